"""Weights that do not fit: which chunks share the loading of a band, and whether a call fits.

If all weights stay loaded, one band holds every block and every chunk is a group of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from ..models import Model
from ..plan.bands import FLOPS_PER_BYTE, make_groups
from ..plan.schedule import Schedule
from .chunks import ChunkRows, Chunks
from .memory import MemoryLimit


class Room(NamedTuple):
    """Bytes for states that wait between bands."""

    memory: int
    slower: int  # on the host, beside a GPU, and on a disk


def peak_tokens(schedules: Mapping[int, Schedule], chunks: Chunks) -> tuple[int, int]:
    """Tokens of the largest chunk of a call, and the most slots that a schedule needs."""
    tokens = max(chunks[number].num_tokens for number in schedules)
    return tokens, max(schedule.num_slots for schedule in schedules.values())


def is_too_large(
    schedules: Mapping[int, Schedule], chunks: Chunks, limit: MemoryLimit, room: Room
) -> bool:
    """Whether the states of a single chunk do not fit between two bands."""
    return any(
        _frontier_bytes(schedule, chunks[number], limit) > sum(room)
        for number, schedule in schedules.items()
    )


def groups_of(
    schedules: Mapping[int, Schedule],
    chunks: Chunks,
    limit: MemoryLimit,
    room: Room,
    model: Model,
) -> list[list[int]]:
    """The chunks that share the loading of every band, see `plan.bands`."""
    numbers = list(schedules)
    if len(model.bands) == 1 or not numbers:
        return [[number] for number in numbers]
    blocks = model.weights.room
    weights_of_block = blocks.block_bytes // model.dtype.itemsize
    flops_per_token = 2 * weights_of_block * blocks.num_blocks // limit.num_units
    groups = make_groups(
        [_frontier_bytes(schedules[number], chunks[number], limit) for number in numbers],
        [
            schedules[number].unit_runs * chunks[number].num_tokens * flops_per_token
            for number in numbers
        ],
        blocks.num_blocks * blocks.block_bytes,
        room.memory,
        room.slower,
        FLOPS_PER_BYTE["cuda" if model.device.type == "cuda" else "cpu"],
    )
    return [[numbers[place] for place in group] for group in groups.groups]


def _frontier_bytes(schedule: Schedule, chunk: ChunkRows, limit: MemoryLimit) -> int:
    """The most that a chunk's states between bands weigh at once."""
    return schedule.frontier_peak * limit.state_bytes(chunk.num_tokens)
