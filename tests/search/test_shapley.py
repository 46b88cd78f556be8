"""shapley against values worked out from every network of a size."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import fastprune as fp
from fastprune.search import Search
from fastprune.search.shapley import shapley_values
from fastprune.testing import SyntheticEvaluator


def exact_values(evaluator: SyntheticEvaluator, gone: int) -> tuple[np.ndarray, float]:
    """Mean loss of all networks that lack a unit, less that of all that have it, float64[U]; and
    the standard deviation of a network's loss on a sample."""
    size = evaluator.num_units
    networks = list(itertools.combinations(range(size), gone))
    losses = evaluator.score(fp.from_removed(networks, size))
    lacks = np.array([[unit in network for unit in range(size)] for network in networks])
    values = np.array([losses[lack].mean() - losses[~lack].mean() for lack in lacks.T])
    masks = fp.from_removed(networks, size)
    return values, float(evaluator.score_samples(masks).std())


@pytest.mark.parametrize(("share", "gone"), [(0.5, 4), (0.75, 2), (0.9, 1)])
def test_values_are_those_of_all_networks_of_the_size(share, gone):
    evaluator = SyntheticEvaluator(8, seed=3)
    networks = 4000 // evaluator.num_samples
    values = shapley_values(Search(evaluator, 3, 0, ()), networks, share)
    expected, deviation = exact_values(evaluator, gone)
    lacking = networks * evaluator.num_samples * gone / 8
    # five standard errors of the smaller of the two means, and of both together
    np.testing.assert_allclose(values, expected, rtol=0, atol=5 * deviation * (2 / lacking) ** 0.5)


class PairAndTwo(SyntheticEvaluator):
    """10 where 0 and 1 are both gone, 2 more without 2, 3 more without 3."""

    def loss(self, units: np.ndarray) -> float:
        gone = {*units.tolist()}
        return 10.0 * ({0, 1} <= gone) + 2.0 * (2 in gone) + 3.0 * (3 in gone)


def test_the_units_of_least_value_go_not_the_best_subset_met():
    """Values over networks of two: 1.67 for 0 and 1, -2.33 for 2, -1 for 3."""
    evaluator = PairAndTwo(4)
    result = fp.run_search(evaluator, "shapley", 2, networks=500)
    assert result.removed == (2, 3)
    assert result.choice == "method's"
    assert evaluator.score(fp.from_removed([(0, 2)], 4))[0] < result.loss == 5.0
    again = fp.run_search(PairAndTwo(4), "shapley", 2, networks=500, redraw=True)
    assert 2 in again.removed


def test_networks_are_drawn_for_each_sample():
    evaluator = SyntheticEvaluator(8, seed=1)
    result = fp.run_search(evaluator, "shapley", 3, networks=6)
    assert evaluator.sample_calls == [(6, 1)] * evaluator.num_samples
    assert result.evaluations == 1


def test_protected_units_are_in_every_network():
    evaluator = SyntheticEvaluator(8, seed=1)
    values = shapley_values(Search(evaluator, 2, 0, protect=(0, 7)), 50, 0.5)
    assert values.shape == (6,)
    assert np.isfinite(values).all()


def test_units_that_break_the_loss_come_last():
    evaluator = SyntheticEvaluator(9, seed=1, broken=(2, 5))
    result = fp.run_search(evaluator, "shapley", 7)
    assert result.removed == (0, 1, 3, 4, 6, 7, 8)
    assert np.isfinite(result.loss)
