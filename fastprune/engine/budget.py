"""What the activations of a call may weigh, and how a calibration set is cut for it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ..data import TokenBatch
from ..errors import InputError, gb_flag
from ..models import Model, Runner
from ..models.device import available_bytes
from ..plan.bands import FLOPS_PER_BYTE, Groups, make_groups
from ..plan.layout import Layout, make_layout
from ..plan.schedule import make_schedule, max_slots
from ..plan.trie import make_trie
from .cache import SHARE
from .chunks import Chunk, Tile
from .footprint import measure_footprint
from .measures import Measure

MAX_SEQUENCES = 1 << 20  # distinct ones of one call; bounds the states alive at once
CHUNK_TOKENS = 16384  # on a GPU: enough rows to keep its matrix units busy, no more
CHUNK_BYTES, LEAST_CHUNK_TOKENS = (
    2 << 20,
    1024,
)  # on a CPU: states that leave a unit's workspace room in the caches
TILE_BYTES = {"cpu": 48 << 20, "cuda": 512 << 20}  # logits of one tile of positions
LEAST_TILE = 8  # positions
BUDGET_BYTES = {"cpu": 4 << 30, "cuda": 16 << 30}
SUMS_SHARE = 8  # one part in so many of the budget is for sums over continuations


class Budget:
    """The bytes that a call's activations may take: states, the workspace of a unit, a tile of
    logits, sums, and the dense model's final states where the measure compares with them.

    limit: those bytes; None for a default by the kind of device. num_units: of a sequence as it is
    mostly asked for. races: whether chunks are cut along the looks of a race.
    most_sums: of how many masks the sums fit at once. footprint: what was measured on the model,
    for the last tile.
    """

    def __init__(
        self,
        limit: int | None,
        model: Model,
        runner: Runner,
        batch: TokenBatch,
        measure: Measure,
        granularity: str,
        races: bool,
    ):
        self._races = races
        self._model, self._runner, self._batch = model, runner, batch
        self._measure, self._granularity = measure, granularity
        self._kind = "cuda" if model.device.type == "cuda" else "cpu"
        self.limit = BUDGET_BYTES[self._kind] if limit is None else limit
        self.num_units = len(model.unit_names(granularity))
        self._slots = max_slots(self.num_units, MAX_SEQUENCES)
        self._positions = len(np.unique(batch.target_source))  # that predict something
        per_mask = (
            24 * len(measure.values) * batch.num_continuations
        )  # sums, and twice that to reduce them
        self.most_sums = max(1, self.limit // SUMS_SHARE // per_mask)

    def most_together(self, longest: int) -> int:
        """The most sequences of so many units whose states, at the worst, chunks are cut for."""
        return MAX_SEQUENCES if longest <= self.num_units else (1 << self._slots) - 1

    def cut(self) -> Layout:
        """Chunks and tiles for which everything held at once stays within the budget; where not
        even one row does, tiles are made small."""
        per_position = self._runner.head_bytes(self._measure.name)
        tile = max(
            LEAST_TILE, min(TILE_BYTES[self._kind], self.limit // 4) // per_position // 8 * 8
        )
        for size in dict.fromkeys((tile, LEAST_TILE)):
            self._weigh(size)
            room = self.limit - self.limit // SUMS_SHARE - self._dense_bytes()
            tokens = self.footprint.tokens_within(room, self._slots)
            if tokens:
                tokens = min(_chunk_tokens(self._model), tokens)
                return make_layout(self._batch, tokens, size, self._races)
        raise InputError(self._too_small("one row of the batch", self.footprint.longest_row))

    def check(self, layout: Layout) -> Layout:
        """A layout that was made before. Raises InputError where it is not the batch's, or does not
        fit the budget."""
        layout.check(self._batch)
        self._weigh(layout.tile)
        widest = max(
            len(rows) * int(self._batch.row_lengths[list(rows)].max()) for rows in layout.chunks
        )
        if self._least_bytes(widest) > self.limit:
            raise InputError(self._too_small("the largest chunk of the layout", widest))
        return layout

    def smaller(self, layout: Layout, chunks: Sequence[Chunk]) -> Layout | None:
        """Chunks of half the size, or where they are single rows, tiles; None where both are as
        small as can be."""
        divisible = [chunk.num_tokens for chunk in chunks if len(chunk.rows) > 1]
        if divisible:
            return make_layout(self._batch, max(divisible) // 2, layout.tile, self._races)
        if layout.tile > LEAST_TILE:
            return make_layout(self._batch, 1, max(LEAST_TILE, layout.tile // 16 * 8))
        return None

    def take_references(self, chunks: Sequence[Chunk]) -> bool:
        """Whether there is room for what the masks of a chunk are compared with; takes it from the
        budget if so."""
        if not self._measure.needs_dense:
            return False
        room = self.limit - self._least_bytes(max(chunk.num_tokens for chunk in chunks))
        needed = max(len(chunk.sources) for chunk in chunks) * self._reference_bytes
        if needed > room:
            return False
        self.limit -= needed  # what is left for all else
        return True

    def beside(self, tokens: int, num_slots: int) -> int:
        """What is left for states between bands, beside a walk with chunks of so many tokens and so
        many slots."""
        walk = self.footprint.needed(tokens, num_slots) + self._dense_bytes()
        return max(0, self.limit - self.limit // SUMS_SHARE - walk)

    def state_bytes(self, tokens: int) -> int:
        """What one state of so many tokens weighs."""
        return int(self.footprint.state * tokens)

    def _too_small(self, what: str, tokens: int) -> str:
        least = self._least_bytes(tokens)
        return (
            f"memory_bytes is too small: {what} takes {least} bytes, not {self.limit} "
            f"({gb_flag('memory', least)})"
        )

    def _least_bytes(self, tokens: int) -> int:
        """The least budget for chunks of so many tokens."""
        needed = self.footprint.needed(tokens, self._slots) + self._dense_bytes()
        return needed + (needed - 1) // (
            SUMS_SHARE - 1
        )  # of which all but the share of sums is that much

    def _dense_bytes(self) -> int:
        """What the dense model's final states weigh, where the measure compares with them."""
        if not self._measure.needs_dense:
            return 0
        return self._positions * self._model.hidden_size * self._model.dtype.itemsize

    def _weigh(self, tile: int) -> None:
        """Note what the activations of the longest rows, and one tile of the head, weigh: of as
        many positions at most as the batch has."""
        tile = min(tile, self._positions)
        with self._model.evaluation():
            self.footprint = measure_footprint(
                self._runner, self._batch, self._granularity, self._run_head, tile
            )

    def _run_head(self, hidden: torch.Tensor) -> torch.Tensor:
        """One tile of the head, for its footprint."""
        none = torch.zeros(0, dtype=torch.int64, device=hidden.device)
        sources = torch.arange(len(hidden), device=hidden.device)
        tile, reference = Tile(slice(None), sources, none, none), None
        if self._measure.reference:
            reference = self._measure.reference(self._runner, hidden)
            self._reference_bytes = reference.nbytes // len(hidden)
        return self._measure.compute(self._runner, hidden, tile, reference)


