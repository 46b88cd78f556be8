"""For tests of search algorithms: an evaluator that needs no model, and the checks that every
algorithm must pass.

Your own algorithm is a function with `@fastprune.search.algorithm`, in a module that an entry point
of the group `fastprune.algorithms` names. Its tests, with pytest:

    import pytest
    from fastprune.testing import CHECKS

    @pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
    def test_my_algorithm(check):
        check("my_algorithm")

or `check_algorithm("my_algorithm")`, which runs all of them. A check fails with AssertionError.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from .costs import UnitCosts
from .errors import InputError
from .evaluator import Stats
from .masks import from_removed, to_removed
from .objectives import Objective
from .plan.racing import Race, check_race
from .search import find_algorithm, run_search

__all__ = ["CHECKS", "SyntheticEvaluator", "check_algorithm", "outcome"]


class SyntheticEvaluator:
    """A `fastprune.search.Scorer` with losses from a formula, so that searches run in no time.

    Pairs of units interact.

    Removing a broken unit makes the loss not finite. curvature: of a term cubic in the units
    removed, which no quadratic model can hold. flat: every unit costs 1, so that subsets of one
    size tie. There are `num_samples` samples of `tokens` tokens each; with 32 or more it races, and
    never errs: it keeps the best. costs: of the units, of any kind, 1 each by default; all else
    costs 10. calls: masks of each call of `score`; sample_calls: (masks,
    samples) of each call on some of the samples; token_calls: (masks, tokens) of each call of
    `score` on some; races: (masks, kept) of each of `race`. linear
    float64[U], pairs float64[U, U]: the formula's terms, which may be changed.
    """

    def __init__(
        self,
        num_units: int,
        seed: int = 0,
        broken: tuple[int, ...] = (),
        curvature: float = 0.0,
        num_samples: int = 16,
        tokens: int = 2048,
        flat: bool = False,
        costs: Sequence[float] | None = None,
    ):
        self._costs = (1.0,) * num_units if costs is None else tuple(map(float, costs))
        rng = np.random.default_rng(seed)
        self.linear = rng.random(num_units)
        self.pairs = np.triu(rng.normal(size=(num_units, num_units)), 1)
        if flat:
            self.linear[:], self.pairs[:] = 1.0, 0.0
        self._noise = rng.normal(size=(num_samples, num_units))
        self._noise -= self._noise.mean(axis=0)  # the mean over samples is the loss
        self._steps = rng.normal(size=(num_units + 1, 24))  # of the state, at each unit
        self._steps[1:] *= self.linear[:, None]
        self._broken, self.num_units, self._curvature = set(broken), num_units, curvature
        self.sample_tokens = np.full(num_samples, tokens)
        self.stats, self.granularity = Stats(), "block"
        self.calls: list[int] = []
        self.sample_calls: list[tuple[int, int]] = []
        self.token_calls: list[tuple[int, int | None]] = []
        self.races: list[tuple[int, int]] = []
        self.objective: Any = type("Named", (Objective,), {"name": "synthetic"})()

    @property
    def num_samples(self) -> int:
        return len(self.sample_tokens)

    cuts_samples = True

    def score(self, masks: Any, *, samples: Any = None, tokens: int | None = None) -> np.ndarray:
        if samples is not None:
            self.token_calls.append((len(masks), tokens))
            return self.score_samples(masks, samples).mean(axis=1)
        removed = [np.flatnonzero(~mask) for mask in np.asarray(masks, dtype=bool)]
        self.calls.append(len(removed))
        return np.array([self.loss(units) for units in removed])

    def score_samples(self, masks: Any, samples: Any = None) -> np.ndarray:
        removed = [np.flatnonzero(~mask) for mask in np.asarray(masks, dtype=bool)]
        noise = self._noise if samples is None else self._noise[samples]
        self.sample_calls.append((len(removed), len(noise)))
        return np.array([self.loss(units) + noise[:, units].sum(axis=1) for units in removed])

    @property
    def num_looks(self) -> int:
        return 1 if self.num_samples < 32 else 2

    def race(
        self, masks: Any, keep: int = 1, confidence: float = 0.99, tolerance: float = 0.0
    ) -> Race:
        rows = np.asarray(masks, dtype=bool)
        distinct = np.sort(
            np.unique(rows, axis=0, return_index=True)[1]
        )  # of equal masks the first
        check_race(keep, len(distinct), confidence, tolerance)
        self.races.append((len(distinct), keep))
        losses = np.array([self.loss(np.flatnonzero(~mask)) for mask in rows[distinct]])
        best = np.argsort(np.where(np.isfinite(losses), losses, np.inf), kind="stable")[:keep]
        early = len(distinct) - keep if self.num_looks > 1 else 0
        return Race(distinct[best], losses[best], decided_early=early, unit_runs=0.0, share=1.0)

    def similarity(self) -> np.ndarray:
        states = self._steps.cumsum(axis=0)
        states /= np.linalg.norm(states, axis=1, keepdims=True)
        return states @ states.T

    def angular_distance(self) -> np.ndarray:
        return np.arccos(np.clip(self.similarity(), -1.0, 1.0)) / np.pi

    def unit_gradients(self) -> np.ndarray:
        gradients = self._noise - self.linear
        gradients[:, list(self._broken)] *= 1000.0
        return gradients

    def unit_salience(self, power: int = 1) -> np.ndarray:
        return np.abs(self.unit_gradients().mean(axis=0)) ** power

    def unit_costs(self, kind: str, batch_size: int = 1, seq_len: int | None = None) -> UnitCosts:
        return UnitCosts(kind, 10.0 + sum(self._costs), self._costs)

    def loss(self, units: np.ndarray) -> float:
        """The loss of removing these units int64[N]."""
        if set(units.tolist()) & self._broken:
            return np.nan
        quadratic = self.linear[units].sum() + self.pairs[np.ix_(units, units)].sum()
        return quadratic + self._curvature * np.sin(3.0 * self.linear[units].sum() + len(units))


def check_algorithm(name: str, **options: Any) -> None:
    """Run every check of CHECKS on a registered algorithm, with these options for all of them.

    Raises InputError for an unregistered name, AssertionError for a check that fails.
    """
    find_algorithm(name)
    for check in CHECKS:
        check(name, **options)


def check_description(name: str, **options: Any) -> None:
    """The docstring has a first line that ends with a full stop, Source:, Cost:, and a line for
    every option."""
    row = find_algorithm(name).describe()
    assert row["summary"].endswith("."), (
        f"{name}: the docstring's first line must end with a full stop"
    )
    for section in ("source", "cost"):
        assert row[section], f"{name}: the docstring has no {section.capitalize()}:"
    for option in row["options"]:
        what = f"{name}: option {option['name']}"
        assert option["meaning"], f"{what} has no line under Options:"
        assert type(option["default"]).__name__ == option["type"], (
            f"{what} has a default of another type"
        )
    assert json.loads(json.dumps(row)) == row, f"{name}: what describes it must be plain values"


def check_budgets(name: str, **options: Any) -> None:
    """It removes as many units as it was asked to, from none to all but one, in small models
    too."""
    for num_units in (2, 3, 7):
        for num_remove in range(num_units):
            result = run_search(SyntheticEvaluator(num_units), name, num_remove, seed=1, **options)
            assert len(result.removed) == num_remove, (
                f"{name} removed {result.removed}, not {num_remove} units"
            )
            assert result.removed == to_removed(result.mask) == tuple(sorted(set(result.removed)))


def check_best(name: str, **options: Any) -> None:
    """Its result is the best subset of the full budget that it scored, or its method's choice."""
    evaluator = SyntheticEvaluator(9, seed=3)
    result = run_search(evaluator, name, 4, **options)
    complete: dict[tuple[int, ...], float] = {r: loss for r, loss in result.history if len(r) == 4}
    assert result.loss == complete[result.removed]
    assert result.choice == "method's" or result.loss == min(complete.values()), (
        f"{name} scored a better subset"
    )
    assert result.loss == evaluator.score(result.mask[None])[0]


