"""Budgets as numbers and shares, and the rounds that algorithms plan."""

from __future__ import annotations

import pytest

import fastprune as fp
from fastprune.search import (
    ALGORITHMS,
    Search,
    SequenceSearch,
    find_algorithm,
    units_to_remove,
)
from fastprune.testing import SyntheticEvaluator


@pytest.mark.parametrize(
    ("budget", "units", "expected"),
    [("25%", 12, 3), ("25%", 14, 3), ("1%", 12, 1), ("99.9%", 12, 11), (" 50% ", 5, 2), (4, 12, 4)],
)
def test_shares_are_rounded_down_to_at_least_one(budget, units, expected):
    assert units_to_remove(budget, units) == expected


@pytest.mark.parametrize("budget", ["25", "0%", "100%", "-1%", "", "many", "25%25%"])
def test_other_texts_are_refused(budget):
    with pytest.raises(fp.InputError, match="num_remove must be an integer or a share such as"):
        fp.run_search(SyntheticEvaluator(8), "greedy", budget)


def test_a_share_is_the_number_that_it_stands_for():
    found = [fp.run_search(SyntheticEvaluator(12), "beam", k).removed for k in ("25%", 3)]
    assert found[0] == found[1]


PLANNING = [name for name in ALGORITHMS if not find_algorithm(name).needs_sklearn]


@pytest.mark.parametrize("name", PLANNING)
def test_planned_rounds_hold_what_is_asked_for(name):
    """Masks asked for in a round are at most those planned for it, and no planned search takes more
    rounds than it said."""
    evaluator = SyntheticEvaluator(9, num_samples=64)
    planned: list[list[int]] = []
    chosen = find_algorithm(name)
    settings = (0, (), None, name)
    over_sequences = chosen.over_sequences
    search = (
        SequenceSearch(evaluator, *settings) if over_sequences else Search(evaluator, 3, *settings)
    )
    told = search.plan
    search.plan = lambda masks: (planned.append(list(masks)), told(planned[-1]))[1]
    _, options = fp.search.check_algorithm(name, {})
    choice = chosen.function(search, **options)
    if choice is not None:
        search.chosen(choice)
    if not planned:
        assert name in ("fast_block_select", "sliding_window_merge")
        return
    event = search.describe(fp.ProgressEvent(1, 1, share=1.0))
    assert event.algorithm == name
    assert event.round <= event.rounds == len(planned[0])
    assert 0 < event.share <= 1
    if not evaluator.sample_calls:
        assert sum(evaluator.calls) <= sum(planned[0])
    assert event.best == evaluator.objective.format(
        min(search.losses[s] for s in search.losses if over_sequences or len(s) == 3)
    )
