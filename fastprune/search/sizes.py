"""Sizes of a removal: a number of units, or enough units to meet a budget."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..costs import UNITS, Budget, UnitCosts
from ..errors import InputError
from .protect import units_to_remove

Removed = tuple[int, ...]
Key = int | str | None  # a size as files name it


@dataclass(frozen=True)
class RemovalSize:
    """The size of a removal as a caller asks for it: a number of units or a budget. A search over
    sequences, which removes nothing, has neither.

    >>> from fastprune.search.sizes import RemovalSize
    >>> [RemovalSize.of(key).describe(12) for key in (3, "params=75%", None)]
    ['3 of 12 removed', 'within params=75%', 'sequences']
    """

    num_remove: int | str | None = None
    budget: Budget | None = None

    @classmethod
    def of(cls, value: int | str | Budget | None) -> RemovalSize:
        """The size of a number, a text such as "25%" or "params=75%", a Budget, or None. Raises
        InputError for a text that is no budget."""
        if isinstance(value, str) and "=" in value:
            value = Budget.parse(value)
        return cls(budget=value) if isinstance(value, Budget) else cls(num_remove=value)

    @property
    def key(self) -> Key:
        """The plain value that names the size in files; `of` reads it."""
        return self.num_remove if self.budget is None else str(self.budget)

    @property
    def arguments(self) -> dict[str, Any]:
        """The size as arguments of `run_search`."""
        return {"num_remove": self.num_remove, "budget": self.budget}

    def describe(self, num_units: int | None = None) -> str:
        """The size in words, with the number of all units if it is given."""
        if self.budget is not None:
            return f"within {self.budget}"
        if self.num_remove is None:
            return "sequences"
        return f"{self.num_remove}{'' if num_units is None else f' of {num_units}'} removed"

    def resolve(
        self, num_units: int, candidates: Sequence[int], costs_of: Callable[[Budget], UnitCosts]
    ) -> tuple[Size, list[int], UnitCosts | None]:
        """The size of complete removals, the candidates for them, and the costs if a budget asks
        for them.

        Raises InputError for a number of units that may not go, and for a budget that no removal
        can meet.
        """
        if self.budget is not None:
            return size_within(self.budget, costs_of, candidates)
        asked = 0 if self.num_remove is None else self.num_remove
        count = units_to_remove(asked, num_units, len(candidates))
        return UnitCount(count), list(candidates), None

    def as_number(
        self, num_units: int, candidates: Sequence[int], costs_of: Callable[[Budget], UnitCosts]
    ) -> RemovalSize:
        """The number of units that this size is on a model, or the budget itself where it is more
        than a number: units save unlike amounts or nothing, or their times are measured, which
        another run measures otherwise."""
        if self.budget is None:
            if self.num_remove is None:
                return self
            return RemovalSize(units_to_remove(self.num_remove, num_units))
        size, useful, _ = self.resolve(num_units, candidates, costs_of)
        is_number = isinstance(size, UnitCount) and useful == list(candidates)
        return RemovalSize(size.most) if is_number and not self.budget.is_measured else self


class Size(ABC):
    """Decides which subsets of the candidates are complete, and completes others.

    Attributes:
        most: The number of units of the largest complete subset.
    """

    most: int

    @abstractmethod
    def meets(self, subset: Removed) -> bool:
        """Whether the subset removes enough."""

    @abstractmethod
    def every(self, candidates: Sequence[int]) -> Iterator[Removed]:
        """Yield every complete subset of the candidates once."""

    def is_complete(self, subset: Removed) -> bool:
        """Whether the subset removes enough, and no unit of it could be put back."""
        return self.meets(subset) and not any(self.meets(smaller) for smaller in less_one(subset))

    def fill(self, subset: Iterable[int], order: Iterable[int]) -> Removed:
        """Make a subset complete.

        Units are added in this order until the subset removes enough, or none is left. Then each
        unit that is not needed is put back, the latest first.
        """
        units = [int(unit) for unit in subset]
        for unit in order:
            if self.meets(tuple(units)):
                break
            units.append(int(unit))
        for unit in reversed(list(units)):
            fewer = [other for other in units if other != unit]
            if self.meets(tuple(fewer)):
                units = fewer
        return tuple(sorted(units))


class UnitCount(Size):
    """A fixed number of units."""

    def __init__(self, count: int):
        self.most = count

    def meets(self, subset: Removed) -> bool:
        return len(subset) >= self.most

    def every(self, candidates: Sequence[int]) -> Iterator[Removed]:
        return itertools.combinations(candidates, self.most)


class CostLimit(Size):
    """The most that the pruned model may cost, for units that save unlike amounts.

    Args:
        costs: The costs of all units.
        limit: The most that the model may cost.
        candidates: The units that may be removed.
    """

    def __init__(self, costs: UnitCosts, limit: float, candidates: Sequence[int]):
        self.costs, self.limit = costs, limit
        cheapest = sorted(candidates, key=lambda unit: costs.own[unit])
        self.most = next(
            count for count in range(len(cheapest) + 1) if self.meets(tuple(cheapest[:count]))
        )

    def meets(self, subset: Removed) -> bool:
        return self.costs.after(subset) <= self.limit

    def every(self, candidates: Sequence[int]) -> Iterator[Removed]:
        """Yield every complete subset of the candidates once.

        Units are tried from the costliest down, so the unit added last is the cheapest. If a subset
        was not enough without it, it is not enough without any other unit.
        """
        order = sorted(candidates, key=lambda unit: (-self.costs.own[unit], unit))

        def extend(subset: Removed, start: int) -> Iterator[Removed]:
            if self.meets(subset):
                if self.is_complete(subset):  # shared weights may break the rule above
                    yield tuple(sorted(subset))
                return
            for place in range(start, len(order)):
                if not self.meets((*subset, *order[place:])):
                    return
                yield from extend((*subset, order[place]), place + 1)

        return extend((), 0)


def as_removed(units: Iterable) -> Removed:
    return tuple(sorted(int(unit) for unit in units))


def less_one(subset: Removed) -> list[Removed]:
    """The subsets with one unit less."""
    return [subset[:i] + subset[i + 1 :] for i in range(len(subset))]


def size_within(
    budget: Budget, costs_of: Callable[[Budget], UnitCosts], candidates: Sequence[int]
) -> tuple[Size, list[int], UnitCosts]:
    """Translate a budget into the size of a removal.

    Returns:
        The size, which is a number of units if all candidates save the same; the candidates that
        save anything; the costs.

    Raises:
        InputError: No removal can meet the budget.
    """
    costs = costs_of(budget)
    limit = budget.limit(costs.total)
    useful = [unit for unit in candidates if costs.saves(unit)]
    every = tuple(useful)
    largest = less_one(every) if len(useful) == len(costs.own) else [every]  # one unit stays
    least = min(costs.after(units) for units in largest)
    if least > limit:
        is_share = budget.amount == limit <= 100 and budget.kind in ("params", "bytes")
        raise InputError(
            f"budget {budget} cannot be met: without all removable units, the model has "
            f"{least:,.10g} {UNITS[costs.kind]}"
            + f'; a share of the whole model is written "{costs.kind}=75%"'
            * is_share,
            argument="budget",
            least=least,
        )
    size = CostLimit(costs, limit, useful)
    return UnitCount(size.most) if costs.alike(useful) else size, useful, costs
