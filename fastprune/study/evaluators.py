"""The models and objectives of a study, and their evaluators on one store of scores."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..costs import Budget, UnitCosts, unit_costs
from ..engine.store import SumStore
from ..errors import InputError
from ..masks import kept_by
from ..objectives import Objective
from ..search import find_algorithm, protected_units
from ..search.registry import check_limits
from ..search.sizes import CostLimit, RemovalSize, Size
from ..workers.processes import Processes, Workers
from .checks import at, check_once
from .controls import Control, Placed, place_controls
from .folder import check_label
from .judging import shared_rows
from .machines import fingerprint

if TYPE_CHECKING:  # a study is checked without torch
    from ..evaluator import Evaluator
    from ..models import Model

    Makers = Mapping[str, Callable[[Model], Objective]]


class Evaluators:
    """The evaluators of a study, on one store.

    One exists at a time: the prefix cache of each may take a good part of the free memory.
    """

    def __init__(
        self,
        models: Sequence[Model],
        objectives: Makers,
        held_out: Makers,
        options: Mapping[str, Any],
    ):
        with at("models"):
            check_once([model.name for model in models])
        for label in (*objectives, *held_out):
            check_label(label)
        for label in held_out:
            if label in objectives:
                raise InputError(
                    f"{label!r} is searched with; what is held out has a label of its own"
                )
        self._models, self._options, self._searched = list(models), {**options}, list(objectives)
        makers = {**objectives, **held_out}
        self._objectives = {
            (m.name, label): make(m) for m in models for label, make in makers.items()
        }
        self._granularity = self._options.get("granularity", "block")
        self._backend = self._options.get("backend", "auto")
        self._current: tuple[tuple[str, str], Evaluator] | None = None
        self._store: SumStore | None = None

    def identity(self) -> dict[str, Any]:
        """The part of a study's settings that its models and objectives decide."""
        return {
            "models": {model.name: model.digest for model in self._models},
            "dtype": {model.name: str(model.dtype) for model in self._models},
            "objectives": {
                f"{name} {label}": [objective.name, objective.content_hash]
                for (name, label), objective in self._objectives.items()
                if label in self._searched
            },
            "granularity": self._granularity,
            "backend": self._backend,
            "machines": dict(self._fingerprints.values()),
        }

    @cached_property
    def _fingerprints(self) -> dict[str, tuple[str, dict[str, object]]]:
        return {model.name: fingerprint(model, self._backend) for model in self._models}

    @property
    def machines(self) -> dict[str, str]:
        """By model, the key of this machine's fingerprint."""
        return {name: key for name, (key, _) in self._fingerprints.items()}

    def check(self, settings: Mapping[str, Any], controls: Sequence[Control]) -> None:
        """Check the searches' settings against every model and objective. Raises InputError."""
        from ..models import Needs, open_runner  # only now: it brings torch

        algorithms, budgets = settings["algorithms"], settings["budgets"]
        for model in self._models:
            open_runner(model, "generic", Needs(self._granularity))
            units = self.num_units(model)
            for control in controls:
                with at(model.name), at(f"control.{control.name}"):
                    control.fixed(units)
            with at(model.name):
                sizes = list(self.sizes(model, settings).values())
            if len({size.key for size in sizes}) < len(sizes):
                raise InputError(
                    f"budgets {', '.join(map(str, budgets))} name one number of units of "
                    f"{model.name} twice"
                )
            for algorithm, values in algorithms.items():
                chosen = find_algorithm(algorithm)
                if chosen.needs_weights and model.weights.streamed:
                    raise InputError(
                        f"{algorithm} needs all weights at once, and {model.name} reads them in "
                        f"bands"
                    )
                for asked in [RemovalSize()] if chosen.over_sequences else sizes:
                    with at(model.name):
                        size, candidates = self.resolve(model, asked, settings["protect"])
                    if isinstance(size, CostLimit):
                        check_limits(chosen, settings["racing"])
                    elif chosen.check_size:
                        chosen.check_size(candidates, size.most, self._granularity, **values)
        for (_, label), objective in self._objectives.items():
            for algorithm in algorithms if label in self._searched else ():
                name = f"{label!r} ({objective.name})"
                find_algorithm(algorithm).check_gradients(objective.differentiable, name)

    def try_all(self, notify: Callable[[str], None]) -> None:
        """Open each evaluator once and keep none: a setting that does not fit a model fails now.

        Args:
            notify: Called with a line before each; the first of a model verifies its runner.
        """
        for (name, label), objective in self._objectives.items():
            notify(f"checking {name} on {label}")
            (model,) = (model for model in self._models if model.name == name)
            self._evaluator(model, objective)

    def describe_objectives(self) -> dict[str, dict]:
        """By label, the description of an objective."""
        return {label: objective.describe() for (_, label), objective in self._objectives.items()}

    def shared_rows(self, label: str) -> int:
        """The number of rows of a held-out objective that share tokens with a calibration set.

        Tokens depend on the model's tokenizer; the largest number of any model counts.
        """
        counts = []
        for model in self._models:
            searched = [self._objectives[model.name, other].batch for other in self._searched]
            judge = self._objectives[model.name, label]
            counts.append(shared_rows(judge.batch, searched, judge.data == "tasks"))
        return max(counts)

    def open_store(self, path: Path) -> None:
        self._store = SumStore(path)

    def get(self, model: Model, label: str) -> Evaluator:
        """Return the evaluator of a model and a label, and drop the one before it."""
        key = (model.name, label)
        if self._current is None or self._current[0] != key:
            self._current = None
            self._current = key, self._evaluator(model, self._objectives[key], store=self._store)
        return self._current[1]

    def _evaluator(self, model: Model, objective: Objective, **more: Any) -> Evaluator:
        from ..evaluator import Evaluator  # only now: it brings torch

        if not isinstance(self._options.get("workers"), (Workers, type(None))):
            self._options["workers"] = Processes(self._options["workers"])
        return Evaluator(model, objective, **more, **self._options)

    def num_units(self, model: Model) -> int:
        return len(model.unit_names(self._granularity))

    def sizes(self, model: Model, settings: Mapping[str, Any]) -> dict[int | str, RemovalSize]:
        """The size of removals that each budget means for a model, by budget.

        The `key` of a size is that of its cells. Raises InputError for a budget that no removal can
        meet.
        """
        units = self._units_that_may_go(model, settings["protect"])
        return {
            budget: RemovalSize.of(budget).as_number(*units, partial(self._costs, model))
            for budget in settings["budgets"]
        }

    def resolve(
        self, model: Model, size: RemovalSize, protect: Iterable[int] | str
    ) -> tuple[Size, list[int]]:
        """The rule for complete removals, and the units that may be removed."""
        units = self._units_that_may_go(model, protect)
        return size.resolve(*units, partial(self._costs, model))[:2]

    def _units_that_may_go(
        self, model: Model, protect: Iterable[int] | str
    ) -> tuple[int, list[int]]:
        units = self.num_units(model)
        stay = {*protected_units(protect, units, self._granularity)}
        return units, [unit for unit in range(units) if unit not in stay]

    def _costs(self, model: Model, budget: Budget) -> UnitCosts:
        size = budget.batch_size, budget.seq_len
        return unit_costs(model, self._granularity, budget.kind, *size)

    def place(
        self,
        model: Model,
        controls: Sequence[Control],
        labels: Iterable[str],
        settings: Mapping[str, Any],
    ) -> list[Placed]:
        """The candidates of a model's controls."""
        sizes = {
            size.key: self.resolve(model, size, settings["protect"])
            for size in self.sizes(model, settings).values()
        }
        units, candidates = self._units_that_may_go(model, settings["protect"])

        def singles(label: str) -> dict[int, float]:
            sequences = [kept_by((unit,), units) for unit in candidates]
            losses = self.get(model, label).score(sequences=sequences)
            return dict(zip(candidates, losses.tolist(), strict=True))

        return list(
            place_controls(controls, units, sizes, list(labels), cache(singles), settings["seed"])
        )

    def parameters(self, model: Model) -> dict[str, object]:
        """Parameters of a model: all, those of each unit alone, and those that units share."""
        costs = unit_costs(model, self._granularity, "params")
        shared = [{"units": sorted(units), "parameters": size} for units, size in costs.shared]
        return {"total": costs.total, "own": list(costs.own), "shared": shared}
