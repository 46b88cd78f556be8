"""The engine: walks a schedule through a model, chunk by chunk. Read this file first.

For every chunk of the calibration set the model embeds the tokens once. The steps of the schedule then run units on
states, depth first; a state is held until its last child has begun, or beyond the call where the prefix cache has it.
Where a sequence ends, the head turns its state into the values of the measure at every target, a tile of positions at a
time. They leave the device in batches and are summed over each continuation in a fixed order, in float64.

Where not all weights fit, a group of chunks goes through the model together, a band of blocks at a time: while one is
loaded, every chunk runs the steps of that visit, depth first, and leaves states that later visits read (`Frontier`).
All weights loaded is one band, one visit, and every chunk a group of its own.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import torch

from .bands import FLOPS_PER_BYTE, Groups, make_groups
from .chunks import Chunk, Tile, make_chunk
from .data import TokenBatch
from .errors import InputError
from .fingerprint import machine_fingerprint
from .footprint import measure_footprint
from .layout import Layout, make_layout
from .measures import MEASURES
from .memory import available_bytes, is_out_of_memory
from .models import Model, make_runner
from .models.attention import BACKENDS
from .models.stand_ins import State, hidden_of, state_bytes
from .schedule import ROOT, Schedule, Visit, make_schedule, max_slots
from .states import SHARE, Frontier, PrefixCache
from .store import SumStore, units_key
from .trie import Seen, Trie, make_trie

Progress = Callable[[int, int], None]

MAX_SEQUENCES = 1 << 20  # distinct ones of one call; bounds the states alive at once
CHUNK_TOKENS = 16384  # on a GPU: enough rows to keep its matrix units busy, no more
CHUNK_BYTES, LEAST_CHUNK_TOKENS = 2 << 20, 1024  # on a CPU: states that leave a unit's workspace room in the caches
TILE_BYTES = {"cpu": 48 << 20, "cuda": 512 << 20}  # logits of one tile of positions
LEAST_TILE = 8  # positions
BUDGET_BYTES = {"cpu": 4 << 30, "cuda": 16 << 30}
SUMS_SHARE = 8  # one part in so many of the budget is for sums over continuations
PENDING = 64  # masks whose numbers wait on the device, to be fetched together


class Engine:
    """Runs sequences of units over one calibration set.

    backend: "generic", "fused" or "auto"; `runner` is what runs the units, the model itself or its fused path.
    measure: the name of what is computed at each target, see `measures`. memory_bytes bounds the activations of a call:
    states, the workspace of a unit, a tile of logits, and the dense model's final states where the measure needs them.
    cache_bytes, cache_dir: of the states that outlive a call, see `PrefixCache`.
    layout: how the batch is cut; None: as fits the budget, see `Layout`.
    store: sums that are known, and are kept as they are finished. peak_activation_bytes: the most that were held so
    far, workspaces as measured on this model. row_runs, row_heads: units, and heads, that were run so far, counted
    where that happens, once for each row of the batch. row_unbounded: unit runs, had every state been kept.
    weight_loads: blocks whose weights were read; weight_bytes: of files, for these.
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
    ):
        model.require(granularity)
        batch.check_fits(model.vocab_size, model.max_positions)
        _check_rows(model, batch)
        self.model, self.batch, self.granularity = model, batch, granularity
        self.measure = MEASURES[measure]
        self.num_units = len(model.unit_names(granularity))
        self.store = store
        kind = "cuda" if model.device.type == "cuda" else "cpu"
        memory_bytes = BUDGET_BYTES[kind] if memory_bytes is None else memory_bytes
        self.runner = make_runner(model, backend)
        self.peak_activation_bytes = 0
        self.row_runs = self.row_heads = self.row_unbounded = 0
        self.weight_loads = self.weight_bytes = 0
        per_block = self.num_units // max(1, model.num_blocks)
        self._block_of = [unit // per_block for unit in range(self.num_units)]
        self._band_of = [number for number, band in enumerate(self.runner.bands) for _ in range(len(band) * per_block)]
        self._frontier = Frontier(cache_dir, model.device)
        self._memory_bytes = memory_bytes
        self.cache = PrefixCache(cache_bytes, cache_dir, model.device)
        self._cached_of: tuple | None = None
        per_mask = 24 * len(self.measure.values) * batch.num_continuations  # sums, and twice that to reduce them
        self.most_sums = max(1, memory_bytes // SUMS_SHARE // per_mask)
        self._slots = max_slots(self.num_units, MAX_SEQUENCES)
        self._positions = len(np.unique(batch.target_source))  # that predict something
        if layout is None:
            per_position = self.runner.head_bytes(measure)
            tile = max(LEAST_TILE, min(TILE_BYTES[kind], memory_bytes // 4) // per_position // 8 * 8)
            layout = self._fit(memory_bytes, _chunk_tokens(model), tile)
        else:
            layout = self._check_layout(memory_bytes, layout)
        self._cut(layout)
        room = memory_bytes - self._least_bytes(max(chunk.num_tokens for chunk in self.chunks))
        most = max(len(chunk.sources) for chunk in self.chunks)
        self._keeps_references = self.measure.needs_dense and most * self._reference_bytes <= room
        if self._keeps_references:
            self._memory_bytes -= most * self._reference_bytes  # what is left for all else
        self._references: dict[int, torch.Tensor] = {}  # by tile of the chunk that runs, see _reference

    def run(
        self, trie: Trie, progress: Progress | None = None, wanted: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Sums of the measure's V values over each continuation, float64[M, V, C], for the trie's M distinct
        sequences; and bool[M], those of which every sum came from the store.

        wanted: bool[C]; only chunks that hold such a continuation are run, whole, so that their numbers keep their
        bits; sums of the others are left at 0. progress(done, total) is told of unit runs. When memory runs out,
        the call begins again: without the prefix cache's states, then with smaller chunks, then with smaller tiles.
        """
        count = len(trie.sequences)
        if count > MAX_SEQUENCES:
            raise InputError(f"{count} distinct masks in one call; at most {MAX_SEQUENCES} are planned together")
        while True:
            try:
                with self.model.evaluation(), self._counted_loads():
                    return self._run(trie, progress or (lambda done, total: None), wanted)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or not (self._shrink_cache() or self._take_smaller_steps()):
                    raise
            finally:
                self._references.clear()

    def most_together(self, longest: int) -> int:
        """The most sequences of so many units whose states, at the worst, the chunks were cut for."""
        return MAX_SEQUENCES if longest <= self.num_units else (1 << max_slots(self.num_units, MAX_SEQUENCES)) - 1

    def share(self, wanted: np.ndarray | None) -> float:
        """The share of the rows that `run` runs for these continuations."""
        return sum(len(self.chunks[number].rows) for number in self._numbers(wanted)) / self.batch.num_rows

    def _numbers(self, wanted: np.ndarray | None) -> list[int]:
        return [n for n, chunk in enumerate(self.chunks) if wanted is None or wanted[chunk.continuation].any()]

    def _run(self, trie: Trie, progress: Progress, wanted: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        sums, keys, context, missing, known = self._begin(trie, wanted)
        if self.measure.needs_dense:
            self._run_dense([number for number, rows in missing.items() if rows.any()])
        schedules = self._schedule(trie, {number: rows for number, rows in missing.items() if rows.any()})
        if self._split(schedules) and len(keys) > 1:
            return self._run_halves(trie, progress, wanted)
        done, total = 0, sum(schedule.unit_runs for schedule in schedules.values())
        asked = {number: np.flatnonzero(rows) for number, rows in missing.items()}
        for group in self._groups(schedules):
            with closing(self._walks({number: schedules[number] for number in group})) as walks:
                for number, steps in walks:
                    chunk, pending = self.chunks[number], []
                    self._references.clear()
                    for end, hidden, units in steps:
                        if end >= 0:
                            pending.append((int(asked[number][end]), self._measure_targets(hidden, number)))
                        if len(pending) == PENDING:
                            self._finish(pending, chunk, sums, context, keys)
                        done += units
                        progress(done, total)
                    self._finish(pending, chunk, sums, context, keys)
        return sums, known

    def _begin(self, trie: Trie, wanted: np.ndarray | None):
        """Sums [M, V, C] as far as the store knows them, and what they are kept under: the sequences' keys and the
        context; by chunk, bool[M], which are missing there; bool[M], which are missing nowhere."""
        sums = np.zeros((len(trie.sequences), len(self.measure.values), self.batch.num_continuations))
        keys = [units_key(sequence) for sequence in trie.sequences]
        context = self._context()
        missing = {number: self._look_up(context, keys, number, sums) for number in self._numbers(wanted)}
        return sums, keys, context, missing, ~np.any([*missing.values(), np.zeros(len(keys), dtype=bool)], axis=0)

    def _run_halves(self, trie: Trie, progress: Progress, wanted: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
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

    # -- bands -----------------------------------------------------------------------------------------------------

    def _frontier_bytes(self, schedule: Schedule, number: int) -> int:
        """What a chunk's states between visits weigh at their most."""
        return schedule.frontier_peak * int(self._footprint.state * self.chunks[number].num_tokens)

    def _room(self, schedules: dict[int, Schedule]) -> tuple[int, int]:
        """Bytes for states between visits: what the budget leaves beside a walk, and what slower tiers may take."""
        widest = max(self.chunks[number].num_tokens for number in schedules)
        slots = max(schedule.num_slots for schedule in schedules.values())
        walk = self._footprint.needed(widest, slots) + self._dense_bytes()
        memory = max(0, self._memory_bytes - self._memory_bytes // SUMS_SHARE - walk)
        return memory, self._frontier.start(memory)

    def _split(self, schedules: dict[int, Schedule]) -> bool:
        """Whether the states between visits of a single chunk do not fit, so that masks must be scored in parts."""
        if not any(schedule.frontier for schedule in schedules.values()):
            return False
        return max(self._frontier_bytes(s, number) for number, s in schedules.items()) > sum(self._room(schedules))

    def _groups(self, schedules: dict[int, Schedule]) -> list[list[int]]:
        """The chunks that go through the model together, see `bands`."""
        numbers = list(schedules)
        if len(self.runner.bands) == 1 or not numbers:
            return [[number] for number in numbers]
        memory, slower = self._room(schedules)
        room = self.model.weights.room
        per_token = 2 * room.block_bytes // self.model.dtype.itemsize * room.num_blocks // self.num_units
        groups = make_groups(
            [self._frontier_bytes(schedules[number], number) for number in numbers],
            [schedules[number].unit_runs * self.chunks[number].num_tokens * per_token for number in numbers],
            room.num_blocks * room.block_bytes,
            memory,
            slower,
            FLOPS_PER_BYTE["cuda" if self.model.device.type == "cuda" else "cpu"],
        )
        return [[numbers[place] for place in group] for group in groups.groups]

    def _walks(self, schedules: dict[int, Schedule]) -> Iterator[tuple[int, Iterator[tuple[int, torch.Tensor, int]]]]:
        """A group of chunks, band by band: (chunk, its steps while that band is loaded, see `_walk`)."""
        cache, finished = self.cache, False
        try:
            for number, schedule in schedules.items():
                cache.drop(number, schedule.dropped)
            visits: dict[int, dict[int, Visit]] = {}
            for number, schedule in schedules.items():
                for visit in schedule.visits:
                    visits.setdefault(visit.number, {})[number] = visit
            order = sorted(visits)
            bands = [self._needed(schedules, visits[visit]) for visit in order]
            for visit, _ in zip(order, self.runner.visit(bands)):
                for number, part in visits[visit].items():
                    with closing(self._walk(schedules[number], part, number)) as steps:
                        yield number, steps
            for number, schedule in schedules.items():
                cache.settle(number, schedule.retained, schedule.likelihood)
            finished = True
        finally:
            self._frontier.clear()
            if not finished:
                for number in schedules:
                    cache.forget(number)

    def _needed(self, schedules: dict[int, Schedule], visits: dict[int, Visit]) -> Sequence[int]:
        """The blocks that a visit runs."""
        if len(self.runner.bands) == 1:
            return self.runner.bands[0]
        steps = (schedules[number].steps[visit.start : visit.stop] for number, visit in visits.items())
        return sorted({self._block_of[unit] for step in itertools.chain.from_iterable(steps) for unit in step.units})

    @contextmanager
    def _counted_loads(self) -> Iterator[None]:
        weights = self.model.weights
        before = (0, 0) if weights is None else (weights.loads, weights.bytes)
        try:
            yield
        finally:
            if weights is not None:
                self.weight_loads += weights.loads - before[0]
                self.weight_bytes += weights.bytes - before[1]

    def _schedule(self, trie: Trie, missing: dict[int, np.ndarray]) -> dict[int, Schedule]:
        """What is run on each chunk, given the sums that are missing there and the states that are known.

        Chunks that lack the same and know the same share a schedule, and so know the same afterwards.
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
            self.row_unbounded += self._seen.add(number, made[key][1]) * len(self.chunks[number].rows)
        return found

    def _context(self) -> int | None:
        """What decides the bits of sums besides chunk and units, as the store's number for it."""
        if self.store is None:
            return None
        return self.store.context({**self.numerics(), "measure": self.measure.name, "weights": self.model.weights_hash})

    def _look_up(self, context: int | None, keys: list[bytes], number: int, sums: np.ndarray) -> np.ndarray:
        """Fill in the sums of a chunk that the store knows; bool[M], those that are missing."""
        missing = np.ones(len(keys), dtype=bool)
        if context is not None:
            chunk = self.chunks[number]
            known = self.store.get(context, chunk.key, keys)
            for mask, key in enumerate(keys):
                if key in known:
                    sums[mask, :, chunk.continuations] = known[key].reshape(-1, sums.shape[1])
                    missing[mask] = False
        return missing

    def _finish(self, pending, chunk: Chunk, sums: np.ndarray, context: int | None, keys: list[bytes]) -> None:
        """Fetch the values of pending masks [V, M], sum them over continuations in target order, and keep the sums."""
        if not pending:
            return
        values = torch.stack([values for _, values in pending]).cpu().double().numpy()
        for (mask, _), rows in zip(pending, values, strict=True):
            for value, row in enumerate(rows):
                found = np.bincount(chunk.continuation, weights=row, minlength=sums.shape[2])
                sums[mask, value, chunk.continuations] = found[chunk.continuations]
        self.row_heads += len(pending) * len(chunk.rows)
        if context is not None:
            finished = {keys[mask]: sums[mask, :, chunk.continuations] for mask, _ in pending}
            self.store.put(context, chunk.key, finished)
        pending.clear()

    def _walk(self, schedule: Schedule, visit: Visit, number: int) -> Iterator[tuple[int, torch.Tensor, int]]:
        """Run a visit's steps on one chunk; after each, yield (its end or -1, hidden [B, T, D], units run)."""
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
                self.row_runs += len(chunk.rows)
                if count in retained:
                    self.cache.put(number, retained[count], self.runner.pack(state))
            if step.frontier >= 0:
                self._frontier.put(number, schedule.frontier[step.frontier], self.runner.pack(state))
            if step.target >= 0:
                slots[step.target] = state
            yield step.end, hidden_of(state), len(step.units)

    def _take(self, schedule: Schedule, place: int, number: int, last_use: bool) -> State:
        """A state of the prefix cache, or of the frontier."""
        if place >= len(schedule.known):
            prefix = schedule.frontier[place - len(schedule.known)]
            state = self.runner.unpack(self._frontier.get(number, prefix), prefix[-1])
            if last_use:
                self._frontier.drop(number, prefix)
            return state
        prefix = schedule.known[place]
        state = self.runner.unpack(self.cache.get(number, prefix), prefix[-1])
        if last_use:
            self.cache.drop(number, [prefix])
        return state

    def _measure_targets(self, hidden: torch.Tensor, number: int) -> torch.Tensor:
        """The measure's values at every target of a chunk, [V, M], from one mask's final states [B, T, D]."""
        hidden = hidden.flatten(0, 1)
        values = []
        for index, tile in enumerate(self._tiles[number]):
            reference = self._reference(number, index) if self.measure.reference else None
            values.append(self.measure.compute(self.runner, hidden[tile.sources], tile, reference))
        return torch.cat(values, dim=1)

    def _reference(self, number: int, index: int) -> torch.Tensor:
        """What the masks are compared with at a tile of a chunk; kept for the next mask where the budget has room."""
        found = self._references.get(index)
        if found is None:
            dense = self._dense[number][self._tiles[number][index].positions]
            found = self.measure.reference(self.runner, dense)
            if self._keeps_references:
                self._references[index] = found
        return found

    def _run_dense(self, numbers: list[int]) -> None:
        """Fill `_dense` for these chunks: final states of the dense model where a target is predicted, [P, D]."""
        of = self.model.state
        if self._dense_of != of:
            self._dense, self._dense_of = {}, of
        trie = make_trie([tuple(range(self.num_units))])
        schedules = self._schedule(trie, {n: np.ones(1, dtype=bool) for n in numbers if n not in self._dense})
        for group in self._groups(schedules):
            with closing(self._walks({number: schedules[number] for number in group})) as walks:
                for number, steps in walks:
                    for end, hidden, _ in steps:
                        if end >= 0:
                            self._dense[number] = hidden.flatten(0, 1)[self.chunks[number].sources]

    def numerics(self) -> dict[str, object]:
        """What the bits of a number depend on besides weights, chunk and mask: path, dtype, device, software."""
        return {
            "tile": self.layout.tile,
            "granularity": self.granularity,
            "path": self.runner.numerics(),
            "dtype": str(self.model.dtype),
            "attention": getattr(self.model.config, "_attn_implementation", None),
            "experts": getattr(self.model.config, "_experts_implementation", None),
            "sdpa": [backend.name for backend in BACKENDS],
            "machine": machine_fingerprint(self.model.device),
        }

    # -- chunks and memory ---------------------------------------------------------------------------------------

    def _fit(self, memory_bytes: int, most_tokens: int, tile: int) -> Layout:
        """Chunks and tiles for which everything held at once stays within the budget; where not even one row does,
        tiles are made small."""
        for size in dict.fromkeys((tile, LEAST_TILE)):
            self._measure(size)
            budget = memory_bytes - memory_bytes // SUMS_SHARE - self._dense_bytes()
            tokens = self._footprint.tokens_within(budget, self._slots)
            if tokens:
                return make_layout(self.batch, min(most_tokens, tokens), size)
        raise InputError(self._too_small(memory_bytes, "one row of the batch", self._footprint.longest_row))

    def _check_layout(self, memory_bytes: int, layout: Layout) -> Layout:
        """A layout that was made before. Raises InputError where it is not the batch's, or does not fit the budget."""
        layout.check(self.batch)
        self._measure(layout.tile)
        widest = max(len(rows) * int(self.batch.row_lengths[list(rows)].max()) for rows in layout.chunks)
        if self._least_bytes(widest) > memory_bytes:
            raise InputError(self._too_small(memory_bytes, "the largest chunk of the layout", widest))
        return layout

    def _too_small(self, memory_bytes: int, what: str, tokens: int) -> str:
        return f"memory_bytes is too small: {what} takes {self._least_bytes(tokens)} bytes, not {memory_bytes}"

    def _least_bytes(self, tokens: int) -> int:
        """The least budget for chunks of so many tokens."""
        needed = self._footprint.needed(tokens, self._slots) + self._dense_bytes()
        return needed + (needed - 1) // (SUMS_SHARE - 1)  # of which all but the share of sums is that much

    def _dense_bytes(self) -> int:
        """What the dense model's final states weigh, where the measure compares with them."""
        if not self.measure.needs_dense:
            return 0
        return self._positions * self.model.hidden_size * self.model.dtype.itemsize

    def _measure(self, tile: int) -> None:
        """Note what the activations of the longest rows, and one tile of the head, weigh: of as many positions at most
        as the batch has."""
        tile = min(tile, self._positions)
        with self.model.evaluation():
            self._footprint = measure_footprint(self.runner, self.batch, self.granularity, self._measure_nothing, tile)

    def _cut(self, layout: Layout) -> None:
        """Make the chunks of a layout, and the tiles of each."""
        self._dense: dict[int, torch.Tensor] = {}  # by chunk, see _run_dense
        self._dense_of: tuple = ()
        self.layout = layout
        self.chunks = [make_chunk(self.batch, rows, self.model.device) for rows in layout.chunks]
        self._tiles = [chunk.tiles(layout.tile) for chunk in self.chunks]
        self._seen = Seen()
        self.cache.start(int(self._footprint.state * sum(chunk.num_tokens for chunk in self.chunks)))

    def _shrink_cache(self) -> bool:
        """Give back what the prefix cache holds, and let it hold less from now on; False when it is empty."""
        if not self.cache.bytes:
            return False
        self.cache.shrink()
        warnings.warn("out of memory: going on with a smaller prefix cache", RuntimeWarning, stacklevel=4)
        return True

    def _take_smaller_steps(self) -> bool:
        """Cut chunks of half the size, or where they are single rows, tiles; False when both are as small as can be."""
        tile = self.layout.tile
        self._keeps_references = False
        divisible = [chunk.num_tokens for chunk in self.chunks if len(chunk.rows) > 1]
        if divisible:
            max_tokens = max(divisible) // 2
        elif tile > LEAST_TILE:
            max_tokens, tile = 1, max(LEAST_TILE, tile // 16 * 8)
        else:
            return False
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()
        self._cut(make_layout(self.batch, max_tokens, tile))
        warnings.warn(
            f"out of memory: going on with chunks of {max(chunk.num_tokens for chunk in self.chunks)} tokens and tiles "
            f"of {tile} positions; scores may differ in the last bits from those before",
            RuntimeWarning,
            stacklevel=4,
        )
        return True

    def _measure_nothing(self, hidden: torch.Tensor) -> torch.Tensor:
        """One tile of the head, for its footprint."""
        none = torch.zeros(0, dtype=torch.int64, device=hidden.device)
        sources = torch.arange(len(hidden), device=hidden.device)
        tile, reference = Tile(slice(None), sources, none, none), None
        if self.measure.reference:
            reference = self.measure.reference(self.runner, hidden)
            self._reference_bytes = reference.nbytes // len(hidden)
        return self.measure.compute(self.runner, hidden, tile, reference)

    def _note_peak(self, slots: list[State | None], state: State, chunk: Chunk) -> None:
        alive = {id(s): s for s in (*slots, state) if s is not None}
        held = sum(map(state_bytes, alive.values())) + self._frontier.bytes
        held += sum(kept.nbytes for kept in (*self._dense.values(), *self._references.values()))
        peak = held + int(self._footprint.workspace * chunk.num_tokens) + self._footprint.head
        self.peak_activation_bytes = max(self.peak_activation_bytes, peak)


def _chunk_tokens(model: Model) -> int:
    """Tokens of a chunk, where they fit."""
    if model.device.type == "cuda":
        return CHUNK_TOKENS
    return max(LEAST_CHUNK_TOKENS, CHUNK_BYTES // (model.hidden_size * model.dtype.itemsize))


def expect_groups(model: Model, num_masks: int, num_rows: int = 64, seq_len: int = 2048) -> Groups:
    """About how often scoring would read the blocks of a model whose weights stay in files: random masks without a
    quarter of the blocks, on rows of so many tokens, in the default budget."""
    kind = "cuda" if model.device.type == "cuda" else "cpu"
    rng = np.random.default_rng(0)
    kept = max(1, model.num_blocks - model.num_blocks // 4)
    sequences = [tuple(sorted(rng.permutation(model.num_blocks)[:kept].tolist())) for _ in range(num_masks)]
    band_of = [number for number, band in enumerate(model.bands) for _ in band]
    schedule = make_schedule(make_trie(sequences), band_of=band_of)
    rows = max(1, _chunk_tokens(model) // seq_len)
    tokens = [min(rows, num_rows - start) * seq_len for start in range(0, num_rows, rows)]
    state, room = model.hidden_size * model.dtype.itemsize, model.weights.room
    walk = 2 * (schedule.num_slots + 1) * state * tokens[0]  # with about as much for a unit's workspace
    return make_groups(
        [schedule.frontier_peak * state * count for count in tokens],
        [2 * schedule.unit_runs * count * (room.block_bytes // model.dtype.itemsize) for count in tokens],
        room.num_blocks * room.block_bytes,
        max(0, BUDGET_BYTES[kind] - BUDGET_BYTES[kind] // SUMS_SHARE - walk),
        available_bytes(torch.device("cpu")) // SHARE if kind == "cuda" else 0,
        FLOPS_PER_BYTE[kind],
    )


def _check_rows(model: Model, batch: TokenBatch) -> None:
    """Raise InputError for rows that the model cannot run as they stand in a chunk with others."""
    switch, longest = model.rotary_switch, int(batch.positions.max()) + 1
    if switch is not None and longest > switch and (batch.row_is_tree.any() or batch.row_lengths.min() <= switch):
        raise InputError(
            f"{model.name}: rotary frequencies change for sequences of more than {switch} tokens, so that longer and "
            f"shorter ones cannot run together; the longest here has {longest}"
        )
    trees = np.flatnonzero(batch.row_is_tree)
    if len(trees):
        longest_tree = make_chunk(batch, [trees[batch.row_lengths[trees].argmax()]], model.device)
        model.check_trees(longest_tree.ids, longest_tree.positions, longest_tree.branch)
