"""Running a search: the task that an algorithm receives, and the result."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from ..costs import Budget, UnitCosts
from ..errors import InputError
from ..masks import from_removed, kept_by
from ..plan.cost import Cost
from ..plan.progress import ProgressCallback, ProgressEvent, reporting
from ..validate import check_callable, check_integer, check_kind
from .protect import protected_units, units_to_remove
from .registry import check_algorithm, check_limits, check_racing
from .sizes import CostLimit, Removed, Size, UnitCount, less_one, size_within

if TYPE_CHECKING:
    from ..plan.racing import Race

Units = tuple[int, ...]  # in the order in which they run
# for completion in editors; packages add others
AlgorithmName = Literal[
    "one_shot",
    "taylor",
    "greedy",
    "beam",
    "genetic",
    "evopress",
    "bayesian",
    "cbo",
    "surrogate",
    "fast_block_select",
    "shapley",
    "sliding_window_merge",
    "contiguous",
    "exhaustive",
    "random",
    "lorp",
    "shortgpt",
    "streamline",
    "repeat",
]
Step = tuple[Removed, int]  # a subset, and the unit that it loses besides
log = logging.getLogger(__name__)


class Metric(Protocol):
    """How the losses of an objective are read: a class of `fastprune.objectives`."""

    @property
    def name(self) -> str: ...

    def format(self, loss: float, error: float | None = None, named: bool = True) -> str: ...

    def record(self, loss: float, prefix: str = "") -> dict[str, float]: ...


class Scorer(Protocol):
    """All that a search asks of an evaluator. `Evaluator` documents each member; tests have another
    one (`fastprune.testing.SyntheticEvaluator`)."""

    @property
    def num_units(self) -> int: ...
    @property
    def num_samples(self) -> int: ...
    @property
    def num_looks(self) -> int: ...
    @property
    def granularity(self) -> str: ...
    @property
    def objective(self) -> Metric: ...
    @property
    def stats(self) -> Cost: ...
    @property
    def sample_tokens(self) -> np.ndarray: ...
    @property
    def cuts_samples(self) -> bool: ...
    def score(
        self,
        masks: Any = None,
        *,
        sequences: Any = None,
        samples: Any = None,
        tokens: int | None = None,
    ) -> np.ndarray: ...
    def score_samples(
        self, masks: Any = None, samples: Any = None, *, sequences: Any = None
    ) -> np.ndarray: ...
    def race(
        self,
        masks: Any = None,
        keep: int = 1,
        confidence: float = 0.99,
        tolerance: float = 0.0,
        *,
        sequences: Any = None,
    ) -> Race: ...
    def similarity(self) -> np.ndarray: ...
    def angular_distance(self) -> np.ndarray: ...
    def unit_gradients(self) -> np.ndarray: ...
    def unit_salience(self, power: int = 1) -> np.ndarray: ...
    def unit_costs(
        self, kind: str, batch_size: int = 1, seq_len: int | None = None
    ) -> UnitCosts: ...


class Search:
    """The task as an algorithm sees it: the size of the removal, the units to choose from, `score`
    and `select`. Every exact loss is remembered.

    num_remove: units to remove. Under a budget of units that save unlike amounts: the most that a
    complete subset has; `size` then says which are complete. candidates: unprotected units,
    ascending; under a budget, those that save anything. rng: the only source of randomness.
    evaluator: for the probes (similarity, unit gradients). losses: all known ones, by subset.
    orders: by subset, its units in the order in which a search removed them one by one. racing: the
    confidence of races, or None, as on sets too small for one. costs: of the units, of the budget's
    kind.
    """

    candidates_name = "subsets"

    def __init__(
        self,
        evaluator: Scorer,
        num_remove: int | str | None,
        seed: int,
        protect: Iterable[int] | str,
        racing: float | None = None,
        algorithm: str | None = None,
        budget: Budget | None = None,
    ):
        self.racing = racing if racing is not None and evaluator.num_looks > 1 else None
        self.decided_early = 0
        self.evaluator = evaluator
        self.num_units = evaluator.num_units
        protected = protected_units(protect, self.num_units, evaluator.granularity)
        self.candidates = [unit for unit in range(self.num_units) if unit not in protected]
        self.costs: UnitCosts | None = None
        self.size: Size
        if budget is not None:
            self.size, self.candidates, self.costs = size_within(
                budget,
                lambda of: evaluator.unit_costs(of.kind, of.batch_size, of.seq_len),
                self.candidates,
            )
        else:
            assert num_remove is not None
            self.size = UnitCount(self._check_number(num_remove))
        self.num_remove = self.size.most
        self.orders: dict[Removed, Removed] = {}
        self.rng = np.random.default_rng(seed)
        self.losses: dict[Removed, float] = {}  # of every subset scored, in order
        self._algorithm = algorithm
        self._best: Removed = ()
        self._round, self._planned = 0, [0]  # masks asked for by the end of each planned round

    def plan(self, masks: Iterable[int]) -> None:
        """Tell how many masks each round will ask for, at most, so that progress has a share.

        A round is a call of `score`, `select` or `score_samples` that asks for unknown losses. An
        algorithm calls this before its first round; one that cannot know its rounds does not.

        Args:
            masks: For each round, in order, the masks it asks for.
        """
        self._planned = [0]
        for count in masks:
            self._planned.append(self._planned[-1] + max(1, count))

    def describe(self, event: ProgressEvent) -> ProgressEvent:
        """The event with this search's own fields: algorithm, round, best loss and share."""
        rounds, share = len(self._planned) - 1, None
        if 0 < self._round <= rounds and event.share is not None:
            before, after = self._planned[self._round - 1 : self._round + 1]
            share = (before + event.share * (after - before)) / self._planned[-1]
        return replace(
            event,
            share=share,
            algorithm=self._algorithm,
            round=self._round or None,
            rounds=rounds if 0 < self._round <= rounds else None,
            best=self._format_best(),
        )

    def _format_best(self) -> str | None:
        """The lowest loss so far among the complete or else the largest subsets, as the objective
        formats it."""
        if self._best not in self.losses:
            return None
        best = self.evaluator.objective.format(self.losses[self._best])
        return best if self._is_complete(self._best) else f"{best} ({len(self._best)} removed)"

    def _remember(self, losses: Iterable[tuple[Removed, float]]) -> None:
        for subset, loss in losses:
            self.losses[subset] = loss
            known = self._best in self.losses and self._best != subset
            if not known or self._order(subset) < self._order(self._best):
                self._best = subset
        log.info("round %d: best %s", self._round, self._format_best())

    # -- the kind of candidate, subsets here -------------------------------------------------------

    def _key(self, units: Iterable[int]) -> tuple[int, ...]:
        """A candidate as `losses` knows it."""
        return tuple(sorted(units))

    def _asked(self, candidates: Sequence[tuple[int, ...]]) -> dict[str, Any]:
        """Candidates as arguments of the evaluator's methods."""
        return {"masks": from_removed(candidates, self.num_units)}

    def _is_complete(self, candidate: tuple[int, ...]) -> bool:
        """Whether a candidate may be the result: one that removes enough, and no unit too many."""
        return self.size.is_complete(candidate)

    def _order(self, candidate: tuple[int, ...]) -> tuple:
        """Sorts candidates: complete subsets first, then the largest, then the lowest losses."""
        complete = self._is_complete(candidate)
        return not complete, 0 if complete else -len(candidate), _rank(self.losses[candidate])

    # -- for algorithms ----------------------------------------------------------------------------

    def score(self, subsets: Sequence[Removed]) -> np.ndarray:
        """The loss of removing each subset, float64[N], +inf if it is not finite, so that it never
        wins.

        All subsets not known yet are scored in one call, so that they share their prefixes.
        """
        subsets = [self._key(subset) for subset in subsets]
        new = [subset for subset in dict.fromkeys(subsets) if subset not in self.losses]
        if new:
            self._round += 1
            losses = self.evaluator.score(**self._asked(new))
            self._remember(zip(new, losses.tolist()))
        return np.array([_rank(self.losses[subset]) for subset in subsets])

    def select(self, subsets: Iterable[Removed], keep: int) -> list[Removed]:
        """The `keep` subsets of lowest loss, best first; ties go to the lowest indices.

        With racing, clearly worse subsets leave early, and only those kept have a remembered loss,
        which is exact (`Evaluator.race`).
        """
        subsets = sorted({self._key(subset) for subset in subsets})
        if (
            self.racing is None
            or keep >= len(subsets)
            or all(subset in self.losses for subset in subsets)
        ):
            order = self.score(subsets).argsort(kind="stable")[:keep]
            return [subsets[i] for i in order]
        self._round += 1
        result = self.evaluator.race(**self._asked(subsets), keep=keep, confidence=self.racing)
        kept = [subsets[i] for i in result.indices]
        self._remember(zip(kept, result.losses.tolist()))
        self.decided_early += result.decided_early
        return kept

    @property
    def limit(self) -> CostLimit | None:
        """The budget, if its units save unlike amounts, so that it is no number of units."""
        return self.size if isinstance(self.size, CostLimit) else None

    def harm(self, steps: Sequence[Step]) -> np.ndarray:
        """The values by which steps from a subset to one with a unit more are compared, float64[N]:
        the loss after the step.

        Under a budget of units that save unlike amounts: the loss that the budget would end with if
        all that remains to be saved cost as much as this step; a step that does not raise the loss
        counts with its loss. +inf if the loss is not finite.
        """
        after = [_with(subset, unit) for subset, unit in steps]
        if self.limit is None:
            return self.score(after)
        before = [subset for subset, _ in steps]
        losses = self.score([*before, *after])
        old, new = losses[: len(steps)], losses[len(steps) :]
        spent = [self.limit.costs.after(subset) for subset in before]
        saved = np.array(spent) - [self.limit.costs.after(subset) for subset in after]
        missing = np.array(spent) - self.limit.limit
        with np.errstate(divide="ignore", invalid="ignore"):
            projected = old + (new - old) * (missing / saved)
        projected = np.where(np.isfinite(projected), projected, np.inf)
        return np.where(new > old, projected, new)

    def extend(self, steps: Sequence[Step], keep: int) -> list[Removed]:
        """The `keep` best subsets that steps lead to, best first, with their `orders`.

        They are selected by loss, or, under a budget of units that save unlike amounts, by `harm`,
        of which every value is needed, so that they do not race.
        """
        harm = None
        if self.limit is not None:
            if self.racing is not None:
                raise InputError(
                    f"{self._algorithm} compares losses by what is saved, which does not race, "
                    "under a budget of units that save unlike amounts; leave out racing",
                    argument="racing",
                )
            harm = self.harm(steps)
            steps = [steps[i] for i in harm.argsort(kind="stable")]
            harm.sort()
        best: dict[Removed, int] = {}
        for number, (subset, unit) in enumerate(steps):
            after = _with(subset, unit)
            if after not in best:
                best[after] = number
                self.orders[after] = (*self.orders.get(subset, subset), unit)
        if harm is None:
            return self.select(best, keep)
        ranked = sorted(
            best, key=lambda after: (harm[best[after]], _rank(self.losses[after]), after)
        )
        return ranked[:keep]

    def fill(self, subset: Iterable[int], order: Iterable[int]) -> Removed:
        """A complete subset, see `Size.fill`."""
        return self.size.fill(subset, order)

    def repaired(self, subset: Removed) -> Removed:
        """The subset itself if it is complete; else units drawn uniformly are added, and those not
        needed are put back."""
        if self.size.is_complete(subset):
            return subset
        drawn = self.rng.permutation([u for u in self.candidates if u not in subset]).tolist()
        return self.fill(self.rng.permutation(subset).tolist(), drawn)

    def trimmed(self, subset: Removed) -> Removed:
        """A complete part of a subset that removes enough: one by one, the unit is put back that
        leaves the lowest loss."""
        while not self.size.is_complete(subset):
            smaller = [part for part in less_one(subset) if self.size.meets(part)]
            best = smaller[int(self.score(smaller).argmin())]
            (gone,) = {*subset} - {*best}
            order = self.orders.get(subset)
            if order is not None:
                self.orders.setdefault(best, tuple(unit for unit in order if unit != gone))
            subset = best
        return subset

    def path(self, subset: Removed) -> list[Removed]:
        """The subsets by which a search came to this one, unit by unit, each of which contains
        those before; empty if the algorithm does not remove units one by one."""
        order = self.orders.get(subset, ())
        path = [tuple(sorted(order[:size])) for size in range(1, len(order) + 1)]
        if not all(part in self.losses for part in path):  # units were put back
            self.score(path)
        return path

    def score_on_tokens(self, subsets: Sequence[Removed], tokens: int) -> np.ndarray:
        """The loss of each subset on fresh samples, float64[N], +inf where it is not finite.

        Samples are drawn without repetition until they hold these tokens, and the last is cut to
        fit, except for questions. Such a loss is not remembered. Where the calibration set holds
        no more tokens, it is the loss on all of it, as `score` gives it.
        """
        order = self.rng.permutation(self.evaluator.num_samples)
        held = np.cumsum(self.evaluator.sample_tokens[order])
        if held[-1] <= tokens:
            return self.score(subsets)
        samples = order[: np.searchsorted(held, tokens) + 1]
        self._round += 1
        losses = self.evaluator.score(
            **self._asked(subsets),
            samples=samples,
            tokens=tokens if self.evaluator.cuts_samples else None,
        )
        return np.array([_rank(loss) for loss in losses.tolist()])

    def score_samples(self, subsets: Sequence[Removed], samples: np.ndarray) -> np.ndarray:
        """The mean loss of each subset over some samples, float64[N], +inf if it is not finite.

        It is no loss of the objective and is not remembered; over all samples it is the loss, as
        `score` gives it.
        """
        if len(samples) == self.evaluator.num_samples:
            return self.score(subsets)
        self._round += 1
        losses = self.evaluator.score_samples(**self._asked(subsets), samples=samples)
        return np.array([_rank(loss) for loss in losses.mean(axis=1)])

    def best(self) -> Removed:
        """The complete candidate with the lowest loss so far; ties go to the lowest indices."""
        complete = [subset for subset in self.losses if self._is_complete(subset)]
        best = min(complete, key=lambda subset: (_rank(self.losses[subset]), subset))
        if not math.isfinite(self.losses[best]):
            raise ArithmeticError(
                f"none of the {len(complete)} {self.candidates_name} scored has a finite loss"
            )
        return best

    def chosen(self, subset: Removed) -> Removed:
        """The subset that a method's own rule ends with, which it has scored."""
        if not math.isfinite(self.losses[subset]):
            raise ArithmeticError(f"the subset that was chosen, {subset}, has no finite loss")
        return subset

    def _check_number(self, number: int | str) -> int:
        num_remove = units_to_remove(number, self.num_units)
        if num_remove > len(self.candidates):
            free = "1 unit is" if len(self.candidates) == 1 else f"{len(self.candidates)} units are"
            raise InputError(
                f"num_remove is {num_remove}, but only {free} not protected",
                argument="num_remove",
                most=len(self.candidates),
            )
        return num_remove


