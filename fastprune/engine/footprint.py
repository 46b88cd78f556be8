"""What a model's activations weigh, measured on one row, and how many tokens of a chunk a byte
budget allows."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from ..data import TokenBatch
from ..models import Runner
from ..models.swap import State, hidden_of, state_bytes
from .chunks import Chunk, make_chunk
from .memory import peak_bytes


@dataclass(frozen=True)
class Footprint:
    """Bytes held while a plan is walked.

    state, workspace: per token, of one state and of one unit while it runs (its result included).
    head: of one tile of positions on its way from hidden states to numbers. longest_row: tokens.
    """

    state: float
    workspace: float
    head: int
    longest_row: int

    def needed(self, tokens: int, num_slots: int) -> int:
        """Bytes of a walk with chunks of so many tokens: the slots, a unit's input, its workspace,
        and the head."""
        return math.ceil(((num_slots + 1) * self.state + self.workspace) * tokens) + self.head

    def tokens_within(self, budget_bytes: int, num_slots: int) -> int:
        """The most tokens of a chunk that `needed` allows within the budget; 0 where not even the
        longest row fits."""
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
    """Run the first units and one tile of the head on the longest rows of a batch, and note what
    they hold."""
    if not runner.bands[0]:
        return _measure(runner, batch, granularity, head, tile)
    (found,) = (
        _measure(runner, batch, granularity, head, tile)
        for _ in runner.visit([runner.bands[0][:1]])
    )
    return found


def _measure(
    runner: Runner, batch: TokenBatch, granularity: str, head: Callable, tile: int
) -> Footprint:
    state_size = workspace = 0.0
    longest = 0
    for row in _longest_rows(batch):
        chunk = make_chunk(batch, [row], runner.device)
        state, largest, peak = _run_first_units(runner, chunk, granularity)
        state_size = max(state_size, largest / chunk.num_tokens)
        workspace = max(workspace, peak / chunk.num_tokens)
        longest = max(longest, chunk.num_tokens)
    return Footprint(state_size, workspace, measure_head(hidden_of(state), head, tile), longest)


def measure_head(hidden: torch.Tensor, head: Callable[[torch.Tensor], object], tile: int) -> int:
    """Bytes that are held while a tile of positions goes from hidden states, like these [..., D],
    to numbers."""
    hidden = hidden.flatten(0, -2)
    hidden = hidden[torch.arange(tile, device=hidden.device) % len(hidden)]
    _, held = peak_bytes(lambda: head(hidden))
    return held + hidden.nbytes


def _longest_rows(batch: TokenBatch) -> list[int]:
    """The longest plain row and the longest tree, as far as there are any."""
    kinds = [np.flatnonzero(batch.row_is_tree == is_tree) for is_tree in (False, True)]
    return [int(rows[batch.row_lengths[rows].argmax()]) for rows in kinds if len(rows)]


def _run_first_units(runner: Runner, chunk: Chunk, granularity: str) -> tuple[State, int, int]:
    """Open a chunk and run its first unit (with sublayers, one of each kind). The last state, the
    bytes of the largest, and those held at the peak besides a unit's input: its workspace, and what
    the layers are given (masks, angles)."""
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
