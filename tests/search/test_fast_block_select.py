"""fast_block_select on cases worked out by hand."""

from __future__ import annotations

import numpy as np

import fastprune as fp
from fastprune.testing import SyntheticEvaluator


class Table(SyntheticEvaluator):
    """Removing unit i alone costs i + 1; other losses come from a table, 11 where it has none."""

    def __init__(self, num_units: int, losses: dict[tuple[int, ...], float]):
        super().__init__(num_units)
        self.losses = losses

    def loss(self, units: np.ndarray) -> float:
        removed = tuple(units.tolist())
        return removed[0] + 1.0 if len(removed) == 1 else self.losses.get(removed, 11.0)


def search(evaluator, k, **options):
    return fp.run_search(evaluator, "fast_block_select", k, **options)


def test_ends_at_one_shot_when_nothing_improves():
    evaluator = Table(6, {(0, 1): 10.0})
    result = search(evaluator, 2)
    assert result.removed == (0, 1)
    # singles; then P, 2 x 4 exchanges of one unit, 1 x 3 of two, in one batch
    assert evaluator.calls == [6, 1 + 8 + 3]


def test_improving_exchanges_are_applied_best_first_in_one_round():
    # 0 for 3 is best; 1 for 4 touches neither, so both move, to (3, 4); 1 for 3 comes too late
    evaluator = Table(6, {(0, 1): 10.0, (1, 3): 5.0, (0, 4): 6.0, (0, 3): 7.0, (3, 4): 1.0})
    result = search(evaluator, 2, max_run=1)
    assert result.removed == (3, 4)
    assert evaluator.calls[0] == 6
    assert evaluator.calls[1] == 1 + 8
    assert (3, 4) not in dict(result.history[: 6 + 9])


def test_an_exchange_that_touches_a_moved_unit_is_skipped():
    # 0 for 2 and 0 for 3 both improve; only the better one is applied
    evaluator = Table(5, {(0, 1): 10.0, (1, 2): 6.0, (1, 3): 5.0, (2, 3): 12.0})
    result = search(evaluator, 2, max_run=1, rounds=1)
    assert result.removed == (1, 3)
    assert (2, 3) not in dict(result.history)


def test_runs_of_several_units_are_exchanged():
    evaluator = Table(7, {(0, 1, 2): 10.0, (4, 5, 6): 3.0, (0, 4, 5): 9.0})
    assert search(evaluator, 3, rounds=1).removed == (4, 5, 6)
    # without runs of 3, the exchange of (1, 2) for (4, 5) is what improves
    assert search(Table(7, evaluator.losses), 3, max_run=2, rounds=1).removed == (0, 4, 5)


def test_the_pool_holds_the_costliest_removed_and_the_cheapest_kept():
    evaluator = Table(10, {(0, 1, 2): 10.0, (0, 2, 3): 9.0})
    assert search(evaluator, 3, max_run=1, pool=1).removed == (0, 1, 2)  # only 2 for 3 is tried
    assert evaluator.calls == [10, 2]
    assert search(Table(10, evaluator.losses), 3, max_run=1, pool=2).removed == (
        0,
        2,
        3,
    )  # 1 for 3 is tried too


def test_a_cycle_ends_with_the_rounds():
    # both exchanges improve alone, but not together: (0, 1) -> (3, 4) -> (0, 1) -> ...
    evaluator = Table(6, {(0, 1): 10.0, (1, 3): 5.0, (0, 4): 6.0})
    assert search(evaluator, 2, max_run=1).removed == (1, 3)
    assert sum(evaluator.calls) <= 6 + 15


def test_what_is_applied_together_is_scored_even_in_the_last_round():
    losses = {(0, 1): 10.0, (1, 3): 5.0, (0, 4): 6.0, (3, 4): 1.0}
    assert search(Table(6, losses), 2, max_run=1, rounds=1).removed == (3, 4)
