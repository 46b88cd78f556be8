"""Memory of a call: its limit, its measured bytes, and smaller steps when memory runs out.

`MemoryLimit` turns a limit in bytes into a `Layout`: chunks and tiles with which a call stays
within the limit. A `Footprint` holds the bytes of states and workspaces. `peak_bytes` measures them
on the longest rows.
"""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..data import TokenBatch
from ..errors import InputError
from ..models import Model, Runner
from ..models.head import Targets
from ..models.swap import State, hidden_of, state_bytes
from ..plan.layout import Layout, make_layout
from ..plan.schedule import max_slots
from .chunks import Chunk, chunk_rows
from .measures import Measure

MAX_SEQUENCES = 1 << 20  # distinct sequences of one call; bounds the states alive at once
# short rows run together up to these tokens, so that one sample costs little; bench/cut.py
CHUNK_TOKENS = {"cpu": 512, "cuda": 2048}
# of a unit; beyond it rows run apart, since a larger workspace does not fit into caches
WORKSPACE_BYTES = {"cpu": 32 << 20, "cuda": 4 << 30}
TILE_BYTES = {"cpu": 48 << 20, "cuda": 512 << 20}  # logits of one tile of positions
LEAST_TILE = 8  # positions
WEIGHED = 64  # positions of a tile that run to measure its bytes
LIMIT_BYTES = {"cpu": 4 << 30, "cuda": 16 << 30}
SUMS_SHARE = 8  # sums over continuations may take 1 / 8 of the limit: calls and races half each
OPENINGS_SHARE = 128  # openings may take 1 / 128 of the limit, from the half of races

Result = TypeVar("Result")


def runs_together(device: torch.device, tokens: int) -> bool:
    """Whether two rows of `tokens` tokens each may run in one chunk."""
    return 2 * tokens <= CHUNK_TOKENS["cuda" if device.type == "cuda" else "cpu"]


class OutOfMemory(RuntimeError):
    """Memory ran out with every cache empty. The cause is the allocator's own error."""


