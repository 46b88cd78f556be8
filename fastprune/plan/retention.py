"""Retention: the states that the cache keeps after a call, for later calls.

A later call asks for sequences that leave the trie at some node, and runs the nodes below the
deepest cached prefix. A state is worth the unit runs that it saves. Its worth is the likelihood
that sequences leave at its node, or below it with no cached prefix in between, times the units
from the next cached prefix above.

Every state takes the same bytes, so the state of least worth is evicted first. Its likelihood
passes to the prefix above. This repeats until the states fit. The remaining states are spread over
the trie: a long chain keeps a few states at even distances. A list of the most recently used
states would keep one end of it.

In a chain of nodes 1 to 4, all of likelihood 1, each state saves one unit run. The deepest of
equals is evicted: 4, whose likelihood passes to 3, then 2, whose likelihood passes to 1. If two
states fit, 1 and 3 remain, worth 2 * (1 - 0) and 2 * (3 - 1) unit runs.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from functools import cached_property
from typing import Any

import numpy as np

from .trie import Trie, Units, levels

FADE = 0.9  # the factor of a likelihood for each call that does not pass its node
MOST_CANDIDATES = 1 << 14  # states compared one by one, unless more are retained


class Prefixes:
    """The prefixes whose states a cache holds for a chunk, each with its likelihood of later use.

    The object is immutable; each call makes another one. Chunks with equal prefixes share one.

    Args:
        prefixes: K distinct prefixes.
        likelihood: float64[K], the likelihood of each; 0 by default.

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
        # by prefix: its likelihood after some call, and that call's number; it fades since then
        self._noted = {prefix: (value, 0) for prefix, value in zip(prefixes, values, strict=True)}

    def __len__(self) -> int:
        return len(self._noted)

    @cached_property
    def prefixes(self) -> tuple[Units, ...]:
        """The K prefixes."""
        return tuple(self._noted)

    @cached_property
    def likelihood(self) -> np.ndarray:
        """The likelihood of each prefix now, float64[K]."""
        noted = self._noted.values()
        return np.array([value * FADE ** (self._call - call) for value, call in noted])

    def on_the_way(self, sequences: Iterable[Units]) -> Prefixes:
        """The held prefixes with which one of the sequences begins."""
        noted = self._noted
        beginnings = (s[:length] for s in sequences for length in range(1, len(s) + 1))
        inside = {prefix: noted[prefix] for prefix in beginnings if prefix in noted}
        return Prefixes(
            inside, [value * FADE ** (self._call - call) for value, call in inside.values()]
        )

    def followed_by(self, retained: Prefixes) -> Prefixes:
        """The prefixes after a call that evicts none; `retained` are those on the call's way."""
        following = Prefixes()
        following._call = call = self._call + 1
        following._noted = dict(self._noted)
        for prefix, value in zip(retained.prefixes, retained.likelihood.tolist()):
            following._noted[prefix] = value, call
        return following


def worth_retaining(
    trie: Trie, likelihood: np.ndarray, capacity: int
) -> tuple[np.ndarray, np.ndarray]:
    """Choose the most valuable states.

    Args:
        trie: The sequences of the call, with K cached prefixes. These and the wanted nodes are
            candidates.
        likelihood: float64[K], the likelihood of each cached prefix before the call.
        capacity: The most states.

    Returns:
        The nodes to retain, int64[R], most worth first; their likelihoods, float64[R].
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
    passed_on = np.flatnonzero((weight > 0) & ~candidate)  # likelihoods of nodes without a state
    weight = weight + np.bincount(above[passed_on], weight[passed_on], minlength=len(weight))
    nodes = np.flatnonzero(candidate)
    if len(nodes) > capacity:
        kept = _evict_to(capacity, nodes, above, trie.depth, weight)
    else:
        worth = weight[nodes] * (trie.depth[nodes] - trie.depth[above[nodes]])
        kept = nodes[np.argsort(-worth, kind="stable")]
    return kept, weight[kept]


def _worth_most_alone(
    trie: Trie, by_depth: list[np.ndarray], weight: np.ndarray, count: int
) -> np.ndarray:
    """Flag the `count` nodes that would save most if theirs were the only state, bool[n].

    Alone, a state saves its depth times the likelihood of all nodes below it.
    """
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


def _evict_to(capacity: int, nodes: np.ndarray, above: Any, depth: Any, weight: Any) -> np.ndarray:
    """Evict nodes until `capacity` remain, and return these, most worth first."""
    above_evicted: dict[int, int] = {}  # by evicted node: the candidate above it
    above, depth, weight = above.tolist(), depth.tolist(), weight.tolist()

    def nearest(node: int) -> int:
        candidate = above[node]
        while candidate in above_evicted:
            candidate = above_evicted[candidate]
        above[node] = candidate
        return candidate

    heap = [
        (weight[node] * (depth[node] - depth[above[node]]), -depth[node], node)
        for node in nodes.tolist()
    ]
    heapq.heapify(heap)
    count = len(heap)
    while count > capacity:
        worth, order, node = heap[0]
        up = nearest(node)
        present_worth = weight[node] * (depth[node] - depth[up])
        if present_worth > worth:  # a node above or below it was evicted meanwhile
            heapq.heapreplace(heap, (present_worth, order, node))
            continue
        heapq.heappop(heap)
        above_evicted[node] = up
        weight[up] += weight[node]
        count -= 1
    return np.array([node for _, _, node in sorted(heap, reverse=True)], dtype=np.int64)
