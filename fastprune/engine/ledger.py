"""The sums of one call: known from a store, missing, or entered as they arrive."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..plan.trie import Units
from .problem import Problem
from .runs import PartialSums
from .store import units_key
from .sums import Sums


class Ledger:
    """Sums of a problem over each continuation, for the M sequences of one call.

    Args:
        problem: The problem.
        sequences: The sequences.
        chunks: The numbers of the chunks that run.
        stores: Stores of finished sums, the fastest first, each with its number of the problem.

    Attributes:
        sums: float64[M, V, C], for V values of the measure and C continuations of the batch; 0 for
            chunks that do not run. A part of a row adds one column.
        from_store: Whether all sums of a sequence came from a store, bool[M].
    """

    def __init__(
        self,
        problem: Problem,
        sequences: Sequence[Units],
        chunks: Sequence[int],
        stores: Sequence[tuple[Sums, int]] = (),
    ):
        self._problem, self._chunks, self._stores = problem, chunks, stores
        self._keys = [units_key(sequence) for sequence in sequences]
        num_values, width = len(problem.measure.values), problem.batch.num_continuations
        width += max(chunks, default=0) >= len(problem.chunks)
        self.sums = np.zeros((len(sequences), num_values, width))
        self.from_store = np.ones(len(sequences), dtype=bool)

    def missing(self) -> dict[int, np.ndarray]:
        """Fill in the sums that the stores hold.

        Returns:
            By chunk, the places of the sequences whose sums are missing there, int64[n]; chunks
            without missing sums are left out.
        """
        missing = {}
        every = np.arange(len(self._keys))
        for number in self._chunks:
            absent = every
            for store, context in self._stores:
                absent = absent[~self._look_up(store, context, number, absent)]
            self.from_store[absent] = False
            if len(absent):
                missing[number] = absent
        return missing

    def put(self, part: PartialSums) -> None:
        """Enter sums, and keep them in the stores, in one transaction each."""
        chunk = self._problem.chunks[part.chunk]
        rows = part.rows.tolist()
        for row, sums in zip(rows, part.sums):
            self.sums[row][:, chunk.continuations] = sums
        if self._stores:
            finished = {self._keys[row]: sums for row, sums in zip(rows, part.sums)}
            for store, context in self._stores:
                store.put(context, chunk.key, finished)

    def _look_up(self, store: Sums, context: int, number: int, rows: np.ndarray) -> np.ndarray:
        """Fill in the sums that a store has, and return for which sequences, bool[n]."""
        chunk = self._problem.chunks[number]
        known = store.get(context, chunk.key, [self._keys[row] for row in rows.tolist()])
        has = np.zeros(len(rows), dtype=bool)
        if not known:
            return has
        shape = (self.sums.shape[1], len(chunk.continuations))
        for place, row in enumerate(rows.tolist()):
            sums = known.get(self._keys[row])
            if sums is not None:
                self.sums[row][:, chunk.continuations] = sums.reshape(shape)
                has[place] = True
        return has
