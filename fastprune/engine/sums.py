"""Finished sums: the interface of their stores, and a bounded memory for the sums of races."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

import numpy as np

ENTRY_BYTES = 256  # of one entry besides its sums: keys and dicts


class Sums(Protocol):
    """Keeps sums over the continuations of a chunk, by (context, chunk, units that ran)."""

    def get(self, context: int, chunk: bytes, keys: Iterable[bytes]) -> dict[bytes, np.ndarray]:
        """Look up sums of a chunk, flat float64[V * C], by the key of the units."""

    def put(self, context: int, chunk: bytes, sums: Mapping[bytes, np.ndarray]) -> None:
        """Keep the sums of a chunk, float64[V, C] each, by the key of the units."""


class SumMemory:
    """Sums of the races of one process, within a limit of bytes. A context is a problem's number.

    There are two generations. New sums enter the young one. When it holds half of the limit, it
    becomes the old one, and the previous old one is dropped. A read moves a sum from the old to the
    young one.
    """

    def __init__(self, limit: int):
        self._limit = limit
        self._young: dict[tuple[int, bytes], dict[bytes, np.ndarray]] = {}
        self._old: dict[tuple[int, bytes], dict[bytes, np.ndarray]] = {}
        self._bytes = 0  # bytes of the young generation

    def __bool__(self) -> bool:
        """Whether it keeps anything."""
        return bool(self._young or self._old)

    def get(self, context: int, chunk: bytes, keys: Iterable[bytes]) -> dict[bytes, np.ndarray]:
        """Look up sums of a chunk; see `Sums.get`."""
        young = self._young.get((context, chunk), {})
        old = self._old.get((context, chunk), {})
        known, again = {}, {}
        for key in keys:
            if key in young:
                known[key] = young[key]
            elif key in old:
                known[key] = again[key] = old[key]
        if again:
            self.put(context, chunk, again)
        return known

    def put(self, context: int, chunk: bytes, sums: Mapping[bytes, np.ndarray]) -> None:
        """Keep the sums of a chunk; see `Sums.put`."""
        for units, values in sums.items():
            size = values.nbytes + ENTRY_BYTES + len(units)
            if size > self._limit // 2:
                continue
            if self._bytes + size > self._limit // 2:
                self._young, self._old, self._bytes = {}, self._young, 0
            kept = self._young.setdefault((context, chunk), {})
            self._bytes += 0 if units in kept else size
            kept[units] = values.ravel().copy()