def check_history(name: str, **options: Any) -> None:
    """It scores through its Search alone, so that every subset is scored, counted and remembered
    once."""
    evaluator = SyntheticEvaluator(9, seed=4)
    result = run_search(evaluator, name, 3, **options)
    assert len(result.history) == len(dict(result.history)) == result.evaluations
    assert result.evaluations == sum(evaluator.calls), f"{name} scores past its Search, or twice"
    for removed, loss in result.history:
        assert loss == evaluator.score(from_removed([removed], 9))[0]


def check_protection(name: str, **options: Any) -> None:
    """It never scores a subset with a protected unit, and takes every budget that remains."""
    for protect in ((0, 2, 5), (1, 3, 8), (0, 8)):
        for num_remove in range(10 - len(protect)):
            result = run_search(
                SyntheticEvaluator(9, seed=5), name, num_remove, protect=protect, **options
            )
            assert len(result.removed) == num_remove
            tried = {unit for removed, _ in result.history for unit in removed}
            assert not tried & set(protect), (
                f"{name} tried to remove units of {protect}, which are protected"
            )


def check_losses_that_are_not_finite(name: str, **options: Any) -> None:
    """Such a loss never wins and breaks no arithmetic, and if no other is found ArithmeticError
    says so.

    An algorithm that scores a single subset may find none although some exist; if a single one of
    35 is finite, any may miss it.
    """
    evaluator = SyntheticEvaluator(8, seed=6, broken=(1, 4))
    found = _finite(evaluator, name, options)
    assert found is not None or sum(evaluator.calls) == 1, (
        f"{name} found no finite loss where most are"
    )
    assert found is None or not set(found) & {1, 4}
    assert _finite(SyntheticEvaluator(7, seed=6, broken=(0, 1, 2, 6)), name, options) in (
        None,
        (3, 4, 5),
    )
    try:
        run_search(SyntheticEvaluator(4, broken=(0, 1, 2, 3)), name, 2, **options)
    except ArithmeticError:
        return
    raise AssertionError(f"{name} found a finite loss where there is none")


