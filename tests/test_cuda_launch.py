"""Loading and launching on a real GPU: streams, threads, devices, CUDA graphs, forks.

The same logic against a driver made of Python is in test_cuda_jit.py.
"""

from __future__ import annotations

import dataclasses
import os
import threading
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from intlass_ops import errors
from intlass_ops.cuda import jit, source

pytestmark = pytest.mark.gpu

SIZE = 1 << 16
ADD_CU = """
struct Params { const float* x; float* y; long long n; };
extern "C" __global__ void add(const __grid_constant__ Params p, long long offset) {
  extern __shared__ float staged[];
  long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x;
  if (i >= p.n) return;
  float* mine = staged + threadIdx.x + (Config::smem_bytes / 4 - blockDim.x);
  *mine = p.x[i];
  p.y[i] = *mine + Config::step * offset;
}
"""


@dataclasses.dataclass(frozen=True)
class AddConfig:
    source: ClassVar[str] = "add.cu"
    entry: ClassVar[str] = "add"
    step: int = 1
    smem_bytes: int = 1024


@pytest.fixture(autouse=True)
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of the test's own, an empty cache, and no kernel loaded."""
    (tmp_path / "add.cu").write_text(ADD_CU)
    monkeypatch.setattr(source, "SOURCE_DIR", tmp_path)
    monkeypatch.setenv("INTLASS_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(jit, "_kernels", {})


def add(x: Tensor, offset: int, config: AddConfig | None = None) -> Tensor:
    """x + step * offset, on torch's current stream of x's device."""
    config = config or AddConfig()
    y = torch.empty_like(x)
    grid = ((x.numel() + 255) // 256, 1, 1)
    stream_ptr = torch.cuda.current_stream(x.device).cuda_stream
    args = (x.data_ptr(), y.data_ptr(), x.numel(), offset)
    kernel = jit.get(config, x.device.index)
    kernel.launch(grid, (256, 1, 1), config.smem_bytes, args, stream_ptr)
    return y


def ramp(device: str = "cuda:0") -> Tensor:
    return torch.arange(SIZE, dtype=torch.float32, device=device)


def test_runs_on_the_current_stream() -> None:
    x = ramp()
    assert torch.equal(add(x, 3), x + 3)


def test_runs_behind_the_work_of_a_side_stream() -> None:
    stream = torch.cuda.Stream()
    add(ramp(), 0)  # loaded: what follows is only a launch
    with torch.cuda.stream(stream):
        x = torch.zeros(SIZE, device="cuda:0")
        torch.cuda._sleep(100_000_000)
        x += 5
        y = add(x, 2)
    stream.synchronize()
    assert torch.equal(y, torch.full_like(y, 7))


def test_shared_memory_beyond_48_kib() -> None:
    x = ramp()
    assert torch.equal(add(x, 1, AddConfig(smem_bytes=96 * 1024)), x + 1)


def test_too_much_shared_memory_is_named_and_harmless() -> None:
    x = ramp()
    with pytest.raises(errors.KernelLaunchError, match="smem_bytes=1048576"):
        add(x, 1, AddConfig(smem_bytes=1 << 20))
    assert torch.equal(add(x, 1), x + 1)


def test_a_thread_without_a_context() -> None:
    x = ramp()
    expected = x + 4
    results: list[Tensor] = []
    for config in (AddConfig(), AddConfig(step=2)):  # one loaded before, one by the thread
        if config.step == 1:
            add(x, 0, config)
        thread = threading.Thread(target=lambda c=config: results.append(add(x, 4 // c.step, c)))
        thread.start()
        thread.join()
    assert len(results) == 2
    assert all(torch.equal(result, expected) for result in results)


def test_autograds_thread() -> None:
    class Add(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, *grads: Tensor) -> Tensor:
            return add(grads[0].contiguous(), 10)

    x = ramp().requires_grad_()
    Add.apply(x).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.full_like(x, 11))


def test_many_threads() -> None:
    x = ramp()
    wrong: list[int] = []

    def work(i: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
            for j in range(200):
                if not torch.equal(add(x, 1000 * i + j), x + (1000 * i + j)):
                    wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_device_is_current() -> None:
    for current, used in ((0, 1), (1, 0)):
        x = ramp(f"cuda:{used}")
        with torch.cuda.device(current):
            assert torch.equal(add(x, 6), x + 6)
            assert torch.cuda.current_device() == current
            assert torch.equal(add(x, 7), x + 7)
            assert torch.cuda.current_device() == current


def test_a_warm_kernel_is_captured_in_a_graph() -> None:
    jit.warmup([AddConfig()], device="cuda:0", progress=False)
    x = ramp()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = add(add(x, 1), 2)
    for start in (0, 100):
        x.copy_(ramp() + start)
        graph.replay()
        assert torch.equal(y, x + 3)


def test_a_cold_kernel_is_refused_in_a_capture() -> None:
    x = ramp()
    graph = torch.cuda.CUDAGraph()
    with (
        pytest.raises(errors.KernelNotReadyError, match="warmup"),
        torch.cuda.graph(graph),
    ):
        add(x, 1, AddConfig(step=9))
    assert torch.equal(add(x, 1, AddConfig(step=9)), x + 9)


def test_warmup_names_what_it_did() -> None:
    configs = [AddConfig(step=i) for i in range(4)]
    assert jit.warmup(configs, progress=False) == (4, 0)
    assert jit.warmup(configs, progress=False) == (0, 4)


def test_ptx_is_finished_by_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jit, "_arch_of", lambda index: "compute_80")
    x = ramp()
    assert torch.equal(add(x, 8), x + 8)


def test_a_forked_child_is_told_why_it_cannot_launch() -> None:
    x = ramp()
    add(x, 0)
    child = os.fork()
    if child == 0:
        try:
            add_to = jit.get(AddConfig(), 0)
            add_to.launch((1, 1, 1), (1, 1, 1), 1024, (0, 0, 0, 0), 0)
        except errors.KernelLaunchError as error:
            os._exit(0 if "forkserver" in str(error) else 2)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert torch.equal(add(x, 1), x + 1)


def test_availability_has_no_problem() -> None:
    found = jit.availability()
    assert found.problem is None
    assert len(found.devices) == torch.cuda.device_count()
    assert found.driver
