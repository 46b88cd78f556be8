"""The protocol that runs units: through the model's own layers (`GenericRunner`), or on fused
operators (`FusedRunner`)."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from .head import Head
from .swap import State


class Runner(Protocol):
    """Runs units on states; its head runs on final states. The engine knows nothing else of a
    model.

    A state is [B, T, D], of B rows of T tokens; inside of a parallel block it is three of these
    (`pack`, `unpack`). A unit leaves its input as it is, since other masks still need it. It runs
    while its weights are loaded (`Model.weights`). States
    and arguments go back to the runner that made them. path_name: the path's name, as users read
    it.
    """

    path_name: str
    device: torch.device
    head: Head

    def open(
        self, ids: torch.Tensor, positions: torch.Tensor | None, branch: torch.Tensor | None
    ) -> tuple:
        """The embedded tokens, and the arguments of every unit for a chunk. Arguments hold tensors
        and functions, never a runner or a model: their tensors are weighed and kept."""

    def run(self, unit: int, state: Any, arguments: Any, granularity: str) -> State:
        """The state after a unit. Skipping one is not calling this."""

    def pack(self, state: Any) -> torch.Tensor:
        """A state as one tensor, to be kept."""

    def unpack(self, packed: torch.Tensor, unit: int) -> State:
        """The state that was packed, after a unit."""

    def numerics(self) -> str:
        """The settings that decide the bits of a score in this path, besides torch and
        transformers."""
