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
from typing import Any

import numpy as np

from .trie import Trie, levels

FADE = 0.9  # the factor of a likelihood for each call that does not pass the node
MOST_CANDIDATES = 1 << 14  # states compared one by one; more only if more are retained


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
