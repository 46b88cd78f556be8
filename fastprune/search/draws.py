"""Random subsets: distinct ones, and swaps."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection

import numpy as np

from .sizes import as_removed
from .task import Removed, Search

PATIENCE = 100  # draws in a row without a new subset that end the drawing


def distinct(
    draw: Callable[[], Removed], count: int, known: Collection[Removed] = ()
) -> list[Removed]:
    """Draw `count` different unknown subsets, in order; fewer if drawing gives no new ones."""
    drawn: dict[Removed, None] = {}
    misses = 0
    while len(drawn) < count and misses < PATIENCE:
        subset = draw()
        misses = misses + 1 if subset in drawn or subset in known else 0
        if not misses:
            drawn[subset] = None
    return list(drawn)


def uniform(search: Search, count: int) -> list[Removed]:
    """Draw `count` different complete subsets uniformly; all of them if they are fewer.

    Under a budget of units that save unlike amounts, units are removed in a uniform order until the
    budget is met. Units that it does not need are put back.
    """
    candidates, k = search.candidates, search.num_remove
    some = list(itertools.islice(search.size.every(candidates), 10 * count + 1))
    if len(some) <= 10 * count:  # few enough to list, and drawing would often repeat itself
        return [some[i] for i in search.rng.permutation(len(some))[:count]]
    if search.limit is not None:
        return distinct(lambda: search.repaired(()), count)
    return distinct(lambda: as_removed(search.rng.choice(candidates, k, replace=False)), count)


def swapped(search: Search, subset: Removed, swaps: int) -> Removed:
    """Exchange `swaps` removed units for kept ones, drawn uniformly; fewer if units run out."""
    kept = [unit for unit in search.candidates if unit not in subset]
    swaps = min(swaps, len(subset), len(kept))
    out = search.rng.choice(len(subset), swaps, replace=False)
    into = search.rng.choice(len(kept), swaps, replace=False)
    return as_removed([*np.delete(subset, out), *(kept[i] for i in into)])
