"""The small commands: exit codes, and what they say. The demo has its own tests."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
import torch

import intlass_ops
from intlass_ops.__main__ import main
from intlass_ops.commands import tune, warmup
from intlass_ops.cuda import jit, plans
from intlass_ops.cuda.cache import CubinCache


@pytest.fixture
def two_entries(empty_kernel_cache: Path) -> list[Path]:
    kernels = CubinCache(empty_kernel_cache)
    for name in (b"one", b"two"):
        kernels.get_or_build(hashlib.sha256(name).hexdigest(), lambda: 1000 * b"x")
    return kernels.entries()


def test_cache_is_listed_verified_and_pruned(
    two_entries: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["cache", "list"]) == 0
    assert "2 kernels, 0.0 MB" in capsys.readouterr().out
    assert main(["cache", "verify"]) == 0
    two_entries[0].write_bytes(b"spoilt")
    assert main(["cache", "verify"]) == 1
    assert f"unsound: {two_entries[0].name}" in capsys.readouterr().out
    assert main(["cache", "prune"]) == 0
    assert [entry.exists() for entry in two_entries] == [False, True]
    assert main(["cache", "prune", "--days", "1"]) == 0
    assert two_entries[1].exists()
    os.utime(two_entries[1], (0, 0))
    assert main(["cache", "prune", "--days", "1"]) == 0
    assert not two_entries[1].exists()


def test_an_empty_cache_is_no_error(
    empty_kernel_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for action in ("list", "verify", "prune"):
        assert main(["cache", action]) == 0
    assert f"{empty_kernel_cache}: 0 kernels" in capsys.readouterr().out


def test_warmup_says_what_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["warmup", "--arch", "sm_70"]) == 2
    assert "intlass warmup: no kernels are shipped for 'sm_70'" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert main(["warmup"]) == 2
        assert "--arch sm_90a" in capsys.readouterr().err


def test_warmup_compiles_what_the_layers_named_run(
    empty_kernel_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layers = ["--arch", "sm_90a", "--shapes", "4096x4096", "--schemes", "w4a16z", "--tokens", "1"]
    assert main(["warmup", *layers]) == 0
    assert main(["warmup", *layers]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "sm_90a: 1 kernels compiled, 0 were there before",
        "sm_90a: 0 kernels compiled, 1 were there before",
    ]
    assert main(["warmup", "--arch", "sm_80", "--schemes", "w5a16"]) == 2
    assert "'w5a16' is none of w4a16" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", ["w4a16z", "w8a8", "w4a8", "w4a4"])
@pytest.mark.parametrize("m", [1, 16, 64, 512])
def test_a_layer_runs_what_warmup_compiles(
    scheme: str, m: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = []
    get = jit.get
    monkeypatch.setattr(jit, "get", lambda config, index: ran.append(config) or get(config, index))
    named = {
        "w4a16z": intlass_ops.Int4WeightOnly(),
        "w8a8": intlass_ops.Int8DynamicActivationInt8Weight(),
        "w4a8": intlass_ops.Int8DynamicActivationInt4Weight(),
        "w4a4": intlass_ops.Int4DynamicActivationInt4Weight(),
    }
    n, k = 1152, 640  # sizes that no other test has, so that no plan is remembered
    model = torch.nn.Sequential(torch.nn.Linear(k, n, bias=False)).to("cuda", torch.bfloat16)
    intlass_ops.quantize_(model, named[scheme])
    ran.clear()  # what quantised the weights
    model(torch.ones(m, k, dtype=torch.bfloat16, device="cuda"))
    gpu = plans.device_of(torch.cuda.current_device())
    assert ran
    assert set(ran) <= set(warmup.kernels(gpu, tune.Work(scheme, n, k), m))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("", "required: COMMAND"),
        ("bake", "invalid choice: 'bake'"),
        ("cache", "required: action"),
        ("cache list --days 3", "--days belongs to prune"),
        ("cache prune --days -1", "argument --days: '-1' is no length of time"),
        ("demo --tokens 0", "argument --tokens: '0' is no positive number"),
        ("bench gemm --device gpu", "argument --device: 'gpu' is none of cpu, cuda"),
        ("explain here --device cuda:64", "argument --device: 'cuda:64': torch sees "),
    ],
)
def test_wrong_usage_is_refused(
    arguments: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments.split())
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert "usage: intlass" in message
    assert said in message


def test_info_says_what_is_missing_and_how_to_get_it(
    empty_kernel_cache: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from intlass_ops.commands import info

    monkeypatch.setattr(info, "_installed", lambda name: "1.0" if "cupy" in name else None)
    monkeypatch.setattr(info, "compiler", lambda: None)
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert f"{empty_kernel_cache}: 0 kernels" in text
    missing = text.partition("\nmissing\n")[2]
    assert "peft (LoRA on quantised models): pip install peft" in missing
    assert "two builds of CuPy share one module" in missing
    assert "apt-get install g++" in missing
