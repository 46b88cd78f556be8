"""Requests to a worker, and its words: plain values, whatever carries them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from ..plan.cost import Cost

# a worker that has said one of these waits for the next request
LAST = ("ready", "opened", "done", "memory", "wrong", "failed", "stopped", "lost")


class Open(NamedTuple):
    """Be ready to run a problem.

    number: of the problem. digest: of its model. model: how to get the model, None if the worker
    has it. setup: a token of `Setup`. alive: numbers of problems still in use.
    """

    number: int
    digest: str
    model: tuple | None
    device: str
    setup: Any
    alive: list[int]


class Run(NamedTuple):
    """Run a part of a call. sequences: a token of them. part: by chunk, places int64[n]."""

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

    kind: "sums" (a `PartialSums`), "progress" (done, total), "warning" (text), or one of `LAST`.
    cost: of its work since the last word.
    """

    kind: str
    value: Any = None
    cost: Cost = Cost()
