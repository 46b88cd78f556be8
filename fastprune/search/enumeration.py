"""Searches over subsets known beforehand: all of them, a random sample, all windows."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from ..errors import InputError
from . import draws
from .registry import Count, algorithm
from .task import Removed, Search

AT_ONCE = 1 << 16  # masks of one call: enough to share prefixes, few enough for its bookkeeping


@algorithm(races=True)
def contiguous(search: Search) -> None:
    """Score every window of k adjacent units.

    A window that touches a protected unit is not a candidate. If protection leaves no window, the
    units on both sides of protected ones count as adjacent, so that a window steps over these.

    Source: the shape of subset of Gromov et al. (arXiv 2403.17887), chosen by the loss itself.
    Cost: U - k + 1.
    """
    chosen = windows(search.candidates, search.num_remove)
    search.plan([len(chosen)])
    search.select(chosen, 1)


def _few_enough(
    candidates: Sequence[int], num_remove: int, granularity: str, max_masks: int
) -> None:
    total = math.comb(len(candidates), num_remove)
    if total > max_masks:
        raise InputError(
            f"exhaustive would score C({len(candidates)}, {num_remove}) = {total} subsets, "
            f"above its option max_masks={max_masks}"
        )


@algorithm(check_size=_few_enough, races=True, limits=True)
def exhaustive(search: Search, max_masks: Count = 100_000) -> None:
    """Score every subset of k units: the optimum, and proof of it.

    Under a budget of units that save unlike amounts, candidates are the subsets that meet it and
    of which no unit could be put back.

    Source: the definition of the problem.
    Cost: C(U, k).
    Options:
        max_masks: refuse to score more subsets than this.
    """
    subsets = search.size.every(search.candidates)
    total = math.comb(len(search.candidates), search.num_remove)
    if search.limit is not None:
        some = sorted(itertools.islice(subsets, max_masks + 1))
        if len(some) > max_masks:
            raise InputError(
                f"exhaustive would score more subsets than its option max_masks={max_masks}"
            )
        total, subsets = len(some), iter(some)
    # in order, so that prefixes are neighbours
    search.plan(min(AT_ONCE, total - start) for start in range(0, total, AT_ONCE))
    while part := list(itertools.islice(subsets, AT_ONCE)):
        search.select(part, 1)


@algorithm(name="random", races=True, limits=True)
def random_subsets(search: Search, num_masks: Count = 100) -> None:
    """Score num_masks different subsets of k units, drawn uniformly.

    If there are fewer subsets, all are scored.

    Source: the baseline of every comparison.
    Cost: num_masks.
    Options:
        num_masks: subsets to draw.
    """
    search.plan([num_masks])
    search.select(draws.uniform(search, num_masks), 1)


def windows(candidates: list[int], k: int) -> list[Removed]:
    """List the windows of k adjacent candidates, by start.

    If no window is adjacent, any k neighbours in `candidates` are a window.
    """
    neighbours = [tuple(candidates[i : i + k]) for i in range(len(candidates) - k + 1)]
    if k == 0:
        return [()]
    adjacent = [window for window in neighbours if window[-1] - window[0] == k - 1]
    return adjacent or neighbours
