"""The units that must stay: given one by one, or as a preset, what a published method never tries
to remove."""

from __future__ import annotations

from collections.abc import Iterable

from ..masks import check_removed
from ..validate import check_one_of

PRESETS = {"sleb": (1, 1), "shortened-llama": (4, 2)}  # blocks at the start and at the end


def protected_units(
    protect: Iterable[int] | str, num_units: int, granularity: str
) -> tuple[int, ...]:
    """The protected units, ascending, of a collection of indices or the name of a preset.

    Of sublayers, a preset protects both halves of its blocks. Raises InputError for a name that is
    no preset, and for an index that is out of range or given twice.
    """
    if not isinstance(protect, str):
        return check_removed(protect, num_units, "protected")
    check_one_of("protect", protect, PRESETS, also="indices such as (0, 1)")
    first, last = PRESETS[protect]
    halves = 2 if granularity == "sublayer" else 1
    return tuple(
        u for u in range(num_units) if u < first * halves or u >= num_units - last * halves
    )
