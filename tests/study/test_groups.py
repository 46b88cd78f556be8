"""The best candidate of each group, on synthetic losses whose answer is known."""

import numpy as np
import pytest

import fastprune as fp

GROUPS = ["easy"] * 400 + ["hard"] * 400 + ["rare"] * 100


def losses(seed: int, gap: float = 0.3, noise: float = 0.5) -> np.ndarray:
    """Candidate 0 is best for all; 1 is better on hard samples by `gap`, and 2 is never better."""
    rng = np.random.default_rng(seed)
    common = rng.normal(3, 1, len(GROUPS))
    hard = np.array([group == "hard" for group in GROUPS])
    rows = [np.zeros(900), np.where(hard, -gap, 2 * gap), np.full(900, 3 * gap)]
    return common + rows + noise * rng.normal(size=(3, 900))


def test_winners_and_their_gain():
    found = fp.best_by_group(losses(0), GROUPS)
    assert found.best == 0
    assert [(of.group, of.candidate) for of in found.groups] == [
        ("easy", 0),
        ("hard", 1),
        ("rare", 0),
    ]
    easy, hard, rare = (of.gain for of in found.groups)
    assert (easy.value, easy.error, rare.value) == (0, 0, 0)
    assert hard.num_samples == 200
    assert abs(hard.value - 0.3) < 3 * hard.error
    # two independent noises of 0.5
    assert hard.error == pytest.approx(0.5 * np.sqrt(2 / 200), rel=0.2)
    assert found.gain.num_samples == 450
    assert found.gain.value == pytest.approx(hard.value * 200 / 450)
    assert found.gain.error == pytest.approx(hard.error * 200 / 450)


def test_the_gain_is_unbiased_where_candidates_are_alike():
    """On the samples that chose, the best of 50 equal candidates would seem to gain; here the mean
    of many draws is within three of its errors of 0, and the stated errors are right."""
    gains = []
    for seed in range(200):
        rows = np.random.default_rng(seed).normal(size=(50, 40))
        found = fp.best_by_group(rows, ["a"] * 20 + ["b"] * 20, seed=seed)
        gains.append((found.gain.value, found.gain.error))
    values, errors = np.array(gains).T
    assert abs(values.mean()) < 3 * values.std() / np.sqrt(200)
    assert 0.8 < values.std() / np.sqrt(np.mean(errors**2)) < 1.25


def test_a_seed_decides_the_halves_and_order_does_not_matter_to_labels():
    assert fp.best_by_group(losses(1), GROUPS, seed=3) == fp.best_by_group(
        losses(1), GROUPS, seed=3
    )
    assert (
        fp.best_by_group(losses(1), GROUPS, seed=3).gain
        != fp.best_by_group(losses(1), GROUPS, seed=4).gain
    )


def test_losses_that_are_not_finite_never_win():
    rows = losses(2)
    rows[0, ::7] = np.nan
    rows[2, 5] = np.inf
    assert fp.best_by_group(rows, GROUPS).best != 0


@pytest.mark.parametrize(
    ("rows", "groups", "message"),
    [
        (np.zeros(8), ["a"] * 8, "sample_losses must have shape"),
        (np.zeros((0, 8)), ["a"] * 8, "sample_losses must have shape"),
        (np.zeros((2, 8)), ["a"] * 7, "groups has 7 labels, but there are 8 samples"),
        (np.zeros((2, 8)), ["a"] * 5 + ["b"] * 3, "group 'b' has 3 samples; at least 4"),
        (np.full((2, 8), np.nan), ["a"] * 8, "no candidate has finite losses"),
    ],
)
def test_refusals(rows, groups, message):
    with pytest.raises(fp.InputError, match=message):
        fp.best_by_group(rows, groups)
