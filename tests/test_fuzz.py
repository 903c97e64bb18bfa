"""fuzz.py itself: nothing found on a CPU, what is wrong found, a case repeated by its index."""

from __future__ import annotations

import json
from pathlib import Path

import fuzz
import pytest


def test_two_hundred_cases_of_a_cpu(tmp_path: Path) -> None:
    summary = tmp_path / "fuzz.json"
    assert fuzz.main(["--device", "cpu", "--cases", "200", "--json", str(summary)]) == 0
    figures = json.loads(summary.read_text())
    assert (figures["cases"], figures["wrong"], figures["failures"]) == (200, 0, [])
    assert sum(figures["kinds"].values()) == 200
    assert sum(figures["kernels"].values()) >= 190


def test_a_failure_is_reported_and_can_be_repeated(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(case: object, device: str) -> None:
        raise AssertionError(f"wrong on {device}")

    monkeypatch.setattr(fuzz, "check_bounded", wrong)
    assert fuzz.main(["--device", "cpu", "--cases", "2"]) == 1
    assert "--seed 0 --first 1 --cases 1: wrong on cpu" in capsys.readouterr().out
    assert fuzz.main(["--device", "cpu", "--first", "1", "--cases", "1"]) == 1


def test_it_stops_in_time() -> None:
    assert fuzz.fuzz("cpu", 0, range(10**9), 4, 0.2, progress=False).cases < 10**6
