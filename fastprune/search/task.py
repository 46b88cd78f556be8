"""The task that an algorithm receives: candidates to choose from, and methods that score them."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ..costs import Budget, UnitCosts
from ..masks import from_removed
from ..plan.cost import Cost
from ..plan.progress import ProgressEvent
from .protect import protected_units
from .sizes import CostLimit, RemovalSize, Removed, as_removed, less_one

if TYPE_CHECKING:
    from ..plan.racing import Race

Units = tuple[int, ...]  # in the order in which they run
Step = tuple[Removed, int]  # a removed subset, and one more unit to remove
log = logging.getLogger(__name__)


class Metric(Protocol):
    """Reads losses as metrics, as the classes of `fastprune.objectives` do."""

    @property
    def name(self) -> str: ...

    def format(self, loss: float, error: float | None = None, named: bool = True) -> str: ...

    def record(self, loss: float, prefix: str = "") -> dict[str, float]: ...


class Scorer(Protocol):
    """The members of an evaluator that a search uses.

    `Evaluator` documents them. `fastprune.testing.SyntheticEvaluator` has them too, for tests.
    """

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
    """The task of an algorithm: candidates to choose from, and methods that score them.

    A search remembers every exact loss. A subset is *complete* if it removes enough units and no
    unit too many; results are complete. `run_search` makes the object.

    Attributes:
        num_remove: The number of units to remove. Under a budget of units that save unlike amounts,
            the most units of a complete subset.
        size: Decides which subsets are complete.
        candidates: The units that may be removed, ascending. Under a budget, units that save
            nothing are left out.
        num_units: U.
        rng: The only source of randomness.
        evaluator: The evaluator, for probes such as similarity and unit gradients.
        losses: All exact losses so far, by subset.
        orders: The order in which a search removed the units of a subset one by one, by subset.
        racing: The confidence of races; None without races, and for sets too small to race.
        costs: The costs of units, of the budget's kind.
        decided_early: The number of subsets that left a race before the last samples.

    Examples:
        >>> from fastprune.search import Search
        >>> from fastprune.testing import SyntheticEvaluator
        >>> search = Search(SyntheticEvaluator(8), num_remove=2, seed=0, protect=(0,))
        >>> search.candidates
        [1, 2, 3, 4, 5, 6, 7]
        >>> search.select([(1, 2), (3, 4)], keep=1) == [search.best()]
        True
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
        self.size, self.candidates, self.costs = RemovalSize(num_remove, budget).resolve(
            self.num_units,
            [unit for unit in range(self.num_units) if unit not in protected],
            lambda of: evaluator.unit_costs(of.kind, of.batch_size, of.seq_len),
        )
        self.num_remove = self.size.most
        self.orders: dict[Removed, Removed] = {}
        self.rng = np.random.default_rng(seed)
        self.losses: dict[Removed, float] = {}  # in the order of scoring
        self._algorithm = algorithm
        self._best: Removed = ()
        self._round, self._planned = 0, [0]  # masks requested by the end of each planned round

    def plan(self, masks: Iterable[int]) -> None:
        """Announce the size of each round, so that progress events have a share.

        A round is a call of `score`, `select` or `score_samples` that asks for unknown losses. An
        algorithm that knows its rounds calls this before the first one.

        Args:
            masks: For each round, in order, the most masks that it asks for.

        Examples:
            >>> from fastprune.search import Search
            >>> from fastprune.testing import SyntheticEvaluator
            >>> search = Search(SyntheticEvaluator(8), num_remove=2, seed=0, protect=())
            >>> search.plan([8, 7])
            >>> losses = search.score([(unit,) for unit in range(8)])
        """
        self._planned = [0]
        for count in masks:
            self._planned.append(self._planned[-1] + max(1, count))

    def describe(self, event: ProgressEvent) -> ProgressEvent:
        """Add this search's fields to an event: algorithm, round, best loss and share."""
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
        """The lowest loss of a complete subset so far, or of the largest, as text."""
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
        """The key of a candidate in `losses`."""
        return tuple(sorted(units))

    def _asked(self, candidates: Sequence[tuple[int, ...]]) -> dict[str, Any]:
        """Candidates as arguments of the evaluator's methods."""
        return {"masks": from_removed(candidates, self.num_units)}

    def _is_complete(self, candidate: tuple[int, ...]) -> bool:
        """Whether a candidate may be the result."""
        return self.size.is_complete(candidate)

    def _order(self, candidate: tuple[int, ...]) -> tuple:
        """A sort key: complete subsets first, then the largest, then the lowest losses."""
        complete = self._is_complete(candidate)
        return not complete, 0 if complete else -len(candidate), _rank(self.losses[candidate])

    # -- for algorithms ----------------------------------------------------------------------------

    def score(self, subsets: Sequence[Removed]) -> np.ndarray:
        """Score subsets. Those without a known loss are scored in one call, and share prefixes.

        Args:
            subsets: N subsets of units to remove.

        Returns:
            The loss of removing each subset, float64[N]. A non-finite loss becomes +inf,
            so that it never wins.

        Examples:
            >>> from fastprune.search import Search
            >>> from fastprune.testing import SyntheticEvaluator
            >>> search = Search(SyntheticEvaluator(8), num_remove=2, seed=0, protect=())
            >>> search.score([(0, 1), (2, 3), (1, 0)]).shape, len(search.losses)
            ((3,), 2)
        """
        subsets = [self._key(subset) for subset in subsets]
        new = [subset for subset in dict.fromkeys(subsets) if subset not in self.losses]
        if new:
            self._round += 1
            losses = self.evaluator.score(**self._asked(new))
            self._remember(zip(new, losses.tolist()))
        return np.array([_rank(self.losses[subset]) for subset in subsets])

    def select(self, subsets: Iterable[Removed], keep: int) -> list[Removed]:
        """Select the subsets of lowest loss. With racing, clearly worse subsets leave early.

        Args:
            subsets: The subsets.
            keep: The number of subsets to keep.

        Returns:
            The `keep` best subsets, best first; ties go to the lowest indices. Their losses are
            exact and remembered. With racing, the losses of the others are not.

        Examples:
            >>> from fastprune.search import Search
            >>> from fastprune.testing import SyntheticEvaluator
            >>> search = Search(SyntheticEvaluator(8), num_remove=2, seed=0, protect=())
            >>> pairs = [(0, 1), (2, 3), (4, 5)]
            >>> search.select(pairs, keep=1) == [pairs[search.score(pairs).argmin()]]
            True
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
        """The budget if its units save unlike amounts; None if a number of units decides."""
        return self.size if isinstance(self.size, CostLimit) else None

    def harm(self, steps: Sequence[Step]) -> np.ndarray:
        """Compute the values by which steps are compared.

        Without a budget of units that save unlike amounts, the harm of a step is the loss after it.
        With one, it is the projected loss: the loss at the end of the budget, if each further
        saving costs as much as this step. A step that does not raise the loss counts with its loss.

        Args:
            steps: N pairs of a subset and a further unit to remove.

        Returns:
            float64[N], +inf if the loss is not finite.

        Examples:
            >>> from fastprune.search import Search
            >>> from fastprune.testing import SyntheticEvaluator
            >>> search = Search(SyntheticEvaluator(8), num_remove=2, seed=0, protect=())
            >>> search.harm([((0,), 1)]) == search.score([(0, 1)])
            array([ True])
        """
        after = [as_removed((*subset, unit)) for subset, unit in steps]
        if self.limit is None:
            return self.score(after)
        before = [subset for subset, _ in steps]
        losses = self.score([*before, *after])
        old, new = losses[: len(steps)], losses[len(steps) :]
        costs = [self.limit.costs.after(subset) for subset in before]
        saved = np.array(costs) - [self.limit.costs.after(subset) for subset in after]
        missing = np.array(costs) - self.limit.limit
        with np.errstate(divide="ignore", invalid="ignore"):
            # from loss 2.0 with 60 to save: a step that saves 20 at loss 2.1 projects to 2.3
            projected = old + (new - old) * (missing / saved)
        projected = np.where(np.isfinite(projected), projected, np.inf)
        return np.where(new > old, projected, new)

    def extend(self, steps: Sequence[Step], keep: int) -> list[Removed]:
        """Take steps, and select the best subsets. Their `orders` are remembered.

        Args:
            steps: Pairs of a subset and a further unit to remove.
            keep: The number of subsets to keep.

        Returns:
            The `keep` best subsets after a step, best first, by `harm`. By loss they may race.

        Examples:
            >>> from fastprune.search import Search
            >>> from fastprune.testing import SyntheticEvaluator
            >>> search = Search(SyntheticEvaluator(8), num_remove=2, seed=0, protect=())
            >>> (best,) = search.extend([((0,), 2), ((0,), 1)], keep=1)
            >>> search.orders[best] == (0, *({*best} - {0}))
            True
        """
        harm = None
        if self.limit is not None:
            harm = self.harm(steps)
            steps = [steps[i] for i in harm.argsort(kind="stable")]
            harm.sort()
        best: dict[Removed, int] = {}
        for number, (subset, unit) in enumerate(steps):
            after = as_removed((*subset, unit))
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
        """Make a complete subset.

        Args:
            subset: The units that it begins with.
            order: Further units. They are added in this order until enough units are removed; then
                each needless unit is put back, the latest first.

        Returns:
            The complete subset.

        Examples:
            >>> from fastprune.search import Search
            >>> from fastprune.testing import SyntheticEvaluator
            >>> search = Search(SyntheticEvaluator(8), num_remove=2, seed=0, protect=())
            >>> search.fill((5,), order=(3, 0, 1))
            (3, 5)
        """
        return self.size.fill(subset, order)

    def repaired(self, subset: Removed) -> Removed:
        """Make a subset complete with uniformly drawn units; a complete one is returned as it is.

        Args:
            subset: The subset.

        Returns:
            A complete subset. Units that it does not need are put back.

        Examples:
            >>> from fastprune.search import Search
            >>> from fastprune.testing import SyntheticEvaluator
            >>> search = Search(SyntheticEvaluator(8), num_remove=2, seed=0, protect=())
            >>> len(search.repaired((1,))), len(search.repaired((1, 2, 3, 4)))
            (2, 2)
        """
        if self.size.is_complete(subset):
            return subset
        drawn = self.rng.permutation([u for u in self.candidates if u not in subset]).tolist()
        return self.fill(self.rng.permutation(subset).tolist(), drawn)

    def trimmed(self, subset: Removed) -> Removed:
        """Put back units that a subset does not need, one by one, each time for the lowest loss.

        Args:
            subset: A subset that removes enough units.

        Returns:
            A complete part of it.

        Examples:
            >>> from fastprune.search import Search
            >>> from fastprune.testing import SyntheticEvaluator
            >>> search = Search(SyntheticEvaluator(8), num_remove=2, seed=0, protect=())
            >>> {*search.trimmed((1, 2, 3, 4))} < {1, 2, 3, 4}
            True
        """
        while not self.size.is_complete(subset):
            smaller = [part for part in less_one(subset) if self.size.meets(part)]
            best = smaller[int(self.score(smaller).argmin())]
            (put_back,) = {*subset} - {*best}
            order = self.orders.get(subset)
            if order is not None:
                self.orders.setdefault(best, tuple(unit for unit in order if unit != put_back))
            subset = best
        return subset

    def path(self, subset: Removed) -> list[Removed]:
        """List the subsets on the way to a subset, each with one unit more than the one before.

        Args:
            subset: A subset that the search reached.

        Returns:
            The subsets; none if the algorithm does not remove units one by one.

        Examples:
            >>> from fastprune.search import Search
            >>> from fastprune.testing import SyntheticEvaluator
            >>> search = Search(SyntheticEvaluator(8), num_remove=2, seed=0, protect=())
            >>> (best,) = search.extend([((4,), 1)], keep=1)
            >>> search.path(best)
            [(4,), (1, 4)]
        """
        order = self.orders.get(subset, ())
        path = [tuple(sorted(order[:size])) for size in range(1, len(order) + 1)]
        if not all(part in self.losses for part in path):  # since units were put back
            self.score(path)
        return path

    def score_on_tokens(self, subsets: Sequence[Removed], tokens: int) -> np.ndarray:
        """Score subsets on fresh samples, which are not remembered.

        Samples are drawn without repetition until they hold enough tokens. The last one is cut to
        fit, unless samples are questions. If the calibration set has too few tokens, the result is
        that of `score`.

        Args:
            subsets: N subsets.
            tokens: The number of tokens.

        Returns:
            The loss of each subset, float64[N], +inf if it is not finite.

        Examples:
            >>> from fastprune.search import Search
            >>> from fastprune.testing import SyntheticEvaluator
            >>> search = Search(SyntheticEvaluator(8), num_remove=2, seed=0, protect=())
            >>> search.score_on_tokens([(0, 1), (2, 3)], tokens=1).shape
            (2,)
        """
        order = self.rng.permutation(self.evaluator.num_samples)
        tokens_so_far = np.cumsum(self.evaluator.sample_tokens[order])
        if tokens_so_far[-1] <= tokens:
            return self.score(subsets)
        samples = order[: np.searchsorted(tokens_so_far, tokens) + 1]
        self._round += 1
        losses = self.evaluator.score(
            **self._asked(subsets),
            samples=samples,
            tokens=tokens if self.evaluator.cuts_samples else None,
        )
        return np.array([_rank(loss) for loss in losses.tolist()])

    def score_samples(self, subsets: Sequence[Removed], samples: np.ndarray) -> np.ndarray:
        """Score subsets on some samples, which are not remembered.

        Args:
            subsets: N subsets.
            samples: int64[n], indices of samples. For all of them, the result is that of `score`.

        Returns:
            The mean loss of each subset over these samples, float64[N], +inf if it is not finite.

        Examples:
            >>> import numpy as np
            >>> from fastprune.search import Search
            >>> from fastprune.testing import SyntheticEvaluator
            >>> search = Search(SyntheticEvaluator(8), num_remove=2, seed=0, protect=())
            >>> search.score_samples([(0, 1), (2, 3)], np.array([0])).shape
            (2,)
        """
        if len(samples) == self.evaluator.num_samples:
            return self.score(subsets)
        self._round += 1
        losses = self.evaluator.score_samples(**self._asked(subsets), samples=samples)
        return np.array([_rank(loss) for loss in losses.mean(axis=1)])

    def best(self) -> Removed:
        """Find the complete candidate of lowest loss so far; ties go to the lowest indices.

        Returns:
            The candidate.

        Raises:
            ArithmeticError: No candidate has a finite loss.

        Examples:
            >>> from fastprune.search import Search
            >>> from fastprune.testing import SyntheticEvaluator
            >>> search = Search(SyntheticEvaluator(8), num_remove=2, seed=0, protect=())
            >>> pairs = [(0, 1), (2, 3), (4, 5)]
            >>> losses = search.score(pairs)
            >>> search.best() == pairs[losses.argmin()]
            True
        """
        complete = [subset for subset in self.losses if self._is_complete(subset)]
        best = min(complete, key=lambda subset: (_rank(self.losses[subset]), subset))
        if not math.isfinite(self.losses[best]):
            raise ArithmeticError(
                f"none of the {len(complete)} {self.candidates_name} scored has a finite loss"
            )
        return best

    def chosen(self, subset: Removed) -> Removed:
        """Score the choice of a method's own rule, and check it.

        Args:
            subset: The subset.

        Returns:
            The subset.

        Raises:
            ArithmeticError: Its loss is not finite.

        Examples:
            >>> from fastprune.search import Search
            >>> from fastprune.testing import SyntheticEvaluator
            >>> search = Search(SyntheticEvaluator(8), num_remove=2, seed=0, protect=())
            >>> search.chosen((0, 1))
            (0, 1)
        """
        self.score([subset])
        if not math.isfinite(self.losses[subset]):
            raise ArithmeticError(f"the subset that was chosen, {subset}, has no finite loss")
        return subset


class SequenceSearch(Search):
    """The task of an algorithm over sequences.

    Its candidates are tuples of units in the order in which they run. No unit is removed.

    Attributes:
        candidates: The unprotected units, ascending. Protected units run once, in their place.
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
        super().__init__(evaluator, None, seed, protect, racing, algorithm)

    def _key(self, units: Iterable[int]) -> Units:
        return tuple(units)

    def _asked(self, candidates: Sequence[Units]) -> dict[str, Any]:
        return {"sequences": candidates}

    def _is_complete(self, candidate: Units) -> bool:
        return True

    def _order(self, candidate: Units) -> tuple:
        return (_rank(self.losses[candidate]),)


def _rank(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf
