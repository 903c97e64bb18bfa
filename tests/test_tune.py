"""`intlass tune` without a GPU: candidates, the search, tables and who they serve, bad tables."""

from __future__ import annotations

import json
import math
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from intlass_ops import config, explain, matmul_int4_bf16_tn, matmul_int8_bf16_tn, pack_int4
from intlass_ops.__main__ import main
from intlass_ops.bench import tuning
from intlass_ops.commands import tune
from intlass_ops.config import gemm, tuned
from intlass_ops.cuda import compiler, cubin, launch
from intlass_ops.errors import KernelCompileError

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import renew_table

A_GPU = replace(config.device_of("sm_80"), name="A Test GPU")
H100 = replace(config.device_of("sm_90a"), name="Another Test GPU")
W4A16 = tuning.SCHEMES["w4a16"]


@pytest.fixture(autouse=True)
def no_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The user's table of each test lies in a folder of its own."""
    monkeypatch.setattr(tuned, "default_directory", lambda: tmp_path)
    forget()
    yield
    forget()


def forget() -> None:
    tuned.forget()
    config.choice._choose.cache_clear()


def fake_times(w: tune.Work, tokens: list[int]) -> tune.Timings:
    shapes = [tuning.SCHEMES[w.scheme].shape(m, w.n, w.k) for m in tokens]
    return {s: best_is_last(config.candidates(A_GPU, s)) for s in shapes}


def best_is_last(candidates: list[config.Matmul]) -> list[tuning.Timed]:
    times = {c: 10.0 - i / 10 for i, c in enumerate(candidates)}
    return tuning.search(candidates, lambda c, *_: times[c], 0.0)


def tuned_table(tokens: list[int], device: config.Device = A_GPU) -> Path:
    work = [tune.Work("w4a16", 4096, 4096)]
    (layer,) = tune.tune([device], work, tokens, fake_times, math.inf)
    path = tuned.user_table(device.name)
    assert tune.keep(path, device.name, layer.entries, {}) == len(tokens)
    forget()
    return path


@pytest.mark.parametrize("arch", config.ARCHS)
def test_candidates_are_legal_and_told_apart_by_their_tiles(arch: str) -> None:
    device = config.without_wgmma(config.device_of(arch))
    for scheme in tuning.SCHEMES.values():
        for m in (1, 9, 40, 2048):
            for n, k in ((4096, 4096), (48, 128), (9728, 256), (57344, 8192)):
                shape = scheme.shape(m, n, k)
                found = config.candidates(device, shape)
                assert found[0] == config.predicted(device, shape)
                assert len({(c.entry, tuned.tile_of(c)) for c in found}) == len(found)
                for c in found:
                    if isinstance(c, config.Gemm):
                        assert gemm.why_illegal(c, device) is None
                    if isinstance(c, config.SkinnyRing | config.SkinnyHeld):
                        assert c.groups < 16  # each has a named barrier
                        assert c.smem_of(n, k) <= device.smem_per_block
                    else:
                        assert c.smem_bytes <= device.smem_per_block
                    assert c.threads <= 1024


def test_what_spills_or_does_not_compile_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    one, spills, broken = config.candidates(A_GPU, W4A16.shape(8, 4096, 4096))[:3]

    def compile_cubin(c: config.Matmul, arch: str) -> bytes:
        if c == broken:
            raise KernelCompileError("no such luck")
        return b"spills" if c == spills else b""

    monkeypatch.setattr(compiler, "compile_cubin", compile_cubin)
    monkeypatch.setattr(cubin, "stack_bytes", lambda image: 8 * (image == b"spills"))
    assert tuning.compile_all([one, spills, broken], "sm_80") == {
        spills: "8 bytes of local memory a thread",
        broken: "no such luck",
    }


