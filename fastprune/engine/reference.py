"""The dense model's side of a measure that compares: final states, and logits while there is room.

P positions that predict in a chunk, D columns of a state.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ..models import Runner
from .chunks import Tile
from .measures import Measure


class DenseReference:
    """Final states of the whole model by chunk, and the references of one chunk's tiles.

    keeps_tiles: whether the references of a chunk stay while its masks run, or are computed again
    for each mask.
    """

    def __init__(self, runner: Runner, measure: Measure, keeps_tiles: bool):
        self._runner, self._measure = runner, measure
        self.keeps_tiles = keeps_tiles
        self._states: dict[int, torch.Tensor] = {}  # [P, D] by chunk
        self._tiles: dict[int, torch.Tensor] = {}  # by number of the tile, of the current chunk

    @property
    def bytes(self) -> int:
        return sum(kept.nbytes for kept in (*self._states.values(), *self._tiles.values()))

    def missing(self, chunks: Iterable[int]) -> list[int]:
        """The chunks whose final states are not held."""
        if not self._measure.needs_dense:
            return []
        return [chunk for chunk in chunks if chunk not in self._states]

    def put(self, chunk: int, states: torch.Tensor) -> None:
        """Hold the final states of a chunk, [P, D], where a target is predicted."""
        self._states[chunk] = states

    def forget(self, chunk: int) -> None:
        """Drop the final states of a chunk."""
        self._states.pop(chunk, None)

    def at(self, chunk: int, number: int, tile: Tile) -> torch.Tensor | None:
        """The reference of a chunk's tile, [P, ...]; None for a measure that compares nothing."""
        if self._measure.reference is None:
            return None
        reference = self._tiles.get(number)
        if reference is None:
            reference = self._measure.reference(self._runner, self._states[chunk][tile.positions])
            if self.keeps_tiles:
                self._tiles[number] = reference
        return reference

    def leave_chunk(self) -> None:
        """Drop the references of the current chunk's tiles."""
        self._tiles.clear()

    def give_back(self) -> bool:
        """Keep no references from now on; False where none were kept."""
        kept, self.keeps_tiles = self.keeps_tiles and self._measure.needs_dense, False
        self._tiles.clear()
        return kept
