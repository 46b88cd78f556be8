"""Runs on this process's model: schedules, the prefix cache, and sums. Then read `executor`.

For the missing sums of every chunk a schedule is made, from the states that the prefix cache holds
there. The executor walks it, depth first. At the end of a sequence the head turns the final state
into values at every target. Values leave the device 64 sequences at a time and are summed over each
continuation in a fixed order, in float64.

M sequences of a call, V values of the measure, C continuations of a chunk.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from ..data import TokenBatch
from ..data.tokens import SplitTrees
from ..errors import InputError
from ..models import Model, Needs, Runner, open_runner
from ..models.device import is_out_of_memory
from ..models.rotary import switch_length
from ..models.verify import check_trees
from ..plan.cost import Cost
from ..plan.layout import Layout
from ..plan.progress import Progress
from ..plan.schedule import Schedule, plan_call
from ..plan.trie import Units
from .cache import Frontier, PrefixCache
from .chunks import Chunk, ChunkRows, make_chunk
from .executor import Counts, Executor, Walk
from .loading import Loading
from .measures import MEASURES
from .memory import MemoryLimit, OutOfMemory, runs_together
from .openings import Openings
from .problem import Problem
from .reference import DenseReference
from .runs import MAX_SUMS, Held, PartialSums

log = logging.getLogger(__name__)

Missing = Mapping[int, np.ndarray]  # by chunk, places of sequences, int64[n]


class Opened(NamedTuple):
    """A model opened for a calibration set: the set as it runs, the runner of the model's units,
    the memory limit, and the layout of the set."""

    batch: TokenBatch
    runner: Runner
    limit: MemoryLimit
    layout: Layout


def open_for(
    model: Model,
    backend: str,
    batch: TokenBatch,
    measure_name: str,
    granularity: str,
    memory_bytes: int | None,
    layout: Layout | None,
) -> Opened:
    """Open a model's runner for a calibration set, and cut the set if no layout is given.

    Raises InputError for rows or units that the model cannot run, and for memory_bytes that a row
    does not fit into.
    """
    batch, opened = verified_for(model, backend, batch, granularity)
    runner = model.extended(opened, granularity)
    measure = MEASURES[measure_name]
    limit = MemoryLimit(memory_bytes, model, runner, batch, measure, granularity)
    cut = limit.layout() if layout is None else limit.check(layout)
    log.info(
        "%s runs on the %s path (backend %s): %d rows in %d chunks, tiles of %d positions",
        *(model.name, runner.path_name, backend, batch.num_rows, len(cut.chunks), cut.tile),
    )
    return Opened(batch, runner, limit, cut)


def verified_for(
    model: Model, backend: str, batch: TokenBatch, granularity: str
) -> tuple[TokenBatch, Runner]:
    """A calibration set as the model runs it, and a runner verified on its longest rows.

    Raises InputError for rows or units that the model cannot run.
    """
    batch.check_fits(model.vocab_size, model.max_positions)
    batch = _runnable(model, batch)
    return batch, open_runner(model, backend, _needs(model, batch, granularity))


class Sharing(NamedTuple):
    """How many processes share the memory of this machine, and of the device."""

    per_machine: int = 1
    per_device: int = 1


class LocalRuns:
    """Runs units here; see `Runs`. Holds all that belongs to one version of one model.

    cache_bytes, cache_dir: of the states that outlive a call, see `PrefixCache`. The caller enters
    `model.evaluation()` around a call.
    """

    def __init__(
        self,
        model: Model,
        runner: Runner,
        limit: MemoryLimit,
        cache_bytes: int | None = None,
        cache_dir: Path | None = None,
        sharing: Sharing = Sharing(),  # noqa: B008  (a tuple of two numbers)
    ):
        self._model, self._runner, self._limit = model, runner, limit
        # a host has other tenants; and weights that take turns need the room that a device has
        has_reserve = model.device.type == "cuda" and not model.weights.take_turns
        reserve = limit.limit if has_reserve else None
        self._cache = PrefixCache(cache_bytes, cache_dir, model.device, reserve)
        self._frontier = Frontier(cache_dir, model.device)
        self._cache.per_machine = self._frontier.per_machine = sharing.per_machine
        self._cache.per_device = sharing.per_device
        self._counts = Counts()
        self._may_keep_references = True
        self._loading = Loading(model, limit, self._frontier)
        self._problem: Problem | None = None
        self._idle: LocalRuns | None = None

    def run_beside(self, idle: LocalRuns) -> bool:
        """See `Runs.run_beside`. Each has half of the cache. The waiting one gives back all that it
        holds when memory runs out, or when its dense reference has no room in its half."""
        self._idle, idle._idle = idle, None
        for runs in (self, idle):
            runs._cache.share(2)
        if idle._problem is not None and idle._reference.bytes > idle._cache.free_bytes:
            idle.close()
        return True

    @property
    def cost(self) -> Cost:
        counts = self._counts
        return Cost(
            unit_runs=counts.token_runs,
            head_runs=counts.token_heads,
            weight_loads=counts.weight_loads,
            weight_bytes=counts.weight_bytes,
        )

    @property
    def held(self) -> Held:
        idle = 0 if self._idle is None else self._idle._cache.bytes
        return Held(self._counts.peak_bytes, self._cache.bytes + idle, dict(self._cache.hits))

    def run(
        self,
        problem: Problem,
        sequences: Sequence[Units],
        missing: Missing,
        progress: Progress,
    ) -> Generator[PartialSums, None, None]:
        """The missing sums; see `Runs.run`. Out of memory, the caches are given back first."""
        self._use(problem)
        try:
            yield from self._run(problem, sequences, dict(missing), _Told(progress))
        finally:
            for number in missing:
                if number >= len(problem.chunks):  # a part of a row, which no later call asks for
                    self._executor.forget(number)

    def _run(
        self, problem: Problem, sequences: Sequence[Units], left: dict[int, np.ndarray], tell: _Told
    ) -> Generator[PartialSums, None, None]:
        while left:
            done: dict[int, list[np.ndarray]] = {}
            try:
                with closing(self._walk_all(problem, sequences, left, tell)) as parts:
                    for part in parts:
                        done.setdefault(part.chunk, []).append(part.rows)
                        yield part
                return
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if not self._give_back():
                    raise OutOfMemory(str(error)) from error
            for number, rows in done.items():
                left[number] = left[number][~np.isin(left[number], np.concatenate(rows))]
            left = {number: rows for number, rows in left.items() if len(rows)}

    def close(self) -> None:
        """Drop every state."""
        self._cache.clear()
        self._frontier.clear()
        if self._problem is not None:
            self._problem = None
            del self._executor, self._reference, self._openings

    # -- one problem -------------------------------------------------------------------------------

    def _use(self, problem: Problem) -> None:
        """Run under this problem from now on. States of another one are dropped."""
        if problem is self._problem:
            return
        chunks = problem.chunks
        widest = max(chunk.num_tokens for chunk in chunks)
        most = max(len(chunk.sources) for chunk in chunks)  # positions of a chunk
        room = self._limit.room_for_references(widest, most) if self._may_keep_references else 0
        self._reference = DenseReference(self._runner, problem.measure, room)
        self._openings = Openings(self._runner, self._limit.opening_bytes)
        self._executor = Executor(
            self._model,
            self._runner,
            problem.measure,
            problem.granularity,
            chunks,
            problem.layout.tile,
            self._limit.footprint,
            self._openings,
            self._cache,
            self._frontier,
            self._reference,
            self._counts,
        )
        self._cache.start(self._limit.state_bytes(sum(chunk.num_tokens for chunk in chunks)))
        self._problem = problem

    def _give_back(self) -> bool:
        """Free the memory of waiting runs, the prefix cache, then the kept references; False if
        nothing is held. Opened chunks, which are small, go with the first of them."""
        self._openings.give_back()
        idle, self._idle = self._idle, None
        if idle is not None:
            idle.close()
        if self._model.device.type == "cuda":
            torch.cuda.empty_cache()
        if idle is not None:
            return True
        if self._cache.bytes:
            self._cache.shrink()
            log.info("out of memory: the prefix cache shrinks to %d bytes", self._cache.bytes)
            warnings.warn(
                "out of memory: going on with a smaller prefix cache", RuntimeWarning, stacklevel=4
            )
            return True
        self._may_keep_references = False
        return self._reference.give_back()

    # -- walks -------------------------------------------------------------------------------------

    def _walk_all(
        self, problem: Problem, sequences: Sequence[Units], missing: Missing, tell: _Told
    ) -> Generator[PartialSums, None, None]:
        """The missing sums, group of chunks by group, in two halves if they do not fit."""
        self._cache.resize()
        self._run_dense(problem, sequences, missing, tell)
        schedules = self._schedules(problem, sequences, missing)
        shared = self._loading.groups(schedules, problem.chunks, self._reference.room)
        if len(sequences) > 1 and not shared.fit:
            log.info("%d sequences do not fit into one call; it runs in halves", len(sequences))
            yield from self._halves(problem, sequences, missing, tell)
            return
        unit_runs = sum(schedule.unit_runs for schedule in schedules.values())
        log.debug(
            "%d sequences on %d chunks: %d unit runs by chunk; %d bytes of prefixes are cached",
            *(len(sequences), len(missing), unit_runs, self._cache.bytes),
        )
        tell.expect(unit_runs)
        with closing(self._walks(schedules, shared.groups)) as walks:
            for number, walk in walks:
                chunk, rows = problem.chunks[number], missing[number]
                yield from self._sums_of(chunk, number, rows, walk, tell)

    def _halves(
        self, problem: Problem, sequences: Sequence[Units], missing: Missing, tell: _Told
    ) -> Generator[PartialSums, None, None]:
        """One half of the sequences after the other."""
        middle = len(sequences) // 2
        for start, stop in ((0, middle), (middle, len(sequences))):
            inside = {
                number: rows[(rows >= start) & (rows < stop)] - start
                for number, rows in missing.items()
            }
            inside = {number: rows for number, rows in inside.items() if len(rows)}
            if not inside:
                continue
            with closing(self._walk_all(problem, sequences[start:stop], inside, tell)) as parts:
                for part in parts:
                    yield part._replace(rows=part.rows + start)

    def _run_dense(
        self, problem: Problem, sequences: Sequence[Units], missing: Missing, tell: _Told
    ) -> None:
        """Hold the dense model's final states of the missing chunks, if the measure needs them."""
        lacking = self._reference.missing(missing)
        if not lacking:
            return
        after = self._schedules(problem, sequences, missing)  # the dense run will save some of it
        whole, only = [tuple(range(self._limit.num_units))], np.zeros(1, dtype=np.int64)
        schedules = self._schedules(problem, whole, dict.fromkeys(lacking, only))
        groups, _ = self._loading.groups(schedules, problem.chunks, self._reference.room)
        tell.expect(sum(of.unit_runs for part in (schedules, after) for of in part.values()))
        with closing(self._walks(schedules, groups)) as walks:
            for number, walk in walks:
                for step in walk:
                    if step.end >= 0:
                        self._executor.keep_dense(step.hidden, number)
                    tell.add(step.units)

    def _walks(
        self, schedules: Mapping[int, Schedule], groups: Sequence[Sequence[int]]
    ) -> Generator[tuple[int, Walk], None, None]:
        """The walks of all chunks, group by group, see `Executor.walks`."""
        for group in groups:
            yield from self._executor.walks({number: schedules[number] for number in group})

    def _schedules(
        self, problem: Problem, sequences: Sequence[Units], missing: Missing
    ) -> dict[int, Schedule]:
        """The steps on each chunk, given the sums that are missing and the states that are cached.

        Chunks that lack the same and cache the same share a schedule, and so cache the same
        afterwards. A part of a row caches nothing.
        """
        shared: dict[tuple, Schedule] = {}
        schedules = {}
        num_chunks = len(problem.chunks)
        for number, rows in missing.items():
            held = self._cache.match(number)
            capacity = self._cache.capacity if number < num_chunks else 0
            key = rows.tobytes(), id(held), capacity
            if key not in shared:
                lacking = [sequences[row] for row in rows.tolist()]
                shared[key] = plan_call(lacking, held, capacity, self._loading.visits_of)
            schedules[number] = shared[key]
        return schedules

    def _sums_of(
        self, chunk: ChunkRows, number: int, rows: np.ndarray, walk: Walk, tell: _Told
    ) -> Iterator[PartialSums]:
        """Sums of the sequences that end in a walk, `MAX_SUMS` at a time."""
        ended: list[int] = []
        values: list[torch.Tensor] = []  # [V, targets] each
        for step in walk:
            if step.end >= 0:
                ended.append(int(rows[step.end]))
                values.append(self._executor.values(step.hidden, number))
            if len(ended) == MAX_SUMS:
                yield _sum(chunk, number, ended, values)
                ended, values = [], []
            tell.add(step.units)
        if ended:
            yield _sum(chunk, number, ended, values)