class SequenceSearch(Search):
    """The task of an algorithm over sequences: its candidates are tuples of units in the order in
    which they run, for `score` and `select` alike, and nothing is removed.

    candidates: the unprotected units, ascending; protected ones run once, in their place.
    """

    candidates_name = "sequences"

    def __init__(
        self,
        evaluator: Scorer,
        seed: int,
        protect: Iterable[int] | str,
        racing: float | None = None,
        algorithm: str | None = None,
    ):
        super().__init__(evaluator, 0, seed, protect, racing, algorithm)

    def _key(self, units: Iterable[int]) -> Units:
        return tuple(units)

    def _asked(self, candidates: Sequence[Units]) -> dict[str, Any]:
        return {"sequences": candidates}

    def _is_complete(self, candidate: Units) -> bool:
        return True

    def _order(self, candidate: Units) -> tuple:
        return (_rank(self.losses[candidate]),)


@dataclass(frozen=True, repr=False)
class SearchResult:
    """The outcome of a search.

    sequence: the units that run, in order. removed, mask (bool[U]): the units that do not, and the
    subset as a mask; None of a search over sequences. loss: its loss. choice: "best scored", of all
    candidates whose loss is known exactly, or "method's", the one that the method's own rule ends
    with, even if a better one was met on the way. metric: the objective's class, which reads
    losses. history: every (removed, loss), or (sequence, loss), whose exact loss is known, in order
    (not of those that left a race, or were scored on a share of the samples).
    evaluations: how many. cost: of this search alone, with the seconds of all of it.
    racing: the confidence of its races, None without. decided_early: subsets that left one before
    the last samples.
    budget: the budget as text, None without. costs: the kind of cost of `path`, and the whole
    model's and the pruned model's. path: of greedy and beam, (removed, loss, cost of what remains)
    for each unit that went, in order; each contains those before, and the last is the result.

    Examples:
        >>> import fastprune as fp
        >>> from fastprune.testing import SyntheticEvaluator
        >>> result = fp.run_search(SyntheticEvaluator(num_units=8), "one_shot", num_remove=2)
        >>> result.to_dict()["evaluations"]
        9
    """

    algorithm: str
    options: dict[str, object]
    seed: int
    objective: str
    granularity: str
    num_units: int
    sequence: Units
    removed: Removed | None
    mask: np.ndarray | None
    loss: float
    metric: Metric
    history: list[tuple[tuple[int, ...], float]]
    evaluations: int
    cost: Cost
    choice: str = "best scored"
    racing: float | None = None
    decided_early: int = 0
    budget: str | None = None
    costs: dict[str, object] = field(default_factory=dict)
    path: list[tuple[Removed, float, float]] = field(default_factory=list)

    def __repr__(self) -> str:
        over_sequences = self.removed is None
        chosen = f"sequence {self.sequence}" if over_sequences else f"removed {self.removed}"
        count = f"{self.evaluations} {'sequences' if over_sequences else 'masks'}"
        return f"SearchResult({self.algorithm}: {chosen}, {self.metric.format(self.loss)}, {count})"

    def to_dict(self) -> dict:
        """Plain values, as written to result.json: the units under "removed", or under "sequence"
        if the search was over sequences."""
        hidden = ("mask", "history", "metric", "removed", "sequence", "cost", "path")
        plain = {name: value for name, value in vars(self).items() if name not in hidden}
        name = "sequence" if self.removed is None else "removed"
        history = [{name: list(units), **self.metric.record(loss)} for units, loss in self.history]
        path = [
            {"removed": list(removed), **self.metric.record(loss), "cost": cost}
            for removed, loss, cost in self.path
        ]
        return {
            **plain,
            "unit_runs": self.cost.unit_runs,
            "naive_unit_runs": self.cost.naive_unit_runs,
            "seconds": self.cost.seconds,
            "path": path,
            **self.metric.record(self.loss),
            name: list(getattr(self, name)),
            "history": history,
        }


