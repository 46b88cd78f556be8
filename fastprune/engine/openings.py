"""Opened chunks: embedded tokens, and the arguments of every unit, within a limit of bytes.

A model's own forward computes them, which takes as long as several narrow units. They depend on the
chunk alone, so that later calls reuse them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ..models import Runner
from .chunks import Chunk

Opening = tuple[Any, Any]  # the embedded tokens, and the units' arguments


class Openings:
    """Opens chunks, and keeps the first ones that fit. Calls take the chunks in one order.

    Args:
        runner: Opens chunks.
        limit: The most bytes to keep.

    Attributes:
        bytes: The bytes kept now.
    """

    def __init__(self, runner: Runner, limit: int):
        self._runner, self._limit = runner, limit
        self._kept: dict[int, tuple[Opening, int]] = {}  # by chunk, with its bytes
        self._weighed: set[int] = set()
        self.bytes = 0

    def open(self, number: int, chunk: Chunk) -> Opening:
        """Return a chunk's embedded tokens [B, T, D], and the arguments of every unit."""
        if number in self._kept:
            return self._kept[number][0]
        opening = self._runner.open(chunk.ids, chunk.positions, chunk.branch)
        self._keep(number, opening)
        return opening

    def weigh(self, number: int) -> None:
        """Count an opening's bytes again: units may add values that they compute once."""
        if number in self._kept and number not in self._weighed:
            opening, _ = self._kept[number]
            self.forget(number)
            if self._keep(number, opening):
                self._weighed.add(number)

    def _keep(self, number: int, opening: Opening) -> bool:
        """Keep an opening if it fits; return whether it does."""
        if self.bytes >= self._limit:
            return False
        size = sum({id(tensor): tensor.nbytes for tensor in _tensors(opening)}.values())
        if self.bytes + size > self._limit:
            return False
        self._kept[number] = opening, size
        self.bytes += size
        return True

    def forget(self, number: int) -> None:
        """Drop a chunk's opening."""
        self._weighed.discard(number)
        if number in self._kept:
            self.bytes -= self._kept.pop(number)[1]

    def give_back(self) -> None:
        """Drop all openings, and keep none from now on."""
        self._limit = self.bytes = 0
        self._kept.clear()


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors inside of arguments, which may be containers or objects of fastprune."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (Mapping, list, tuple)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(item)
    elif type(value).__module__.startswith(("fastprune.", "fastprune_kernels.")):
        yield from _tensors(vars(value))