class _Told:
    """Tells `progress` of unit runs: done so far, and in all as far as is known."""

    def __init__(self, progress: Callable[[int, int], None]):
        self._progress = progress
        self._done = self._total = 0

    def expect(self, units: int) -> None:
        self._total = self._done + units

    def add(self, units: int) -> None:
        self._done += units
        self._progress(self._done, self._total)


def _sum(chunk: ChunkRows, number: int, rows: list[int], values: list[torch.Tensor]) -> PartialSums:
    """Sum values over continuations in target order: one fetch from the device."""
    stacked = torch.stack(values) if len(values) > 1 else values[0][None]
    fetched = stacked.cpu().double().numpy()  # [n, V, targets]
    sums = np.empty((*fetched.shape[:2], len(chunk.continuations)))
    for of_sequence, into in zip(fetched, sums):
        for weights, total in zip(of_sequence, into):
            total[:] = np.bincount(chunk.places, weights=weights, minlength=len(total))
    return PartialSums(number, np.array(rows, dtype=np.int64), sums)


def _needs(model: Model, batch: TokenBatch, granularity: str) -> Needs:
    """Needs of a calibration set: its longest plain row, or tree with the longest of its
    sequences."""
    plain, trees = (np.flatnonzero(batch.row_is_tree == is_tree) for is_tree in (False, True))
    row, together, tree = None, False, None
    if len(plain):
        row = _longest(batch, plain, model).ids
        together = runs_together(model.device, row.shape[1])
    if len(trees):
        sequence = _longest_sequence(batch, trees)
        if row is None or len(sequence) > row.shape[1]:
            row = torch.from_numpy(sequence).to(model.device)[None]
        if batch.split_trees:
            together = True
        else:
            chunk = _longest(batch, trees, model)
            assert chunk.positions is not None
            assert chunk.branch is not None
            tree = (chunk.ids, chunk.positions, chunk.branch)
    return Needs(granularity, row, together, tree)


