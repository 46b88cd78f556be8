"""The sums of one call: known from the store, missing, or put as they come."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from ..plan.trie import Units
from .problem import Problem
from .runs import PartialSums
from .store import SumStore, units_key


class Ledger:
    """Sums of a problem over each continuation, for the sequences of one call.

    sums float64[M, V, C]: M sequences, V values of the measure, C continuations of the batch; 0 for
    values not asked for. from_store bool[M]: every sum asked for came from the store.
    """

    def __init__(self, problem: Problem, sequences: Sequence[Units], store: SumStore | None):
        self._problem, self._store = problem, store
        self._context = None if store is None else store.context(problem.context)
        self._keys = [units_key(sequence) for sequence in sequences]
        num_values = len(problem.measure.values)
        self.sums = np.zeros((len(sequences), num_values, problem.batch.num_continuations))
        self.from_store = np.ones(len(sequences), dtype=bool)

    def missing(self, chunks: Iterable[int]) -> dict[int, np.ndarray]:
        """Fill in the sums that the store holds.

        Args:
            chunks: numbers of the requested chunks.

        Returns:
            By chunk, the places of the sequences whose sums are missing there, int64[n]; chunks
            without missing sums are left out.
        """
        missing = {}
        for number in chunks:
            absent = self._look_up(number)
            self.from_store &= ~absent
            if absent.any():
                missing[number] = np.flatnonzero(absent)
        return missing

    def put(self, part: PartialSums) -> None:
        """Enter sums, and keep them in the store: one transaction."""
        chunk = self._problem.chunks[part.chunk]
        values = np.arange(self.sums.shape[1])
        self.sums[np.ix_(part.rows, values, chunk.continuations)] = part.sums
        if self._store is not None and self._context is not None:
            finished = {self._keys[row]: sums for row, sums in zip(part.rows.tolist(), part.sums)}
            self._store.put(self._context, chunk.key, finished)

    def _look_up(self, number: int) -> np.ndarray:
        """bool[M]: sequences whose sums the store has not; fills in the others."""
        absent = np.ones(len(self._keys), dtype=bool)
        if self._store is None or self._context is None:
            return absent
        chunk = self._problem.chunks[number]
        known = self._store.get(self._context, chunk.key, self._keys)
        for row, key in enumerate(self._keys):
            if key in known:
                shape = (self.sums.shape[1], len(chunk.continuations))
                self.sums[row][:, chunk.continuations] = known[key].reshape(shape)
                absent[row] = False
        return absent