@pytest.mark.parametrize("name", tuning.SCHEMES)
def test_what_is_timed_is_the_scheme(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scheme = tuning.SCHEMES[name]
    layer = tuning.Layer(scheme, 48, 256, torch.device("cpu"))
    shape = scheme.shape(3, 48, 256)

    def microseconds(call: Callable[[int], object], *_: object, **__: object) -> float:
        (ran,) = explain(call, 1).dispatches
        assert (ran.m, ran.n, ran.k, ran.group_size) == (3, 48, 256, shape.group_size)
        named = {"e4m3": "fp8", "nf4": "nf4"}
        weights = named.get(shape.w_kind, f"w{config.BITS[shape.w_kind]}")
        assert ran.scheme == f"{weights}a{config.BITS[shape.x_kind]}"
        return 5.0

    monkeypatch.setattr(tuning.timing, "microseconds", microseconds)
    (timed,) = tuning.search([config.predicted(A_GPU, shape)], layer.measure(3), 0.0)
    assert timed.us == 5.0


def test_the_search_takes_the_fastest_but_no_chance_differences() -> None:
    found = config.candidates(A_GPU, W4A16.shape(64, 4096, 4096))
    assert best_is_last(found)[0].config == found[-1]
    times = dict.fromkeys(found, 5.0) | {found[0]: 4.0, found[1]: 3.99, found[2]: math.inf}
    timed = tuning.search(found, lambda c, *_: times[c], 0.0)
    assert timed[0].config == found[0]
    assert found[2] not in [t.config for t in timed]
    assert tuning.search(found, lambda *_: math.inf, 0.0) == []


def test_a_table_serves_the_problems_it_was_made_for() -> None:
    shape = W4A16.shape(64, 4096, 4096)
    last = config.candidates(A_GPU, shape)[-1]
    assert config.pick(A_GPU, shape) == config.predicted(A_GPU, shape) != last
    tuned_table([8, 64])
    assert config.pick(A_GPU, shape) == last
    assert config.reason(A_GPU, shape) == "tuned: the fastest at M=64"
    near = replace(shape, m=50, out_type="float")
    assert tuned.tile_of(config.pick(A_GPU, near)) == tuned.tile_of(last)
    assert config.pick(A_GPU, near).out_type == "float"
    others = (
        replace(shape, m=100),  # too far from 64
        replace(shape, m=17, n=4096),  # 8 is out of reach too
        replace(shape, n=4097),
        replace(shape, aligned=False),
        replace(shape, group_size=64),
        replace(shape, has_a_zero=True, x_kind="s8"),
    )
    for each in others:
        assert config.pick(A_GPU, each) == config.predicted(A_GPU, each)
        assert "tuned" not in config.reason(A_GPU, each)
    elsewhere = replace(A_GPU, name="")
    assert config.pick(elsewhere, shape) == config.predicted(elsewhere, shape)


def test_batch_invariance_takes_no_notice_of_tables() -> None:
    shape = replace(W4A16.shape(64, 4096, 4096), batch_invariant=True)
    before = config.pick(A_GPU, shape)
    tuned_table([64])
    assert config.pick(A_GPU, shape) == before


def test_few_tokens_of_a_hopper_gpu_are_served_by_the_portable_entries() -> None:
    shape = W4A16.shape(8, 4096, 4096)
    portable = config.without_wgmma(H100)
    timed = best_is_last(config.candidates(portable, shape))
    entry = tuning.entry(portable, shape, timed)
    assert entry is not None
    tune.keep(tuned.user_table(H100.name), H100.name, [entry], {})
    forget()
    assert config.pick(H100, shape) == config.pick(portable, shape) == timed[0].config


def test_a_second_run_adds_to_the_table_and_replaces_what_it_measured_again() -> None:
    path = tuned_table([8, 64])
    (entry, *_) = tuned.read(path, A_GPU.name)
    faster = entry._replace(us=1.0)
    assert tune.keep(path, A_GPU.name, [faster, entry._replace(m=128)], {}) == 3
    assert faster in tuned.read(path, A_GPU.name)


def test_entries_of_another_kernel_source_are_ignored() -> None:
    path = tuned_table([64])
    stale = [e._replace(source="0" * 12) for e in tuned.read(path, A_GPU.name)]
    tuned.write(path, A_GPU.name, stale, {})
    forget()
    shape = W4A16.shape(64, 4096, 4096)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert config.pick(A_GPU, shape) == config.predicted(A_GPU, shape)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda text: text[: len(text) // 2], "left out"),
        (lambda text: "", "left out"),
        (lambda text: "[" * 100_000, "nested too deep"),
        (lambda text: text.replace('"format": 1', '"format": 2'), "not of format 1"),
        (lambda text: text.replace("A Test GPU", "A100"), "of 'A100', not 'A Test GPU'"),
        (lambda text: text.replace('"m": 64', '"m": "64"'), "m='64' in an entry"),
        (lambda text: text.replace('"m": 64', '"m": 0'), "m=0"),
        (lambda text: text.replace('"tile": {', '"tile": {"extra": [],'), "tile="),
        (lambda text: text.replace('"n": 4096', '"n": NaN'), "n=nan in an entry"),
        (lambda text: json.dumps({**json.loads(text), "entries": 5}), "no list of entries"),
        (lambda text: json.dumps({**json.loads(text), "entries": [5]}), "5 is no entry"),
        (lambda text: "\udcff", "left out"),
    ],
)
def test_a_table_that_cannot_be_read_costs_one_warning(spoil: object, said: str) -> None:
    path = tuned_table([64])
    assert callable(spoil)
    text = spoil(path.read_text(encoding="utf-8"))
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    forget()
    shape = W4A16.shape(64, 4096, 4096)
    with pytest.warns(RuntimeWarning, match=said) as warned:
        picked = [config.pick(A_GPU, replace(shape, m=m)) for m in (8, 64, 100)]
    assert len(warned) == 1
    assert picked[1] == config.predicted(A_GPU, shape)


