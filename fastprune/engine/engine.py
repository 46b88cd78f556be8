"""The engine: what is known, what is to be run, and the sums that come of it. Read this file first,
then `executor`.

A call asks for sums of a measure, over each continuation, of many sequences of units. What the
store knows is filled in; for the rest a schedule is made on each chunk of the calibration set, from
the states that the prefix cache has there. The executor walks it, depth first. Where a sequence
ends, the head turns its state into values at every target. They leave the device in batches and are
summed over each continuation in a fixed order, in float64.

Where not all weights fit, a group of chunks goes through the model together, a band of blocks at a
time: while one is loaded, every chunk runs the steps of that visit and leaves states that later
visits read (`Frontier`). All weights loaded is one band, one visit, and every chunk a group of its
own.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Generator
from contextlib import closing
from pathlib import Path

import numpy as np
import torch

from ..data import TokenBatch
from ..errors import InputError
from ..models import Model, make_runner
from ..models.attention import SDPA_BACKENDS
from ..models.device import is_out_of_memory
from ..models.fingerprint import machine_fingerprint
from ..plan.bands import FLOPS_PER_BYTE, make_groups
from ..plan.layout import Layout
from ..plan.schedule import Schedule, make_schedule
from ..plan.trie import Seen, Trie, make_trie
from .budget import MAX_SEQUENCES, Budget
from .cache import Frontier, PrefixCache
from .chunks import Chunk, make_chunk
from .executor import Counts, Executor, Walk
from .measures import MEASURES
from .store import SumStore, units_key

Progress = Callable[[int, int], None]

PENDING = 64  # masks whose numbers wait on the device, to be fetched together


class Engine:
    """Runs sequences of units over one calibration set.

    backend: "generic", "fused" or "auto"; `runner` is what runs the units, the model itself or its
    fused path.
    measure: the name of what is computed at each target, see `measures`. memory_bytes: see
    `Budget`. cache_bytes, cache_dir: of the states that outlive a call, see `PrefixCache`. layout:
    how the batch is cut; None: as fits the budget, see `Layout`. races: whether it is cut along the
    looks of a race. store: sums that are known, and
    are kept as they are finished. counts: what was done so far.
    """

    def __init__(
        self,
        model: Model,
        batch: TokenBatch,
        measure: str,
        granularity: str,
        memory_bytes: int | None = None,
        backend: str = "auto",
        store: SumStore | None = None,
        cache_bytes: int | None = None,
        cache_dir: Path | None = None,
        layout: Layout | None = None,
        races: bool = True,
    ):
        model.require(granularity)
        batch.check_fits(model.vocab_size, model.max_positions)
        _check_rows(model, batch)
        self.model, self.batch, self.granularity = model, batch, granularity
        self.measure, self.store = MEASURES[measure], store
        self.num_units = len(model.unit_names(granularity))
        self.runner = make_runner(model, backend)
        self.counts = Counts()
        self.cache = PrefixCache(cache_bytes, cache_dir, model.device)
        self._cached_of: tuple | None = None
        per_block = self.num_units // max(1, model.num_blocks)
        self._band_of = [
            number
            for number, band in enumerate(self.runner.bands)
            for _ in range(len(band) * per_block)
        ]
        self.frontier = Frontier(cache_dir, model.device)
        self.executor = Executor(
            model, self.runner, self.measure, granularity, self.cache, self.frontier, self.counts
        )
        self.budget = Budget(
            memory_bytes, model, self.runner, batch, self.measure, granularity, races
        )
        self._cut(self.budget.cut() if layout is None else self.budget.check(layout))
        self.executor.keeps_references = self.budget.take_references(self.chunks)

    def run(
        self, trie: Trie, progress: Progress | None = None, wanted: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Sums of the measure's V values over each continuation, float64[M, V, C], for the trie's M
        distinct sequences; and bool[M], those of which every sum came from the store.

        wanted: bool[C]; only chunks that hold such a continuation are run, whole, so that their
        numbers keep their bits; sums of the others are left at 0. progress(done, total) is told of
        unit runs. When memory runs out, the call begins again: without the prefix cache's states,
        then with smaller chunks, then with smaller tiles.
        """
        count = len(trie.sequences)
        if count > MAX_SEQUENCES:
            raise InputError(
                f"{count} distinct masks in one call; at most {MAX_SEQUENCES} are planned together"
            )
        while True:
            try:
                with self.model.evaluation():
                    return self._run(trie, progress or (lambda done, total: None), wanted)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or not (
                    self._shrink_cache() or self._take_smaller_steps()
                ):
                    raise

    def share(self, wanted: np.ndarray | None) -> float:
        """The share of the rows that `run` runs for these continuations."""
        return (
            sum(len(self.chunks[number].rows) for number in self._numbers(wanted))
            / self.batch.num_rows
        )

    def _numbers(self, wanted: np.ndarray | None) -> list[int]:
        return [
            n
            for n, chunk in enumerate(self.chunks)
            if wanted is None or wanted[chunk.continuation].any()
        ]

    def _run(
        self, trie: Trie, progress: Progress, wanted: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        sums, keys, context, missing, known = self._begin(trie, wanted)
        if self.measure.needs_dense:
            self._run_dense([number for number, rows in missing.items() if rows.any()])
        schedules = self._schedule(
            trie, {number: rows for number, rows in missing.items() if rows.any()}
        )
        if self._split(schedules) and len(keys) > 1:
            return self._run_halves(trie, progress, wanted)
        done, total = 0, sum(schedule.unit_runs for schedule in schedules.values())
        asked = {number: np.flatnonzero(rows) for number, rows in missing.items()}
        with closing(self._walks(schedules)) as walks:
            for number, walk in walks:
                chunk, pending = self.chunks[number], []
                for end, hidden, units in walk:
                    if end >= 0:
                        pending.append(
                            (int(asked[number][end]), self.executor.values(hidden, number))
                        )
                    if len(pending) == PENDING:
                        self._finish(pending, chunk, sums, context, keys)
                    done += units
                    progress(done, total)
                self._finish(pending, chunk, sums, context, keys)
        return sums, known

    def _begin(
        self, trie: Trie, wanted: np.ndarray | None
    ) -> tuple[np.ndarray, list[bytes], int | None, dict[int, np.ndarray], np.ndarray]:
        """Sums [M, V, C] as far as the store knows them, and what they are kept under: the
        sequences' keys and the context; by chunk, bool[M], which are missing there; bool[M], which
        are missing nowhere."""
        sums = np.zeros(
            (len(trie.sequences), len(self.measure.values), self.batch.num_continuations)
        )
        keys = [units_key(sequence) for sequence in trie.sequences]
        context = self._context()
        missing = {
            number: self._look_up(context, keys, number, sums) for number in self._numbers(wanted)
        }
        return (
            sums,
            keys,
            context,
            missing,
            ~np.any([*missing.values(), np.zeros(len(keys), dtype=bool)], axis=0),
        )

    def _run_halves(
        self, trie: Trie, progress: Progress, wanted: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """As `_run`, one half of the sequences after the other."""
        done = known = 0
        found = []

        def note(now: int, total: int) -> None:
            nonlocal known
            known = now
            progress(done + now, done + total)

        middle = len(trie.sequences) // 2
        for part in (trie.sequences[:middle], trie.sequences[middle:]):
            found.append(self._run(make_trie(part), note, wanted))
            done += known
        sums, from_store = zip(*found)
        return np.concatenate(sums), np.concatenate(from_store)

    # -- bands -------------------------------------------------------------------------------------

    def _frontier_bytes(self, schedule: Schedule, number: int) -> int:
        """What a chunk's states between visits weigh at their most."""
        return schedule.frontier_peak * self.budget.state_bytes(self.chunks[number].num_tokens)

    def _room(self, schedules: dict[int, Schedule]) -> tuple[int, int]:
        """Bytes for states between visits: what the budget leaves beside a walk, and what slower
        tiers may take."""
        widest = max(self.chunks[number].num_tokens for number in schedules)
        memory = self.budget.beside(
            widest, max(schedule.num_slots for schedule in schedules.values())
        )
        return memory, self.frontier.start(memory)

    def _split(self, schedules: dict[int, Schedule]) -> bool:
        """Whether the states between visits of a single chunk do not fit, so that masks must be
        scored in parts."""
        if not any(schedule.frontier for schedule in schedules.values()):
            return False
        return max(self._frontier_bytes(s, number) for number, s in schedules.items()) > sum(
            self._room(schedules)
        )

    def _walks(self, schedules: dict[int, Schedule]) -> Generator[tuple[int, Walk], None, None]:
        """The walks of all chunks, group by group, see `Executor.walks`."""
        for group in self._groups(schedules):
            yield from self.executor.walks({number: schedules[number] for number in group})

    def _groups(self, schedules: dict[int, Schedule]) -> list[list[int]]:
        """The chunks that go through the model together, see `bands`."""
        numbers, weights = list(schedules), self.model.weights
        if weights is None or len(self.runner.bands) == 1 or not numbers:
            return [[number] for number in numbers]
        memory, slower = self._room(schedules)
        room = weights.room
        per_token = (
            2 * room.block_bytes // self.model.dtype.itemsize * room.num_blocks // self.num_units
        )
        groups = make_groups(
            [self._frontier_bytes(schedules[number], number) for number in numbers],
            [
                schedules[number].unit_runs * self.chunks[number].num_tokens * per_token
                for number in numbers
            ],
            room.num_blocks * room.block_bytes,
            memory,
            slower,
            FLOPS_PER_BYTE["cuda" if self.model.device.type == "cuda" else "cpu"],
        )
        return [[numbers[place] for place in group] for group in groups.groups]

    # -- what is known -----------------------------------------------------------------------------

    def _schedule(self, trie: Trie, missing: dict[int, np.ndarray]) -> dict[int, Schedule]:
        """What is run on each chunk, given the sums that are missing there and the states that are
        known.

        Chunks that lack the same and know the same share a schedule, and so know the same
        afterwards.
        """
        of = self.model.state, self.numerics()
        if self._cached_of != of:
            self.cache.clear()
            self._cached_of = of
        capacity, made = self.cache.capacity(), {}
        found = {}
        for number, rows in missing.items():
            known, likelihood = self.cache.known(number)
            key = rows.tobytes(), id(known)
            if key not in made:
                new = trie
                if known or not rows.all():
                    new = make_trie(itertools.compress(trie.sequences, rows), known)
                made[key] = make_schedule(new, likelihood, capacity, self._band_of), new
            found[number] = made[key][0]
            self.counts.row_unbounded += self._seen.add(number, made[key][1]) * len(
                self.chunks[number].rows
            )
        return found

    def _context(self) -> int | None:
        """What decides the bits of sums besides chunk and units, as the store's number for it."""
        if self.store is None:
            return None
        return self.store.context(
            {**self.numerics(), "measure": self.measure.name, "weights": self.model.weights_hash}
        )

    def _look_up(
        self, context: int | None, keys: list[bytes], number: int, sums: np.ndarray
    ) -> np.ndarray:
        """Fill in the sums of a chunk that the store knows; bool[M], those that are missing."""
        missing = np.ones(len(keys), dtype=bool)
        if self.store is not None and context is not None:
            chunk = self.chunks[number]
            known = self.store.get(context, chunk.key, keys)
            for mask, key in enumerate(keys):
                if key in known:
                    sums[mask, :, chunk.continuations] = known[key].reshape(-1, sums.shape[1])
                    missing[mask] = False
        return missing

    def _finish(
        self,
        pending: list[tuple[int, torch.Tensor]],
        chunk: Chunk,
        sums: np.ndarray,
        context: int | None,
        keys: list[bytes],
    ) -> None:
        """Fetch the values of pending masks [V, M], sum them over continuations in target order,
        and keep the sums."""
        if not pending:
            return
        values = torch.stack([values for _, values in pending]).cpu().double().numpy()
        for (mask, _), rows in zip(pending, values, strict=True):
            for value, row in enumerate(rows):
                found = np.bincount(chunk.continuation, weights=row, minlength=sums.shape[2])
                sums[mask, value, chunk.continuations] = found[chunk.continuations]
        if self.store is not None and context is not None:
            finished = {keys[mask]: sums[mask, :, chunk.continuations] for mask, _ in pending}
            self.store.put(context, chunk.key, finished)
        pending.clear()

    def _run_dense(self, numbers: list[int]) -> None:
        """Have the executor know the dense model's final states of these chunks."""
        trie, every = make_trie([tuple(range(self.num_units))]), np.ones(1, dtype=bool)
        schedules = self._schedule(trie, dict.fromkeys(self.executor.without_dense(numbers), every))
        with closing(self._walks(schedules)) as walks:
            for number, walk in walks:
                for end, hidden, _ in walk:
                    if end >= 0:
                        self.executor.keep_dense(hidden, number)

    def numerics(self) -> dict[str, object]:
        """What the bits of a number depend on besides weights, chunk and mask: path, dtype, device,
        software."""
        return {
            "tile": self.layout.tile,
            "granularity": self.granularity,
            "path": self.runner.numerics(),
            "dtype": str(self.model.dtype),
            "attention": getattr(self.model.config, "_attn_implementation", None),
            "experts": getattr(self.model.config, "_experts_implementation", None),
            "sdpa": [backend.name for backend in SDPA_BACKENDS],
            "machine": machine_fingerprint(self.model.device),
        }

    # -- chunks and memory -------------------------------------------------------------------------

    def _cut(self, layout: Layout) -> None:
        """Make the chunks of a layout."""
        self.layout = layout
        self.chunks = [make_chunk(self.batch, rows, self.model.device) for rows in layout.chunks]
        self.executor.start(self.chunks, layout.tile, self.budget.footprint)
        self._seen = Seen()
        self.cache.start(self.budget.state_bytes(sum(chunk.num_tokens for chunk in self.chunks)))

    def _shrink_cache(self) -> bool:
        """Give back what the prefix cache holds, and let it hold less from now on; False when it is
        empty."""
        if not self.cache.bytes:
            return False
        self.cache.shrink()
        warnings.warn(
            "out of memory: going on with a smaller prefix cache", RuntimeWarning, stacklevel=4
        )
        return True

    def _take_smaller_steps(self) -> bool:
        """Cut smaller chunks, or tiles; False when both are as small as can be."""
        self.executor.keeps_references = False
        smaller = self.budget.smaller(self.layout, self.chunks)
        if smaller is None:
            return False
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()
        self._cut(smaller)
        warnings.warn(
            f"out of memory: going on with chunks of "
            f"{max(chunk.num_tokens for chunk in self.chunks)} tokens and tiles "
            f"of {smaller.tile} positions; scores may differ in the last bits from those before",
            RuntimeWarning,
            stacklevel=4,
        )
        return True


def _check_rows(model: Model, batch: TokenBatch) -> None:
    """Raise InputError for rows that the model cannot run as they stand in a chunk with others."""
    switch, longest = model.rotary_switch, int(batch.positions.max()) + 1
    if (
        switch is not None
        and longest > switch
        and (batch.row_is_tree.any() or batch.row_lengths.min() <= switch)
    ):
        raise InputError(
            f"{model.name}: rotary frequencies change for sequences of more than {switch} tokens, "
            f"so that longer and "
            f"shorter ones cannot run together; the longest here has {longest}"
        )
    trees = np.flatnonzero(batch.row_is_tree)
    if len(trees):
        longest_tree = make_chunk(batch, [trees[batch.row_lengths[trees].argmax()]], model.device)
        model.check_trees(longest_tree.ids, longest_tree.positions, longest_tree.branch)
