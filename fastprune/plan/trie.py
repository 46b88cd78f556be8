"""Sequences of units as a trie: one node for each distinct prefix. Pure integers: no model, no
torch.

The hidden state after a unit depends only on the units that ran so far and their order, so a batch
of masks is a trie over sequences of kept units. The trie knows sequences, not masks: a unit that is
repeated, or run in another order, is one more sequence. Every node is one unit run; the number of
nodes is the least work that any exact evaluator can do.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

Units = tuple[int, ...]


@dataclass(frozen=True)
class Trie:
    """The prefixes of some sequences that are asked for, and of some whose states are known.

    sequences: the M distinct ones that are asked for, sorted. index: int64[N], which of them each
    of the N asked is. Nodes are numbered so that a parent comes before its children, and a child
    that alone continues its parent comes right after it; node 0 is the empty prefix. unit, parent,
    depth: int64[n] (unit and parent of node 0 are -1).
    through: of each node, a sequence or prefix on whose way it lies. ends int64[M]: the node of
    each sequence.
    known: the K prefixes whose states are known; known_nodes int64[K].
    asked: bool[n], nodes on the way to some sequence. wanted: bool[n], those that must be run:
    below the deepest known prefix of one. unit_runs: how many are on the way, the unit runs were
    nothing known. naive_unit_runs: those of one forward pass for each asked.
    """

    sequences: tuple[Units, ...]
    index: np.ndarray
    unit: np.ndarray
    parent: np.ndarray
    depth: np.ndarray
    ends: np.ndarray
    through: _Through
    known: tuple[Units, ...]
    known_nodes: np.ndarray
    asked: np.ndarray
    wanted: np.ndarray
    unit_runs: int
    naive_unit_runs: int

    @property
    def wanted_runs(self) -> int:
        """Unit runs that are left to do."""
        return int(np.count_nonzero(self.wanted))

    def prefix(self, node: int) -> Units:
        """The units that lead to a node."""
        return self.through[node][: self.depth[node]]


def make_trie(asked: Iterable[Units], known: Sequence[Units] = ()) -> Trie:
    """The trie of sequences of unit indices; known: prefixes, distinct, not empty, whose states
    need not be run."""
    asked = list(asked)
    every = [*asked, *known]
    lengths = np.array([len(sequence) for sequence in every], dtype=np.int64)
    table = np.zeros(
        (len(every), int(lengths.max(initial=0)) + 1), dtype=np.uint16
    )  # 0 is the end, unit i is i + 1
    units = np.fromiter(
        itertools.chain.from_iterable(every), dtype=np.int64, count=int(lengths.sum())
    )
    table[np.arange(table.shape[1]) < lengths[:, None]] = units + 1
    # in sorted order, sequences that share a prefix are neighbours, and one comes before those that
    # extend it
    order = np.lexsort(table.T[::-1])
    differs = table[order[1:]] != table[order[:-1]]
    new = np.concatenate([np.ones(min(len(every), 1), dtype=bool), differs.any(axis=1)])
    row_of = np.empty(len(every), dtype=np.int64)
    row_of[order] = np.cumsum(new) - 1
    rows, lengths = table[order[new]], lengths[order[new]]
    shared = np.concatenate([[0], differs[new[1:]].argmax(axis=1)])[: len(rows)].astype(np.int64)

    owner, starts, path = _paths(lengths, shared)
    depth = np.concatenate([[0], np.arange(len(owner)) - starts[owner] + shared[owner] + 1])
    unit = np.concatenate([[-1], rows[owner, depth[1:] - 1].astype(np.int64) - 1])
    parent = np.concatenate([[-1], path[owner, depth[1:] - 1]])

    asked_rows, index = np.unique(row_of[: len(asked)], return_inverse=True)
    known_rows = row_of[len(asked) :]
    known_nodes = path[known_rows, lengths[known_rows]]
    is_known = np.zeros(len(unit), dtype=bool)
    is_known[known_nodes] = True
    steps, path, lengths = np.arange(path.shape[1]), path[asked_rows], lengths[asked_rows]
    inside = (steps > 0) & (steps <= lengths[:, None])
    deepest = np.where(is_known[path] & inside, steps, 0).max(axis=1, initial=0)
    on_the_way, wanted = np.zeros((2, len(unit)), dtype=bool)
    on_the_way[path[inside]] = True
    wanted[path[inside & (steps > deepest[:, None])]] = True
    of_row = [every[i] for i in order[new].tolist()]
    return Trie(
        sequences=tuple(of_row[row] for row in asked_rows.tolist()),
        index=index,
        unit=unit,
        parent=parent,
        depth=depth,
        ends=path[np.arange(len(path)), lengths],
        through=_Through(of_row, owner),
        known=tuple(known),
        known_nodes=known_nodes,
        asked=on_the_way,
        wanted=wanted,
        unit_runs=int(np.count_nonzero(on_the_way)),
        naive_unit_runs=sum(map(len, asked)),
    )


def _paths(lengths: np.ndarray, shared: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of sorted rows, `shared` of whose units are those of the row before: which row first holds
    each node (but the root), int64[n - 1]; the number of each row's first own node, less 1; the
    nodes on each row's path, [R, L]."""
    own = lengths - shared
    starts = np.cumsum(own) - own
    owner = np.repeat(np.arange(len(lengths)), own)
    steps = np.arange(int(lengths.max(initial=0)) + 1)
    holder = np.where(shared[:, None] < steps, np.arange(len(lengths))[:, None], 0)
    holder = np.maximum.accumulate(
        holder, axis=0
    )  # the last row, at or before, whose own nodes reach this depth
    path = starts[holder] + steps - shared[holder]
    path[(steps == 0) | (steps > lengths[:, None])] = 0
    return owner, starts, path


