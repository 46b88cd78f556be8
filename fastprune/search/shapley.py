"""Shapley values: what each unit adds to the loss, on the average over orders of removal."""

from __future__ import annotations

import math

import numpy as np

from .draws import as_removed
from .one_shot import lowest
from .registry import Count, CountOrAuto, algorithm
from .run import Removed, Search


@algorithm
def shapley(search: Search, permutations: Count = 16, depth: CountOrAuto = 0) -> None:
    """Remove the k units of lowest Shapley value: their mean cost along random orders.

    Each random order of all units that may go is cut into pieces of `depth` units. Along a piece,
    units are removed one after the other from the whole model, and each is charged the increase of
    the loss: every unit is charged once for an order, with 0 to depth - 1 others removed before it.
    All these subsets are scored in one call. A unit whose removal has made the loss no longer
    finite comes last, and what follows it in its piece is not charged. The k units of lowest mean
    charge are scored at the end.

    Source: Siddiqui et al. (arXiv 2407.16286), with the loss as the value.
    Cost: at most permutations U + 2.
    Options:
        permutations: random orders of removal.
        depth: most units removed together; 0 for k, as larger subsets are not asked for.
    """
    if search.num_remove == 0:
        search.score([()])
    else:
        search.score(
            [lowest(search, shapley_values(search, permutations, depth or search.num_remove))]
        )


def shapley_values(search: Search, permutations: int, depth: int) -> np.ndarray:
    """The mean charge of each unit, float64[candidates], +inf where it broke the loss or was never
    charged."""
    search.plan([permutations * len(search.candidates) + 1, 1])
    depth = min(depth, search.num_units - 1)  # something is always kept
    orders = [search.rng.permutation(search.candidates).tolist() for _ in range(permutations)]
    pieces = [
        order[start : start + depth] for order in orders for start in range(0, len(order), depth)
    ]
    search.score([(), *(subset for piece in pieces for subset in _prefixes(piece))])
    charges: dict[int, list[float]] = {unit: [] for unit in search.candidates}
    for piece in pieces:
        losses = search.score([(), *_prefixes(piece)]).tolist()  # known by now
        for unit, before, after in zip(piece, losses, losses[1:]):
            if math.isfinite(before):
                charges[unit].append(after - before)
    return np.array([np.mean(charged or [math.inf]) for charged in charges.values()])


def _prefixes(piece: list[int]) -> list[Removed]:
    return [as_removed(piece[: i + 1]) for i in range(len(piece))]
