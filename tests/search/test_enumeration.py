"""contiguous, exhaustive and random."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest

import fastprune as fp
from fastprune.testing import SyntheticEvaluator


def scored(evaluator, name, k, **arguments) -> list[tuple[int, ...]]:
    return [removed for removed, _ in fp.run_search(evaluator, name, k, **arguments).history]


def test_contiguous_scores_every_window_in_one_call():
    evaluator = SyntheticEvaluator(7)
    assert scored(evaluator, "contiguous", 3) == [
        (0, 1, 2),
        (1, 2, 3),
        (2, 3, 4),
        (3, 4, 5),
        (4, 5, 6),
    ]
    assert evaluator.calls == [5]


def test_windows_do_not_touch_protected_units_and_step_over_them_only_when_none_is_left():
    assert scored(SyntheticEvaluator(8), "contiguous", 3, protect=(3,)) == [
        (0, 1, 2),
        (4, 5, 6),
        (5, 6, 7),
    ]
    assert scored(SyntheticEvaluator(6), "contiguous", 3, protect=(2,)) == [(3, 4, 5)]
    assert scored(SyntheticEvaluator(6), "contiguous", 3, protect=(1, 4)) == [(0, 2, 3), (2, 3, 5)]


def test_exhaustive_scores_all_and_finds_the_optimum():
    evaluator = SyntheticEvaluator(8, seed=2)
    result = fp.run_search(evaluator, "exhaustive", 3)
    assert [removed for removed, _ in result.history] == list(itertools.combinations(range(8), 3))
    assert result.loss == min(loss for _, loss in result.history)
    assert evaluator.calls == [56]
    assert fp.run_search(evaluator, "exhaustive", 3, protect=(0, 1)).evaluations == 20


def test_exhaustive_refuses_too_many_and_says_how_many():
    evaluator = SyntheticEvaluator(32)
    with pytest.raises(fp.InputError, match=r"C\(32, 8\) = 10518300 subsets.*max_masks=100000"):
        fp.run_search(evaluator, "exhaustive", 8)
    with pytest.raises(fp.InputError, match=r"C\(6, 3\) = 20 subsets.*max_masks=19"):
        fp.run_search(SyntheticEvaluator(6), "exhaustive", 3, max_masks=19)
    assert not evaluator.calls


def test_random_draws_different_subsets_uniformly():
    evaluator = SyntheticEvaluator(32)
    subsets = scored(evaluator, "random", 8, num_masks=500)
    assert len(set(subsets)) == 500
    assert evaluator.calls == [500]
    counts = Counter(
        unit for subset in subsets for unit in subset
    )  # of each unit: 125 on average, deviation 9.7
    assert min(counts.values()) > 125 - 45
    assert max(counts.values()) < 125 + 45
    assert subsets != scored(evaluator, "random", 8, num_masks=500, seed=1)


def test_random_takes_all_where_there_are_not_more():
    every = list(itertools.combinations(range(6), 3))
    assert sorted(scored(SyntheticEvaluator(6), "random", 3)) == every
    assert len(set(scored(SyntheticEvaluator(6), "random", 3, num_masks=19))) == 19
