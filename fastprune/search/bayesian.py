"""Bayesian optimisation guided by the prior."""

from __future__ import annotations

import numpy as np

from ..masks import from_removed
from . import draws
from .prior import LinearMean, Prior, penalised
from .registry import Count, algorithm
from .sizes import as_removed
from .task import Removed, Search

PRIOR_DRAWS = 256  # subsets of the pool drawn by the prior
NEIGHBOURS_OF = 3  # best subsets whose swaps are in the pool
TWO_SWAPS = 100  # random 2-swaps of each of these; all would be too many


@algorithm(needs_sklearn=True, studied=True)
def bayesian(
    search: Search, trials: Count = 200, initial: Count = 10, batch_size: Count = 1
) -> None:
    """Repeatedly score the subset of highest expected improvement under a Gaussian process.

    The kernel is s^2 exp(-hamming / l) + noise, with hyperparameters by marginal likelihood. The
    prior mean is a + b sum d_i with d_i = loss({i}), by least squares. The prior of `genetic` draws
    the first subsets. Expected improvement over the best loss is maximised over a pool: 256 prior
    draws, and all 1-swaps and 100 2-swaps of each of the 3 best subsets. A non-finite loss
    counts as the worst finite one. The search ends early when the pool has no new subset.

    Source: Kim et al. (arXiv 2604.24938).
    Cost: U + at most trials.
    Options:
        trials: scored subsets of the full budget, the initial ones included.
        initial: subsets drawn by the prior before the first fit.
        batch_size: subsets scored at once, by highest expected improvement.
    """
    from .gaussian_process import MaskProcess

    first = min(initial, trials)
    batches = -(-(trials - first) // batch_size)
    search.plan([len(search.candidates), first, *[batch_size] * batches])
    process = MaskProcess()
    prior = Prior(search)
    scored = draws.distinct(prior.subset, first)
    search.score(scored)
    while len(scored) < trials:
        pool = _pool(search, prior, scored)
        if not pool:
            return
        losses = penalised(search.score(scored))
        mean = LinearMean(prior, scored, losses)
        process.fit(_features(search, scored), losses - mean(scored))
        improvement = process.expected_improvement(
            _features(search, pool), losses.min() - mean(pool)
        )
        order = np.argsort(-improvement, kind="stable")[: min(batch_size, trials - len(scored))]
        chosen = [pool[i] for i in order]
        search.score(chosen)
        scored += chosen


def _pool(search: Search, prior: Prior, scored: list[Removed]) -> list[Removed]:
    """List unscored subsets in order, so that ties go to the lowest indices."""
    losses = search.score(scored)
    pool = {*draws.distinct(prior.subset, PRIOR_DRAWS)}
    for i in losses.argsort(kind="stable")[:NEIGHBOURS_OF]:
        best = scored[i]
        kept = [unit for unit in search.candidates if unit not in best]
        pool |= {as_removed({*best} - {out} | {into}) for out in best for into in kept}
        pool |= {draws.swapped(search, best, 2) for _ in range(TWO_SWAPS)}
    return sorted(pool - {*scored})


def _features(search: Search, subsets: list[Removed]) -> np.ndarray:
    """Mark the removed units of each subset with 1, float64[N, U]."""
    return 1.0 - from_removed(subsets, search.num_units)
