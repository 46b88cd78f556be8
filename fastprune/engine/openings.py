"""Opened chunks: embedded tokens, and the arguments of every unit, while there is room for them.

A model's own forward works them out, which takes as long as several narrow units. They depend on
the chunk alone, so that later calls need not open it again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ..models import Runner
from .chunks import Chunk

Opening = tuple[Any, Any]  # the embedded tokens, and the units' arguments


class Openings:
    """Opens chunks, and keeps the first ones that fit.

    Calls take the chunks in one order. So the first ones stay when not all fit.

    Args:
        runner: Opens them.
        limit: Bytes that may be kept.

    Attributes:
        bytes: Kept now.
    """

    def __init__(self, runner: Runner, limit: int):
        self._runner, self._limit = runner, limit
        self._kept: dict[int, tuple[Opening, int]] = {}  # by chunk, with its bytes
        self._weighed: set[int] = set()
        self.bytes = 0

    def open(self, number: int, chunk: Chunk) -> Opening:
        """A chunk's embedded tokens [B, T, D], and the arguments of every unit."""
        if number in self._kept:
            return self._kept[number][0]
        opening = self._runner.open(chunk.ids, chunk.positions, chunk.branch)
        self._keep(number, opening)
        return opening

    def weigh(self, number: int) -> None:
        """Weigh a chunk's opening again: units may add values that they compute once."""
        if number in self._kept and number not in self._weighed:
            opening, _ = self._kept[number]
            self.forget(number)
            self._keep(number, opening)
            self._weighed.add(number)

    def _keep(self, number: int, opening: Opening) -> None:
        if self.bytes >= self._limit:
            return
        size = sum({id(tensor): tensor.nbytes for tensor in _tensors(opening)}.values())
        if self.bytes + size <= self._limit:
            self._kept[number] = opening, size
            self.bytes += size

    def forget(self, number: int) -> None:
        """Drop a chunk's opening."""
        self._weighed.discard(number)
        if number in self._kept:
            self.bytes -= self._kept.pop(number)[1]

    def give_back(self) -> None:
        """Keep none from now on."""
        self._limit = self.bytes = 0
        self._kept.clear()


def _tensors(thing: Any) -> Iterator[torch.Tensor]:
    """The tensors inside of arguments and of their own classes."""
    if isinstance(thing, torch.Tensor):
        yield thing
    elif isinstance(thing, Mapping):
        for item in thing.values():
            yield from _tensors(item)
    elif isinstance(thing, (list, tuple)):
        for item in thing:
            yield from _tensors(item)
    elif type(thing).__module__.startswith("fastprune."):
        yield from _tensors(vars(thing))
