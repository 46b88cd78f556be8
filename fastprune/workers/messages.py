"""Requests to a worker and its answers, as plain values for any channel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from ..plan.cost import Cost

# kinds of words after which a worker waits for the next request
LAST = ("ready", "opened", "done", "memory", "wrong", "failed", "stopped", "lost")


class Open(NamedTuple):
    """Open a problem, to run parts of its calls.

    Attributes:
        number: The number of the problem.
        digest: The digest of its model.
        model: The way to get the model; None if the worker has it.
        device: The device of the worker.
        setup: A token for a `Setup`.
        alive: The numbers of problems still in use.
    """

    number: int
    digest: str
    model: tuple | None
    device: str
    setup: Any
    alive: list[int]


class Run(NamedTuple):
    """Run a part of a call.

    Attributes:
        number: The number of the problem.
        sequences: A token for the sequences.
        part: By chunk, the indices of the sequences that run on it, int64[n].
    """

    number: int
    sequences: Any
    part: Mapping[int, np.ndarray]


class Stop(NamedTuple):
    """Cancel the request at hand."""


class Setup(NamedTuple):
    """The settings of a worker's runs, the same for all workers of an evaluator."""

    problem: Any  # Problem
    backend: str
    memory_bytes: int | None
    cache_bytes: int | None
    cache_dir: Any
    per_machine: int
    per_device: int
    threads: int


class Word(NamedTuple):
    """A message from a worker.

    Attributes:
        kind: "sums" (a `PartialSums`), "progress" (done, total), "warning" (text), or one of
            `LAST`.
        value: The content.
        cost: The cost of the worker's work since its last word.
    """

    kind: str
    value: Any = None
    cost: Cost = Cost()
