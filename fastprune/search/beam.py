"""Searches that remove one unit a round: greedy elimination and beam search."""

from __future__ import annotations

from .registry import Count, algorithm
from .task import Removed, Search


@algorithm(races=True, studied=True, limits=True, weighs=True, stepwise=True)
def greedy(search: Search) -> None:
    """Remove, in each of k rounds, the unit whose removal gives the lowest loss.

    The search equals beam with width 1.

    Source: SLEB (arXiv 2402.09025).
    Cost: U + (U - 1) + ... + (U - k + 1).
    """
    beam(search, beam_width=1)


@algorithm(races=True, studied=True, limits=True, weighs=True, stepwise=True)
def beam(search: Search, beam_width: Count = 5) -> None:
    """Extend, in each of k rounds, every kept subset by every unit; keep the beam_width lowest.

    Equal subsets are merged. A race of the last round keeps the best subset alone, since no round
    extends the others. Under a budget of units that save unlike amounts, a subset is judged by its
    projected loss: the loss at the end of the budget if each further saving costs as much as the
    last unit did. Subsets that meet the budget leave the beam, after units that it does not need
    are put back. The lowest loss among them wins.

    Source: Kim et al. (arXiv 2604.24938).
    Cost: U + at most beam_width ((U - 1) + ... + (U - k + 1)).
    Options:
        beam_width: subsets kept after each round.
    """
    candidates = len(search.candidates)
    search.plan(
        candidates if size == 0 else beam_width * (candidates - size)
        for size in range(max(1, search.num_remove))
    )
    kept: list[Removed] = [()]
    if search.size.meets(()):
        search.score(kept)
    for size in range(1, search.num_remove + 1):
        # best subsets first: the order of an extended subset then begins with its best part
        steps = [
            (subset, unit) for subset in kept for unit in search.candidates if unit not in subset
        ]
        is_last = search.limit is None and size == search.num_remove
        ranked = search.extend(steps, 1 if is_last else beam_width)
        kept = [subset for subset in ranked if not search.size.meets(subset)]
        for subset in ranked:
            if subset not in kept:
                search.trimmed(subset)
        if not kept:
            return
