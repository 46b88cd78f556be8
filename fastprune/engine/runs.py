"""The protocol that runs a call: one method to implement, in this process or on workers.

`LocalRuns` (local.py) runs units on this process's model, `RemoteRuns` (workers/remote.py) shares
the call out. `Calls` (calls.py) knows this protocol only.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from ..plan.cost import Cost
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

    cost: grows while a call runs, also when it is broken off. Its unit runs and head runs count
    single tokens, so that they stay integers.
    """

    @property
    def cost(self) -> Cost: ...

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

    def run_beside(self, idle: Any) -> bool:
        """Run from now on, while the runs of another version of the model wait with their states.

        Args:
            idle: of the same class.

        Returns:
            Whether they can wait; False: their states are of no more use.
        """

    def close(self) -> None:
        """Free all memory held."""
