"""Test search algorithms: an evaluator that needs no model, and the checks for every algorithm.

Your own algorithm is a function with `@fastprune.search.algorithm`, in a module that an entry point
of the group `fastprune.algorithms` names. Test it with pytest:

```python
import pytest
from fastprune.testing import CHECKS


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_my_algorithm(check):
    check("my_algorithm")
```

`check_algorithm("my_algorithm")` runs all checks at once. A check fails with AssertionError. An
algorithm over sequences gets no budget; the checks hold for its sequences as for masks.

Examples:
    >>> from fastprune.testing import check_algorithm
    >>> check_algorithm("one_shot")
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import combinations, pairwise
from typing import Any

import numpy as np

from .costs import UnitCosts
from .errors import InputError
from .masks import as_masks, check_sequences, kept_by, removed_by, repeated, to_removed
from .objectives import Objective
from .plan.cost import Cost
from .plan.racing import Race, check_race
from .search import SearchResult, find_algorithm, run_search

__all__ = ["CHECKS", "SyntheticEvaluator", "check_algorithm", "outcome"]


class SyntheticEvaluator:
    """A `fastprune.search.Scorer` whose losses follow a formula, so that searches take no time.

    The loss sums a term for each removed unit and one for each removed pair.

    Args:
        num_units: U.
        seed: Decides the terms.
        broken: Units whose removal gives a non-finite loss.
        curvature: The factor of a further term, which no quadratic model can fit.
        num_samples: Samples. With 32 or more the evaluator races, and always keeps the best.
        tokens: Tokens of each sample.
        flat: Give every unit the term 1, so that subsets of equal size tie.
        costs: The cost of each unit, of any kind; 1 by default. The rest of the model costs 10.

    Attributes:
        linear: float64[U], the terms of units. A test may change them.
        pairs: float64[U, U], the terms of pairs. A test may change them.
        calls: The number of masks of each call of `score`.
        sample_calls: (masks, samples) of each call on some of the samples.
        token_calls: (masks, tokens) of each call of `score` on some of the samples.
        races: (masks, kept) of each call of `race`.

    Examples:
        >>> import fastprune as fp
        >>> from fastprune.testing import SyntheticEvaluator
        >>> evaluator = SyntheticEvaluator(num_units=6)
        >>> fp.run_search(evaluator, "greedy", num_remove=2).evaluations
        11
        >>> evaluator.calls
        [6, 5]
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
        self._noise -= self._noise.mean(axis=0)  # so that the mean over samples is the loss
        self._steps = rng.normal(size=(num_units + 1, 24))  # added to the state by each unit
        self._steps[1:] *= self.linear[:, None]
        self._broken, self.num_units, self._curvature = set(broken), num_units, curvature
        self.sample_tokens = np.full(num_samples, tokens)
        self.stats, self.granularity = Cost(), "block"
        self.calls: list[int] = []
        self.sample_calls: list[tuple[int, int]] = []
        self.token_calls: list[tuple[int, int | None]] = []
        self.races: list[tuple[int, int]] = []
        self.objective: Any = type("Named", (Objective,), {"name": "synthetic"})()

    @property
    def num_samples(self) -> int:
        return len(self.sample_tokens)

    cuts_samples = True

    def score(
        self,
        masks: Any = None,
        *,
        sequences: Any = None,
        samples: Any = None,
        tokens: int | None = None,
    ) -> np.ndarray:
        asked = self._asked(masks, sequences)
        if samples is not None:
            self.token_calls.append((len(asked), tokens))
            named = {} if sequences is None else {"sequences": sequences}
            return self.score_samples(masks, samples, **named).mean(axis=1)
        self.calls.append(len(asked))
        return np.array([self.loss_of(units) for units in asked])

    def score_samples(
        self, masks: Any = None, samples: Any = None, *, sequences: Any = None
    ) -> np.ndarray:
        asked = self._asked(masks, sequences)
        noise = self._noise if samples is None else self._noise[samples]
        self.sample_calls.append((len(asked), len(noise)))
        return np.array(
            [self.loss_of(units) + noise @ (1 - self._counts(units)) for units in asked]
        )

    def _asked(self, masks: Any, sequences: Any) -> list[tuple[int, ...]]:
        """The units that each mask or sequence runs."""
        if sequences is not None:
            return [tuple(units) for units in sequences]
        return [tuple(np.flatnonzero(mask).tolist()) for mask in as_masks(masks, self.num_units)]

    def _counts(self, sequence: tuple[int, ...]) -> np.ndarray:
        """The number of times that each unit runs, int64[U]."""
        return np.bincount(np.array(sequence, dtype=np.int64), minlength=self.num_units)

    @property
    def num_looks(self) -> int:
        return 1 if self.num_samples < 32 else 2

    def race(
        self,
        masks: Any = None,
        keep: int = 1,
        confidence: float = 0.99,
        tolerance: float = 0.0,
        *,
        sequences: Any = None,
    ) -> Race:
        asked = self._asked(masks, sequences)
        first = {units: number for number, units in reversed(list(enumerate(asked)))}
        distinct = np.sort(np.array(list(first.values()), dtype=np.int64))
        check_race(keep, len(distinct), confidence, tolerance)
        self.races.append((len(distinct), keep))
        losses = np.array([self.loss_of(asked[number]) for number in distinct])
        best = np.argsort(np.where(np.isfinite(losses), losses, np.inf), kind="stable")[:keep]
        early = len(distinct) - keep if self.num_looks > 1 else 0
        return Race(distinct[best], losses[best], decided_early=early)

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

    def loss_of(self, sequence: tuple[int, ...]) -> float:
        """The loss of running these units in this order.

        A further run of a unit counts against its removal. Each step that does not lead to the
        next unit adds a small loss.
        """
        removed = removed_by(sequence, self.num_units)
        if removed is not None:
            return self.loss(np.array(removed, dtype=np.int64))
        extra_runs = self._counts(sequence) - 1  # -1 for a unit that does not run
        if extra_runs[list(self._broken)].any():
            return np.nan
        jumps = sum(
            0.01 * abs(self.linear[a] - self.linear[b]) for a, b in pairwise(sequence) if b != a + 1
        )
        return float(extra_runs @ self.pairs @ extra_runs - extra_runs @ self.linear + jumps)

    def unit_costs(self, kind: str, batch_size: int = 1, seq_len: int | None = None) -> UnitCosts:
        return UnitCosts(kind, 10.0 + sum(self._costs), self._costs)

    def loss(self, units: np.ndarray) -> float:
        """The loss of removing these units int64[N]."""
        if set(units.tolist()) & self._broken:
            return np.nan
        quadratic = self.linear[units].sum() + self.pairs[np.ix_(units, units)].sum()
        return quadratic + self._curvature * np.sin(3.0 * self.linear[units].sum() + len(units))


