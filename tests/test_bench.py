"""`intlass bench` on tiny layers: who takes part, what is written, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from intlass_ops.__main__ import main
from intlass_ops.bench import contenders, report

QUICK = ("--shapes", "48x128", "--tokens", "1,3", "--seconds", "0", "--device", "cpu")


def test_products_are_checked_timed_and_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "gemm.json"
    assert main(["bench", "gemm", *QUICK, "--json", str(file)]) == 0
    figures = json.loads(file.read_text())
    assert {"commit", "torch", "device", "copy_gb_per_second"} <= set(figures)
    ours = [row for row in figures["rows"] if row["contender"] == "w4a8"]
    assert [(row["n"], row["k"], row["m"]) for row in ours] == [(48, 128, 1), (48, 128, 3)]
    assert all(row["microseconds"] > 0 and row["error"] <= 1 for row in ours)
    assert all(row["kernel"] for row in ours)
    assert "| w4a16 " in capsys.readouterr().out


def test_a_wrong_product_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(layer: contenders.Layer, t: contenders.Tokens, w: contenders.Weights) -> torch.Tensor:
        return t.x @ w[0].T * 1.1

    cheat = contenders.Contender("cheat", 8, contenders._dense, wrong)
    monkeypatch.setattr(report.contenders, "gemms", lambda: iter([cheat]))
    assert main(["bench", "gemm", *QUICK]) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--shapes", "4096"], "takes NxK"),
        (["--shapes", "64x100"], "K=100 is not a multiple of 128"),
        (["--tokens", "0"], "takes positive numbers"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "gemm", "--device", "cpu", *arguments]) == 2
    assert said in capsys.readouterr().out


def test_only_names_contenders_by_parts() -> None:
    assert report._chosen(["dense", "w4a16", "w8a16"], "a16") == ["w4a16", "w8a16"]
    assert report._chosen(["dense"], None) == ["dense"]
