"""Runs on workers: a call is split, sent, and sent again if a worker dies. Read `plan.split` first.

Every worker has a `LocalRuns` of its own for the same problem. Each gets its part of a call:
sequences for each chunk. Sums come back as they are finished. A sum is the same, whichever worker
computes it.
"""

from __future__ import annotations

import warnings
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..engine.memory import OutOfMemory
from ..engine.problem import Problem
from ..engine.runs import Held, PartialSums
from ..errors import InputError
from ..models import Model
from ..plan.cost import Cost
from ..plan.progress import Progress
from ..plan.split import cut, owners, teams
from ..plan.trie import Trie, Units, make_trie
from .messages import Open, Run, Setup, Word
from .processes import Workers
from .transfer import pack

MAX_DEATHS = 3  # deaths of one worker in one call


@dataclass
class _Call:
    """A call on workers.

    Attributes:
        sequences: The sequences of the call.
        parts: By worker and chunk, the indices of the sequences that run on it, int64[n].
        left: By chunk, the indices of the sequences whose sums have not come back.
        sent: By worker, the indices of the sequences in its last request.
        tokens: Tokens for sequences in requests, by their indices; several workers share one.
    """

    sequences: Sequence[Units]
    parts: Mapping[int, Mapping[int, np.ndarray]]
    left: dict[int, np.ndarray]
    sent: dict[int, np.ndarray] = field(default_factory=dict)
    tokens: dict[bytes, Any] = field(default_factory=dict)


