"""An evaluator without a model, for tests of searches."""

from __future__ import annotations

import numpy as np

import fastprune as fp


class SyntheticEvaluator(fp.Evaluator):
    """An evaluator whose losses come from a formula, so that searches run in no time: pairs of units interact."""

    def __init__(self, num_units: int, seed: int = 0, broken: tuple[int, ...] = ()):
        rng = np.random.default_rng(seed)
        self._linear = rng.random(num_units)
        self._pairs = np.triu(rng.normal(size=(num_units, num_units)), 1)
        self._broken, self._num_units = set(broken), num_units
        self.stats, self.granularity, self.calls = fp.Stats(), "block", []
        self.objective = type("Named", (), {"name": "synthetic"})

    @property
    def num_units(self) -> int:
        return self._num_units

    def score(self, masks) -> np.ndarray:
        removed = [np.flatnonzero(~mask) for mask in np.asarray(masks, dtype=bool)]
        self.calls.append(len(removed))
        return np.array([self._loss(units) for units in removed])

    def _loss(self, units: np.ndarray) -> float:
        if set(units.tolist()) & self._broken:
            return np.nan
        return self._linear[units].sum() + self._pairs[np.ix_(units, units)].sum()
