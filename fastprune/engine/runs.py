"""The protocol that runs a call: one method to implement, in this process or on workers.

`LocalRuns` (local.py) runs units on this process's model, `RemoteRuns` (workers/remote.py) shares
the call out. The evaluator knows this protocol only.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from ..plan.progress import Progress
from ..plan.trie import Units

if TYPE_CHECKING:  # a command line checks its workers without torch
    from .problem import Problem

MAX_SUMS = 64  # sequences whose sums travel together: one fetch, one message, one put


class PartialSums(NamedTuple):
    """Sums over continuations of up to `MAX_SUMS` sequences on one chunk."""

    chunk: int
    rows: np.ndarray  # int64[n], places in the call's sequences
    sums: np.ndarray  # float64[n, V, C], C continuations of the chunk


@dataclass(frozen=True)
class Cost:
    """Work, counted by the process that does it.

    unit_runs: one unit over the whole calibration set counts one. naive_unit_runs: those of one
    forward pass for each requested mask. heads: masks whose losses were computed.
    weight_loads: blocks read from files, weight_bytes: their bytes. seconds: of wall time.
    """

    unit_runs: float = 0
    naive_unit_runs: float = 0
    heads: float = 0
    weight_loads: int = 0
    weight_bytes: int = 0
    seconds: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return self._with(other, 1)

    def __sub__(self, other: Cost) -> Cost:
        return self._with(other, -1)

    def _with(self, other: Cost, sign: int) -> Cost:
        return Cost(
            **{f.name: getattr(self, f.name) + sign * getattr(other, f.name) for f in fields(self)}
        )

    def of_tokens(self, num_tokens: int) -> Cost:
        """Counts of single tokens as counts of the whole calibration set."""
        unit_runs, heads = self.unit_runs / num_tokens, self.heads / num_tokens
        return replace(self, unit_runs=whole(unit_runs), heads=whole(heads))


@dataclass(frozen=True)
class Held:
    """Bytes that a `Runs` holds now, and the peak of its last calls.

    peak_bytes: of activations, the prefix cache apart. cache_bytes: of the prefix cache now.
    cache_hits: states that it served, by tier.
    """

    peak_bytes: int = 0
    cache_bytes: int = 0
    cache_hits: Mapping[str, int] = field(default_factory=dict)


class Runs(Protocol):
    """Computes missing sums.

    cost: grows while a call runs, also when it is broken off. Its unit runs and heads count single
    tokens, so that they stay integers.
    """

    cost: Cost

    @property
    def held(self) -> Held: ...

    def run(
        self,
        problem: Problem,
        sequences: Sequence[Units],
        missing: Mapping[int, np.ndarray],
        progress: Progress,
    ) -> Generator[PartialSums, None, None]:
        """The missing sums, in any order.

        Args:
            problem: the data, measure and settings of the sums.
            sequences: of units, distinct and sorted.
            missing: by number of the chunk (see `Chunks`), the places of the sequences to run
                there, int64[n], ascending.
            progress: told of unit runs, done and in all.

        Closing the iterator cancels the call. Raises OutOfMemory when no memory is left to free;
        sums that were yielded before stay right.
        """

    def close(self) -> None:
        """Free all memory held."""


def whole(count: float) -> float:
    """The count as an integer, if it is one."""
    return int(count) if count == int(count) else count