class Seen:
    """Which prefixes were asked for so far, by group: what a cache without bounds would have run.

    By 64-bit hashes, since these are counts that nothing else depends on.
    """

    def __init__(self) -> None:
        self._hashes: dict[int, np.ndarray] = {}  # ascending
        self._last: tuple = (
            None,
            None,
            None,
        )  # hashes, a trie, and both together: the next group mostly asks the same

    def add(self, group: int, trie: Trie) -> int:
        """How many of the prefixes asked for in a trie are new to a group."""
        old = self._hashes.get(group, _NONE)
        if self._last[0] is not old or self._last[1] is not trie:
            self._last = old, trie, np.union1d(old, _hashes(trie))
        self._hashes[group] = self._last[2]
        return len(self._hashes[group]) - len(old)


_NONE = np.zeros(0, dtype=np.uint64)


def _hashes(trie: Trie) -> np.ndarray:
    """uint64 of every node on the way to some sequence."""
    hashes = np.zeros(len(trie.unit), dtype=np.uint64)
    for level in levels(trie):
        mixed = (
            hashes[trie.parent[level]] ^ trie.unit[level].astype(np.uint64) + np.uint64(1)
        ) * _MIX
        hashes[level] = mixed ^ (mixed >> np.uint64(29))
    return hashes[trie.asked]


_MIX = np.uint64(0x9E3779B97F4A7C15)  # odd, 2^64 over the golden ratio


def levels(trie: Trie) -> list[np.ndarray]:
    """The nodes of each depth, from 1 on."""
    by_depth = np.argsort(trie.depth, kind="stable")
    return np.split(
        by_depth, np.searchsorted(trie.depth[by_depth], np.arange(1, int(trie.depth.max()) + 1))
    )[1:]


class _Through:
    """Of each node but the root, the row that first holds it."""

    def __init__(self, rows: list[Units], owner: np.ndarray):
        self._rows, self._owner = rows, owner

    def __getitem__(self, node: int) -> Units:
        return self._rows[self._owner[node - 1]] if node else ()


def kept_units(masks: np.ndarray) -> list[Units]:
    """The sequence of kept units of each mask bool[N, U]."""
    rows, units = np.nonzero(masks)
    bounds = np.searchsorted(rows, np.arange(len(masks) + 1)).tolist()
    units = units.tolist()
    return [tuple(units[start:stop]) for start, stop in itertools.pairwise(bounds)]
