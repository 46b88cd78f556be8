"""The prior of genetic, bayesian and surrogate: subsets judged by the losses of single removals."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from .one_shot import lowest
from .task import Removed, Search

UNLIKELY = 50.0  # log weight of units with a non-finite loss, below the least likely other


class Prior:
    """Weights w_i = softmax(-z_i), for z the standardised d_i = loss({i}) of the candidates.

    Under a budget of units that save unlike amounts, d_i is the harm of i (`Search.harm`). A unit
    whose loss is not finite is drawn last, and counts in sums as the worst other unit. Making a
    prior scores all candidates in one batch.
    """

    def __init__(self, search: Search):
        self.search = search
        # [candidates], +inf if not finite
        self.singles = search.harm([((), unit) for unit in search.candidates])
        finite = np.isfinite(self.singles)
        single = penalised(self.singles)
        spread = single[finite].std() if finite.any() else 0.0
        z = (single - single[finite].mean()) / spread if spread > 0 else np.zeros(len(single))
        log_weight = np.where(finite, -z, -z.max(initial=0.0) - UNLIKELY)
        self._log_weight = dict(zip(search.candidates, log_weight.tolist()))
        self._single = dict(zip(search.candidates, single.tolist()))

    def draw(self, units: Iterable[int], count: int) -> list[int]:
        """Draw `count` of the units by w, one after the other without replacement."""
        units = list(units)
        # the largest values of log w + Gumbel noise are such draws
        keys = np.array([self._log_weight[unit] for unit in units]) + self.search.rng.gumbel(
            size=len(units)
        )
        return [units[i] for i in np.argsort(-keys, kind="stable")[:count]]

    def subset(self) -> Removed:
        """Draw a complete subset by w."""
        candidates = self.search.candidates
        return self.search.fill((), self.draw(candidates, len(candidates)))

    def one_shot(self) -> Removed:
        """Make a complete subset of the units with the lowest d_i; ties go to the lowest index."""
        return lowest(self.search, self.singles)

    def sums(self, subsets: Iterable[Removed]) -> np.ndarray:
        """Sum d_i over each subset, float64[N]."""
        return np.array([sum(self._single[unit] for unit in subset) for subset in subsets])


class LinearMean:
    """A prior mean of the loss, linear in sum d_i, fitted by least squares to known losses.

    Attributes:
        slope: The slope of the loss in that sum.
    """

    def __init__(self, prior: Prior, subsets: list[Removed], losses: np.ndarray):
        self._prior = prior
        sums = prior.sums(subsets)
        spread = sums - sums.mean()
        self.slope = float(spread @ losses / (spread @ spread)) if np.ptp(sums) > 0 else 0.0
        self._offset = float(losses.mean() - self.slope * sums.mean())

    def __call__(self, subsets: list[Removed]) -> np.ndarray:
        return self._offset + self.slope * self._prior.sums(subsets)


def penalised(losses: np.ndarray) -> np.ndarray:
    """Replace non-finite losses by the worst finite one, or by 0 if none is finite.

    Models of the loss then stay away from them, with finite arithmetic.
    """
    finite = np.isfinite(losses)
    return np.where(finite, losses, losses[finite].max() if finite.any() else 0.0)