class MemoryLimit:
    """The bytes that a call's activations may take, and the layouts that stay within them.

    The activations are states, the workspace of a unit, a tile of logits, sums, and the dense
    model's final states if the measure compares with them.

    Args:
        limit: The most bytes; None for a default by the kind of device.
        model: The model.
        runner: Runs its units.
        batch: The calibration set.
        measure: Computes values at targets.
        granularity: "block" or "sublayer".

    Attributes:
        most_sums: The number of masks whose sums fit at once.
        footprint: The bytes of states, workspaces and heads, as `weigh` measured them.
    """

    def __init__(
        self,
        limit: int | None,
        model: Model,
        runner: Runner,
        batch: TokenBatch,
        measure: Measure,
        granularity: str,
    ):
        self._model, self._runner, self._batch = model, runner, batch
        self._measure, self._granularity = measure, granularity
        self._kind = "cuda" if model.device.type == "cuda" else "cpu"
        self.limit = LIMIT_BYTES[self._kind] if limit is None else limit
        self.num_units = len(model.unit_names(granularity))
        self._slots = max_slots(self.num_units, MAX_SEQUENCES)
        self._positions = len(np.unique(batch.target_source))  # positions that predict a target
        per_mask = 24 * len(measure.values) * batch.num_continuations  # sums, twice more to reduce
        self.most_sums = max(1, self.limit // SUMS_SHARE // 2 // per_mask)

    @property
    def race_bytes(self) -> int:
        """Bytes for the sums that races keep: half of the share of sums, less `opening_bytes`."""
        return self.limit // SUMS_SHARE // 2 - self.opening_bytes

    @property
    def opening_bytes(self) -> int:
        """Bytes for kept openings of chunks."""
        return self.limit // OPENINGS_SHARE

    def most_together(self, longest: int) -> int:
        """The most sequences of at most `longest` units that one call can schedule."""
        return MAX_SEQUENCES if longest <= self.num_units else (1 << self._slots) - 1

    def layout(self, alone: bool) -> Layout:
        """Cut the calibration set into chunks and tiles that stay within the limit.

        Chunks take at most `CHUNK_TOKENS` and `WORKSPACE_BYTES`; tiles are as large as fits.

        Args:
            alone: Whether each row is a chunk of its own.

        Raises:
            InputError: One row does not fit, even with the smallest tiles.
        """
        per_position = self._measure.position_bytes(self._runner.head)
        room = min(TILE_BYTES[self._kind], self.limit // 4)
        tile = max(LEAST_TILE, room // per_position // 8 * 8)
        for size in dict.fromkeys((tile, LEAST_TILE)):
            self.weigh(size)
            room = self.limit - self.limit // SUMS_SHARE - self._dense_bytes()
            tokens = self.footprint.tokens_within(room, self._slots)
            if tokens:
                few = int(WORKSPACE_BYTES[self._kind] / max(self.footprint.workspace, 1))
                most = 1 if alone else min(CHUNK_TOKENS[self._kind], few, tokens)
                return make_layout(self._batch, max(most, 1), size)
        raise self._too_small("one row of the batch", self.footprint.longest_row)

    def check(self, layout: Layout) -> Layout:
        """Return the layout if it fits the batch and the limit; else raise InputError."""
        layout.check(self._batch)
        self.weigh(layout.tile)
        widest = max(
            len(rows) * int(self._batch.run_sizes[list(rows)].max()) for rows in layout.chunks
        )
        if self._least_bytes(widest) > self.limit:
            raise self._too_small("the largest chunk of the layout", widest)
        return layout

    def smaller(self, layout: Layout) -> Layout | None:
        """A layout with chunks of half the size or, if chunks are single rows, smaller tiles.

        None if neither can shrink.
        """
        lengths = self._batch.run_sizes
        divisible = [
            len(rows) * int(lengths[list(rows)].max()) for rows in layout.chunks if len(rows) > 1
        ]
        if divisible:
            return make_layout(self._batch, max(divisible) // 2, layout.tile)
        if layout.tile > LEAST_TILE:
            return make_layout(self._batch, 1, max(LEAST_TILE, layout.tile // 16 * 8))
        return None

    def room_for_references(self, tokens: int, positions: int) -> int:
        """Compute the bytes for references of the dense model beside a walk.

        If weights take turns, they hold at most one chunk: waiting states need the rest.

        Args:
            tokens: The tokens of the largest chunk.
            positions: The most positions of a chunk that predict targets.

        Returns:
            The bytes; 0 if one chunk's references do not fit.
        """
        if self._measure.reference is None:
            return 0
        chunk = positions * self._measure.reference.position_bytes(self._runner.head)
        room = self.limit - self._least_bytes(tokens)
        if chunk > room:
            return 0
        return chunk if self._model.weights.take_turns else room

    def beside(self, tokens: int, num_slots: int, references: int) -> int:
        """Compute the bytes for states that wait beside a walk.

        Args:
            tokens: The tokens of the walk's chunk.
            num_slots: The slots of the walk.
            references: The bytes of the dense references held.
        """
        walk = self.footprint.needed(tokens, num_slots) + self._dense_bytes()
        limit = self.limit - references
        return max(0, limit - limit // SUMS_SHARE - walk)

    def state_bytes(self, tokens: int) -> int:
        """The bytes of one state of this many tokens."""
        return int(self.footprint.state * tokens)

    def weigh(self, tile: int) -> None:
        """Measure the footprint of the longest rows, and of one tile of the head.

        Only a few positions of the tile run, since all hold equal bytes.
        """
        tile = min(tile, self._positions)
        few = min(tile, WEIGHED)
        with self._model.evaluation():
            (footprint,) = (  # measured while the first block is loaded
                measure_footprint(self._runner, self._batch, self._granularity, self._run_head, few)
                for _ in self._model.weights.visit([range(min(1, self._model.num_blocks))])
            )
        self.footprint = replace(footprint, head=-(-footprint.head * tile // few))

    def _too_small(self, part: str, tokens: int) -> InputError:
        least = self._least_bytes(tokens)
        return InputError(
            f"memory_bytes is too small: {part} takes {least} bytes, not {self.limit}",
            argument="memory_bytes",
            least=least,
        )

    def _least_bytes(self, tokens: int) -> int:
        """The least limit for chunks of this many tokens."""
        needed = self.footprint.needed(tokens, self._slots) + self._dense_bytes()
        return needed + (needed - 1) // (SUMS_SHARE - 1)  # plus the share of sums

    def _dense_bytes(self) -> int:
        """The bytes of the dense model's final states, if the measure compares with them."""
        if self._measure.reference is None:
            return 0
        return self._positions * self._model.hidden_size * self._model.dtype.itemsize

    def _run_head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Run one tile of the head on states [P, D], to measure its footprint."""
        none = torch.zeros(0, dtype=torch.int64, device=hidden.device)
        targets, reference = Targets(len(hidden), none, none), None
        if self._measure.reference:
            reference = self._measure.reference.compute(self._runner.head, hidden, False)
        return self._measure.compute(self._runner.head, hidden, targets, reference)


@dataclass(frozen=True)
class Footprint:
    """Bytes held during a walk.

    Attributes:
        state: Bytes of a state for each token.
        workspace: Bytes of a running unit for each token, its result included.
        head: Bytes of one tile of positions in the head.
        longest_row: Tokens of the longest row.
    """

    state: float
    workspace: float
    head: int
    longest_row: int

    def needed(self, tokens: int, num_slots: int) -> int:
        """Bytes of a walk on a chunk of `tokens` tokens.

        They hold the slots, a unit's input, its workspace and the head.
        """
        return math.ceil(((num_slots + 1) * self.state + self.workspace) * tokens) + self.head

    def tokens_within(self, budget_bytes: int, num_slots: int) -> int:
        """The most tokens of a chunk that stay within the bytes; 0 if the longest row does not."""
        if self.needed(self.longest_row, num_slots) > budget_bytes:
            return 0
        per_token = (num_slots + 1) * self.state + self.workspace
        return max(self.longest_row, int((budget_bytes - self.head) / per_token))


def measure_footprint(
    runner: Runner,
    batch: TokenBatch,
    granularity: str,
    head: Callable[[torch.Tensor], object],
    tile: int,
) -> Footprint:
    """Measure the bytes of the first units, and of one tile of the head, on the longest rows."""
    state_size = workspace = 0.0
    longest = 0
    for row in _longest_rows(batch):
        chunk = chunk_rows(batch, [row]).to(runner.device)
        try:
            state, largest, peak = _run_first_units(runner, chunk, granularity)
        except NotImplementedError:  # torch's, for compiled operators such as flex_attention
            raise InputError(
                "memory cannot be measured inside of the compiled operators that this model runs; "
                "open it with attn_implementation='sdpa'"
            ) from None
        state_size = max(state_size, largest / chunk.num_tokens)
        workspace = max(workspace, peak / chunk.num_tokens)
        longest = max(longest, chunk.num_tokens)
    hidden = hidden_of(state).flatten(0, -2)
    hidden = hidden[torch.arange(tile, device=hidden.device) % len(hidden)]
    _, held = peak_bytes(lambda: head(hidden))
    return Footprint(state_size, workspace, held + hidden.nbytes, longest)


def _longest_rows(batch: TokenBatch) -> list[int]:
    """The longest plain row and the longest tree, if the batch has both kinds."""
    kinds = [np.flatnonzero(batch.row_is_tree == is_tree) for is_tree in (False, True)]
    return [int(rows[batch.run_sizes[rows].argmax()]) for rows in kinds if len(rows)]


def _run_first_units(runner: Runner, chunk: Chunk, granularity: str) -> tuple[State, int, int]:
    """Open a chunk and run its first unit; with sublayers, one of each kind.

    Returns:
        The last state, the bytes of the largest state, and the bytes at the peak besides a unit's
        input: its workspace, and the layers' arguments (masks, angles).
    """
    largest = 0

    def run() -> State:
        nonlocal largest
        state, arguments = runner.open(chunk.ids, chunk.positions, chunk.branch)
        largest = state_bytes(state)
        for unit in range(2 if granularity == "sublayer" else 1):
            state = runner.run(unit, state, arguments, granularity)
            largest = max(largest, state_bytes(state))
        return state

    state, peak = peak_bytes(run)
    return state, largest, max(largest, peak - largest)


def peak_bytes(work: Callable[[], Result]) -> tuple[Result, int]:
    """Run `work`, and count the most bytes that its tensors held at once.

    The storage of every tensor that an operator returns counts from its creation until it is freed,
    on any device. Its requested bytes count. An allocator's cache and its rounding do not count, so
    that equal work always counts equal bytes. Scratch space inside an operator does not count. A
    copy of a parameter in another dtype belongs to the weights and does not count either. The
    garbage collector is paused, because the process's past decides when it runs.

    Args:
        work: A function without arguments.

    Returns:
        The result of `work`, whose tensors count too, and the bytes.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        with _LiveStorages() as live:
            result = work()
    finally:
        if collects:
            gc.enable()
    return result, live.peak


class _LiveStorages(TorchDispatchMode):
    """Counts the bytes of the storages that operators return, until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.current = self.peak = 0
        self._known: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {
            id(t.untyped_storage())
            for t in tree_leaves((args, kwargs))
            if isinstance(t, torch.Tensor)
        }
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and isinstance(args[0], torch.nn.Parameter):
            return result
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if id(storage) not in self._known and id(storage) not in before:
                    self._follow(storage)
        return result

    def _follow(self, storage: torch.UntypedStorage) -> None:
        size, key = storage.nbytes(), id(storage)

        def freed(_: object) -> None:
            self.current -= size
            del self._known[key]

        self._known[key] = weakref.ref(storage, freed)
        self.current += size
        self.peak = max(self.peak, self.current)