def check_algorithm(name: str, **options: Any) -> None:
    """Run every check of CHECKS on a registered algorithm.

    Args:
        name: The algorithm.
        options: Its options, the same for all checks.

    Raises:
        InputError: No algorithm of this name is registered.
        AssertionError: A check fails.

    Examples:
        >>> from fastprune.testing import check_algorithm
        >>> check_algorithm("beam", beam_width=2)
    """
    find_algorithm(name)
    for check in CHECKS:
        check(name, **options)


def check_description(name: str, **options: Any) -> None:
    """The docstring describes the algorithm.

    It has a first line with a full stop, Source:, Cost:, and a line for every option.
    """
    row = find_algorithm(name).describe()
    assert row["summary"].endswith("."), (
        f"{name}: the docstring's first line must end with a full stop"
    )
    for section in ("source", "cost"):
        assert row[section], f"{name}: the docstring has no {section.capitalize()}:"
    for option in row["options"]:
        subject = f"{name}: option {option['name']}"
        assert option["meaning"], f"{subject} has no line under Options:"
        assert type(option["default"]).__name__ == option["type"], (
            f"{subject} has a default of another type"
        )
    assert json.loads(json.dumps(row)) == row, f"{name}: its description must be plain values"


def check_budgets(name: str, **options: Any) -> None:
    """The algorithm removes exactly num_remove units, from none to all but one.

    Over sequences, it runs units of the model, and its result is no mask.
    """
    for num_units in (2, 3, 7):
        if _is_over_sequences(name):
            result = run_search(SyntheticEvaluator(num_units), name, seed=1, **options)
            assert [result.sequence] == check_sequences([result.sequence], num_units)
            assert result.removed is None, f"{name} is over sequences and removes units"
            assert result.mask is None, f"{name} is over sequences and has a mask"
            continue
        for num_remove in range(num_units):
            result = run_search(SyntheticEvaluator(num_units), name, num_remove, seed=1, **options)
            assert result.removed is not None, f"{name} removed no units"
            assert len(result.removed) == num_remove, (
                f"{name} removed {result.removed}, not {num_remove} units"
            )
            assert result.removed == to_removed(result.mask) == tuple(sorted(set(result.removed)))


