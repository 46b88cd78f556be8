"""Which blocks are loaded together, and which chunks share the loading: decided from bytes, in
integers.

The weights of blocks that do not fit are loaded a band of consecutive blocks at a time, for a whole
group of chunks. The model of cost behind the choice:

- Half of the room is for the band that computes, half for the next, which is read meanwhile. The
  size of bands does not change how often a block is read, so they are as large as that allows:
  then fewest states go from one to the next.
- A group of chunks reads every block once, so groups are as large as the states between bands may
  be. If these fit into memory only in more groups than with a slower tier (a GPU's host, a disk),
  the cheaper way is taken: loading costs its bytes as far as it is longer than computing,
  FLOPS_PER_BYTE operations to a byte; a state in a slower tier costs its bytes twice.
- Masks are split only if the states of a single chunk do not fit: splitting chunks repeats no unit,
  splitting masks repeats their shared units.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import InputError
from .trie import Trie, levels

# operations in the time that a byte takes to be read: about 50 GFLOP/s over 1 GB/s, and 400 TFLOP/s
# over 8 GB/s
FLOPS_PER_BYTE = {"cpu": 50, "cuda": 50_000}


@dataclass(frozen=True)
class Room:
    """The space that a limit on resident weights leaves for blocks.

    num_blocks, block_bytes: of the model; the largest block, since every place for one takes any.
    always: bytes that stay loaded (embeddings, final norm, head), and the buffers for reading.
    places: blocks that fit at once.
    """

    num_blocks: int
    block_bytes: int
    always: int
    places: int

    @property
    def bands(self) -> tuple[range, ...]:
        """The bands, ascending, of nearly equal length. With a single place, a block is read after
        the one before."""
        if not self.num_blocks:
            return (range(0),)
        most = self.num_blocks if self.places >= self.num_blocks else max(1, self.places // 2)
        count = -(-self.num_blocks // most)
        bounds = [self.num_blocks * i // count for i in range(count + 1)]
        return tuple(range(start, stop) for start, stop in itertools.pairwise(bounds))


def make_room(limit: int, num_blocks: int, block_bytes: int, always: int, name: str) -> Room:
    """The room that `limit` bytes leave. Raises InputError, with the smallest that works, if no
    block fits."""
    least = always + block_bytes
    if limit < least:
        raise InputError(
            f"weights_bytes is too small for {name}: what stays loaded takes {always} bytes, a "
            f"block {block_bytes}; "
            f"the smallest that works is {least}, not {limit}",
            argument="weights_bytes",
            least=least,
        )
    places = num_blocks if not block_bytes else min(num_blocks, (limit - always) // block_bytes)
    return Room(num_blocks, block_bytes, always, places)


def visits_of(trie: Trie, band_of: Sequence[int]) -> np.ndarray:
    """The visit that each wanted node is run in, int64[n]: the first one of its unit's band not
    before its parent's.

    An ascending sequence needs each band once. One that turns back waits for the next round: with
    three bands, a unit of band 0 after one of band 2, in visit 2, runs in visit
    2 + (0 - 2) % 3 = 3.

    band_of: the band of each unit, from 0 on.
    """
    num_bands = max(band_of, default=0) + 1
    band = np.append(np.asarray(band_of, dtype=np.int64), 0)[trie.unit]  # the root's unit is -1
    visit = band.copy()
    for level in levels(trie):
        parent = trie.parent[level]
        below = visit[parent] + (band[level] - band[parent]) % num_bands
        visit[level] = np.where(trie.wanted[parent], below, band[level])
    return visit


@dataclass(frozen=True)
class Groups:
    """Chunks that share the loading, by their places in the list that was given; whether their
    states may go to a slower tier; load_bytes: read in all."""

    groups: tuple[tuple[int, ...], ...]
    slower: bool
    load_bytes: int


def make_groups(
    state_bytes: Sequence[int],
    flops: Sequence[int],
    load_bytes: int,
    memory: int,
    slower: int,
    flops_per_byte: int,
) -> Groups:
    """Which chunks share the loading, for the least cost.

    state_bytes, flops: of each chunk, the states between bands at their most, and its operations.
    load_bytes: read for a group. memory, slower: bytes for states in memory, and beyond it. A chunk
    that alone is too large is a group.
    """
    best: tuple[int, Groups] | None = None
    for extra in (0, slower) if slower else (0,):
        groups = _pack(state_bytes, memory + extra)
        cost = 0
        for group in groups:
            computing = sum(flops[i] for i in group) // flops_per_byte
            spilled = max(0, sum(state_bytes[i] for i in group) - memory)
            cost += max(load_bytes, computing) + 2 * spilled
        if best is None or cost < best[0]:
            best = cost, Groups(groups, extra > 0, load_bytes * len(groups))
    assert best is not None
    return best[1]


def _pack(state_bytes: Sequence[int], most: int) -> tuple[tuple[int, ...], ...]:
    """Neighbours together, as many as fit, but at least one."""
    groups: list[list[int]] = []
    total = 0
    for i, size in enumerate(state_bytes):
        if groups and total + size <= most:
            groups[-1].append(i)
            total += size
        else:
            groups.append([i])
            total = size
    return tuple(map(tuple, groups))
