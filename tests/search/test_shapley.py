"""shapley against plain computations of Shapley values."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

import fastprune as fp
from fastprune.search import Search
from fastprune.search.shapley import shapley_values
from fastprune.testing import SyntheticEvaluator


@pytest.mark.parametrize("seed", range(3))
def test_pairs_are_shared_equally_between_their_units(seed):
    """For a quadratic loss the Shapley value of a unit is its own share and half of each of its
    pairs."""
    evaluator = SyntheticEvaluator(8, seed)
    search = Search(
        evaluator, 3, 0, protect=(7,)
    )  # so that whole orders of the others can be walked
    pairs = (evaluator.pairs + evaluator.pairs.T)[:7, :7]
    linear = evaluator.linear[:7]
    exact = linear + pairs.sum(axis=1) / 2
    # an order charges a unit a random half of its pairs: a deviation of at most half of the sum of
    # their sizes
    bound = 5 * np.abs(pairs).sum(axis=1) / 2 / np.sqrt(2000)
    assert (np.abs(shapley_values(search, 2000, 7) - exact) < bound).all()
    assert shapley_values(search, 1, 1) == pytest.approx(linear)


def test_chooses_the_units_of_lowest_value():
    evaluator = SyntheticEvaluator(8, seed=3)
    values = shapley_values(
        Search(evaluator, 4, 5, ()), 6, 2
    )  # at depth 2, no subset of 4 but the chosen is scored
    result = fp.run_search(evaluator, "shapley", 4, seed=5, permutations=6, depth=2)
    assert result.removed == tuple(sorted(np.argsort(values, kind="stable")[:4].tolist()))


def test_depth_1_is_one_shot():
    evaluator = SyntheticEvaluator(8, seed=2)
    found = fp.run_search(evaluator, "shapley", 3, depth=1, permutations=1)
    assert found.history[-1] == fp.run_search(evaluator, "one_shot", 3).history[-1]


def test_charges_every_unit_along_pieces_of_depth_units_and_asks_once():
    evaluator = SyntheticEvaluator(9, seed=4)
    result = fp.run_search(evaluator, "shapley", 4, permutations=5, depth=3, protect=(8,))
    assert len(evaluator.calls) <= 2
    assert result.evaluations <= 5 * 8 + 2
    subsets = [removed for removed, _ in result.history]
    assert subsets[0] == ()
    assert max(map(len, subsets[1:-1])) == 3
    assert (
        max(len(removed) for removed, _ in fp.run_search(evaluator, "shapley", 4).history) == 4
    )  # depth=0 is k
    every = fp.run_search(SyntheticEvaluator(4), "shapley", 1, permutations=200, depth=99).history
    assert {removed for removed, _ in every} == {
        s for n in range(4) for s in itertools.combinations(range(4), n)
    }


def test_units_that_break_the_loss_come_last():
    evaluator = SyntheticEvaluator(9, seed=1, broken=(2, 5))
    result = fp.run_search(evaluator, "shapley", 7)
    assert result.removed == (0, 1, 3, 4, 6, 7, 8)
    assert math.isfinite(result.loss)
