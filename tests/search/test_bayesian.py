"""bayesian: its Gaussian process against the textbook's formulas in NumPy, and its budget."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import integrate, stats

import fastprune as fp
from fastprune.search.gaussian_process import MaskProcess
from fastprune.testing import SyntheticEvaluator


def random_masks(count: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.random((count, 12)).argsort(axis=1) < 4).astype(float)


def hamming(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a[:, None] != b[None]).sum(axis=2)


@pytest.fixture(scope="module")
def fitted():
    masks = random_masks(25, 0)
    losses = masks @ np.arange(12) / 10 + np.random.default_rng(1).normal(size=25) * 0.1
    process = MaskProcess()
    process.fit(masks, losses - losses.mean())
    return process, masks, losses - losses.mean()


def test_kernel_decays_with_the_hamming_distance(fitted):
    process, masks, _ = fitted
    product, noise = process.kernel.k1, process.kernel.k2.noise_level
    variance, length = product.k1.constant_value, product.k2.length_scale
    expected = variance * np.exp(-hamming(masks, masks) / length) + noise * np.eye(len(masks))
    np.testing.assert_allclose(process.kernel(masks), expected, rtol=1e-12)


def test_hyperparameters_maximise_the_marginal_likelihood(fitted):
    process, *_ = fitted
    gp = process.regressor
    theta = gp.kernel_.theta
    value, gradient = gp.log_marginal_likelihood(theta, eval_gradient=True)
    for i, step in enumerate(1e-4 * np.eye(len(theta))):
        up, down = (gp.log_marginal_likelihood(theta + sign * step) for sign in (1, -1))
        assert gradient[i] == pytest.approx((up - down) / 2e-4, rel=1e-3, abs=1e-3)
        inside = gp.kernel_.bounds[i, 0] + 1e-3 < theta[i] < gp.kernel_.bounds[i, 1] - 1e-3
        if inside:
            assert abs(gradient[i]) < 1e-2
    assert value >= gp.log_marginal_likelihood(MaskProcess().kernel.theta)


def test_expected_improvement_is_that_of_the_posterior(fitted):
    process, masks, residuals = fitted
    product, noise = process.kernel.k1, process.kernel.k2.noise_level
    variance, length = product.k1.constant_value, product.k2.length_scale
    scale = residuals.std()
    new = random_masks(6, 3)
    K = variance * np.exp(-hamming(masks, masks) / length) + noise * np.eye(len(masks))
    cross = variance * np.exp(-hamming(new, masks) / length)
    mean = scale * cross @ np.linalg.solve(K, residuals / scale)
    deviation = scale * np.sqrt(
        variance - np.einsum("ij,ji->i", cross, np.linalg.solve(K, cross.T))
    )
    margins = np.full(6, residuals.min())
    expected = [
        integrate.quad(lambda f, m=m, d=d, t=t: (t - f) * stats.norm.pdf(f, m, d), m - 12 * d, t)[0]
        for m, d, t in zip(mean, deviation, margins)
    ]
    np.testing.assert_allclose(
        process.expected_improvement(new, margins), expected, rtol=1e-4, atol=1e-9
    )


def test_budget_and_batches():
    evaluator = SyntheticEvaluator(16, seed=1)
    result = fp.run_search(evaluator, "bayesian", 5, trials=30, initial=10)
    assert evaluator.calls == [16, 10, *[1] * 20]
    assert result.evaluations == 16 + 30
    evaluator = SyntheticEvaluator(16, seed=1)
    fp.run_search(evaluator, "bayesian", 5, trials=30, initial=12, batch_size=8)
    assert evaluator.calls == [16, 12, 8, 8, 2]
    evaluator = SyntheticEvaluator(16, seed=1)
    fp.run_search(evaluator, "bayesian", 5, trials=3)
    assert evaluator.calls == [16, 3]


def test_default_budget_is_200_trials():
    assert (
        fp.run_search(SyntheticEvaluator(16), "bayesian", 5, batch_size=64).evaluations == 16 + 200
    )


def test_ends_early_when_all_is_known():
    result = fp.run_search(SyntheticEvaluator(6, seed=1), "bayesian", 3)
    assert result.evaluations == 6 + 20


def test_beats_random_draws_of_the_same_number():
    gains = []
    for seed in range(3):
        evaluator = SyntheticEvaluator(16, seed)
        found = fp.run_search(evaluator, "bayesian", 5, trials=40, seed=seed).loss
        gains.append(fp.run_search(evaluator, "random", 5, num_masks=40, seed=seed).loss - found)
    assert np.mean(gains) > 0