def check_best(name: str, **options: Any) -> None:
    """The result is the best candidate that was scored, or the choice of the method's own rule.

    Candidates are subsets of the full budget, or sequences.
    """
    evaluator = SyntheticEvaluator(9, seed=3)
    result = _run(evaluator, name, 4, options)
    complete: dict[tuple[int, ...], float] = {
        units: loss for units, loss in result.history if _is_over_sequences(name) or len(units) == 4
    }
    assert result.loss == complete[_chosen(result)]
    assert result.choice == "method's" or result.loss == min(complete.values()), (
        f"{name} scored a better candidate"
    )
    assert result.loss == evaluator.score(sequences=[result.sequence])[0]


def check_history(name: str, **options: Any) -> None:
    """The algorithm scores through its Search alone, which counts and remembers each candidate."""
    evaluator = SyntheticEvaluator(9, seed=4)
    result = _run(evaluator, name, 3, options)
    assert len(result.history) == len(dict(result.history)) == result.evaluations
    assert result.evaluations == sum(evaluator.calls), f"{name} scores past its Search, or twice"
    for units, loss in result.history:
        sequence = units if _is_over_sequences(name) else kept_by(units, 9)
        assert loss == evaluator.score(sequences=[sequence])[0]


def check_protection(name: str, **options: Any) -> None:
    """The algorithm never removes a protected unit, and takes every budget that remains.

    Over sequences, a protected unit runs once.
    """
    for protect in ((0, 2, 5), (1, 3, 8), (0, 8)):
        if _is_over_sequences(name):
            evaluator = SyntheticEvaluator(9, seed=5)
            for sequence, _ in run_search(evaluator, name, protect=protect, **options).history:
                assert all(sequence.count(unit) == 1 for unit in protect), (
                    f"{name} tried {sequence}, although {protect} are protected"
                )
            continue
        for num_remove in range(10 - len(protect)):
            result = run_search(
                SyntheticEvaluator(9, seed=5), name, num_remove, protect=protect, **options
            )
            assert len(_chosen(result)) == num_remove
            tried = {unit for removed, _ in result.history for unit in removed}
            assert not tried & set(protect), (
                f"{name} tried to remove units of {protect}, which are protected"
            )


def check_losses_that_are_not_finite(name: str, **options: Any) -> None:
    """A non-finite loss never wins and breaks no arithmetic.

    If no loss is finite, ArithmeticError says so. An algorithm that scores a single subset may miss
    the finite losses. If only one of 35 subsets has a finite loss, any algorithm may miss it.
    """
    evaluator = SyntheticEvaluator(8, seed=6, broken=(1, 4))
    chosen = _finite(evaluator, name, options)
    assert chosen is not None or sum(evaluator.calls) == 1, (
        f"{name} found no finite loss although most are finite"
    )
    if not _is_over_sequences(name):
        assert chosen is None or not set(chosen) & {1, 4}
        assert _finite(SyntheticEvaluator(7, seed=6, broken=(0, 1, 2, 6)), name, options) in (
            None,
            (3, 4, 5),
        )
    assert _finite(SyntheticEvaluator(4, broken=(0, 1, 2, 3)), name, options) is None, (
        f"{name} found a finite loss although none is finite"
    )


def check_ties(name: str, **options: Any) -> None:
    """Equal losses of all masks break no arithmetic."""
    result = _run(SyntheticEvaluator(7, flat=True), name, 3, options)
    assert result.removed is None or len(result.removed) == 3


def check_gap(name: str, **options: Any) -> float:
    """The algorithm finds no loss below the optimum.

    Returns:
        The gap of its loss to the optimum, for information. Over sequences, whose number has no
        bound, the gap to the best repeated window.
    """
    evaluator = SyntheticEvaluator(10, seed=7)
    over_sequences = _is_over_sequences(name)
    if over_sequences:
        sequences = [repeated(10, [window]) for window in combinations(range(11), 2)]
    else:
        sequences = [kept_by(units, 10) for units in combinations(range(10), 4)]
    gap = _run(evaluator, name, 4, options).loss - evaluator.score(sequences=sequences).min()
    assert over_sequences or gap >= 0, f"{name} reports a loss that no subset has"
    return float(gap)


