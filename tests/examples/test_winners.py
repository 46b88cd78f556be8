"""The example of winners by kind runs, and its gain is that of its kinds."""

import importlib
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.slow
def test_winners_by_kind():
    sys.path.insert(0, str(EXAMPLES))
    try:
        example = importlib.import_module("winners")
    finally:
        sys.path.remove(str(EXAMPLES))
    names, found = example.by_kind(limit=90)
    assert len(names) == 25
    assert len(found.groups) == 7
    counts = [winner.gain.num_samples for winner in found.groups]
    total = sum(winner.gain.value * count for winner, count in zip(found.groups, counts))
    assert found.gain.value == pytest.approx(total / sum(counts))
    for winner in found.groups:
        assert winner.candidate != found.best or winner.gain.value == 0
