"""Which states are worth keeping beyond a call, for calls that come after it. Pure integers and
NumPy.

A later call asks for sequences that leave the trie at some node; it then runs the nodes below the
deepest cached prefix. So a state is worth the unit runs that it saves: how likely sequences leave
at its node, or below it with no cached prefix in between, times the units from the next cached
prefix above. Every state takes the same bytes, so the state of least worth is evicted first, and
its likelihood passes on to the prefix above, until the states fit. The states that remain are
spread over the trie: a chain of which few states fit keeps them at even distances; a list of the
most recently used would keep its beginning.

In a chain of nodes 1 to 4, all of likelihood 1, each state saves one unit run. The
deepest of equals is evicted: 4, whose likelihood passes to 3, then 2, whose likelihood passes to 1.
If two states fit, 1 and 3 remain, worth 2 * (1 - 0) and 2 * (3 - 1) unit runs.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from functools import cached_property
from typing import Any

import numpy as np

from .trie import Trie, Units, levels

FADE = 0.9  # the factor of a likelihood for each call that does not pass the node
MOST_CANDIDATES = 1 << 14  # states compared one by one; more only if more are retained


class Prefixes:
    """The prefixes whose states a cache holds of a chunk, and how likely a later call needs each.

    Immutable: each call makes another one. Chunks that hold the same share one.

    Args:
        prefixes: K distinct prefixes.
        likelihood: float64[K], of each; 0 by default.

    Examples:
        >>> from fastprune.plan.retention import Prefixes
        >>> held = Prefixes([(0, 1), (2,)], [1.0, 1.0])
        >>> held.on_the_way([(0, 1, 3)]).prefixes
        ((0, 1),)
        >>> held.followed_by(Prefixes([(0, 1), (0, 1, 3)], [1.9, 1.0])).likelihood.tolist()
        [1.9, 0.9, 1.0]
    """

    def __init__(self, prefixes: Iterable[Units] = (), likelihood: Iterable[float] | None = None):
        prefixes = list(prefixes)
        values = [0.0] * len(prefixes) if likelihood is None else [float(x) for x in likelihood]
        self._call = 0
        # by prefix: its likelihood, and the call after which it was that. It fades with every call.
        self._noted = {prefix: (value, 0) for prefix, value in zip(prefixes, values, strict=True)}

    def __len__(self) -> int:
        return len(self._noted)

    @cached_property
    def prefixes(self) -> tuple[Units, ...]:
        """The K prefixes."""
        return tuple(self._noted)

    @cached_property
    def likelihood(self) -> np.ndarray:
        """float64[K], of `prefixes`."""
        noted = self._noted.values()
        return np.array([value * FADE ** (self._call - call) for value, call in noted])

    def on_the_way(self, sequences: Iterable[Units]) -> Prefixes:
        """The ones with which a sequence begins."""
        noted = self._noted
        begun = (s[:length] for s in sequences for length in range(1, len(s) + 1))
        inside = {prefix: noted[prefix] for prefix in begun if prefix in noted}
        return Prefixes(
            inside, [value * FADE ** (self._call - call) for value, call in inside.values()]
        )

    def followed_by(self, retained: Prefixes) -> Prefixes:
        """The prefixes held after a call that evicts none. retained: the ones on its way, all."""
        following = Prefixes()
        following._call = call = self._call + 1
        following._noted = dict(self._noted)
        for prefix, value in zip(retained.prefixes, retained.likelihood.tolist()):
            following._noted[prefix] = value, call
        return following


def worth_retaining(
    trie: Trie, likelihood: np.ndarray, capacity: int
) -> tuple[np.ndarray, np.ndarray]:
    """The nodes whose states are best retained, int64[R], most worth first, R at most `capacity`;
    their likelihoods.

    likelihood float64[K]: of trie.cached, as the last call left them. Candidates are these and the
    wanted nodes.
    """
    if capacity <= 0:
        return np.zeros(0, dtype=np.int64), np.zeros(0)
    weight = np.zeros(len(trie.unit))
    weight[trie.cached_nodes] = FADE * likelihood
    touched = trie.wanted.copy()
    touched[trie.cached_nodes] |= trie.asked[trie.cached_nodes]
    weight[touched] += 1
    by_depth = levels(trie)
    candidate = trie.wanted.copy()
    candidate[trie.cached_nodes] = True
    candidate[0] = False
    most = max(capacity, min(2 * capacity + 4096, MOST_CANDIDATES))
    if np.count_nonzero(candidate) > most:
        candidate &= _worth_most_alone(trie, by_depth, weight, most)
    above = _nearest_above(trie, by_depth, candidate)
    left = np.flatnonzero((weight > 0) & ~candidate)
    weight = weight + np.bincount(above[left], weight[left], minlength=len(weight))
    nodes = np.flatnonzero(candidate)
    if len(nodes) > capacity:
        kept = _least_worth_goes_first(nodes, above, trie.depth, weight, capacity)
    else:
        kept = nodes[
            np.argsort(
                -weight[nodes] * (trie.depth[nodes] - trie.depth[above[nodes]]), kind="stable"
            )
        ]
    return kept, weight[kept]


def _worth_most_alone(
    trie: Trie, by_depth: list[np.ndarray], weight: np.ndarray, count: int
) -> np.ndarray:
    """bool[n]: the nodes that would save most were theirs the only state: the likelihood below,
    times the depth."""
    below = weight.copy()
    for level in reversed(by_depth):
        np.add.at(below, trie.parent[level], below[level])
    chosen = np.zeros(len(below), dtype=bool)
    chosen[np.argpartition(-below * trie.depth, count)[:count]] = True
    return chosen


def _nearest_above(trie: Trie, by_depth: list[np.ndarray], candidate: np.ndarray) -> np.ndarray:
    """The nearest candidate strictly above each node, or the root, int64[n]."""
    above = np.zeros(len(trie.unit), dtype=np.int64)
    for level in by_depth:
        parent = trie.parent[level]
        above[level] = np.where(candidate[parent], parent, above[parent])
    return above


def _least_worth_goes_first(
    nodes: np.ndarray, above: Any, depth: Any, weight: Any, capacity: int
) -> np.ndarray:
    """The nodes that remain when all but `capacity` are removed, most worth first."""
    gone: dict[int, int] = {}
    above, depth, weight = above.tolist(), depth.tolist(), weight.tolist()

    def nearest(node: int) -> int:
        found = above[node]
        while found in gone:
            found = gone[found]
        above[node] = found
        return found

    heap = [
        (weight[node] * (depth[node] - depth[above[node]]), -depth[node], node)
        for node in nodes.tolist()
    ]
    heapq.heapify(heap)
    count = len(heap)
    while count > capacity:
        worth, order, node = heap[0]
        up = nearest(node)
        now = weight[node] * (depth[node] - depth[up])
        if now > worth:  # a node above it was removed, or one below
            heapq.heapreplace(heap, (now, order, node))
            continue
        heapq.heappop(heap)
        gone[node] = up
        weight[up] += weight[node]
        count -= 1
    return np.array([node for _, _, node in sorted(heap, reverse=True)], dtype=np.int64)
