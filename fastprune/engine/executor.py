"""The executor: runs the steps of a schedule on a chunk, and computes the measure's values.

It decides nothing: `LocalRuns` chooses the chunks, their order and their steps. The executor runs
units and heads, and counts them.

B rows, T tokens of a row, D columns of a state, V values of the measure, M targets.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..models import Model, Runner
from ..models.swap import HalfBlock, State, hidden_of, pack, state_bytes
from ..plan.schedule import Schedule, Step, Visit
from ..plan.trie import Units
from .cache import Frontier, PrefixCache
from .chunks import Chunk, Tile
from .loading import Loading
from .memory import Footprint
from .openings import Openings
from .problem import Problem
from .reference import DenseReference


class Reached(NamedTuple):
    """The outcome of a step.

    Attributes:
        end: The number of the sequence that ends here, or -1.
        hidden: The hidden states, [B, T, D].
        units: The number of units that the step ran.
    """

    end: int
    hidden: torch.Tensor
    units: int


Walk = Generator[Reached, None, None]


@dataclass
class Counts:
    """Work done so far.

    Attributes:
        token_runs: Unit runs, each counted once for every token that it read.
        token_heads: Runs of the head, counted likewise.
        weight_loads: Blocks whose weights were read.
        weight_bytes: Bytes of files that were read for these.
        peak_bytes: The most bytes of activations held at once, with workspaces as measured on this
            model.
    """

    token_runs: int = 0
    token_heads: int = 0
    weight_loads: int = 0
    weight_bytes: int = 0
    peak_bytes: int = 0


class Executor:
    """Runs schedules on the chunks of one problem.

    Args:
        model: The model.
        runner: Runs its units.
        problem: The problem. Its chunks become tensors when they first run.
        footprint: The bytes of states, workspaces and heads.
        loading: Loads the weights of visits.
        openings: Opens chunks.
        cache: States that outlive a walk.
        frontier: States that wait for a later visit.
        reference: The dense model's side of the measure.
        counts: Grows with the work done.
    """

    def __init__(
        self,
        model: Model,
        runner: Runner,
        problem: Problem,
        footprint: Footprint,
        loading: Loading,
        openings: Openings,
        cache: PrefixCache,
        frontier: Frontier,
        reference: DenseReference,
        counts: Counts,
    ):
        self._model, self._runner, self._footprint = model, runner, footprint
        self._measure, self._granularity = problem.measure, problem.granularity
        self._chunks, self._tile = problem.chunks, problem.layout.tile
        self._cache, self._frontier, self._reference = cache, frontier, reference
        self._counts, self._openings, self._loading = counts, openings, loading
        self._opened: dict[int, tuple[Chunk, list[Tile]]] = {}  # by number

    def _open(self, number: int) -> tuple[Chunk, list[Tile]]:
        """A chunk as tensors, and its tiles."""
        if number not in self._opened:
            chunk = self._chunks[number].to(self._model.device)
            self._opened[number] = chunk, chunk.tiles(self._tile)
        return self._opened[number]

    def forget(self, number: int) -> None:
        """Drop everything held for a chunk."""
        self._opened.pop(number, None)
        self._openings.forget(number)
        self._cache.forget(number)
        self._reference.forget(number)

    # -- walks -------------------------------------------------------------------------------------

    def walks(self, schedules: dict[int, Schedule]) -> Iterator[tuple[int, Walk]]:
        """Yield the walks of a group of chunks, visit by visit, while their weights are loaded.

        Exhaust each walk before the next one. If the iterator is closed early, the cache forgets
        its states of the chunks that were begun and not finished.

        Args:
            schedules: The schedule of each chunk, by number.

        Yields:
            The number of a chunk, and its walk.
        """
        cache, weights, begun = self._cache, self._model.weights, set[int]()
        loads, read = weights.loads, weights.bytes
        try:
            for visits in self._loading.visits(schedules):
                for number, visit in visits.items():
                    schedule = schedules[number]
                    if visit is schedule.visits[0]:
                        begun.add(number)
                        cache.evict(number, schedule.evicted)
                    with closing(self._walk(schedule, visit, number)) as walk:
                        yield number, walk
                    if visit is schedule.visits[-1]:
                        cache.commit(number, schedule.held)
                        begun.remove(number)
        finally:
            self._frontier.clear()
            for number in begun:
                cache.forget(number)
            self._counts.weight_loads += weights.loads - loads
            self._counts.weight_bytes += weights.bytes - read

    def _walk(self, schedule: Schedule, visit: Visit, number: int) -> Walk:
        """Run a visit's steps on one chunk."""
        chunk, _ = self._open(number)
        embedded, arguments = self._openings.open(number, chunk)
        slots: list[State | None] = [None] * schedule.num_slots
        run, granularity = self._runner.run, self._granularity
        counts, num_read = self._counts, chunk.num_read
        for step in schedule.steps[visit.start : visit.stop]:
            kind, index = step.source
            if kind == "root":  # the first step, if any
                state, embedded = embedded, None
            elif kind == "slot":
                state = slots[index]
                if step.last_use:
                    slots[index] = None
            else:
                state = self._take(schedule, step, number)
            retained = dict(step.retained)
            fresh: dict[Units, torch.Tensor] = {}
            # states that stay on the device are cached together, so that no code of the cache runs
            # between units
            together = len(retained) if self._cache.takes(number, len(retained)) else 1
            for count, unit in enumerate(step.units, start=1):
                # within a step, only the size of a state can change
                if count == 1 or isinstance(state, HalfBlock):
                    self._note_peak(slots, state, chunk)
                state = run(unit, state, arguments, granularity)
                counts.token_runs += num_read
                if count in retained:
                    fresh[retained[count]] = pack(state)
                    if len(fresh) == together:
                        self._cache.insert(number, fresh)
                        fresh.clear()
            if step.frontier >= 0:
                self._frontier.put(number, schedule.frontier[step.frontier], pack(state))
            if step.target >= 0:
                slots[step.target] = state
            yield Reached(step.end, hidden_of(state), len(step.units))
        self._openings.weigh(number)

    def _take(self, schedule: Schedule, step: Step, number: int) -> State:
        """The first state of a step, from the prefix cache or the frontier."""
        kind, index = step.source
        states: PrefixCache | Frontier
        if kind == "cached":
            states, prefix = self._cache, schedule.cached[index]
        else:
            states, prefix = self._frontier, schedule.frontier[index]
        state = self._runner.unpack(states.get(number, prefix), prefix[-1])
        if step.last_use:
            states.drop(number, prefix)
        return state

    def _note_peak(self, slots: list[State | None], state: State, chunk: Chunk) -> None:
        alive = {id(s): s for s in (*slots, state) if s is not None}
        held = sum(map(state_bytes, alive.values())) + self._frontier.bytes
        held += self._reference.bytes + self._openings.bytes
        peak = held + int(self._footprint.workspace * chunk.num_tokens) + self._footprint.head
        self._counts.peak_bytes = max(self._counts.peak_bytes, peak)

    # -- final states ------------------------------------------------------------------------------

    def values(self, hidden: torch.Tensor, number: int) -> torch.Tensor:
        """The measure's values at every target of a chunk, [V, M].

        hidden: one mask's final states, [B, T, D].
        """
        hidden = hidden.flatten(0, 1)
        values = []
        chunk, tiles = self._open(number)
        for index, tile in enumerate(tiles):
            reference = self._reference.at(number, index, tile)
            states = hidden[tile.sources]
            values.append(self._measure.compute(self._runner.head, states, tile, reference))
        self._counts.token_heads += chunk.num_read
        return torch.cat(values, dim=1)

    def keep_dense(self, hidden: torch.Tensor, number: int) -> None:
        """Hold the dense model's final states of a chunk, [B, T, D], as the reference."""
        self._reference.put(number, hidden.flatten(0, 1)[self._open(number)[0].sources])
