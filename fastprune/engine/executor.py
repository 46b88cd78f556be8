"""The executor: takes a chunk through the steps of a schedule, and turns final states into values
of the measure.

It decides nothing. The engine says which chunks, in which order, by which steps; here units and
heads run, and what was run is counted where it happens.
"""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass

import torch

from ..models import Model, Runner
from ..models.swap import State, hidden_of, state_bytes
from ..plan.schedule import ROOT, Schedule, Visit
from .cache import Frontier, PrefixCache
from .chunks import Chunk
from .footprint import Footprint
from .measures import Measure

Walk = Generator[
    tuple[int, torch.Tensor, int], None, None
]  # after each step: its end or -1, hidden, units run


@dataclass
class Counts:
    """What was done so far.

    row_runs, row_heads: units, and heads, that were run, once for each row of the batch.
    row_unbounded: unit runs, had every state been kept. weight_loads: blocks whose weights were
    read; weight_bytes: of files, for these.
    peak_activation_bytes: the most that were held, workspaces as measured on this model.
    """

    row_runs: int = 0
    row_heads: int = 0
    row_unbounded: int = 0
    weight_loads: int = 0
    weight_bytes: int = 0
    peak_activation_bytes: int = 0


class Executor:
    """Runs schedules on chunks. cache, frontier: where states come from and go to; counts: where it
    says what it did.

    keeps_references: whether what masks are compared with (`Measure.reference`) stays while the
    masks of a chunk run.
    """

    def __init__(
        self,
        model: Model,
        runner: Runner,
        measure: Measure,
        granularity: str,
        cache: PrefixCache,
        frontier: Frontier,
        counts: Counts,
    ):
        self.model, self.runner, self.measure, self.granularity = (
            model,
            runner,
            measure,
            granularity,
        )
        self.cache, self.frontier, self.counts = cache, frontier, counts
        self.keeps_references = False
        self._per_block = len(model.unit_names(granularity)) // max(1, model.num_blocks)
        self._dense_of: tuple = ()

    def start(self, chunks: Sequence[Chunk], tile: int, footprint: Footprint) -> None:
        """Run these chunks from now on, so many positions at a time through the head."""
        self.chunks, self._footprint = chunks, footprint
        self._tiles = [chunk.tiles(tile) for chunk in chunks]
        self._dense: dict[int, torch.Tensor] = {}  # by chunk, see keep_dense
        self._references: dict[
            int, torch.Tensor
        ] = {}  # by tile of the chunk that runs, see _reference

    # -- walks -------------------------------------------------------------------------------------

    def walks(self, schedules: dict[int, Schedule]) -> Iterator[tuple[int, Walk]]:
        """A group of chunks, band by band: (chunk, its walk while that band is loaded). Each is
        walked before the next is asked for; broken off, the cache forgets what it has of these
        chunks."""
        cache, weights, finished = self.cache, self.model.weights, False
        loads, read = weights.loads, weights.bytes
        try:
            for number, schedule in schedules.items():
                cache.drop(number, schedule.dropped)
            visits: dict[int, dict[int, Visit]] = {}
            for number, schedule in schedules.items():
                for visit in schedule.visits:
                    visits.setdefault(visit.number, {})[number] = visit
            order = sorted(visits)
            bands = [self._needed(schedules, visits[now]) for now in order]
            for now, _ in zip(order, self.runner.visit(bands)):
                for number, part in visits[now].items():
                    self._references.clear()
                    with closing(self._walk(schedules[number], part, number)) as walk:
                        yield number, walk
            for number, schedule in schedules.items():
                cache.settle(number, schedule.retained, schedule.likelihood)
            finished = True
        finally:
            self.frontier.clear()
            self._references.clear()
            if not finished:
                for number in schedules:
                    cache.forget(number)
            self.counts.weight_loads += weights.loads - loads
            self.counts.weight_bytes += weights.bytes - read

    def _needed(self, schedules: dict[int, Schedule], visits: dict[int, Visit]) -> Sequence[int]:
        """The blocks that a visit runs."""
        if len(self.runner.bands) == 1:
            return self.runner.bands[0]
        steps = (
            schedules[number].steps[visit.start : visit.stop] for number, visit in visits.items()
        )
        return sorted(
            {
                unit // self._per_block
                for step in itertools.chain.from_iterable(steps)
                for unit in step.units
            }
        )

    def _walk(self, schedule: Schedule, visit: Visit, number: int) -> Walk:
        """Run a visit's steps on one chunk."""
        chunk = self.chunks[number]
        embedded, arguments = self.runner.open(chunk.ids, chunk.positions, chunk.branch)
        slots: list[State | None] = [None] * schedule.num_slots
        for step in schedule.steps[visit.start : visit.stop]:
            if step.source == ROOT:  # the first step, if any
                state, embedded = embedded, None
            elif step.source >= 0:
                state = slots[step.source]
                if step.last_use:
                    slots[step.source] = None
            else:
                state = self._take(schedule, -2 - step.source, number, step.last_use)
            retained = dict(step.retained)
            for count, unit in enumerate(step.units, start=1):
                self._note_peak(slots, state, chunk)
                state = self.runner.run(unit, state, arguments, self.granularity)
                self.counts.row_runs += len(chunk.rows)
                if count in retained:
                    self.cache.put(number, retained[count], self.runner.pack(state))
            if step.frontier >= 0:
                self.frontier.put(number, schedule.frontier[step.frontier], self.runner.pack(state))
            if step.target >= 0:
                slots[step.target] = state
            yield step.end, hidden_of(state), len(step.units)

    def _take(self, schedule: Schedule, place: int, number: int, last_use: bool) -> State:
        """A state of the prefix cache, or of the frontier."""
        if place >= len(schedule.known):
            prefix = schedule.frontier[place - len(schedule.known)]
            state = self.runner.unpack(self.frontier.get(number, prefix), prefix[-1])
            if last_use:
                self.frontier.drop(number, prefix)
            return state
        prefix = schedule.known[place]
        state = self.runner.unpack(self.cache.get(number, prefix), prefix[-1])
        if last_use:
            self.cache.drop(number, [prefix])
        return state

    def _note_peak(self, slots: list[State | None], state: State, chunk: Chunk) -> None:
        alive = {id(s): s for s in (*slots, state) if s is not None}
        held = sum(map(state_bytes, alive.values())) + self.frontier.bytes
        held += sum(kept.nbytes for kept in (*self._dense.values(), *self._references.values()))
        peak = held + int(self._footprint.workspace * chunk.num_tokens) + self._footprint.head
        self.counts.peak_activation_bytes = max(self.counts.peak_activation_bytes, peak)

    # -- final states ------------------------------------------------------------------------------

    def values(self, hidden: torch.Tensor, number: int) -> torch.Tensor:
        """The measure's values at every target of a chunk, [V, M], from one mask's final states [B,
        T, D]."""
        hidden = hidden.flatten(0, 1)
        values = []
        for index, tile in enumerate(self._tiles[number]):
            reference = self._reference(number, index) if self.measure.reference else None
            values.append(self.measure.compute(self.runner, hidden[tile.sources], tile, reference))
        self.counts.row_heads += len(self.chunks[number].rows)
        return torch.cat(values, dim=1)

    def _reference(self, number: int, index: int) -> torch.Tensor:
        """What the masks are compared with at a tile of a chunk; kept for the next mask where the
        budget has room."""
        found = self._references.get(index)
        if found is None:
            assert self.measure.reference is not None
            dense = self._dense[number][self._tiles[number][index].positions]
            found = self.measure.reference(self.runner, dense)
            if self.keeps_references:
                self._references[index] = found
        return found

    def without_dense(self, numbers: Iterable[int]) -> list[int]:
        """Those of the chunks on which the dense model, as it is now, has not been run."""
        if self._dense_of != self.model.version:
            self._dense.clear()
            self._dense_of = self.model.version
        return [number for number in numbers if number not in self._dense]

    def keep_dense(self, hidden: torch.Tensor, number: int) -> None:
        """Keep the dense model's final states of a chunk, [B, T, D], where a target is
        predicted."""
        self._dense[number] = hidden.flatten(0, 1)[self.chunks[number].sources]
