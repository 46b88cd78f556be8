"""The engine: walks a plan through a model, chunk by chunk. Read this file first.

For every chunk of the calibration set the model embeds the tokens once. The plan's steps then run units on
states, depth first; a state is kept only until its last child has begun. Where a mask ends, the head turns its
state into one number per target, a tile of positions at a time. The numbers leave the device in batches and are
summed over each continuation in a fixed order, in float64.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import torch

from .calibration import TokenBatch
from .chunks import Chunk, Tile, make_chunk, make_chunks
from .errors import InputError
from .fingerprint import machine_fingerprint
from .footprint import measure_footprint, measure_head
from .memory import is_out_of_memory
from .models import Model, make_runner
from .models.stand_ins import State, hidden_of, state_bytes
from .plan import ROOT, Plan, make_plan, max_slots
from .store import SumStore, units_key

Progress = Callable[[int, int], None]

MAX_SEQUENCES = 1 << 20  # distinct ones of one call; bounds the states alive at once
CHUNK_TOKENS = 16384  # on a GPU: enough rows to keep its matrix units busy, no more
CHUNK_BYTES, LEAST_CHUNK_TOKENS = 2 << 20, 1024  # on a CPU: states that leave a unit's workspace room in the caches
TILE_BYTES = {"cpu": 48 << 20, "cuda": 512 << 20}  # logits of one tile of positions
LEAST_TILE = 8  # positions
BUDGET_BYTES = {"cpu": 4 << 30, "cuda": 16 << 30}
PENDING = 64  # masks whose numbers wait on the device, to be fetched together


class Engine:
    """Runs plans of depth masks over one calibration set.

    backend: "generic", "fused" or "auto"; `runner` is what runs the units, the model itself or its fused path.
    measure: what is computed at each target, "nll" or "kl". budget_bytes bounds the activations: states, the
    workspace of a unit, a tile of logits, and for "kl" the dense model's final states.
    store: sums that are known, and are kept as they are finished. peak_activation_bytes: the most that were held so
    far, workspaces as measured on this model. row_runs, row_heads: units, and heads, that were run so far, counted
    where that happens, once for each row of the batch.
    """

    def __init__(
        self,
        model: Model,
        batch: TokenBatch,
        measure: str,
        granularity: str,
        budget_bytes: int | None,
        backend: str = "auto",
        store: SumStore | None = None,
    ):
        model.require(granularity)
        batch.check_fits(model.vocab_size, model.max_positions)
        _check_rows(model, batch)
        self.model, self.batch, self.measure, self.granularity = model, batch, measure, granularity
        self.num_units = len(model.unit_names(granularity))
        self.store = store
        kind = "cuda" if model.device.type == "cuda" else "cpu"
        budget_bytes = BUDGET_BYTES[kind] if budget_bytes is None else budget_bytes
        self.runner = make_runner(model, backend)
        self._tile = self._tile_within(budget_bytes)
        self.peak_activation_bytes = 0
        self.row_runs = self.row_heads = 0
        with model.evaluation():
            self._footprint = measure_footprint(self.runner, batch, granularity, self._measure_nothing, self._tile)
        if kind == "cuda":
            wanted = CHUNK_TOKENS
        else:
            wanted = max(LEAST_CHUNK_TOKENS, CHUNK_BYTES // (model.hidden_size * model.dtype.itemsize))
        self._cut(self._fit(budget_bytes, wanted))

    def run(
        self, plan: Plan, progress: Progress | None = None, wanted: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Sums of the measure over each continuation, float64[M, C], for the plan's M distinct sequences; and bool[M],
        those of which every sum came from the store.

        wanted: bool[C]; only chunks that hold such a continuation are run, whole, so that their numbers keep their
        bits; sums of the others are left at 0. progress(done, total) is told of unit runs. When memory runs out,
        the call begins again with smaller chunks, then tiles.
        """
        count = len(plan.sequences)
        if count > MAX_SEQUENCES:
            raise InputError(f"{count} distinct masks in one call; at most {MAX_SEQUENCES} are planned together")
        while True:
            try:
                with self.model.evaluation():
                    return self._run(plan, progress or (lambda done, total: None), wanted)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or not self._take_smaller_steps():
                    raise

    def most_together(self, longest: int) -> int:
        """The most sequences of so many units whose states, at the worst, the chunks were cut for."""
        return MAX_SEQUENCES if longest <= self.num_units else (1 << max_slots(self.num_units, MAX_SEQUENCES)) - 1

    def share(self, wanted: np.ndarray | None) -> float:
        """The share of the rows that `run` runs for these continuations."""
        return sum(len(self.chunks[number].rows) for number in self._numbers(wanted)) / self.batch.num_rows

    def _numbers(self, wanted: np.ndarray | None) -> list[int]:
        return [n for n, chunk in enumerate(self.chunks) if wanted is None or wanted[chunk.continuation].any()]

    def _run(self, plan: Plan, progress: Progress, wanted: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        sums = np.zeros((len(plan.sequences), self.batch.num_continuations))
        keys = [units_key(sequence) for sequence in plan.sequences]
        context = self._context()
        missing = {number: self._look_up(context, keys, number, sums) for number in self._numbers(wanted)}
        plans = {
            rows.tobytes(): plan if rows.all() else make_plan(itertools.compress(plan.sequences, rows))
            for rows in missing.values()
        }
        if self.measure == "kl" and any(rows.any() for rows in missing.values()):
            self._run_dense()
        done, total = 0, sum(plans[rows.tobytes()].layer_runs for rows in missing.values())
        for number, rows in missing.items():
            if not rows.any():
                continue
            chunk, part, asked = self.chunks[number], plans[rows.tobytes()], np.flatnonzero(rows)
            pending: list[tuple[int, torch.Tensor]] = []
            for end, hidden, units in self._walk(part, number):
                if end >= 0:
                    pending.append((int(asked[end]), self._measure_targets(hidden, number)))
                if len(pending) == PENDING:
                    self._finish(pending, chunk, sums, context, keys)
                done += units
                progress(done, total)
            self._finish(pending, chunk, sums, context, keys)
        return sums, ~np.any([*missing.values(), np.zeros(len(keys), dtype=bool)], axis=0)

    def _context(self) -> int | None:
        """What decides the bits of sums besides chunk and units, as the store's number for it."""
        if self.store is None:
            return None
        return self.store.context({**self.numerics(), "measure": self.measure, "weights": self.model.weights_hash})

    def _look_up(self, context: int | None, keys: list[bytes], number: int, sums: np.ndarray) -> np.ndarray:
        """Fill in the sums of a chunk that the store knows; bool[M], those that are missing."""
        missing = np.ones(len(keys), dtype=bool)
        if context is not None:
            chunk = self.chunks[number]
            known = self.store.get(context, chunk.key, keys)
            for mask, key in enumerate(keys):
                if key in known:
                    sums[mask, chunk.continuations] = known[key]
                    missing[mask] = False
        return missing

    def _finish(self, pending, chunk: Chunk, sums: np.ndarray, context: int | None, keys: list[bytes]) -> None:
        """Fetch the measures of pending masks [M], sum them over continuations in target order, and keep the sums."""
        if not pending:
            return
        values = torch.stack([values for _, values in pending]).cpu().double().numpy()
        for (mask, _), row in zip(pending, values, strict=True):
            found = np.bincount(chunk.continuation, weights=row, minlength=sums.shape[1])
            sums[mask, chunk.continuations] = found[chunk.continuations]
        self.row_heads += len(pending) * len(chunk.rows)
        if context is not None:
            finished = {keys[mask]: sums[mask, chunk.continuations] for mask, _ in pending}
            self.store.put(context, chunk.key, finished)
        pending.clear()

    def _walk(self, plan: Plan, number: int) -> Iterator[tuple[int, torch.Tensor, int]]:
        """Run the plan's steps on one chunk; after each, yield (its end or -1, hidden [B, T, D], units run)."""
        chunk = self.chunks[number]
        state, arguments = self.runner.open(chunk.ids, chunk.positions, chunk.branch)
        slots: list[State | None] = [None] * plan.num_slots
        for step in plan.steps:
            if step.source != ROOT:
                state = slots[step.source]
                if step.last_use:
                    slots[step.source] = None
            for unit in step.units:
                self._note_peak(slots, state, chunk)
                state = self.runner.run(unit, state, arguments, self.granularity)
                self.row_runs += len(chunk.rows)
            if step.target >= 0:
                slots[step.target] = state
            yield step.end, hidden_of(state), len(step.units)

    def _measure_targets(self, hidden: torch.Tensor, number: int) -> torch.Tensor:
        """The measure at every target of a chunk, [M], from one mask's final states [B, T, D]."""
        hidden = hidden.flatten(0, 1)
        values = []
        for tile in self._tiles[number]:
            dense = self._dense[number][tile.positions] if self.measure == "kl" else None
            values.append(self._measure_tile(hidden[tile.sources], tile, dense))
        return torch.cat(values)

    def _measure_tile(self, states: torch.Tensor, tile: Tile, dense: torch.Tensor | None) -> torch.Tensor:
        """The measure at a tile's targets, [M], from the final states at its sources, [P, D]."""
        if self.measure == "nll":
            return self.runner.nll(states, tile)
        return self.runner.kl(dense, states, tile)

    def _run_dense(self) -> None:
        """Fill `_dense`: final states of the dense model where a target is predicted, [P, D] for each chunk."""
        if self._dense and self._dense_of == self.model.state:
            return
        of, dense = self.model.state, []
        plan = make_plan([tuple(range(self.num_units))])
        for number, chunk in enumerate(self.chunks):
            for end, hidden, _ in self._walk(plan, number):
                if end >= 0:
                    dense.append(hidden.flatten(0, 1)[chunk.sources])
        self._dense, self._dense_of = dense, of

    def numerics(self) -> dict[str, object]:
        """What the bits of a number depend on besides weights, chunk and mask: path, dtype, device, software."""
        return {
            "tile": self._tile,
            "granularity": self.granularity,
            "path": self.runner.numerics(),
            "dtype": str(self.model.dtype),
            "attention": getattr(self.model.config, "_attn_implementation", None),
            "experts": getattr(self.model.config, "_experts_implementation", None),
            "machine": machine_fingerprint(self.model.device),
        }

    # -- chunks and memory ---------------------------------------------------------------------------------------

    def _fit(self, budget_bytes: int, most_tokens: int) -> int:
        """Tokens of a chunk for which everything held at once stays within the budget."""
        dense = 0
        if self.measure == "kl":
            positions = len(np.unique(self.batch.target_source))
            dense = positions * self.model.hidden_size * self.model.dtype.itemsize
        slots = max_slots(self.num_units, MAX_SEQUENCES)
        tokens = self._footprint.tokens_within(budget_bytes - dense, slots)
        if not tokens:
            least = self._least_budget(dense, slots)
            raise InputError(
                f"cache_bytes is too small by {least - budget_bytes} bytes: one row of the batch takes {least}"
            )
        return min(most_tokens, tokens)

    def _tile_within(self, budget_bytes: int) -> int:
        """Positions of a tile for which logits take a quarter of the budget, and no more than is of use."""
        most = min(TILE_BYTES["cuda" if self.model.device.type == "cuda" else "cpu"], budget_bytes // 4)
        return max(LEAST_TILE, most // self.runner.head_bytes(self.measure) // 8 * 8)

    def _least_budget(self, dense: int, slots: int) -> int:
        """The least budget for which the longest row fits. A larger one has larger tiles: up to where both agree."""
        hidden = torch.zeros(1, self.model.hidden_size, dtype=self.model.dtype, device=self.model.device)
        tile, footprint = 0, self._footprint
        budget_bytes = 0
        while tile != self._tile_within(budget_bytes):
            tile = self._tile_within(budget_bytes)
            with self.model.evaluation():
                footprint = replace(footprint, head=measure_head(hidden, self._measure_nothing, tile))
            budget_bytes = dense + footprint.needed(footprint.longest_row, slots)
        return budget_bytes

    def _cut(self, max_tokens: int) -> None:
        """Cut the batch into chunks, and the targets of each chunk into tiles."""
        self._dense: list[torch.Tensor] = []  # per chunk, see _run_dense
        self._dense_of: tuple = ()
        self.chunks = make_chunks(self.batch, max_tokens, self.model.device)
        self._tiles = [chunk.tiles(self._tile) for chunk in self.chunks]

    def _take_smaller_steps(self) -> bool:
        """Cut chunks of half the size, or where they are single rows, tiles; False when both are as small as can be."""
        divisible = [chunk.num_tokens for chunk in self.chunks if len(chunk.rows) > 1]
        if divisible:
            max_tokens = max(divisible) // 2
        elif self._tile > LEAST_TILE:
            max_tokens, self._tile = 1, max(LEAST_TILE, self._tile // 16 * 8)
        else:
            return False
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()
        self._cut(max_tokens)
        warnings.warn(
            f"out of memory: going on with chunks of {max(chunk.num_tokens for chunk in self.chunks)} tokens and tiles "
            f"of {self._tile} positions; scores may differ in the last bits from those before",
            RuntimeWarning,
            stacklevel=4,
        )
        return True

    def _measure_nothing(self, hidden: torch.Tensor) -> torch.Tensor:
        """One tile of the head, for its footprint."""
        none = torch.zeros(0, dtype=torch.int64, device=hidden.device)
        sources = torch.arange(len(hidden), device=hidden.device)
        return self._measure_tile(hidden, Tile(slice(None), sources, none, none), hidden)

    def _note_peak(self, slots: list[State | None], state: State, chunk: Chunk) -> None:
        alive = {id(s): s for s in (*slots, state) if s is not None}
        held = sum(map(state_bytes, alive.values())) + sum(dense.nbytes for dense in self._dense)
        peak = held + int(self._footprint.workspace * chunk.num_tokens) + self._footprint.head
        self.peak_activation_bytes = max(self.peak_activation_bytes, peak)


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