def run_search(
    evaluator: Scorer,
    algorithm: AlgorithmName | str,
    num_remove: int | str | None = None,
    seed: int = 0,
    protect: Iterable[int] | str = (),
    racing: float | None = None,
    *,
    budget: Budget | None = None,
    progress: ProgressCallback | None = None,
    **options: object,
) -> SearchResult:
    """Search for the units whose removal gives the lowest loss, or for the sequence of units with
    the lowest loss.

    algorithm: a name of known_algorithms(); options are its own. num_remove: how many units, or a
    share of them such as "25%", rounded down, at least 1; left out for a search over sequences,
    such as "repeat". budget: instead, the most that the pruned model may have, such as
    `fp.Budget(params="75%")`: the result is within it, and putting back any of its units would
    exceed it. If all units save the same, it is a number of units, as num_remove; otherwise only
    some algorithms take it, and others refuse. protect: units that must stay (in a sequence, units
    that run once), or the name of a preset, "sleb" or "shortened-llama": the units that those
    methods never remove. progress: called with a `ProgressEvent` as the search runs. racing: a
    confidence such as 0.99 lets clearly worse subsets leave early (`Evaluator.race`), in each
    selection of an algorithm that races; the result's loss is exact all the same. Deterministic for
    a seed. Raises InputError for an unknown algorithm, option or preset, for a number missing,
    without meaning or outside 0..U-1, for a budget that no removal meets, and for racing outside
    (0, 1) or with an algorithm that does not race; ArithmeticError when no candidate has a finite
    loss.

    Examples:
        >>> import fastprune as fp
        >>> from fastprune.testing import SyntheticEvaluator
        >>> result = fp.run_search(SyntheticEvaluator(num_units=8), "greedy", num_remove=3)
        >>> len(result.removed), result.evaluations  # 8 + 7 + 6 masks
        (3, 21)
        >>> fp.run_search(SyntheticEvaluator(num_units=4, seed=1), "repeat", lengths="1-2").sequence
        (0, 1, 2, 1, 2, 3)
    """
    chosen, options = check_algorithm(algorithm, options)
    chosen.check_num_remove(num_remove, budget)
    check_racing([algorithm], racing)
    if not hasattr(evaluator, "num_units"):
        raise InputError(f"a search takes an Evaluator, not {type(evaluator).__name__}")
    check_integer("seed", seed, least=0)
    if progress is not None:
        check_callable("progress", progress, "a function of a ProgressEvent")
    if budget is not None:
        check_kind("budget", budget, Budget, 'a Budget, such as fp.Budget(params="75%")')
    search = (
        SequenceSearch(evaluator, seed, protect, racing, algorithm)
        if chosen.over_sequences
        else Search(evaluator, num_remove, seed, protect, racing, algorithm, budget)
    )
    if search.limit is not None:
        check_limits(chosen)
    elif chosen.check_size:
        chosen.check_size(
            len(search.candidates), search.num_remove, evaluator.granularity, **options
        )
    before, started = evaluator.stats, time.perf_counter()
    with reporting(search.describe, progress):
        choice = chosen.function(search, **options)
    best = search.best() if choice is None else search.chosen(choice)
    num_units, is_mask = search.num_units, not chosen.over_sequences
    path = search.path(best) if is_mask else []
    costs = search.costs or evaluator.unit_costs("params")
    cost = replace(evaluator.stats - before, seconds=time.perf_counter() - started)
    reader: Any = type(evaluator.objective)  # the class, without the data
    return SearchResult(
        algorithm=algorithm,
        options=options,
        seed=seed,
        objective=evaluator.objective.name,
        granularity=evaluator.granularity,
        num_units=num_units,
        sequence=kept_by(best, num_units) if is_mask else best,
        removed=best if is_mask else None,
        mask=from_removed([best], num_units)[0] if is_mask else None,
        loss=search.losses[best],
        metric=reader,
        history=list(search.losses.items()),
        evaluations=len(search.losses),
        cost=cost,
        choice="best scored" if choice is None else "method's",
        racing=racing,
        decided_early=search.decided_early,
        budget=None if budget is None else str(budget),
        costs={"kind": costs.kind, "before": costs.total, "after": costs.after(best)}
        if is_mask
        else {},
        path=[(part, search.losses[part], costs.after(part)) for part in path],
    )


def _with(subset: Removed, unit: int) -> Removed:
    return tuple(sorted((*subset, unit)))


def _rank(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf
