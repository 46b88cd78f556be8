"""The protocol of the two paths: `GenericRunner` runs a model's own layers, `FusedRunner` fused
operators."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from .head import Head
from .swap import State


class Runner(Protocol):
    """Runs units on states. The engine knows no more of a model.

    A state is [B, T, D]: B rows of T tokens, D columns. Inside of a parallel block it is three of
    these; `swap.pack` turns it into one tensor, to keep it. A unit leaves its input unchanged,
    because other masks may need it. A unit may only run while its weights are loaded
    (`Model.weights`). States and arguments are passed back only to the runner that made them.

    Attributes:
        path_name: The path's name, as users read it.
        device: The device of states.
        head: The head, which runs on final states.
    """

    path_name: str
    device: torch.device
    head: Head

    def open(
        self, ids: torch.Tensor, positions: torch.Tensor | None, branch: torch.Tensor | None
    ) -> tuple:
        """Embed a chunk's tokens, and find the arguments of every unit.

        Arguments hold tensors and functions, never a runner or a model: the engine weighs and keeps
        their tensors.

        Args:
            ids: Token ids, int64[B, T].
            positions: The positions of a tree's tokens, int64[B, T]; None for plain rows.
            branch: The branches of a tree's tokens, 0 for the trunk, int64[B, T]; likewise.
        """

    def run(self, unit: int, state: Any, arguments: Any, granularity: str) -> State:
        """Run a unit on a state, and return the next state. A skipped unit has no call."""

    def unpack(self, packed: torch.Tensor, unit: int) -> State:
        """Restore the state that `swap.pack` packed after this unit."""

    def numerics(self) -> str:
        """The settings of this path that decide the bits of a score, as text."""
