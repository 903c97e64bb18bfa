"""Models quantised by the libraries themselves; each skips clearly when its library is missing."""

from __future__ import annotations

import warnings

import library_zoo
import pytest
import torch
from lowering_helpers import TOLERANCE, Counting, fresh, outcomes, relative_error

from intlass_ops import lowering


@pytest.mark.parametrize("name", library_zoo.LIBRARY)
def test_library_model(name: str) -> None:
    entry = library_zoo.LIBRARY[name]
    backend = Counting()
    with warnings.catch_warnings(), fresh(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            model, x = entry.make()
        except ImportError as missing:
            pytest.skip(f"{name}: {missing}")
        expected = model(x)
        y = torch.compile(model, backend=backend)(x)
    assert outcomes() == [entry.outcome] * 2, lowering.report()
    assert {decision.scheme for decision in lowering.report()} == {entry.scheme}
    assert backend.compiles == 1
    assert "run.dense" not in lowering.counters()
    assert relative_error(y, expected) < max(TOLERANCE[x.dtype], 1e-2)
