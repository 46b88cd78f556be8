"""An evaluator without a model, for tests of searches."""

from __future__ import annotations

import numpy as np

import fastprune as fp


class SyntheticEvaluator(fp.Evaluator):
    """An evaluator whose losses come from a formula, so that searches run in no time: pairs of units interact.

    Removing a broken unit makes the loss not finite. curvature: of a term cubic in the units removed, which no
    quadratic model can hold. There are `num_samples` samples of `tokens` tokens each. calls: masks of each call of
    `score`; sample_calls: (masks, samples) of each call of `score_samples`.
    """

    def __init__(
        self,
        num_units: int,
        seed: int = 0,
        broken: tuple[int, ...] = (),
        curvature: float = 0.0,
        num_samples: int = 16,
        tokens: int = 2048,
    ):
        rng = np.random.default_rng(seed)
        self._linear = rng.random(num_units)
        self._pairs = np.triu(rng.normal(size=(num_units, num_units)), 1)
        self._noise = rng.normal(size=(num_samples, num_units))
        self._noise -= self._noise.mean(axis=0)  # the mean over samples is the loss
        self._steps = rng.normal(size=(num_units + 1, 24))  # of the state, at each unit
        self._steps[1:] *= self._linear[:, None]
        self._broken, self._num_units, self._curvature = set(broken), num_units, curvature
        self.sample_tokens = np.full(num_samples, tokens)
        self.stats, self.granularity, self.calls, self.sample_calls = fp.Stats(), "block", [], []
        self.objective = type("Named", (), {"name": "synthetic"})

    @property
    def num_units(self) -> int:
        return self._num_units

    @property
    def num_samples(self) -> int:
        return len(self.sample_tokens)

    @property
    def sample_groups(self) -> list[np.ndarray]:
        return np.array_split(np.arange(self.num_samples), -(-self.num_samples // 4))

    def score(self, masks) -> np.ndarray:
        removed = [np.flatnonzero(~mask) for mask in np.asarray(masks, dtype=bool)]
        self.calls.append(len(removed))
        return np.array([self._loss(units) for units in removed])

    def score_samples(self, masks, samples=None) -> np.ndarray:
        removed = [np.flatnonzero(~mask) for mask in np.asarray(masks, dtype=bool)]
        noise = self._noise if samples is None else self._noise[samples]
        self.sample_calls.append((len(removed), len(noise)))
        return np.array([self._loss(units) + noise[:, units].sum(axis=1) for units in removed])

    def similarity(self) -> np.ndarray:
        states = self._steps.cumsum(axis=0)
        states /= np.linalg.norm(states, axis=1, keepdims=True)
        return states @ states.T

    def unit_gradients(self) -> np.ndarray:
        gradients = self._noise - self._linear
        gradients[:, list(self._broken)] *= 1000.0
        return gradients

    def _loss(self, units: np.ndarray) -> float:
        if set(units.tolist()) & self._broken:
            return np.nan
        quadratic = self._linear[units].sum() + self._pairs[np.ix_(units, units)].sum()
        return quadratic + self._curvature * np.sin(3.0 * self._linear[units].sum() + len(units))
