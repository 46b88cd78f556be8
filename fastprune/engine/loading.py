"""Weights that do not fit: groups of chunks that share the loading of bands.

If all weights stay loaded, all chunks are one group, and no state waits. Other modules need not
know which case holds.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from ..data import TokenBatch
from ..models import Model
from ..plan.bands import FLOPS_PER_BYTE, make_groups, pack_neighbours, visits_of
from ..plan.schedule import Schedule, Visit
from ..plan.trie import Trie
from .cache import Frontier
from .chunks import Chunks
from .memory import MemoryLimit

STATES_BYTES = 1 << 30  # of the rows that share a reading of weights, see `row_groups`


class Loading:
    """The loading of weights for the calls of one model.

    Args:
        model: The model.
        limit: The limit of a call's memory.
        frontier: Holds states that wait.

    Attributes:
        visits_of: An argument of `plan_call`; None if weights stay loaded.
    """

    def __init__(self, model: Model, limit: MemoryLimit, frontier: Frontier):
        self._model, self._limit, self._frontier = model, limit, frontier
        self._units_of_block = limit.num_units // max(1, model.num_blocks)
        self.visits_of: Callable[[Trie], np.ndarray] | None = None
        if model.weights.take_turns:
            band_of = [
                number
                for number, band in enumerate(model.weights.bands)
                for _ in range(len(band) * self._units_of_block)
            ]
            self.visits_of = functools.partial(visits_of, band_of=band_of)

    def groups(
        self, schedules: Mapping[int, Schedule], chunks: Chunks, references: int
    ) -> tuple[Sequence[Sequence[int]], bool]:
        """Group the chunks of a call, and start the frontier for it.

        Args:
            schedules: The schedule of each chunk, by number.
            chunks: The chunks.
            references: Bytes of the held dense references.

        Returns:
            The chunks that share the loading of weights, and whether the states of each chunk fit.
        """
        numbers, model = list(schedules), self._model
        if not model.weights.take_turns or not numbers:
            return [numbers], True
        tokens = max(chunks[number].num_tokens for number in numbers)
        slots = max(schedule.num_slots for schedule in schedules.values())
        memory = self._limit.beside(tokens, slots, references)
        self._frontier.start(memory)
        slower = self._frontier.slower_bytes
        waiting = [  # the most bytes of a chunk's states that wait at once
            schedules[number].frontier_peak * self._limit.state_bytes(chunks[number].num_tokens)
            for number in numbers
        ]
        blocks = model.weights.room
        weights_of_block = blocks.block_bytes // model.dtype.itemsize
        flops_per_token = 2 * weights_of_block * blocks.num_blocks // self._limit.num_units
        groups = make_groups(
            waiting,
            [
                schedules[number].unit_runs * chunks[number].num_tokens * flops_per_token
                for number in numbers
            ],
            blocks.num_blocks * blocks.block_bytes,
            memory,
            slower,
            FLOPS_PER_BYTE["cuda" if model.device.type == "cuda" else "cpu"],
        )
        fit = max(waiting) <= memory + slower
        return [[numbers[place] for place in group] for group in groups], fit

    def visits(self, schedules: Mapping[int, Schedule]) -> Iterator[dict[int, Visit]]:
        """Yield the visits that run together, by chunk, while their weights are loaded."""
        weights = self._model.weights
        by_number: dict[int, dict[int, Visit]] = {}
        for chunk, schedule in schedules.items():
            for visit in schedule.visits:
                by_number.setdefault(visit.number, {})[chunk] = visit
        together = [by_number[number] for number in sorted(by_number)]
        bands: list[Sequence[int]] = [*weights.bands] * len(together)
        if weights.take_turns:
            bands = [self._blocks_of(schedules, parts) for parts in together]
        for parts, _ in zip(together, weights.visit(bands)):
            yield parts

    def _blocks_of(
        self, schedules: Mapping[int, Schedule], parts: Mapping[int, Visit]
    ) -> list[int]:
        """The blocks that visits run."""
        steps = (schedules[chunk].steps[visit.start : visit.stop] for chunk, visit in parts.items())
        units = {unit for step in itertools.chain.from_iterable(steps) for unit in step.units}
        return sorted({unit // self._units_of_block for unit in units})


# -- probes ----------------------------------------------------------------------------------------


def there_and_back(model: Model) -> Iterator[tuple[Sequence[int], bool]]:
    """Yield the bands from the first to the last and back, each with whether it is the way back.

    The last band comes once, as the first one of the way back. Bands A, B, C give
    (A, False), (B, False), (C, True), (B, True), (A, True).
    """
    *before, last = model.weights.bands
    way = [*before, last, *reversed(before)]
    for number, blocks in enumerate(model.weights.visit(way)):
        yield blocks, number >= len(before)


def row_groups(
    model: Model, batch: TokenBatch, states_of_row: int | None = None
) -> Sequence[Sequence[int]]:
    """Group the rows that share a reading of weights.

    If all weights stay loaded, each row is alone. Else the states of a group fit into
    `STATES_BYTES`.

    Args:
        model: The model.
        batch: The calibration set.
        states_of_row: The number of states held for a row; by default the number of bands.
    """
    if not model.weights.take_turns:
        return [[row] for row in range(batch.num_rows)]
    states_of_row = states_of_row or len(model.weights.bands)
    sizes = batch.run_sizes * states_of_row * model.hidden_size * model.dtype.itemsize
    return pack_neighbours(sizes.tolist(), STATES_BYTES)
