"""Tries: sequences of units, with a node for each distinct prefix, in integers.

The hidden state after a unit depends only on the units that ran so far and their order, so a batch
of masks is a trie over sequences of kept units. The trie knows sequences, not masks: a repeated or
reordered unit makes another sequence. Each node is one unit run. The number of nodes is the least
work that any exact evaluator can do.

The masks that keep all of four units, all but the last, and all but unit 1 are three sequences:

    sequences  (0, 1, 2)  (0, 1, 2, 3)  (0, 2, 3)        node    0   1   2   3   4   5   6
    ends           3            4           6            unit   -1   0   1   2   3   2   3
                                                         parent -1   0   1   2   3   1   5
    0 ──unit 0── 1 ──unit 1── 2 ──unit 2── 3 ──unit 3── 4    depth   0   1   2   3   4   2   3
                 └───unit 2── 5 ──unit 3── 6

Six unit runs instead of ten. If the state of (0, 1), node 2, is cached, five nodes are wanted:
3 and 4 start from that state, while (0, 2, 3) still needs 1, 5 and 6.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import InputError
from ..masks import as_masks, check_sequences

Units = tuple[int, ...]


@dataclass(frozen=True)
class Trie:
    """The prefixes of M distinct requested sequences, and of K prefixes whose states are cached.

    A parent comes before its children. An only child comes right after its parent. Node 0 is the
    empty prefix, with unit and parent -1. The head of this file draws a trie.

    Attributes:
        sequences: The M requested sequences, each once, sorted.
        index: int64[N], the number in `sequences` of each of the N requests.
        unit: int64[n], the last unit on the way to each of the n nodes.
        parent: int64[n], the node before that unit.
        depth: int64[n], the number of units on the way to each node.
        ends: int64[M], the node of each sequence.
        through: For each node, a sequence or cached prefix that begins with its prefix.
        cached: The K cached prefixes, in the order of the call.
        cached_nodes: int64[K], the node of each cached prefix.
        asked: bool[n], the nodes on the way to a sequence.
        wanted: bool[n], the nodes that must run: those below a sequence's deepest cached prefix.
    """

    sequences: tuple[Units, ...]
    index: np.ndarray
    unit: np.ndarray
    parent: np.ndarray
    depth: np.ndarray
    ends: np.ndarray
    through: list[Units]
    cached: tuple[Units, ...]
    cached_nodes: np.ndarray
    asked: np.ndarray
    wanted: np.ndarray

    @property
    def unit_runs(self) -> int:
        """Unit runs of all sequences if no state were cached."""
        return int(np.count_nonzero(self.asked))

    @property
    def naive_unit_runs(self) -> int:
        """Unit runs of one forward pass for each request."""
        return int(self.depth[self.ends[self.index]].sum())

    @property
    def wanted_runs(self) -> int:
        """Unit runs of all sequences with the cached states."""
        return int(np.count_nonzero(self.wanted))

    def prefix(self, node: int) -> Units:
        """The units that run on the way to a node."""
        return self.through[node][: self.depth[node]]

    def parts(self, size: int) -> Iterator[Trie]:
        """Yield tries of at most `size` sequences each, in the order of the sequences."""
        for start in range(0, len(self.sequences), size):
            yield make_trie(self.sequences[start : start + size])


def make_trie(requests: Iterable[Units], cached: Sequence[Units] = ()) -> Trie:
    """Build the trie of sequences of unit indices.

    Args:
        requests: Sequences of units, in any order; they may repeat.
        cached: Distinct prefixes, none of them empty, whose states need not be run.

    Returns:
        The trie. Equal sets of sequences give equal numbers, whatever their order.

    Examples:
        >>> from fastprune.plan.trie import make_trie
        >>> trie = make_trie([(0, 1, 2, 3), (0, 2, 3), (0, 1, 2)], cached=[(0, 1)])
        >>> trie.parent.tolist(), trie.ends.tolist()
        ([-1, 0, 1, 2, 3, 1, 5], [3, 4, 6])
        >>> trie.unit_runs, trie.wanted_runs
        (6, 5)
    """
    requests, cached = list(requests), tuple(cached)
    requested, known = set(requests), set(cached)
    unit, parent, depth = [-1], [-1], [0]
    through: list[Units] = [()]
    is_cached, asked, wanted = bytearray(1), bytearray(b"\x01"), bytearray(b"\x01")
    node_of: dict[Units, int] = {}
    before: Units = ()
    path = [0]  # the nodes of the sequence before, from the root on
    # sorting makes sequences with a common prefix neighbours, and puts a prefix first
    for sequence in sorted(requested | known):
        # after (0, 1, 2, 3), path is [0, 1, 2, 3, 4]; (0, 2, 3) shares one unit: nodes 5 and 6
        # are new, the parent of 5 is path[1] = 1, and path becomes [0, 1, 5, 6]
        shared = shared_length(before, sequence)
        new = range(len(unit), len(unit) + len(sequence) - shared)
        del path[shared + 1 :]
        path.extend(new)
        unit.extend(sequence[shared:])
        parent.extend(path[shared:-1])
        depth.extend(range(shared + 1, len(sequence) + 1))
        through.extend([sequence] * len(new))
        for flags in (is_cached, asked, wanted):
            flags.extend(bytes(len(new)))
        node_of[sequence], before = path[-1], sequence
        is_cached[path[-1]] = sequence in known
        if sequence in requested:  # mark its nodes from the end up to the first marked one
            for node in reversed(path):
                if asked[node]:
                    break
                asked[node] = True
            for node in reversed(path):
                if wanted[node] or is_cached[node]:
                    break
                wanted[node] = True
    asked[0] = wanted[0] = False  # the embeddings are not a unit

    sequences = tuple(sorted(requested))
    number = {sequence: i for i, sequence in enumerate(sequences)}
    return Trie(
        sequences=sequences,
        index=np.array([number[sequence] for sequence in requests], dtype=np.int64),
        unit=np.array(unit, dtype=np.int64),
        parent=np.array(parent, dtype=np.int64),
        depth=np.array(depth, dtype=np.int64),
        ends=np.array([node_of[s] for s in sequences], dtype=np.int64),
        through=through,
        cached=cached,
        cached_nodes=np.array([node_of[prefix] for prefix in cached], dtype=np.int64),
        asked=np.frombuffer(asked, dtype=bool),
        wanted=np.frombuffer(wanted, dtype=bool),
    )


def shared_length(one: Units, other: Units) -> int:
    """The number of units that both sequences begin with."""
    for i, (unit, other_unit) in enumerate(zip(one, other)):
        if unit != other_unit:
            return i
    return min(len(one), len(other))


def levels(trie: Trie) -> list[np.ndarray]:
    """The nodes of each depth from 1 on, ascending: [1], [2, 5], [3, 6], [4] in the drawn trie."""
    by_depth = np.argsort(trie.depth, kind="stable")  # 0 1 2 5 3 6 4
    depths = np.arange(1, int(trie.depth.max()) + 1)
    starts = np.searchsorted(trie.depth[by_depth], depths)  # 1 2 4 6
    return np.split(by_depth, starts)[1:]


def units_of(masks: Any, sequences: Any, num_units: int, num_variants: int = 0) -> list[Units]:
    """Check masks or sequences, and list the units that each of them runs, in order.

    Args:
        masks: Bool or 0/1 [N, U], or None.
        sequences: Sequences of units, or None.
        num_units: U.
        num_variants: The number of variants that sequences may name as further units (`Library`).

    Raises:
        InputError: Both or none are given, or a check of `as_masks` or `check_sequences` fails.
    """
    if (masks is None) == (sequences is None):
        raise InputError("give either masks or sequences=, one of them")
    if sequences is None:
        return kept_units(as_masks(masks, num_units))
    return check_sequences(sequences, num_units + num_variants)


def kept_units(masks: np.ndarray) -> list[Units]:
    """The sequence of kept units of each mask bool[N, U]."""
    rows, units = np.nonzero(masks)
    bounds = np.searchsorted(rows, np.arange(len(masks) + 1)).tolist()
    units = units.tolist()
    return [tuple(units[start:stop]) for start, stop in itertools.pairwise(bounds)]
