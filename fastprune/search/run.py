"""Run a search: its arguments, and its result."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from ..costs import Budget
from ..errors import InputError
from ..masks import from_removed, kept_by
from ..plan.cost import Cost
from ..plan.progress import ProgressCallback, reporting
from ..validate import check_callable, check_integer, check_kind
from .registry import check_algorithm, check_limits, check_racing
from .sizes import Removed
from .task import Metric, Scorer, Search, SequenceSearch, Units

# names that editors complete; packages add others
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


@dataclass(frozen=True, repr=False)
class SearchResult:
    """The outcome of a search.

    Attributes:
        algorithm: The name of the algorithm.
        options: Its options with their values.
        seed: The seed.
        objective: The name of the objective.
        granularity: "block" or "sublayer".
        num_units: U.
        sequence: The units that run, in order.
        removed: The removed units, ascending; None for a search over sequences.
        mask: bool[U], True for a kept unit; None for a search over sequences.
        loss: The loss of the result.
        metric: The objective's class, which reads losses.
        history: (removed, loss) or (sequence, loss) of each candidate whose exact loss is known, in
            order. Candidates that left a race, or were scored on a share of the samples, are not
            among them.
        evaluations: The length of the history.
        cost: The cost of this search alone, with its wall time in seconds.
        choice: "best scored" for the best candidate of the history; "method's" for the choice of
            the method's own rule, even if a better candidate was scored.
        racing: The confidence of its races; None without races, and for sets too small to race.
        decided_early: The number of candidates that left a race before the last samples.
        budget: The budget as text; None without one.
        costs: The kind of cost, and the cost of the whole model and of the pruned model.
        path: For greedy and beam, (removed, loss, remaining cost) after each removed unit, in
            order. The last entry is the result.

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
        """Convert the result into plain values, as result.json holds them.

        Returns:
            The values by name. The units are under "removed", or under "sequence" for a search over
            sequences.

        Examples:
            >>> import fastprune as fp
            >>> from fastprune.testing import SyntheticEvaluator
            >>> result = fp.run_search(SyntheticEvaluator(num_units=8), "one_shot", num_remove=2)
            >>> result.to_dict()["algorithm"], len(result.to_dict()["removed"])
            ('one_shot', 2)
        """
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
    """Search for the units whose removal gives the lowest loss.

    An algorithm over sequences, such as "repeat", searches for the sequence of units with the
    lowest loss instead. A search is deterministic for a seed.

    Args:
        evaluator: The evaluator that scores candidates.
        algorithm: The name of an algorithm; `fastprune.search.describe_algorithms` lists them.
        num_remove: The number of units to remove, or a share such as "25%", rounded down to at
            least 1. Leave it out for a budget, or over sequences.
        seed: Decides all random choices.
        protect: Units that must stay; in a sequence, units that run once. "sleb" and
            "shortened-llama" name the units that these methods never remove.
        racing: A confidence such as 0.99. Each selection of an algorithm that races then drops
            clearly worse candidates early (`Evaluator.race`). The loss of the result is exact.
        budget: Instead of num_remove, the most that the pruned model may cost, such as
            `fp.Budget(params="75%")`. If all units save the same, a number of units meets it.
            Otherwise only some algorithms take a budget.
        progress: Called with a `ProgressEvent` as the search runs.
        options: Options of the algorithm.

    Returns:
        The result, with its exact loss, its history and its cost.

    Raises:
        InputError: The algorithm, an option or a preset is unknown. num_remove is missing,
            meaningless, or outside 0 to U - 1. No removal meets the budget. racing is outside
            (0, 1), or the algorithm does not race.
        ArithmeticError: No candidate has a finite loss.

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
        check_limits(chosen, racing)
    elif chosen.check_size:
        chosen.check_size(search.candidates, search.num_remove, evaluator.granularity, **options)
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
        racing=search.racing,
        decided_early=search.decided_early,
        budget=None if budget is None else str(budget),
        costs={"kind": costs.kind, "before": costs.total, "after": costs.after(best)}
        if is_mask
        else {},
        path=[(part, search.losses[part], costs.after(part)) for part in path],
    )
