"""cbo and surrogate: gradients against finite differences, states against enumeration, optima of
quadratic losses."""

from __future__ import annotations

import itertools

import families
import numpy as np
import pytest
import torch

import fastprune as fp
from fastprune.testing import SyntheticEvaluator


@pytest.fixture(scope="module")
def model():
    return families.build("llama", dtype=torch.float64)


@pytest.fixture(scope="module")
def rows() -> list[list[int]]:
    return families.random_rows(97, [11, 7, 14, 9], seed=2)


@pytest.fixture(scope="module")
def evaluator(model, rows) -> fp.Evaluator:
    return fp.Evaluator(model, fp.Perplexity(fp.TokenBatch.from_ids(rows)))


def sample_losses(model, rows, scales) -> np.ndarray:
    """Mean negative log-likelihood of each row, with the branches of block i scaled by
    scales[i]."""
    scaled = families.with_scaled_branches(model, np.repeat(scales, 2))
    return np.array([nll.mean() for nll in families.reference_token_nll(scaled, rows)])


def test_gradients_are_finite_differences_of_each_samples_loss(evaluator, model, rows):
    # transformers' norms compute in float32 whatever the dtype: steps are wide, and the stencil is
    # of fourth order
    stencil = {-2: 1 / 12, -1: -2 / 3, 1: 2 / 3, 2: -1 / 12}
    step, size = 0.03, evaluator.num_units
    differences = np.zeros((len(rows), size))
    for i, (offset, weight) in itertools.product(range(size), stencil.items()):
        scales = np.where(np.arange(size) == i, 1 + offset * step, 1.0)
        differences[:, i] += weight / step * sample_losses(model, rows, scales)
    np.testing.assert_allclose(evaluator.unit_gradients(), differences, atol=5e-5, rtol=0)


def lowest(
    energy: np.ndarray, linear: np.ndarray, units, k: int, count: int
) -> list[tuple[int, ...]]:
    """The subsets of the units with the lowest z^T H z + linear^T z, by enumeration."""

    def value(subset):
        z = np.zeros(len(linear))
        z[list(subset)] = 1
        return z @ energy @ z + linear @ z

    return sorted(itertools.combinations(units, k), key=value)[:count]


@pytest.mark.parametrize("first_order", [False, True])
def test_cbo_scores_the_lowest_states_of_a_model_in_order(evaluator, first_order):
    A = evaluator.unit_gradients()
    H, g = A.T @ A / len(A), A.mean(axis=0)
    result = fp.run_search(evaluator, "cbo", 2, num_states=4, first_order=first_order)
    expected = lowest(H, -g if first_order else 0 * g, range(5), 2, 4)
    assert [removed for removed, _ in result.history] == expected
    assert result.loss == min(loss for _, loss in result.history)


@pytest.mark.parametrize("seed", range(3))
def test_cbo_states_match_enumeration_with_protected_units(seed):
    evaluator = SyntheticEvaluator(12, seed)
    A = evaluator.unit_gradients()
    units = [unit for unit in range(12) if unit not in (2, 7)]
    result = fp.run_search(evaluator, "cbo", 5, num_states=20, protect=(2, 7))
    assert [removed for removed, _ in result.history] == lowest(
        A.T @ A / len(A), np.zeros(12), units, 5, 20
    )
    assert evaluator.calls == [20]


def test_cbo_without_rescoring_takes_the_lowest_state():
    evaluator = SyntheticEvaluator(10, 1)
    rescored = fp.run_search(evaluator, "cbo", 4)
    plain = fp.run_search(evaluator, "cbo", 4, rescore=False)
    assert plain.history == rescored.history[:1]
    assert rescored.loss <= plain.loss


def test_cbo_leaves_out_samples_whose_gradient_is_not_finite(monkeypatch):
    evaluator = SyntheticEvaluator(10, 1)
    gradients = evaluator.unit_gradients()
    expected = fp.run_search(evaluator, "cbo", 4).history
    spoiled = np.vstack([gradients, np.full(10, np.nan)])
    monkeypatch.setattr(evaluator, "unit_gradients", lambda: spoiled)
    assert fp.run_search(evaluator, "cbo", 4).history == expected
    monkeypatch.setattr(evaluator, "unit_gradients", lambda: np.full((3, 10), np.inf))
    with pytest.raises(ArithmeticError, match="finite gradient"):
        fp.run_search(evaluator, "cbo", 4)


@pytest.mark.parametrize("seed", range(5))
def test_surrogate_finds_the_optimum_of_a_quadratic_loss(seed):
    optimum = fp.run_search(SyntheticEvaluator(14, seed), "exhaustive", 5)
    evaluator = SyntheticEvaluator(14, seed)
    result = fp.run_search(evaluator, "surrogate", 5)
    assert (result.removed, result.loss) == (optimum.removed, optimum.loss)
    assert result.evaluations < 450  # of 2002


def test_surrogate_asks_in_batches_and_ends_after_its_patience():
    evaluator = SyntheticEvaluator(14, 3)
    result = fp.run_search(evaluator, "surrogate", 5, initial=40, proposals=8, patience=2)
    assert evaluator.calls[:2] == [14, 40]
    assert set(evaluator.calls[2:]) == {8}
    best_before = min(loss for removed, loss in result.history[:-16] if len(removed) == 5)
    assert result.loss == best_before  # the last two rounds found nothing better


def test_surrogate_ends_when_everything_is_scored():
    result = fp.run_search(SyntheticEvaluator(7, 3), "surrogate", 3, patience=100)
    assert sum(len(removed) == 3 for removed, _ in result.history) == 35