class RemoteRuns:
    """Shares calls out over workers; see `Runs`. This process's model runs no unit.

    Workers run with as many threads as this process.

    Args:
        workers: The workers.
        model: The model.
        backend: As in `Evaluator`.
        memory_bytes: The limit on activations of each worker.
        cache_bytes: The limit on the prefix caches of all workers of a machine together.
        cache_dir: As in `Evaluator`.

    Raises:
        InputError: The model has variants or cannot be sent, or a worker would compute other bits,
            by another kind of device, other software or other switches.
    """

    def __init__(
        self,
        workers: Workers,
        model: Model,
        backend: str,
        memory_bytes: int | None = None,
        cache_bytes: int | None = None,
        cache_dir: Path | None = None,
    ):
        if model.num_variants:
            raise InputError(
                "workers open the model alone, without a library's variants; leave workers out",
                argument="workers",
            )
        self._workers, self._model = workers, model
        self._backend, self._memory_bytes = backend, memory_bytes
        self._cache_bytes = None if cache_bytes is None else cache_bytes // workers.per_machine
        # absolute, since a worker may run in another folder
        self._cache_dir = cache_dir and cache_dir.absolute()
        self._problem: Problem | None = None
        self._number = -1
        self._model_sent: tuple[tuple, object] | None = None  # for workers, and its open file
        self.cost = Cost()
        self._held: dict[int, Held] = {}  # by worker
        model.weights.release()  # no unit runs here

    @property
    def held(self) -> Held:
        tiers = sorted({tier for held in self._held.values() for tier in held.cache_hits})
        return Held(
            max((held.peak_bytes for held in self._held.values()), default=0),
            sum(held.cache_bytes for held in self._held.values()),
            {t: sum(held.cache_hits.get(t, 0) for held in self._held.values()) for t in tiers},
        )

    def open(self, problem: Problem) -> None:
        """Let every worker open the model for this problem, inside `model.evaluation()`."""
        with self._workers.lock:
            self._use(problem)

    def run(
        self,
        problem: Problem,
        sequences: Sequence[Units],
        missing: Mapping[int, np.ndarray],
        progress: Progress,
    ) -> Generator[PartialSums, None, None]:
        """Yield the missing sums; see `Runs.run`."""
        with self._workers.lock:
            finished = False
            try:
                self._use(problem)
                parts = self._split(problem, sequences, missing)
                yield from self._share_out(_Call(sequences, parts, dict(missing)), progress)
                finished = True
            finally:
                if not finished:
                    self._workers.cancel()

    def run_beside(self, idle: object) -> bool:
        """See `Runs.run_beside`. Workers hold one model."""
        return False

    def close(self) -> None:
        """Let the workers drop their objects for this problem when they open the next."""
        self._problem = None

    # -- what the workers hold ---------------------------------------------------------------------

    def _use(self, problem: Problem) -> None:
        """Let every worker hold this problem."""
        if problem is not self._problem:
            self._number = problem.number
            self._workers.alive[self._number] = self._problem = problem
            self._held.clear()
            looks = problem.layout.looks(problem.batch)
            looks = looks[[rows[0] for rows in problem.layout.chunks]]
            loads = [chunk.num_tokens for chunk in problem.chunks]
            self._owner = owners(loads, looks.tolist(), self._workers.count)
        self._workers.get_ready()
        late = [
            worker
            for worker in range(self._workers.count)
            if self._number not in self._workers.problems[worker]
        ]
        if late:
            self._open(late, problem)

    def _open(self, late: Sequence[int], problem: Problem) -> None:
        setup = self._workers.share(self._setup(problem))
        for worker in late:
            self._send_open(worker, problem, setup)
        deaths = 0
        while self._workers.busy:
            worker, word = self._workers.receive()
            if word.kind == "opened":
                self._note_opened(worker, word.value)
            elif word.kind == "lost" and deaths < MAX_DEATHS:  # it may have died while idle
                deaths += 1
                self._workers.restart(worker)
                self._send_open(worker, problem, setup)
            elif word.kind == "wrong":
                _raise(worker, word)
            elif word.kind in ("failed", "memory", "lost"):
                raise RuntimeError(f"worker {worker} could not open the model: {word.value}")

    def _setup(self, problem: Problem) -> Setup:
        return Setup(
            # copies without cached properties
            replace(problem, batch=replace(problem.batch)),
            self._backend,
            self._memory_bytes,
            self._cache_bytes,
            self._cache_dir,
            self._workers.per_machine,
            self._workers.per_device(self._model.device),
            torch.get_num_threads(),
        )

    def _send_open(self, worker: int, problem: Problem, setup: Any) -> None:
        digest = problem.digest
        assert digest is not None
        has_model = digest in self._workers.models[worker]
        model = None if has_model else self._model_for_workers()
        device = self._workers.device(worker, self._model.device)
        self._workers.problems[worker].discard(self._number)  # until the worker has opened it
        alive = list(self._workers.alive)
        self._workers.send(worker, Open(self._number, digest, model, device, setup, alive))

    def _note_opened(self, worker: int, models: Sequence[str]) -> None:
        self._workers.models[worker] = set(models)
        self._workers.problems[worker].add(self._number)

    def _model_for_workers(self) -> tuple:
        """The way to get the model: arguments of `load_model`, or modules and tensors."""
        if self._model_sent is None:
            model = self._model
            if model.opened is not None and model.opened[1] == model.version:
                self._model_sent = ("load", *model.opened[0]), None
            else:
                model.require_resident(
                    "has changed since it was opened, and its weights are in files"
                )
                modules, tensors = pack(model.given)
                places, buffer, held = self._workers.share_tensors(tensors)
                self._model_sent = ("modules", modules, places, buffer), held
        return self._model_sent[0]

    # -- a call ------------------------------------------------------------------------------------

    def _split(
        self, problem: Problem, sequences: Sequence[Units], missing: Mapping[int, np.ndarray]
    ) -> dict[int, dict[int, np.ndarray]]:
        """Split a call: by worker and chunk, the indices of the sequences that run, int64[n]."""
        tries: dict[bytes, Trie] = {}
        for rows in missing.values():
            if (key := rows.tobytes()) not in tries:
                tries[key] = make_trie([sequences[row] for row in rows.tolist()])
        head = _head_cost(self._model, problem)
        loads = [problem.chunks[number].num_tokens for number in missing]
        owner = [self._owner[problem.chunks.home(number)] for number in missing]
        chosen = teams(loads, owner, self._workers.count)
        parts: dict[int, dict[int, np.ndarray]] = {}
        for (number, rows), team in zip(missing.items(), chosen):
            for worker, part in zip(team, cut(tries[rows.tobytes()], len(team), head)):
                parts.setdefault(worker, {})[number] = rows[part.start : part.stop]
        return parts

    def _share_out(self, call: _Call, progress: Progress) -> Iterator[PartialSums]:
        """Send every worker its part, and yield the sums that come back."""
        deaths = dict.fromkeys(call.parts, 0)
        done: dict[int, tuple[int, int]] = {}  # by worker, its unit runs so far and in total
        for worker, part in call.parts.items():
            self._send_part(worker, call, part)
        while self._workers.busy:
            worker, word = self._workers.receive()
            self.cost += word.cost
            if word.kind == "sums":
                yield self._enter(worker, call, word.value)
            elif word.kind == "progress":
                done[worker] = word.value
                if len(done) == len(call.parts):
                    progress(*map(sum, zip(*done.values())))
            elif word.kind == "done":
                self._held[worker] = word.value
                if worker in done:
                    done[worker] = (done[worker][1],) * 2
            elif word.kind == "lost":
                deaths[worker] += 1
                self._restart(worker, deaths[worker], word)
            elif word.kind == "opened":
                self._note_opened(worker, word.value)
                self._send_rest(worker, call)
            else:
                _raise(worker, word)
        if done:
            progress(*map(sum, zip(*done.values())))

    def _enter(self, worker: int, call: _Call, part: PartialSums) -> PartialSums:
        """Enter a worker's sums, and return them with their indices in the call."""
        rows = call.sent[worker][part.rows]
        left = call.left[part.chunk]
        call.left[part.chunk] = left[~np.isin(left, rows)]
        return part._replace(rows=rows)

    def _restart(self, worker: int, deaths: int, word: Word) -> None:
        if deaths == MAX_DEATHS:
            raise RuntimeError(f"worker {worker} died {deaths} times in one call: {word.value}")
        warnings.warn(
            f"worker {worker} died, its share is run again: {word.value}",
            RuntimeWarning,
            stacklevel=6,
        )
        self._workers.restart(worker)
        assert self._problem is not None
        setup = self._workers.share(self._setup(self._problem))
        self._send_open(worker, self._problem, setup)

    def _send_rest(self, worker: int, call: _Call) -> None:
        """Send a restarted worker the rest of its part."""
        rest = {
            number: rows[np.isin(rows, call.left[number])]
            for number, rows in call.parts[worker].items()
        }
        rest = {number: rows for number, rows in rest.items() if len(rows)}
        if rest:
            self._send_part(worker, call, rest)

    def _send_part(self, worker: int, call: _Call, part: Mapping[int, np.ndarray]) -> None:
        """Send a worker its part: the sequences, and by chunk their indices among these."""
        places = np.unique(np.concatenate([*part.values()]))
        if (key := places.tobytes()) not in call.tokens:
            sequences = [call.sequences[place] for place in places.tolist()]
            call.tokens[key] = self._workers.share(sequences)
        inside = {number: np.searchsorted(places, rows) for number, rows in part.items()}
        call.sent[worker] = places
        self._workers.send(worker, Run(self._number, call.tokens[key], inside))


def _raise(worker: int, word: Word) -> None:
    """Raise the error that a worker reports, or show its warning."""
    message = f"worker {worker}: {word.value}"
    if word.kind == "memory":
        raise OutOfMemory(message)
    if word.kind == "wrong":
        error: InputError = word.value
        raise error.restated(f"worker {worker}: {error.message}")
    if word.kind == "failed":
        raise RuntimeError(message)
    if word.kind == "warning":
        warnings.warn(word.value, RuntimeWarning, stacklevel=6)


def _head_cost(model: Model, problem: Problem) -> float:
    """The cost of one mask's head in unit runs, estimated from counts of weights and positions."""
    blocks = sum(p.numel() for layer in model.layers for p in layer.parameters())
    num_units = len(model.unit_names(problem.granularity))
    head = sum(p.numel() for p in model.output_head.parameters())
    positions = len(np.unique(problem.batch.target_source))  # only these need the head
    return head / max(1, blocks / num_units) * positions / problem.num_tokens
