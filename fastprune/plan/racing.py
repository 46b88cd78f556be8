"""Races: candidates are scored on growing samples, and surely beaten ones leave early.

`race` is the loop, `beaten` the rule, `look_rows` the samples of each look, `Race` the result.

Legend: A candidates; n samples seen, of N; K candidates to keep; the B = min(A, 2 K) candidates of
lowest mean so far.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from scipy.special import stdtrit  # quantiles of Student's t distribution

from ..data import TokenBatch
from ..validate import check_integer, check_number, check_probability
from .cost import Cost

log = logging.getLogger(__name__)

LEAST_ROWS_TO_RACE = 32  # fewer are scored whole
FIRST_LOOK_ROWS = 8, 16  # the first look has at least 8 rows, up to 16 if rows are short
FIRST_LOOK_TOKENS = 1024  # a matrix product of 1,024 rows runs at speed on a CPU
FIRST_LOOK_SHARE = 16  # the first look has at least one row in 16
LEAST_SAMPLES = 3  # fewer samples have no meaningful skewness
SAMPLES_PER_OUTLIER = 200  # one unseen sample in 200 (at least one) may be an outlier
ROUNDING = 1e-12  # a standard deviation below this share of the losses is rounding
CANCELLATION = 1e-9  # a variance below this share of its terms has lost its third moment's digits


@dataclass(frozen=True)
class Race:
    """The masks that a race kept, best first; equal losses keep the order of the masks.

    Attributes:
        indices: int64[K], the index of each kept mask; the first index of equal masks.
        losses: float64[K], exact, over all samples.
        decided_early: The number of masks that left before the last samples.
        cost: The cost of the race: `unit_runs` were made, `asked_unit_runs` would score every mask
            on every sample.

    Examples:
        >>> import fastprune as fp
        >>> from fastprune.testing import SyntheticEvaluator
        >>> masks = fp.from_removed([(0,), (1,), (2,)], num_units=6)
        >>> result = SyntheticEvaluator(6, num_samples=64).race(masks, keep=2)
        >>> len(result.indices), result.decided_early
        (2, 1)
    """

    indices: np.ndarray
    losses: np.ndarray = field(repr=False)
    decided_early: int
    cost: Cost = field(default=Cost(), repr=False)

    @property
    def share(self) -> float:
        """Unit runs of the race, divided by those of scoring every mask on every sample."""
        return self.cost.unit_runs / max(1, self.cost.asked_unit_runs)


def check_race(keep: int, count: int, confidence: float, tolerance: float) -> None:
    """Raise InputError unless `count` different masks can race under these arguments."""
    check_integer("keep", keep, 1, count, of="the number of different masks")
    check_probability("confidence", confidence)
    check_number("tolerance", tolerance, least=0)


def look_rows(batch: TokenBatch) -> list[np.ndarray]:
    """Choose the rows of each look.

    Rows are in a random order, the same for every batch of as many rows. The first look takes a
    sixteenth of the rows, but at least 8, and up to 16 if these have fewer than 1,024 tokens. Each
    later look adds two fifths to the rows seen; on the demo model's triples this took a tenth less
    work than doubling. The last look adds a quarter or more.

    Returns:
        The rows of each look, int64[n], in the order of the looks. A small batch has one look.

    Examples:
        >>> import fastprune as fp
        >>> from fastprune.plan.racing import look_rows
        >>> batch = fp.TokenBatch.from_ids([[5, 6, 7, 8] * 128] * 64)
        >>> [len(rows) for rows in look_rows(batch)]
        [8, 3, 4, 6, 8, 11, 24]
    """
    num_rows = batch.num_rows
    order = np.random.default_rng(num_rows).permutation(num_rows)
    fewest, most = FIRST_LOOK_ROWS
    least = min(most, max(fewest, -(-FIRST_LOOK_TOKENS * num_rows // batch.num_tokens)))
    bound = max(least, -(-num_rows // FIRST_LOOK_SHARE))
    bounds = [0]
    while num_rows >= LEAST_ROWS_TO_RACE and 5 * bound <= 4 * num_rows:
        bounds.append(bound)
        bound += 2 * bound // 5
    bounds.append(num_rows)
    return [np.sort(order[start:stop]) for start, stop in itertools.pairwise(bounds)]


def look_of(batch: TokenBatch) -> np.ndarray:
    """Number the look of each row, int64[R]."""
    numbers = np.zeros(batch.num_rows, dtype=np.int64)
    for number, rows in enumerate(look_rows(batch)):
        numbers[rows] = number
    return numbers


def race(
    count: int,
    num_looks: int,
    look: Callable[[int, np.ndarray], np.ndarray],
    num_samples: int,
    keep: int,
    confidence: float = 0.99,
    tolerance: float = 0.0,
) -> np.ndarray:
    """Find the `keep` candidates of lowest mean loss without scoring each on every sample.

    The looks that decide, all but the last, share the error 1 - confidence evenly.

    Args:
        count: The number of candidates.
        num_looks: The number of looks.
        look: A function look(number, alive). It scores the candidates `alive` on one more look, and
            returns their losses float64[len(alive), n] on all n samples so far, in any order.
        num_samples: N, all samples. A candidate's loss is its mean over them.
        keep: K, the candidates to keep.
        confidence: The probability of keeping the `keep` best, over the whole race, under the
            assumption of `beaten`.
        tolerance: A candidate may also leave if it could be better by no more than this.

    Returns:
        int64[M], the candidates that reach the last look, ascending; at least `keep`.
    """
    alive = np.arange(count)
    error = (1 - confidence) / max(1, num_looks - 1)
    for number in range(num_looks):
        losses = look(number, alive)
        if number < num_looks - 1:
            leave = beaten(losses, num_samples, keep, error, tolerance)
            log.info(
                "look %d of %d: %d of %d candidates leave the race",
                *(number + 1, num_looks, int(leave.sum()), len(alive)),
            )
            alive = alive[~leave]
    return alive


def beaten(
    losses: np.ndarray, num_samples: int, keep: int, error: float, tolerance: float = 0.0
) -> np.ndarray:
    """Decide at one look which candidates leave: those that at least `keep` others surely beat.

    A candidate leaves if `keep` of the 2 `keep` lowest so far each beat it in `_statistics`, at the
    level error / H with H = sum over r = 1..K of (A - r) / (K - r + 1).

    H follows from a bound on wrong decisions. The r-th best leaves only if K others beat it. At
    most r - 1 of them are truly better, so K - r + 1 of its A - r possible wrong comparisons
    happen. Their probability is at most (A - r) level / (K - r + 1), by Markov's inequality. The
    sum over the K best is H level = error. Candidates that leave make A smaller, and the remaining
    ones are tested again at the level of the new H.

    Args:
        losses: float64[A, n], on the n samples seen so far.
        num_samples: N, all samples.
        keep: K.
        error: The probability of a wrong decision that this look may have.
        tolerance: Added to the mean difference in every comparison.

    Returns:
        bool[A], the candidates that leave. One without a finite mean leaves if K others have one.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        finite = np.isfinite(losses.mean(axis=1))
    if finite.sum() < keep:
        return np.zeros(len(losses), dtype=bool)
    leaves = ~finite
    alive, num_seen = np.flatnonzero(finite), losses.shape[1]
    if len(alive) == keep or num_seen < LEAST_SAMPLES:
        return leaves
    statistics = _statistics(losses[alive], num_samples, keep, tolerance)  # [A, B]
    kth_strongest = -np.partition(-statistics, keep - 1, axis=1)[:, keep - 1]  # [A]
    ranks = np.arange(1, keep + 1)
    remaining = len(alive)
    while remaining > keep:
        level = error / ((remaining - ranks) / (keep - ranks + 1)).sum()
        stays = kth_strongest <= -stdtrit(num_seen - 1, level)
        if stays.sum() == remaining:
            break
        remaining = int(stays.sum())
        leaves[alive] = ~stays
    return leaves


