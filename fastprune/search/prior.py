"""The prior of genetic, bayesian and surrogate: a guess about subsets from the loss of removing
each unit alone."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from .one_shot import lowest
from .run import Removed, Search

UNLIKELY = (
    50.0  # in log weight, below the least likely of the rest: drawn when nothing else is left
)


class Prior:
    """Weights w_i = softmax(-z_i), z the standardised d_i = loss({i}) of the candidates.

    Under a budget of units that save unlike amounts, d_i is the harm of i (`Search.harm`).

    A unit whose loss is not finite is drawn last, and counts in sums as the worst of the others.
    Asks for the candidates' losses, one batch.
    """

    def __init__(self, search: Search):
        self.search = search
        self.singles = search.harm(
            [((), unit) for unit in search.candidates]
        )  # [candidates], +inf if not finite
        finite = np.isfinite(self.singles)
        single = penalised(self.singles)
        spread = single[finite].std() if finite.any() else 0.0
        z = (single - single[finite].mean()) / spread if spread > 0 else np.zeros(len(single))
        log_weight = np.where(finite, -z, -z.max(initial=0.0) - UNLIKELY)
        self._log_weight = dict(zip(search.candidates, log_weight.tolist()))
        self._single = dict(zip(search.candidates, single.tolist()))

    def draw(self, units: Iterable[int], count: int) -> list[int]:
        """`count` of the units by w, one after the other without replacement."""
        units = list(units)
        # the largest of log w + Gumbel noise are draws without replacement
        keys = np.array([self._log_weight[unit] for unit in units]) + self.search.rng.gumbel(
            size=len(units)
        )
        return [units[i] for i in np.argsort(-keys, kind="stable")[:count]]

    def subset(self) -> Removed:
        """A complete subset, drawn by w."""
        candidates = self.search.candidates
        return self.search.fill((), self.draw(candidates, len(candidates)))

    def one_shot(self) -> Removed:
        """A complete subset of the units with the lowest d_i; ties go to the lowest index."""
        return lowest(self.search, self.singles)

    def sums(self, subsets: Iterable[Removed]) -> np.ndarray:
        """The sum of d_i over each subset, float64[N]."""
        return np.array([sum(self._single[unit] for unit in subset) for subset in subsets])


class LinearMean:
    """A prior mean of the loss, linear in sum d_i: fitted by least squares to subsets whose losses
    are known.

    slope: of the loss in that sum.
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
    """Losses, the infinite ones and NaN set to the worst of the others (0 if all are so): models of
    the loss stay away from them, and their arithmetic stays finite."""
    finite = np.isfinite(losses)
    return np.where(finite, losses, losses[finite].max() if finite.any() else 0.0)
