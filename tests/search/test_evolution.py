"""genetic and evopress, and the prior and the draws that they use."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from synthetic import SyntheticEvaluator

import fastprune as fp
from fastprune.search import Search, draws
from fastprune.search.evolution import _child
from fastprune.search.prior import LinearMean, Prior


def prior_of(evaluator, k, protect=()) -> Prior:
    return Prior(Search(evaluator, k, 0, protect))


def weights(singles: np.ndarray) -> np.ndarray:
    """softmax(-z)"""
    w = np.exp(-(singles - singles.mean()) / singles.std())
    return w / w.sum()


def test_prior_draws_without_replacement_by_softmax_of_standardised_losses():
    evaluator = SyntheticEvaluator(4, seed=2)
    prior = prior_of(evaluator, 2)
    w = weights(evaluator._linear)
    drawn = Counter(prior.subset() for _ in range(20_000))
    for i, j in itertools.combinations(range(4), 2):
        expected = w[i] * w[j] / (1 - w[i]) + w[j] * w[i] / (1 - w[j])
        assert drawn[i, j] / 20_000 == pytest.approx(expected, abs=0.02)


def test_prior_draws_units_without_a_finite_loss_last():
    prior = prior_of(SyntheticEvaluator(6, seed=2, broken=(0, 3)), 3)
    drawn = Counter(unit for _ in range(300) for unit in prior.subset())
    assert set(drawn) == {1, 2, 4, 5}
    assert set(prior.draw([0, 1, 3], 2)) & {0, 3}
    assert prior.one_shot() == tuple(sorted(sorted((1, 2, 4, 5), key=lambda i: prior.singles[i])[:3]))


def test_linear_mean_is_least_squares():
    prior = prior_of(SyntheticEvaluator(8, seed=1), 3)
    subsets = [(0, 1, 2), (2, 5, 6), (1, 3, 7), (4, 5, 7)]
    losses = np.array([1.0, 2.5, 0.3, 4.0])
    sums = [sum(prior.singles[list(subset)]) for subset in subsets]
    slope, offset = np.polyfit(sums, losses, 1)
    mean = LinearMean(prior, subsets, losses)
    np.testing.assert_allclose(mean(subsets), offset + slope * np.array(sums))


def test_a_child_keeps_what_its_parents_share_and_takes_the_rest_from_either():
    evaluator = SyntheticEvaluator(10)
    evaluator._linear[:] = 1.0
    search = Search(evaluator, 4, 0, ())
    prior = Prior(search)
    members = [(0, 1, 2, 3), (0, 1, 4, 5)]
    children = {_child(search, prior, members, 1, mutation=0.0) for _ in range(200)}
    assert all(len(child) == 4 and {0, 1} <= {*child} <= {0, 1, 2, 3, 4, 5} for child in children)
    assert len(children) == 6
    mutants = {_child(search, prior, members[:1], 1, mutation=1.0) for _ in range(200)}
    assert all(len({*mutant} & {0, 1, 2, 3}) == 3 for mutant in mutants)


def test_genetic_costs_what_it_says_and_asks_once_a_generation():
    evaluator = SyntheticEvaluator(24, seed=4)
    result = fp.run_search(evaluator, "genetic", 8)
    assert evaluator.calls[:2] == [24, 16]
    assert len(evaluator.calls) <= 1 + 10
    assert all(count <= 13 for count in evaluator.calls[2:])
    assert result.evaluations <= 24 + 16 + 9 * 13
    assert fp.run_search(evaluator, "genetic", 8, generations=1).evaluations == 24 + 16
    assert fp.run_search(evaluator, "genetic", 8, seed=1).history != result.history


def test_genetic_starts_from_one_shot():
    evaluator = SyntheticEvaluator(12, seed=4)
    history = fp.run_search(evaluator, "genetic", 5, population=1, generations=1).history
    assert history[-1][0] == fp.run_search(evaluator, "one_shot", 5).history[-1][0]


def test_draws_are_distinct_and_swaps_exchange_what_they_say():
    search = Search(SyntheticEvaluator(9), 4, 0, (8,))
    assert draws.distinct(lambda: (1,), 3) == [(1,)]
    assert draws.distinct(lambda: (1,), 3, known=[(1,)]) == []
    for swaps in (1, 2, 3, 4):
        for _ in range(50):
            swapped = draws.swapped(search, (0, 2, 4, 6), swaps)
            assert len({*swapped} - {0, 2, 4, 6}) == swaps
            assert 8 not in swapped
    assert len({*draws.swapped(search, (0, 1, 2, 3, 4, 5), 3)} - {0, 1, 2, 3, 4, 5}) == 2  # only 6 and 7 are kept


def test_evopress_counts_of_masks_and_tokens():
    evaluator = SyntheticEvaluator(32, num_samples=64, tokens=2048)
    result = fp.run_search(evaluator, "evopress", 8)
    generations = int(8 * 24 / 1.5)
    assert generations == 128
    steps = [(32, 1), (3, 16)]  # children on 2,048 tokens, two of them and the parent on 32,768
    assert evaluator.sample_calls == [(64, 1), *steps * generations]
    masks = sum(count for count, _ in evaluator.sample_calls)
    tokens = sum(count * samples * 2048 for count, samples in evaluator.sample_calls)
    assert masks == 64 + 128 * 35
    assert tokens == 64 * 2048 + 128 * (32 * 2048 + 3 * 32768)
    assert evaluator.calls == [1]  # the last parent, on all samples
    assert [removed for removed, _ in result.history] == [result.removed]


def test_evopress_draws_fresh_samples_of_enough_tokens(monkeypatch):
    evaluator = SyntheticEvaluator(10, num_samples=30, tokens=700)
    drawn = []
    score_samples = evaluator.score_samples
    monkeypatch.setattr(
        evaluator, "score_samples", lambda masks, samples: drawn.append(samples) or score_samples(masks, samples)
    )
    fp.run_search(evaluator, "evopress", 4, final_tokens=7000)
    assert {len(samples) for samples in drawn} == {3, 10}  # 2,100 and 7,000 tokens
    assert all(len(set(samples)) == len(samples) for samples in drawn)
    assert len({tuple(samples) for samples in drawn}) > len(drawn) / 2


def test_evopress_is_exact_where_the_calibration_set_is_small():
    evaluator = SyntheticEvaluator(16, seed=1, num_samples=1)
    result = fp.run_search(evaluator, "evopress", 5)
    assert not evaluator.sample_calls
    assert all(len(removed) == 5 for removed, _ in result.history)
    assert len(evaluator.calls) <= 1 + int(5 * 11 / 1.5)  # the second step asks for nothing new


def test_evopress_remembers_no_score_of_some_samples():
    evaluator = SyntheticEvaluator(9, num_samples=40)
    result = fp.run_search(evaluator, "evopress", 3)
    assert evaluator.sample_calls
    assert all(loss == evaluator._loss(np.array(removed)) for removed, loss in result.history)
