"""Planning alone: masks to ordered steps, for 10,000 random masks of 80 units."""

from __future__ import annotations

import numpy as np
import pytest

from fastprune.plan.schedule import make_schedule, max_slots
from fastprune.plan.trie import kept_units, make_trie


def test_trie_of_10000_masks_of_80_units(benchmark):
    sequences = kept_units(np.random.default_rng(0).random((10_000, 80)) < 0.8)
    trie = benchmark(lambda: make_trie(sequences))
    benchmark.extra_info["unit_runs"] = trie.unit_runs


@pytest.mark.parametrize("capacity", [0, 100, 10_000])
def test_plan_10000_masks_of_80_units(benchmark, capacity):
    """capacity: states that the prefix cache has room for."""
    masks = np.random.default_rng(0).random((10_000, 80)) < 0.8
    schedule = benchmark(lambda: make_schedule(make_trie(kept_units(masks)), capacity=capacity))
    assert schedule.num_slots <= max_slots(80, 10_000)
    benchmark.extra_info["unit_runs"] = schedule.unit_runs
