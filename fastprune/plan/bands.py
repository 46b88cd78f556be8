"""Bands: the blocks loaded together, and the chunks that share each loading.

Weights that do not fit are loaded a band of consecutive blocks at a time, for a whole group of
chunks. The choices follow a model of cost, in bytes:

- Half of the room is for the band that computes. The other half is for the next band, which is
  read meanwhile. Band sizes do not change how often a block is read. The largest bands pass the
  fewest states from one to the next.
- A group of chunks reads every block once. Groups are as large as the states between bands allow.
- A slower tier (a GPU's host, a disk) can hold more states, so that fewer groups are needed. The
  cheaper way is taken. Loading costs its bytes, as far as it takes longer than computing, at
  FLOPS_PER_BYTE operations a byte. A state in the slower tier costs its bytes twice.
- Masks are split only if the states of a single chunk do not fit. Splitting chunks repeats no unit;
  splitting masks repeats the units that they share.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import InputError
from .trie import Trie, levels

# operations while one byte is read: about 50 GFLOP/s over 1 GB/s, and 400 TFLOP/s over 8 GB/s
FLOPS_PER_BYTE = {"cpu": 50, "cuda": 50_000}


@dataclass(frozen=True)
class Room:
    """The space that a limit on resident weights leaves for blocks.

    Attributes:
        num_blocks: The number of blocks of the model.
        block_bytes: Bytes of the largest block, since any block may take any place.
        always: Bytes that stay loaded (embeddings, final norm, head), with the read buffers.
        places: The number of blocks that fit at once.
    """

    num_blocks: int
    block_bytes: int
    always: int
    places: int

    @property
    def bands(self) -> tuple[range, ...]:
        """The bands, ascending, of nearly equal length.

        Seven blocks and four places give bands of at most two blocks: 0, 1-2, 3-4 and 5-6. With a
        single place, blocks are read one after the other.
        """
        if not self.num_blocks:
            return (range(0),)
        most = self.num_blocks if self.places >= self.num_blocks else max(1, self.places // 2)
        count = -(-self.num_blocks // most)  # 4
        bounds = [self.num_blocks * i // count for i in range(count + 1)]  # 0 1 3 5 7
        return tuple(range(start, stop) for start, stop in itertools.pairwise(bounds))


def make_room(limit: int, num_blocks: int, block_bytes: int, always: int, name: str) -> Room:
    """Compute the room that `limit` bytes leave.

    Raises:
        InputError: No block fits. The error names the smallest limit that works.
    """
    least = always + block_bytes
    if limit < least:
        raise InputError(
            f"weights_bytes is too small for {name}: embeddings, head and buffers stay loaded and "
            f"take {always} bytes, a block {block_bytes}; "
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


def make_groups(
    state_bytes: Sequence[int],
    flops: Sequence[int],
    load_bytes: int,
    memory: int,
    slower: int,
    flops_per_byte: int,
) -> tuple[tuple[int, ...], ...]:
    """Group chunks that share the loading, for the least cost.

    Args:
        state_bytes: For each chunk, the most bytes of its states between bands.
        flops: The operations of each chunk.
        load_bytes: Bytes that a group reads.
        memory: Bytes for states in memory.
        slower: Bytes for states in the slower tier; 0 for none.
        flops_per_byte: Operations in the time of reading a byte.

    Returns:
        The indices of the chunks of each group. A too large chunk is a group of its own.

    Examples:
        >>> from fastprune.plan.bands import make_groups
        >>> make_groups([4, 4, 4], [0, 0, 0], 100, memory=8, slower=0, flops_per_byte=50)
        ((0, 1), (2,))
    """

    def cost(groups: tuple[tuple[int, ...], ...]) -> int:
        total = 0
        for group in groups:
            computing = sum(flops[i] for i in group) // flops_per_byte
            spilled = max(0, sum(state_bytes[i] for i in group) - memory)
            total += max(load_bytes, computing) + 2 * spilled
        return total

    packings = [pack_neighbours(state_bytes, most) for most in (memory, memory + slower)]
    return min(packings, key=cost)


def pack_neighbours(sizes: Sequence[int], most: int) -> tuple[tuple[int, ...], ...]:
    """Group the indices of neighbours whose sizes add up to at most `most`, or of one alone."""
    groups: list[list[int]] = []
    total = 0
    for i, size in enumerate(sizes):
        if groups and total + size <= most:
            groups[-1].append(i)
            total += size
        else:
            groups.append([i])
            total = size
    return tuple(map(tuple, groups))