def _longest(batch: TokenBatch, rows: np.ndarray, model: Model) -> Chunk:
    """The longest of these rows of a batch, alone in a chunk."""
    return make_chunk(batch, [rows[batch.row_lengths[rows].argmax()]], model.device)


def _longest_sequence(batch: TokenBatch, trees: np.ndarray) -> np.ndarray:
    """The token ids int64[T] of the longest sequence of the longest of these trees."""
    row = trees[batch.row_lengths[trees].argmax()]
    inside = slice(batch.row_starts[row], batch.row_starts[row + 1])
    branch = batch.branch[inside]
    longest = 1 + np.bincount(branch)[1:].argmax()
    return batch.ids[inside][(branch == 0) | (branch == longest)]


def _runnable(model: Model, batch: TokenBatch) -> TokenBatch:
    """The calibration set as the model runs it: with its trees, or each branch as a row.

    Raises InputError for rows that the model cannot run together with others.
    """
    switch, longest = switch_length(model.config), int(batch.positions.max()) + 1
    if (
        switch is not None
        and longest > switch
        and (batch.row_is_tree.any() or batch.row_lengths.min() <= switch)
    ):
        raise InputError(
            f"{model.name}: rotary frequencies change for sequences of more than {switch} tokens, "
            f"so that longer and shorter ones cannot run together; the longest here has {longest}"
        )
    trees = np.flatnonzero(batch.row_is_tree)
    if not len(trees) or batch.split_trees:
        return batch
    tree = _longest(batch, trees, model)
    try:
        check_trees(open_runner(model, "generic"), tree.ids, tree.positions, tree.branch)
    except InputError as error:
        log.info("%s; each choice of a question runs as a row of its own", error.message)
        return SplitTrees.of(batch)
    return batch