def test_an_entry_that_names_no_legal_tile_is_ignored() -> None:
    path = tuned_table([64])
    text = path.read_text(encoding="utf-8").replace('"block_m": ', '"block_m": 99')
    path.write_text(text.replace('"kernel": "gemm"', '"kernel": "../gemm"'), encoding="utf-8")
    forget()
    shape = W4A16.shape(64, 4096, 4096)
    assert config.pick(A_GPU, shape) == config.predicted(A_GPU, shape)


def test_shipped_tables_can_be_read() -> None:
    for path in tuned.SHIPPED.glob("*.json"):
        name = json.loads(path.read_text(encoding="utf-8"))["device"]
        assert path.name == tuned.file_name(name)
        assert tuned.read(path, name)


def test_shipped_tables_ask_for_candidates_of_today() -> None:
    """A field that is added to a configuration must not make its entries strangers."""
    assert len(dict(renew_table.configurations())) == len(renew_table.entries())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--schemes", "w3a16"], "'w3a16' is none of w4a16"),
        (["--shapes", "4096x100"], "K=100 is not a multiple of 128"),
        (["--tokens", "1,x"], "takes positive numbers"),
        (["--device", "cpu"], "cpu is no GPU"),
    ],
)
def test_wrong_arguments_are_refused(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tune", *arguments]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_it_needs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune"]) == 2
    assert "an NVIDIA GPU" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["w8a8", "w4a8c", "w4a16"])
def test_tiles_of_gpus_with_little_shared_memory_run_on_any(name: str) -> None:
    """What sm_86, sm_89 and sm_120 get for many tokens, with exact sums: the same as elsewhere."""
    m, n, k = 300, 720, 1056 if name != "w4a16" else 1024
    scheme = tuning.SCHEMES[name]
    bits = config.BITS[scheme.w_kind]
    w = torch.randint(-8, 8, (n, k), dtype=torch.int8, device="cuda")
    x = torch.randint(-8, 8, (m, k), device="cuda")
    x = x.to(torch.bfloat16 if scheme.x_kind == "bf16" else torch.int8)
    one = torch.ones(n, k // (scheme.group_size or k), device="cuda")
    x_scale = None if scheme.x_kind == "bf16" else torch.ones(m, 1, device="cuda")
    small = replace(config.device_of("sm_86", 3), arch="sm_90")
    shape = replace(scheme.shape(m, n, k), scale_type="float", out_type="float")
    c = config.predicted(small, shape)
    assert isinstance(c, config.Gemm)
    with launch.forced(c):
        if bits == 8:
            y = matmul_int8_bf16_tn(x, w, x_scale, one, out_dtype=torch.float32)
        else:
            y = matmul_int4_bf16_tn(x, pack_int4(w), one, a_scale=x_scale, out_dtype=torch.float32)
    assert torch.equal(y, (x.double() @ w.double().T).float())


@pytest.mark.gpu
def test_a_gpu_is_tuned(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--shapes", "1024x1024", "--tokens", "64", "--schemes", "w4a16"]
    assert main(["tune", *arguments, "--families", "portable"]) == 0
    gpu = torch.cuda.get_device_name()
    found = tuned.read(tuned.user_table(gpu), gpu)
    assert [e.m for e in found] == [64]
    assert all(0 < e.us <= e.predicted_us / 0.99 for e in found)
    assert "problems" in capsys.readouterr().out
