"""Racing: which candidates can no longer be among the best, from the samples seen so far. Pure
NumPy and SciPy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Selection:
    """The masks that a race kept, best first; equal losses keep the order in which they were asked
    for.

    indices int64[K]: rows of what was asked for (of equal masks the first). losses float64[K]:
    exact, over all samples.
    decided_early: masks that left before the last samples. unit_runs: unit runs that were made.
    share: these, as a share of what scoring every mask on every sample takes.

    >>> import fastprune as fp
    >>> from fastprune.testing import SyntheticEvaluator
    >>> masks = fp.from_removed([(0,), (1,), (2,)], num_units=6)
    >>> found = SyntheticEvaluator(6, num_samples=64).select(masks, keep=2)
    >>> len(found.indices), found.decided_early
    (2, 1)
    """

    indices: np.ndarray
    losses: np.ndarray = field(repr=False)
    decided_early: int
    unit_runs: float
    share: float


def race(
    count: int,
    num_looks: int,
    look: Callable[[int, np.ndarray], np.ndarray],
    num_samples: int,
    keep: int,
    confidence: float = 0.99,
    tolerance: float = 0.0,
) -> np.ndarray:
    """Which of `count` candidates reach the last look, int64[K].

    look(number, alive) scores those that are left on the samples of one more look, and returns
    their shares float64[len(alive), n] on all samples seen so far, see `beaten`. The error 1 -
    confidence is shared out evenly over looks, and at each over the candidates that are left: one
    that has left was so far behind that a later decision in its favour would have been next to
    impossible.
    """
    alive = np.arange(count)
    error = (1 - confidence) / max(1, num_looks - 1)
    for number in range(num_looks):
        shares = look(number, alive)
        if number < num_looks - 1:
            alive = alive[~beaten(shares, num_samples, keep, error / len(alive), tolerance)]
    return alive


def beaten(
    shares: np.ndarray, num_samples: int, keep: int, error: float, tolerance: float = 0.0
) -> np.ndarray:
    """bool[M]: candidates that are not among the `keep` best, beyond doubt or by no more than
    `tolerance`.

    shares float64[M, n]: what each sample seen so far, n of num_samples, adds to a loss, times
    num_samples: a loss is the mean over all samples. error: the probability of a wrong decision
    that each comparison may have.

    Each candidate is compared with the keep-th best so far by the paired t statistic of their
    differences, with the finite-population correction 1 - n / num_samples, since samples are drawn
    without replacement (Cochran, Sampling Techniques, 3rd ed., 2.5-2.6; paired racing: Maron and
    Moore 1994). The assumption: the mean difference over the samples seen is near normal. A
    candidate without a finite mean is beaten where `keep` others have one; one that differs from
    the keep-th best by the same number on every sample is not decided.
    """
    from scipy.stats import t

    count = shares.shape[1]
    means = shares.mean(axis=1)
    finite = np.isfinite(means)
    if len(shares) <= keep or finite.sum() < keep:
        return np.zeros(len(shares), dtype=bool)
    reference = np.argsort(np.where(finite, means, np.inf), kind="stable")[keep - 1]
    if count < 2:
        return ~finite
    differences = np.where(finite[:, None], shares, np.inf) - shares[reference]
    with np.errstate(invalid="ignore"):
        spread = differences.std(axis=1, ddof=1) * np.sqrt((1 - count / num_samples) / count)
    bound = t.ppf(1 - error, count - 1) * spread
    worse = means > means[reference]
    with np.errstate(invalid="ignore"):
        return ~finite | (worse & (spread > 0) & (means - means[reference] + tolerance > bound))