def _statistics(losses: np.ndarray, num_samples: int, keep: int, tolerance: float) -> np.ndarray:
    """Measure how surely each of the B lowest so far beats each candidate, float64[A, B].

    The value is a paired t statistic of the difference d of two candidates, or -inf for no
    decision. It has two corrections. Samples are drawn without replacement (Cochran, Sampling
    Techniques, 3rd ed., 2.5-2.6; paired racing: Maron and Moore 1994). A negative skewness comes
    from rare samples on which the candidate is far better, and lowers the value (Johnson 1978).
    Hall's transformation, which rises again beyond t = -3 / (2 a), saved nothing and was wrong more
    often on lognormal differences.

        t = mean(d) / (sd(d) sqrt((1 - n / N) / n)),  a = min(0, skewness(d)) / sqrt(n)
        value = t + a (1 + 2 t^2) / 6

    The mean difference must also outweigh outliers among the unseen samples: one in 200, at least
    one, each as large as the range of the better candidate's losses so far. A difference that is
    equal on every sample decides nothing.

    Two matrix products give the variances and third moments of all pairs. They take deviations x
    and y of the differences from the best so far:
    sum (x - y)^3 = sum x^3 - 3 x^2 y + 3 x y^2 - y^3.
    """
    num_seen = losses.shape[1]
    means = losses.mean(axis=1)
    order = np.argsort(means, kind="stable")
    best = order[: 2 * keep]
    with np.errstate(over="ignore", invalid="ignore"):  # losses near the largest float: no decision
        x = losses - losses[order[0]]  # [A, n]
        x -= x.mean(axis=1, keepdims=True)
        x2 = x * x
        squares, cubes = x2.sum(axis=1), np.einsum("an,an->a", x2, x)  # [A]
        by_x = x @ np.concatenate([x[best], x2[best]]).T  # [A, 2 B]
        xy, xy2 = np.split(by_x, 2, axis=1)  # [A, B]
        variance = squares[:, None] + squares[best] - 2 * xy
        third = cubes[:, None] - cubes[best] - 3 * (x2 @ x[best].T) + 3 * xy2
        floor = np.maximum(CANCELLATION * squares, ROUNDING**2 * (losses * losses).sum(axis=1))
        decides = variance > np.maximum(floor[:, None], floor[best])
        sd = np.sqrt(np.where(decides, variance, np.inf) / (num_seen - 1))
        skewness = third / num_seen / sd**3
        gaps = means[:, None] - means[best]
        t = (gaps + tolerance) / (sd * np.sqrt((1 - num_seen / num_samples) / num_seen))
        a = np.minimum(0, skewness) / np.sqrt(num_seen)
        t += a * (1 + 2 * t * t) / 6
        outliers = max(1, (num_samples - num_seen) / SAMPLES_PER_OUTLIER)
        outweighs = (gaps + tolerance) * num_samples > np.ptp(losses[best], axis=1) * outliers
    return np.where(decides & (gaps > 0) & outweighs & ~np.isnan(t), t, -np.inf)
