"""Budgets, and units that must stay.

Protected units are named one by one, or by a preset: the units that a published method never tries
to remove.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from ..errors import InputError, shown
from ..masks import check_removed
from ..validate import check_integer, check_one_of

PRESETS = {"sleb": (1, 1), "shortened-llama": (4, 2)}  # blocks at the start and at the end


def protected_units(
    protect: Iterable[int] | str, num_units: int, granularity: str
) -> tuple[int, ...]:
    """List the protected units.

    Args:
        protect: Indices of units, or the name of a preset. With sublayers, a preset protects both
            halves of its blocks.
        num_units: U.
        granularity: "block" or "sublayer".

    Returns:
        The units, ascending.

    Raises:
        InputError: The preset is unknown, or an index is out of range or given twice.
    """
    if not isinstance(protect, str):
        return check_removed(protect, num_units, "protected")
    check_one_of("protect", protect, PRESETS, also="indices such as (0, 1)")
    first, last = PRESETS[protect]
    halves = 2 if granularity == "sublayer" else 1
    return tuple(
        u for u in range(num_units) if u < first * halves or u >= num_units - last * halves
    )


def check_budget(budget: int | str) -> float | None:
    """Read the percentage of a budget such as "25%"; None for an integer.

    Raises:
        InputError: The text has another form, or the percentage is not between 0 and 100.
    """
    if not isinstance(budget, str):
        return None
    share = re.fullmatch(r"(\d{1,3}(?:\.\d{1,9})?)%", budget.strip())
    if share is None or not 0 < float(share[1]) < 100:
        raise InputError(
            f'num_remove must be an integer or a share such as "25%", not {shown(budget)}',
            argument="num_remove",
        )
    return float(share[1])


def units_to_remove(budget: int | str, num_units: int, num_free: int | None = None) -> int:
    """Compute the number of units that a budget removes.

    Args:
        budget: The number, or a share such as "25%", rounded down to at least 1.
        num_units: U.
        num_free: The number of units that are not protected; by default all.

    Raises:
        InputError: The number is outside 0 to num_units - 1, or above num_free.

    Examples:
        >>> from fastprune.search import units_to_remove
        >>> units_to_remove("25%", 14), units_to_remove(3, 14)
        (3, 3)
    """
    percentage = check_budget(budget)
    if percentage is not None:
        budget = max(1, int(num_units * percentage / 100))
    of = f"since the model has {num_units} units"
    count = check_integer("num_remove", budget, 0, num_units - 1, of)
    if num_free is not None and count > num_free:
        free = "1 unit is" if num_free == 1 else f"{num_free} units are"
        raise InputError(
            f"num_remove is {count}, but only {free} not protected",
            argument="num_remove",
            most=num_free,
        )
    return count
