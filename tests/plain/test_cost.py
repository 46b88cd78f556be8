"""Costs add and subtract, and count the whole calibration set."""

import numpy as np

import fastprune as fp
from fastprune.plan.cost import whole


def test_costs_add_and_subtract():
    one = fp.Cost(masks=2, unit_runs=5, head_runs=2, weight_bytes=7, seconds=1.5)
    other = fp.Cost(masks=1, unit_runs=0.5, naive_unit_runs=12, store_hits=3, seconds=0.25)
    together = one + other
    assert (together.masks, together.unit_runs, together.naive_unit_runs) == (3, 5.5, 12)
    assert (together.store_hits, together.weight_bytes, together.seconds) == (3, 7, 1.75)
    assert together - other == one
    assert one - one == fp.Cost()


def test_a_difference_of_stats_holds_no_bytes():
    """Bytes that are held do not add up over calls."""
    before = fp.Stats(masks=1, unit_runs=4, cache_bytes=10)
    after = fp.Stats(masks=3, unit_runs=9, cache_bytes=99, cache_hits={"device": 2})
    assert type(after - before) is fp.Cost
    assert after - before == fp.Cost(masks=2, unit_runs=5)


def test_tokens_count_by_the_whole_set():
    cost = fp.Cost(unit_runs=30, head_runs=5, weight_loads=2).of_tokens(10)
    assert (cost.unit_runs, cost.head_runs, cost.weight_loads) == (3, 0.5, 2)
    assert isinstance(cost.unit_runs, int)
    assert isinstance(whole(2.0), int)


def test_the_share_of_a_race():
    cost = fp.Cost(unit_runs=3, asked_unit_runs=12)
    assert fp.Race(np.arange(1), np.zeros(1), 2, cost).share == 0.25
    assert fp.Race(np.arange(1), np.zeros(1), 0).share == 0
