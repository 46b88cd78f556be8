"""The protocol that runs a call: one method to implement, in this process or on workers.

`LocalRuns` (local.py) runs units on this process's model. `RemoteRuns` (workers/remote.py) divides
the call among workers. `Calls` (calls.py) knows this protocol only.
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
    """The memory of a `Runs`.

    Attributes:
        peak_bytes: The most bytes of activations so far, without the prefix cache.
        cache_bytes: The bytes of the prefix cache now.
        cache_hits: The number of states that the cache returned, by tier.
    """

    peak_bytes: int = 0
    cache_bytes: int = 0
    cache_hits: Mapping[str, int] = field(default_factory=dict)


class Runs(Protocol):
    """Computes missing sums.

    Attributes:
        cost: Grows while a call runs, also if it is cancelled. Its unit runs and head runs count
            single tokens, so that they stay integers.
        held: The memory in use.
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
        """Yield the missing sums, in any order. Closing the iterator cancels the call.

        Args:
            problem: The data, measure and settings of the sums.
            sequences: Sequences of units, distinct and sorted.
            missing: The places of the sequences to run, int64[n], ascending, by number of the chunk
                (see `Chunks`).
            progress: Called with the unit runs done so far, and their total.

        Raises:
            OutOfMemory: No memory is left to free. Sums that were yielded stay valid.
        """

    def run_beside(self, idle: Any) -> bool:
        """Run from now on, while the runs of another version of the model keep their states.

        Args:
            idle: The other runs, of the same class.

        Returns:
            Whether they can keep them; if not, the caller closes them.
        """

    def close(self) -> None:
        """Free all memory held."""
