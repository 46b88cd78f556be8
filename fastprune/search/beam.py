"""Round by round: greedy elimination and beam search."""

from __future__ import annotations

from .registry import Count, algorithm
from .run import Removed, Search


@algorithm(races=True, studied=True, limits=True, weighs=True)
def greedy(search: Search) -> None:
    """k rounds; each removes the unit whose additional removal gives the lowest loss.

    Equal to beam with width 1.

    Source: SLEB (arXiv 2402.09025).
    Cost: U + (U - 1) + ... + (U - k + 1).
    """
    beam(search, beam_width=1)


@algorithm(races=True, studied=True, limits=True, weighs=True)
def beam(search: Search, beam_width: Count = 5) -> None:
    """k rounds; each extends every kept subset by every unit and keeps the beam_width lowest.

    Equal subsets are merged. A race of the last round keeps the best one alone, since nothing is
    made of the others. Under a budget of units that save unlike amounts, a subset is judged by the
    loss that the budget would end with if all that remains to be saved cost as much as its last
    unit. Those that meet the budget leave the beam, less the units that it does not need, and the
    lowest loss among them wins.

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
        # best first, so that a subset's order begins with the best of its parts
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
