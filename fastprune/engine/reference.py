"""The dense model's side of a measure that compares: final states, and logits that fit.

P positions of a chunk that predict targets, D columns of a state.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from ..models import Runner
from .chunks import Tile
from .measures import Measure


class DenseReference:
    """Final states of the dense model by chunk, and the references of tiles.

    Both outlive a call. If the references of all chunks do not fit, the current chunk evicts the
    one computed last. Calls take the chunks in one order, so that one is needed last.

    Args:
        runner: The runner, whose head computes references.
        measure: The measure.
        room: The most bytes of references. Those that do not fit are computed again for each mask.
    """

    def __init__(self, runner: Runner, measure: Measure, room: int):
        self._head, self._measure, self.room = runner.head, measure, room
        self._states: dict[int, torch.Tensor] = {}  # [P, D] by chunk
        # by chunk and number of the tile: a reference, and its bytes
        self._tiles: dict[int, dict[int, tuple[Any, int]]] = {}
        self._state_bytes = self._tile_bytes = 0

    @property
    def bytes(self) -> int:
        return self._state_bytes + self._tile_bytes

    def missing(self, chunks: Iterable[int]) -> list[int]:
        """The chunks whose final states are not held."""
        if self._measure.reference is None:
            return []
        return [chunk for chunk in chunks if chunk not in self._states]

    def put(self, chunk: int, states: torch.Tensor) -> None:
        """Hold the final states of a chunk, [P, D], at the positions that predict a target."""
        self._states[chunk] = states
        self._state_bytes += states.nbytes

    def forget(self, chunk: int) -> None:
        """Drop the final states of a chunk, and the references of its tiles."""
        states = self._states.pop(chunk, None)
        if states is not None:
            self._state_bytes -= states.nbytes
        for _, size in self._tiles.pop(chunk, {}).values():
            self._tile_bytes -= size

    def at(self, chunk: int, number: int, tile: Tile) -> Any:
        """The reference of a chunk's tile; None for a measure that compares nothing."""
        reference = self._measure.reference
        if reference is None:
            return None
        tiles = self._tiles.get(chunk, {})
        if number not in tiles:
            states = self._states[chunk][tile.positions]
            size = reference.position_bytes(self._head) * len(states)
            if not self._make_room(chunk, size):
                return reference.compute(self._head, states, False)
            tiles[number] = reference.compute(self._head, states, True), size
            self._tiles[chunk] = tiles
            self._tile_bytes += size
        return tiles[number][0]

    def _make_room(self, chunk: int, size: int) -> bool:
        """Evict the latest references of other chunks until a new one fits; False if it cannot."""
        own = sum(held for _, held in self._tiles.get(chunk, {}).values())
        if own + size > self.room:
            return False
        while self._tile_bytes + size > self.room:
            latest = next(other for other in reversed(self._tiles) if other != chunk)
            _, (_, held) = self._tiles[latest].popitem()
            self._tile_bytes -= held
            if not self._tiles[latest]:
                del self._tiles[latest]
        return True

    def give_back(self) -> bool:
        """Keep no references of tiles from now on; False if none were kept."""
        kept, self.room = self.room > 0 and self._measure.reference is not None, 0
        self._tiles.clear()
        self._tile_bytes = 0
        return kept
