"""Runs on this process's model: schedules, the prefix cache, and sums. Then read `executor`.

Each chunk gets a schedule for its missing sums, from the states that the prefix cache holds for it.
The executor walks the schedule, depth first. At the end of a sequence, the head computes values at
every target from the final state. The values of 64 sequences leave the device together. They are
summed over each continuation in a fixed order, in float64.

M sequences of a call, V values of the measure, C continuations of a chunk.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path

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
from ..plan.layout import Cut, Layout
from ..plan.progress import Progress
from ..plan.schedule import Schedule, plan_call
from ..plan.trie import Units
from .cache import Frontier, PrefixCache
from .chunks import Chunk, ChunkRows, chunk_rows
from .executor import Counts, Executor, Walk
from .loading import Loading
from .measures import MEASURES
from .memory import MemoryLimit, OutOfMemory, runs_together
from .openings import Openings
from .problem import Problem, numerics_of
from .reference import DenseReference
from .runs import MAX_SUMS, Held, PartialSums

log = logging.getLogger(__name__)

Missing = Mapping[int, np.ndarray]  # by chunk, places of sequences, int64[n]


def open_for(
    model: Model,
    backend: str,
    batch: TokenBatch,
    measure_name: str,
    granularity: str,
    memory_bytes: int | None,
    layout: Cut,
) -> tuple[Problem, Runner, MemoryLimit]:
    """Open a model's runner for a calibration set, and cut the set unless it has a layout.

    Args:
        model: The model.
        backend: "auto", "generic" or "fused".
        batch: The calibration set.
        measure_name: A name of `MEASURES`.
        granularity: "block" or "sublayer".
        memory_bytes: The limit of a call's activations; None for a default.
        layout: A layout to check and use; "rows" or None to make one.

    Returns:
        The problem, without a digest; the runner; the limit of a call's memory.

    Raises:
        InputError: The model cannot run a row or unit, or a row does not fit into memory_bytes.
    """
    batch, opened = verified_for(model, backend, batch, granularity)
    runner = model.extended(opened, granularity)
    measure = MEASURES[measure_name]
    limit = MemoryLimit(memory_bytes, model, runner, batch, measure, granularity)
    cut = limit.check(layout) if isinstance(layout, Layout) else limit.layout(layout == "rows")
    log.info(
        "%s runs on the %s path (backend %s): %d rows in %d chunks, tiles of %d positions",
        *(model.name, runner.path_name, backend, batch.num_rows, len(cut.chunks), cut.tile),
    )
    numerics = numerics_of(model, runner)
    return Problem(batch, measure_name, granularity, cut, numerics), runner, limit


def verified_for(
    model: Model, backend: str, batch: TokenBatch, granularity: str
) -> tuple[TokenBatch, Runner]:
    """Convert a calibration set to the form that the model runs, and verify a runner on it.

    Returns:
        The calibration set, and the runner, verified on the longest rows.

    Raises:
        InputError: The model cannot run a row or unit.
    """
    batch.check_fits(model.vocab_size, model.max_positions)
    batch = _runnable(model, batch)
    return batch, open_runner(model, backend, _needs(model, batch, granularity))


class LocalRuns:
    """Runs units in this process (see `Runs`), for one version of one model.

    The caller enters `model.evaluation()` around a call.

    Args:
        model: The model.
        runner: Runs its units.
        limit: The limit of a call's memory.
        cache_bytes: The limit of states that outlive a call (see `PrefixCache`).
        cache_dir: A folder for further states, or None.
        per_machine: The number of processes that share the memory of this machine.
        per_device: The number of processes that share the memory of the device.
    """

    def __init__(
        self,
        model: Model,
        runner: Runner,
        limit: MemoryLimit,
        cache_bytes: int | None = None,
        cache_dir: Path | None = None,
        per_machine: int = 1,
        per_device: int = 1,
    ):
        self._model, self._runner, self._limit = model, runner, limit
        # a host has other tenants, and weights that take turns need the device's free memory
        has_reserve = model.device.type == "cuda" and not model.weights.take_turns
        reserve = limit.limit if has_reserve else None
        self._cache = PrefixCache(cache_bytes, cache_dir, model.device, reserve)
        self._frontier = Frontier(cache_dir, model.device)
        self._cache.per_machine = self._frontier.per_machine = per_machine
        self._cache.per_device = per_device
        self._counts = Counts()
        self._may_keep_references = True
        self._loading = Loading(model, limit, self._frontier)
        self._problem: Problem | None = None
        self._idle: LocalRuns | None = None

    def run_beside(self, idle: LocalRuns) -> bool:
        """See `Runs.run_beside`. Each gets half of the cache.

        The waiting one frees everything when memory runs out, or when its dense reference does not
        fit into its half.
        """
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
        """Yield the missing sums (see `Runs.run`). When memory runs out, caches are freed first."""
        self._use(problem)
        try:
            yield from self._run(problem, sequences, dict(missing), _UnitProgress(progress))
        finally:
            for number in missing:
                if number >= len(problem.chunks):  # a part of a row: no later call needs it
                    self._executor.forget(number)

    def _run(
        self,
        problem: Problem,
        sequences: Sequence[Units],
        left: dict[int, np.ndarray],
        tell: _UnitProgress,
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
        """Run under this problem from now on, and drop the states of another one."""
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
            problem,
            self._limit.footprint,
            self._loading,
            self._openings,
            self._cache,
            self._frontier,
            self._reference,
            self._counts,
        )
        self._cache.start(self._limit.state_bytes(sum(chunk.num_tokens for chunk in chunks)))
        self._problem = problem

    def _give_back(self) -> bool:
        """Free the next kind of memory: waiting runs, the prefix cache, or kept references.

        Opened chunks, which are small, are freed with the first kind.

        Returns:
            Whether anything was freed.
        """
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
        self, problem: Problem, sequences: Sequence[Units], missing: Missing, tell: _UnitProgress
    ) -> Generator[PartialSums, None, None]:
        """Yield the missing sums, group by group; in two halves if the call does not fit."""
        self._cache.resize()
        self._run_dense(problem, sequences, missing, tell)
        schedules = self._schedules(problem, sequences, missing)
        groups, fit = self._loading.groups(schedules, problem.chunks, self._reference.room)
        if len(sequences) > 1 and not fit:
            log.info("%d sequences do not fit into one call; it runs in halves", len(sequences))
            yield from self._halves(problem, sequences, missing, tell)
            return
        unit_runs = sum(schedule.unit_runs for schedule in schedules.values())
        log.debug(
            "%d sequences on %d chunks: %d unit runs by chunk; %d bytes of prefixes are cached",
            *(len(sequences), len(missing), unit_runs, self._cache.bytes),
        )
        tell.expect(unit_runs)
        with closing(self._walks(schedules, groups)) as walks:
            for number, walk in walks:
                chunk, rows = problem.chunks[number], missing[number]
                yield from self._sums_of(chunk, number, rows, walk, tell)

    def _halves(
        self, problem: Problem, sequences: Sequence[Units], missing: Missing, tell: _UnitProgress
    ) -> Generator[PartialSums, None, None]:
        """Run one half of the sequences after the other."""
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
        self, problem: Problem, sequences: Sequence[Units], missing: Missing, tell: _UnitProgress
    ) -> None:
        """Compute and hold the dense model's final states of the missing chunks, if needed."""
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
        """Yield the walks of all chunks, group by group (see `Executor.walks`)."""
        for group in groups:
            yield from self._executor.walks({number: schedules[number] for number in group})

    def _schedules(
        self, problem: Problem, sequences: Sequence[Units], missing: Missing
    ) -> dict[int, Schedule]:
        """Plan the steps on each chunk, from its missing sums and its cached states.

        Chunks with equal missing sums and equal cached prefixes share a schedule. So they cache
        equal prefixes afterwards. A part of a row caches nothing.
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
        self, chunk: ChunkRows, number: int, rows: np.ndarray, walk: Walk, tell: _UnitProgress
    ) -> Iterator[PartialSums]:
        """Yield the sums of the sequences that end in a walk, `MAX_SUMS` at a time."""
        ends: list[int] = []
        values: list[torch.Tensor] = []  # [V, targets] each
        for step in walk:
            if step.end >= 0:
                ends.append(step.end)
                values.append(self._executor.values(step.hidden, number))
            if len(ends) == MAX_SUMS:
                yield _sum(chunk, number, rows[ends], values)
                ends, values = [], []
            tell.add(step.units)
        if ends:
            yield _sum(chunk, number, rows[ends], values)


class _UnitProgress:
    """Reports unit runs to `progress`: those done so far, and the total as it is known now."""

    def __init__(self, progress: Callable[[int, int], None]):
        self._progress = progress
        self._done = self._total = 0

    def expect(self, units: int) -> None:
        self._total = self._done + units

    def add(self, units: int) -> None:
        self._done += units
        self._progress(self._done, self._total)


def _sum(
    chunk: ChunkRows, number: int, rows: np.ndarray, values: list[torch.Tensor]
) -> PartialSums:
    """Sum values over continuations in target order, with one transfer from the device."""
    together = torch.stack(values) if len(values) > 1 else values[0]
    fetched = together.cpu().numpy().reshape(len(values), *values[0].shape)  # [n, V, targets]
    count = len(chunk.continuations)
    sums = [  # bincount adds in float64
        [np.bincount(chunk.places, weights, count) for weights in of_sequence]
        for of_sequence in fetched
    ]
    return PartialSums(number, rows, np.array(sums))


def _needs(model: Model, batch: TokenBatch, granularity: str) -> Needs:
    """The rows of a calibration set on which a runner must be verified.

    These are the longest plain row, and the longest tree with its longest sequence.
    """
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
    return chunk_rows(batch, [rows[batch.row_lengths[rows].argmax()]]).to(model.device)


def _longest_sequence(batch: TokenBatch, trees: np.ndarray) -> np.ndarray:
    """The token ids int64[T] of the longest sequence of the longest of these trees."""
    row = trees[batch.row_lengths[trees].argmax()]
    inside = slice(batch.row_starts[row], batch.row_starts[row + 1])
    branch = batch.branch[inside]
    longest = 1 + np.bincount(branch)[1:].argmax()
    return batch.ids[inside][(branch == 0) | (branch == longest)]


def _runnable(model: Model, batch: TokenBatch) -> TokenBatch:
    """Keep the trees of a calibration set if the model can run them; else split them into rows.

    Raises:
        InputError: The model cannot run longer and shorter rows together.
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
