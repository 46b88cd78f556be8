"""genetic and evopress, and the prior and the draws that they use."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest

import fastprune as fp
from fastprune.search import Search, draws
from fastprune.search.evolution import _child, _flipped
from fastprune.search.prior import LinearMean, Prior
from fastprune.testing import SyntheticEvaluator


def prior_of(evaluator, k, protect=()) -> Prior:
    return Prior(Search(evaluator, k, 0, protect))


def weights(singles: np.ndarray) -> np.ndarray:
    """softmax(-z)"""
    w = np.exp(-(singles - singles.mean()) / singles.std())
    return w / w.sum()


def test_prior_draws_without_replacement_by_softmax_of_standardised_losses():
    evaluator = SyntheticEvaluator(4, seed=2)
    prior = prior_of(evaluator, 2)
    w = weights(evaluator.linear)
    drawn = Counter(prior.subset() for _ in range(20_000))
    for i, j in itertools.combinations(range(4), 2):
        expected = w[i] * w[j] / (1 - w[i]) + w[j] * w[i] / (1 - w[j])
        assert drawn[i, j] / 20_000 == pytest.approx(expected, abs=0.02)


def test_prior_draws_units_without_a_finite_loss_last():
    prior = prior_of(SyntheticEvaluator(6, seed=2, broken=(0, 3)), 3)
    drawn = Counter(unit for _ in range(300) for unit in prior.subset())
    assert set(drawn) == {1, 2, 4, 5}
    assert set(prior.draw([0, 1, 3], 2)) & {0, 3}
    assert prior.one_shot() == tuple(
        sorted(sorted((1, 2, 4, 5), key=lambda i: prior.singles[i])[:3])
    )


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
    evaluator.linear[:] = 1.0
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
    assert (
        len({*draws.swapped(search, (0, 1, 2, 3, 4, 5), 3)} - {0, 1, 2, 3, 4, 5}) == 2
    )  # only 6 and 7 are kept


def test_evopress_counts_of_masks_and_tokens():
    evaluator = SyntheticEvaluator(32, num_samples=64, tokens=2048)
    result = fp.run_search(evaluator, "evopress", 8)
    generations = int(8 * 24 / 1.5)
    assert generations == 128
    steps = [(32, 1), (3, 16)]  # children on 2,048 tokens, two of them and the parent on 32,768
    assert evaluator.sample_calls == [(64, 1), *steps * generations]
    masks = sum(count for count, _ in evaluator.sample_calls)
    assert evaluator.token_calls == [(64, 2048), *[(32, 2048), (3, 32768)] * generations]
    tokens = sum(count * tokens for count, tokens in evaluator.token_calls)
    assert masks == 64 + 128 * 35
    assert tokens == 64 * 2048 + 128 * (32 * 2048 + 3 * 32768)
    assert evaluator.calls == [1]  # the last parent, on all samples
    assert [removed for removed, _ in result.history] == [result.removed]


def test_evopress_draws_fresh_samples_of_enough_tokens(monkeypatch):
    evaluator = SyntheticEvaluator(10, num_samples=30, tokens=700)
    drawn = []
    score_samples = evaluator.score_samples
    monkeypatch.setattr(
        evaluator,
        "score_samples",
        lambda masks, samples: drawn.append(samples) or score_samples(masks, samples),
    )
    fp.run_search(evaluator, "evopress", 4, final_tokens=7000)
    assert {len(samples) for samples in drawn} == {3, 10}  # 2,100 and 7,000 tokens
    assert {tokens for _, tokens in evaluator.token_calls} == {2048, 7000}  # the last one is cut
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
    assert all(loss == evaluator.loss(np.array(removed)) for removed, loss in result.history)


def parents_of(monkeypatch, evaluator, k, **arguments) -> list[tuple[tuple[int, ...], list]]:
    """Every (parent, its children) of an evopress search, from the subsets that it asks for."""
    asked = []
    score_samples = evaluator.score_samples
    monkeypatch.setattr(
        evaluator,
        "score_samples",
        lambda masks, samples: (
            asked.append([fp.to_removed(mask) for mask in masks]) or score_samples(masks, samples)
        ),
    )
    fp.run_search(evaluator, "evopress", k, **arguments)
    children, finals = asked[1::2], asked[2::2]
    return [(final[-1], born) for final, born in zip(finals, children)]


def swaps_law(k: int, kept: int, most: int = 3) -> np.ndarray:
    """The share of children that differ from their parent in 1..most blocks, under the published
    flips.

    n = min of two draws from 1..most; each flip is discarded with probability 1/2. With s swaps
    made, one more swaps another pair with probability (k-s)(kept-s)/(k kept), undoes one with
    s^2/(k kept), and else replaces one.
    """
    step = np.zeros((most + 1, most + 1))
    for s in range(most + 1):
        up, down = max(k - s, 0) * max(kept - s, 0) / (k * kept), s * s / (k * kept)
        for to, probability in ((s + 1, up / 2), (s - 1, down / 2), (s, 1 - (up + down) / 2)):
            if 0 <= to <= most:
                step[s, to] += probability
    chance = [((most - n + 1) ** 2 - (most - n) ** 2) / most**2 for n in range(1, most + 1)]
    law = sum(p * np.linalg.matrix_power(step, n)[0] for n, p in enumerate(chance, 1))
    return law[1:] / law[1:].sum()


@pytest.mark.slow
@pytest.mark.parametrize(("k", "kept"), [(8, 24), (200, 200), (2, 5)])
def test_published_flips_swap_as_many_blocks_as_the_law_says(k, kept):
    search = Search(SyntheticEvaluator(k + kept), k, 3, ())
    parent = tuple(range(0, k))
    counts, total = np.zeros(4), 30_000
    for _ in range(total):
        flips = search.rng.integers(1, 4, 2).min()
        counts[len({*_flipped(search, parent, flips, (search.candidates, []))} - {*parent})] += 1
    law = swaps_law(k, kept)
    expected = law * counts[1:].sum()
    seen = expected > 0
    assert not counts[1:][~seen].any()
    assert (
        (counts[1:] - expected)[seen] ** 2 / expected[seen]
    ).sum() < 20  # chi-square with 2 degrees: p < 5e-5
    if k == 200:  # undoing is rare: the law of the flips alone, Binomial(n, 1/2) given at least one
        np.testing.assert_allclose(law, np.array([35, 9, 1]) / 45, atol=0.01)


def test_published_flips_keep_the_balance_of_attentions_and_mlps(monkeypatch):
    evaluator = SyntheticEvaluator(16, seed=2, num_samples=64)
    evaluator.granularity = "sublayer"
    families = parents_of(monkeypatch, evaluator, 6, protect=(0, 5))
    assert len(families) == int(3 * (7 - 3) / 1.5)
    swapped = Counter()
    for parent, children in families:
        assert parent not in children
        assert len(set(children)) == len(children)
        for child in (parent, *children):
            assert len(child) == 6
            assert not {0, 5} & {*child}
            assert sum(unit % 2 for unit in child) == 3
        swapped.update(
            tuple(sorted(unit % 2 for unit in {*child} - {*parent})) for child in children
        )
    assert {(0,), (1,), (0, 1)} <= {*swapped}


def test_a_type_with_nothing_left_to_swap_is_not_flipped(monkeypatch):
    evaluator = SyntheticEvaluator(8, num_samples=64)
    evaluator.granularity = "sublayer"
    for parent, children in parents_of(
        monkeypatch, evaluator, 4, protect=(0, 2)
    ):  # attentions 4 and 6 must go
        assert children
        assert all({4, 6} <= {*child} for child in (parent, *children))


def test_sublayers_that_cannot_be_balanced_are_refused_before_anything_is_scored():
    evaluator = SyntheticEvaluator(8, num_samples=64)
    evaluator.granularity = "sublayer"
    with pytest.raises(fp.InputError, match=r"num_remove must be even, not 3, .*flips=free"):
        fp.run_search(evaluator, "evopress", 3)
    with pytest.raises(
        fp.InputError, match=r"only 1 attentions are not protected, below 2.*flips=free"
    ):
        fp.run_search(evaluator, "evopress", 4, protect=(0, 2, 4))
    assert not evaluator.calls + evaluator.sample_calls
    assert len(fp.run_search(evaluator, "evopress", 3, flips="free").removed) == 3


def test_free_flips_swap_pairs_of_different_units_of_any_type(monkeypatch):
    evaluator = SyntheticEvaluator(40, num_samples=64)
    evaluator.granularity = "sublayer"
    families = parents_of(monkeypatch, evaluator, 20, flips="free")
    sizes = Counter(
        len({*child} - {*parent}) for parent, children in families for child in children
    )
    shares = np.array([sizes[n] for n in (1, 2, 3)]) / sizes.total()
    np.testing.assert_allclose(shares, np.array([5, 3, 1]) / 9, atol=0.03)
    assert any(sum(unit % 2 for unit in parent) != 10 for parent, _ in families)