def check_ties(name: str, **options: Any) -> None:
    """Equal losses of all masks break no arithmetic."""
    assert len(run_search(SyntheticEvaluator(7, flat=True), name, 3, **options).removed) == 3


def check_gap(name: str, **options: Any) -> float:
    """It finds nothing below the optimum. Returns how far above it stays, for information."""
    evaluator = SyntheticEvaluator(10, seed=7)
    optimum = float(evaluator.score(from_removed(list(combinations(range(10), 4)), 10)).min())
    gap = run_search(evaluator, name, 4, **options).loss - optimum
    assert gap >= 0, f"{name} reports a loss that no subset has"
    return float(gap)


def check_races(name: str, **options: Any) -> None:
    """Racing, it needs no loss but those of subsets that a race keeps, has its result's exact loss,
    and finds it once more.

    One registered without races=True refuses to race.
    """
    if not find_algorithm(name).races:
        _refused(SyntheticEvaluator(9), name, 4, {**options, "racing": 0.99}, "does not race")
        return
    found = []
    for _ in range(2):
        evaluator = SyntheticEvaluator(9, seed=9, num_samples=64)
        try:
            result = run_search(evaluator, name, 4, seed=2, protect=(1,), racing=0.99, **options)
        except KeyError as error:
            raise AssertionError(
                f"{name} needs the loss of {error}, which has left a race"
            ) from error
        assert result.decided_early > 0, f"{name} is registered as one that races, and does not"
        assert result.loss == evaluator.score(result.mask[None])[0]
        assert 1 not in result.removed, f"{name} removed a protected unit"
        found.append(result.history)
    assert found[0] == found[1], f"{name} finds something else when it is run again"


def check_repeats(name: str, **options: Any) -> None:
    """A second run finds the same to the bit, scores the same subsets, and draws from search.rng
    alone."""
    first = outcome(name, **options)
    np.random.seed(0)  # noqa: NPY002 (the global one, which a search must not use)
    assert outcome(name, **options) == first, f"{name} finds something else when it is run again"


def check_another_process(name: str, **options: Any) -> None:
    """A new process, with other hashes of strings, finds the same to the bit."""
    module = find_algorithm(name).function.__module__
    code = (
        f"import importlib, json; importlib.import_module({module!r}); from fastprune.testing "
        f"import outcome; "
        f"print(json.dumps(outcome({name!r}, **json.loads({json.dumps(options)!r}))))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{name} cannot be run in a new process: {done.stderr[-1000:]}"
    there = json.loads(done.stdout.splitlines()[-1])
    assert there == outcome(name, **options), f"{name} finds something else in another process"


def check_refusals(name: str, **options: Any) -> None:
    """Unknown options, and budgets and protected units that leave no room, are refused before
    anything is scored."""
    evaluator = SyntheticEvaluator(4)
    _refused(evaluator, name, 1, {**options, "no_such_option": 1}, "has no option 'no_such_option'")
    for num_remove in (-1, 4, 1.0, True):
        _refused(evaluator, name, num_remove, options, "num_remove")
    _refused(evaluator, name, 3, {**options, "protect": (0, 1)}, "units are not protected")
    assert not evaluator.calls, f"{name} scores before it refuses"


CHECKS: tuple[Callable, ...] = (
    check_description,
    check_budgets,
    check_best,
    check_history,
    check_protection,
    check_losses_that_are_not_finite,
    check_ties,
    check_gap,
    check_races,
    check_repeats,
    check_another_process,
    check_refusals,
)


def outcome(name: str, **options: Any) -> list:
    """The outcome of a search for one seed: the removed units, the loss to the bit, and the
    history. Plain values."""
    result = run_search(SyntheticEvaluator(9, seed=8, num_samples=20), name, 4, seed=11, **options)
    history = [[list(removed), loss.hex()] for removed, loss in result.history]
    return [list(result.removed), result.loss.hex(), history]


def _finite(evaluator: SyntheticEvaluator, name: str, options: dict) -> tuple[int, ...] | None:
    """The 3 units that the search removes, None if it found no finite loss."""
    try:
        result = run_search(evaluator, name, 3, **options)
    except ArithmeticError:
        return None
    assert math.isfinite(result.loss), f"{name} let a loss that is not finite win"
    return result.removed


def _refused(
    evaluator: SyntheticEvaluator, name: str, num_remove: Any, options: dict, message: str
) -> None:
    try:
        run_search(evaluator, name, num_remove, **options)
    except InputError as error:
        if message in str(error):
            return
        raise AssertionError(f"{name}: the refusal names something else: {error}") from error
    raise AssertionError(f"{name} takes num_remove={num_remove!r} with {options}")
