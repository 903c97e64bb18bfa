"""The small commands: exit codes, and what they say. The demo has its own tests."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
import torch

from intlass_ops.__main__ import main
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


@pytest.mark.parametrize("arguments", [[], ["cache"], ["cache", "burn"], ["bake"]])
def test_wrong_usage_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage: intlass" in capsys.readouterr().err


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
