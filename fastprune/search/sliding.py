"""A window that slides down the model and takes in units whose removal costs little."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated

from .registry import Allowed, algorithm
from .sizes import as_removed
from .task import Removed, Search


@algorithm
def sliding_window_merge(
    search: Search, keep: Annotated[str, Allowed(choices=("low", "high"))] = "high"
) -> Removed:
    """Remove all but one unit of each longest window whose loss is low enough, from the top.

    The walk begins at the last unit but one. A window begins as two units and grows downwards, one
    unit at a time. It grows while the loss is at most a threshold, without all but one of its units
    and without the units that earlier windows removed. Then the next window begins at the unit
    below. If a window could not even hold two units, the next begins one unit further down. The
    walk ends when k units are removed. The threshold is the lowest for which a walk removes k. No
    unit is merged into the one that stays. The last unit is in no window. A window steps over
    protected units. If k leaves no other choice, every removable unit is removed, the last one
    last. The result is the subset that the last walk removes.

    Source: the selection of Sliding-Window Merging (arXiv 2502.19159), with the loss instead of the
    similarity of final states (the objective cosine), and the budget instead of the threshold.
    Cost: U - 1 for each tried threshold; many of these losses are known already.
    Options:
        keep: the unit of a window that stays; the authors' merged layer has the projections of the
            highest.
    """
    last = search.num_units - 1
    order = [unit for unit in search.candidates if unit != last]
    if search.num_remove == 0 or search.num_remove >= len(order):
        return as_removed([*order, last][: search.num_remove])
    search.score([(unit,) for unit in order])  # the first units of windows, in one call
    threshold = -math.inf
    while True:
        removed: Removed = ()
        refused: list[float] = []
        for subset, loss in _walk(search, order, keep, threshold):
            if loss <= threshold:
                removed = subset
            else:
                refused.append(loss)
        if len(removed) == search.num_remove:
            return removed
        threshold = min(refused)  # any lower threshold would repeat the same walk


def _walk(
    search: Search, order: list[int], keep: str, threshold: float
) -> Iterator[tuple[Removed, float]]:
    """Yield the subsets that a walk tries, with their losses; those up to the threshold stay."""
    removed: Removed = ()
    high = len(order) - 1
    while high > 0 and len(removed) < search.num_remove:
        low, taken = high - 1, removed
        while low >= 0 and len(taken) < search.num_remove:
            window = order[low + 1 : high + 1] if keep == "low" else order[low:high]
            subset = as_removed([*removed, *window])
            loss = float(search.score([subset])[0])
            yield subset, loss
            if loss > threshold:
                break
            taken, low = subset, low - 1
        high = low if taken != removed else high - 1
        removed = taken
