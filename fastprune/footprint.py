"""What a model's activations weigh, measured on one row, and how many tokens of a chunk a byte budget allows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from .calibration import TokenBatch
from .chunks import Chunk, make_chunk
from .memory import peak_bytes
from .models import Runner
from .models.stand_ins import State, hidden_of, state_bytes


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
        """Bytes of a walk with chunks of so many tokens: the slots, a unit's input, its workspace, and the head."""
        return int(((num_slots + 1) * self.state + self.workspace) * tokens) + self.head

    def tokens_within(self, budget_bytes: int, num_slots: int) -> int:
        """The most tokens of a chunk for which `needed` stays within the budget."""
        per_token = (num_slots + 1) * self.state + self.workspace
        return int((budget_bytes - self.head) / per_token)


def measure_footprint(
    runner: Runner,
    batch: TokenBatch,
    granularity: str,
    head: Callable[[torch.Tensor], object],
    tile: int,
) -> Footprint:
    """Run the first units and one tile of the head on the longest rows of a batch, and note what they hold."""
    state_size = workspace = 0.0
    longest = 0
    for row in _longest_rows(batch):
        chunk = make_chunk(batch, [row], runner.device)
        states, peak = _run_first_units(runner, chunk, granularity)
        state_size = max(state_size, *(state_bytes(state) / chunk.num_tokens for state in states))
        workspace = max(workspace, peak / chunk.num_tokens)
        longest = max(longest, chunk.num_tokens)
    hidden = hidden_of(states[-1]).flatten(0, 1)
    hidden = hidden[torch.arange(tile, device=hidden.device) % len(hidden)]
    _, head_bytes = peak_bytes(lambda: head(hidden))
    return Footprint(state_size, workspace, head_bytes + hidden.nbytes, longest)


def _longest_rows(batch: TokenBatch) -> list[int]:
    """The longest plain row and the longest tree, as far as there are any."""
    kinds = [np.flatnonzero(batch.row_is_tree == is_tree) for is_tree in (False, True)]
    return [int(rows[batch.row_lengths[rows].argmax()]) for rows in kinds if len(rows)]


def _run_first_units(runner: Runner, chunk: Chunk, granularity: str) -> tuple[list[State], int]:
    """The states after the embeddings and the first two units (with sublayers, one of each kind), and the peak."""
    opened, peak = peak_bytes(lambda: runner.open(chunk.ids, chunk.positions, chunk.branch))
    state, arguments = opened
    states = [state]
    for unit in range(2 if granularity == "sublayer" else 1):
        state, unit_peak = peak_bytes(lambda unit=unit, state=state: runner.run(unit, state, arguments, granularity))
        states.append(state)
        peak = max(peak, unit_peak)
    return states, peak