def check_races(name: str, **options: Any) -> None:
    """With racing, the algorithm needs the losses of kept subsets only, and repeats to the bit.

    The loss of its result is exact. An algorithm registered without races=True refuses to race.
    """
    if not find_algorithm(name).races:
        _refused(SyntheticEvaluator(9), name, 4, {**options, "racing": 0.99}, "does not race")
        return
    histories = []
    for _ in range(2):
        evaluator = SyntheticEvaluator(9, seed=9, num_samples=64)
        try:
            racing = {"seed": 2, "protect": (1,), "racing": 0.99}
            result = _run(evaluator, name, 4, {**options, **racing})
        except KeyError as error:
            raise AssertionError(
                f"{name} needs the loss of {error}, which has left a race"
            ) from error
        assert result.decided_early > 0, f"{name} is registered with races=True, and does not race"
        assert result.loss == evaluator.score(sequences=[result.sequence])[0]
        assert result.sequence.count(1) == 1, f"{name} removed or repeated a protected unit"
        histories.append(result.history)
    assert histories[0] == histories[1], f"{name} gives another result when it is run again"


def check_repeats(name: str, **options: Any) -> None:
    """A second run gives the same result to the bit, since all randomness is search.rng's."""
    first = outcome(name, **options)
    np.random.seed(0)  # noqa: NPY002 (the global one, which a search must not use)
    assert outcome(name, **options) == first, f"{name} gives another result when it is run again"


def check_another_process(name: str, **options: Any) -> None:
    """A new process, with other hashes of strings, gives the same result to the bit."""
    module = find_algorithm(name).function.__module__
    code = (
        f"import importlib, json; importlib.import_module({module!r}); from fastprune.testing "
        f"import outcome; "
        f"print(json.dumps(outcome({name!r}, **json.loads({json.dumps(options)!r}))))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": "1"}
    process = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, (
        f"{name} cannot be run in a new process: {process.stderr[-1000:]}"
    )
    other_outcome = json.loads(process.stdout.splitlines()[-1])
    assert other_outcome == outcome(name, **options), (
        f"{name} gives another result in another process"
    )


def check_refusals(name: str, **options: Any) -> None:
    """Wrong options, budgets and protected units are refused before any mask is scored."""
    evaluator = SyntheticEvaluator(4)
    _refused(evaluator, name, 1, {**options, "no_such_option": 1}, "has no option 'no_such_option'")
    if _is_over_sequences(name):
        _refused(evaluator, name, 1, options, "removes nothing")
        assert not evaluator.calls, f"{name} scores before it refuses"
        return
    for num_remove in (None, -1, 4, 1.0, True):
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
    """Run a search with a fixed seed.

    Args:
        name: The algorithm.
        options: Its options.

    Returns:
        Plain values: the removed units or the sequence, the loss to the bit, and the history.

    Examples:
        >>> from fastprune.testing import outcome
        >>> removed, loss, history = outcome("one_shot")
        >>> len(removed), len(history)
        (4, 10)
    """
    evaluator = SyntheticEvaluator(9, seed=8, num_samples=20)
    result = _run(evaluator, name, 4, {**options, "seed": 11})
    history = [[list(units), loss.hex()] for units, loss in result.history]
    return [list(_chosen(result)), result.loss.hex(), history]


def _is_over_sequences(name: str) -> bool:
    return find_algorithm(name).over_sequences


def _run(evaluator: SyntheticEvaluator, name: str, num_remove: int, options: dict) -> SearchResult:
    """Search for num_remove units, or over sequences."""
    return run_search(evaluator, name, None if _is_over_sequences(name) else num_remove, **options)


def _chosen(result: SearchResult) -> tuple[int, ...]:
    """The key of a result in its history."""
    return result.sequence if result.removed is None else result.removed


def _finite(evaluator: SyntheticEvaluator, name: str, options: dict) -> tuple[int, ...] | None:
    """The 3 units that a search removes, or its sequence; None if no loss was finite."""
    try:
        result = _run(evaluator, name, 3, options)
    except ArithmeticError:
        return None
    assert math.isfinite(result.loss), f"{name} let a non-finite loss win"
    return _chosen(result)


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
