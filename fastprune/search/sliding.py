"""A window that slides down the model, and takes in units of little cost."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated

from .draws import as_removed
from .registry import Allowed, algorithm
from .run import Removed, Search


@algorithm
def sliding_window_merge(
    search: Search, keep: Annotated[str, Allowed(choices=("low", "high"))] = "high"
) -> Removed:
    """Remove all but one unit of each longest window whose loss is low enough, from the top.

    The walk begins at the last unit but one. A window begins as two units and grows downwards by
    one as long as the loss, without all but one of its units and without what earlier windows have
    removed, is at most a threshold. Then the next one begins: from the unit below, or, where not
    even two units could go together, one further down. The walk ends when k units are removed. The
    threshold is the lowest for which a walk removes k. Nothing is merged into the unit that stays.
    The last unit is in no window. A window steps over protected units. Where k leaves no other
    choice, every unit goes that can, the last one last. The result is what the last walk removes.

    Source: the selection of Sliding-Window Merging (arXiv 2502.19159), with the loss in the place
    of the likeness of final states (the objective cosine) and the budget in that of the threshold.
    Cost: U - 1 for each threshold that is tried, of which many are known before.
    Options:
        keep: the unit of a window that stays; the authors' merged layer has the projections of the
            highest.
    """
    last = search.num_units - 1
    order = [unit for unit in search.candidates if unit != last]
    if search.num_remove == 0 or search.num_remove >= len(order):
        subset = as_removed([*order, last][: search.num_remove])
        search.score([subset])
        return subset
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
        threshold = min(refused)  # up to here, the walk would be the same once more


def _walk(
    search: Search, order: list[int], keep: str, threshold: float
) -> Iterator[tuple[Removed, float]]:
    """The subsets that a walk tries, with their losses; those up to the threshold are taken."""
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