def _chunk_tokens(model: Model) -> int:
    """Tokens of a chunk, where they fit."""
    if model.device.type == "cuda":
        return CHUNK_TOKENS
    return max(LEAST_CHUNK_TOKENS, CHUNK_BYTES // (model.hidden_size * model.dtype.itemsize))


def expect_groups(model: Model, num_masks: int, num_rows: int = 64, seq_len: int = 2048) -> Groups:
    """About how often scoring would read the blocks of a model whose weights stay in files: random
    masks without a quarter of the blocks, on rows of so many tokens, in the default budget."""
    assert model.weights is not None
    kind = "cuda" if model.device.type == "cuda" else "cpu"
    rng = np.random.default_rng(0)
    kept = max(1, model.num_blocks - model.num_blocks // 4)
    sequences = [
        tuple(sorted(rng.permutation(model.num_blocks)[:kept].tolist())) for _ in range(num_masks)
    ]
    band_of = [number for number, band in enumerate(model.bands) for _ in band]
    schedule = make_schedule(make_trie(sequences), band_of=band_of)
    rows = max(1, _chunk_tokens(model) // seq_len)
    tokens = [min(rows, num_rows - start) * seq_len for start in range(0, num_rows, rows)]
    state, room = model.hidden_size * model.dtype.itemsize, model.weights.room
    walk = (
        2 * (schedule.num_slots + 1) * state * tokens[0]
    )  # with about as much for a unit's workspace
    return make_groups(
        [schedule.frontier_peak * state * count for count in tokens],
        [
            2 * schedule.unit_runs * count * (room.block_bytes // model.dtype.itemsize)
            for count in tokens
        ],
        room.num_blocks * room.block_bytes,
        max(0, BUDGET_BYTES[kind] - BUDGET_BYTES[kind] // SUMS_SHARE - walk),
        available_bytes(torch.device("cpu")) // SHARE if kind == "cuda" else 0,
        FLOPS_PER_BYTE[kind],
    )
