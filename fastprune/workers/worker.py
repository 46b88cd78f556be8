"""One worker of several: it holds models of its own and an engine for each evaluator, and runs its
part of a call.

It knows nothing of other workers. What it is asked comes as plain values, and so does what it
answers, whatever carries them: a pipe (`serve`), or Ray (`integrations.distributed`).
"""

from __future__ import annotations

import pickle
import signal
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch

from ..engine.chunks import Chunk
from ..engine.engine import Engine, Progress
from ..engine.store import units_key
from ..errors import InputError
from ..models import Model, load_model
from ..models.device import is_out_of_memory
from ..models.imports import import_transformers
from ..plan.trie import Units, make_trie
from .transfer import unpack, views

EVERY = 0.1  # seconds between two words on progress


class Stopped(Exception):
    """The call is given up elsewhere."""


class PartEngine(Engine):
    """An engine that runs some sequences on some chunks, and gives their sums away as they are
    finished."""

    emit: Callable[[str, object], None] = lambda kind, value: None
    places: Mapping[bytes, int]  # of the sequences of a call, by the keys of their units
    part: Mapping[int, np.ndarray]  # by chunk, bool[M]: which of them are to be run there

    def start(
        self, sequences: Sequence[Units], part: Mapping[int, np.ndarray], progress: Progress
    ) -> None:
        """Run sequences, sorted and distinct, on chunks."""
        self.places, self.part = (
            {units_key(sequence): place for place, sequence in enumerate(sequences)},
            part,
        )
        self.counts.peak_activation_bytes = 0
        self.run(make_trie(sequences), progress)

    def _numbers(self, wanted: np.ndarray | None) -> list[int]:
        return list(self.part)

    def _look_up(
        self, context: int | None, keys: list[bytes], number: int, sums: np.ndarray
    ) -> np.ndarray:
        return self.part[number][[self.places[key] for key in keys]]

    def _finish(
        self, pending: list, chunk: Chunk, sums: np.ndarray, context: int | None, keys: list[bytes]
    ) -> None:
        rows = [row for row, _ in pending]
        super()._finish(pending, chunk, sums, context, keys)
        if rows:
            number = next(n for n, known in enumerate(self.chunks) if known is chunk)
            places = [self.places[keys[row]] for row in rows]
            self.emit("sums", (number, places, sums[rows][:, :, chunk.continuations]))

    def share_memory(self, per_machine: int, per_device: int) -> None:
        """Take only one part in so many of what is free, of the host and its disk, and of the
        device."""
        self.cache.per_machine = self.frontier.per_machine = per_machine
        self.cache.per_device = per_device

    def _take_smaller_steps(self) -> bool:
        return False  # chunks are common to all workers: who shares out the work cuts them

    def agree(self, given: Mapping[str, Any]) -> None:
        """Cut chunks and tiles as all do. Raises InputError where numbers would have other bits all
        the same."""
        if self.layout != given["layout"]:
            self.executor.keeps_references = False
            self._cut(given["layout"])
        _check_alike(self.numerics(), given["numerics"])


class Worker:
    """Answers requests, by words: emit((kind, value, unit runs on rows, heads on rows)), counted
    since the last word.

    stopping() says whether the request at hand is given up. fetch: what stands for a large value ->
    the value.
    """

    def __init__(
        self,
        emit: Callable[[tuple], object],
        stopping: Callable[[], bool],
        fetch: Callable[[Any], Any] = lambda token: token,
    ):
        self._emit, self._stopping, self._fetch = emit, stopping, fetch
        self._models: dict[str, Model] = {}  # by the hash of their weights
        self._engines: dict[int, PartEngine] = {}  # by the number of who shares out the work
        self._counted: tuple[Engine | None, int, int] = (None, 0, 0)

    def answer(self, kind: str, *request: Any) -> None:
        """Do what is asked, and say so; the last word is one of `processes.LAST`. A "stop" that
        comes late has none."""
        if kind == "stop":
            return
        try:
            with warnings.catch_warnings():
                warnings.simplefilter(
                    "ignore" if kind == "open" else "always"
                )  # the caller has opened the same
                warnings.showwarning = self._warn
                last: tuple[str, object] = (
                    self._open(*request) if kind == "open" else self._run(*request)
                )
        except InputError as error:
            last = "wrong", str(error)
        except Stopped:
            last = "stopped", None
        except Exception as error:
            kind = "memory" if is_out_of_memory(error) else "failed"
            last = kind, f"{type(error).__name__}: {error}"
        self._say(*last)

    def _open(
        self,
        number: int,
        weights: str,
        model: tuple | None,
        device: str,
        token: Any,
        alive: list[int],
    ) -> tuple[str, object]:
        """Make an engine. weights: the hash of the model's; model: how to come by it, None where it
        is here already.
        alive: the numbers of engines that are still of use."""
        given = self._fetch(token)
        _use_threads(given["threads"])
        self._engines = {
            n: engine for n, engine in self._engines.items() if n in alive and n != number
        }
        if model is not None:
            self._models[weights] = self._make_model(model, device)
            found = self._models[weights].digest
            if found != weights:
                del self._models[weights]
                raise InputError(
                    "the model that it opened is not the same as here: weights, config, hooks or "
                    "switches"
                )
        engine = PartEngine(self._models[weights], **given["engine"])
        engine.share_memory(*given["sharing"])
        engine.emit = self._say
        engine.agree(given)
        self._engines[number] = engine
        used = {id(engine.model) for engine in self._engines.values()}
        self._models = {key: model for key, model in self._models.items() if id(model) in used}
        return "opened", list(self._models)

    def _make_model(self, how: tuple, device: str) -> Model:
        kind, *arguments = how
        if kind == "load":
            place, dtype, trust_remote_code, weights_bytes = arguments
            options = {"trust_remote_code": trust_remote_code, "weights_bytes": weights_bytes}
            return load_model(place, device, dtype, **options)
        modules, at, token = arguments
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Model(unpack(modules, views(self._fetch(token), at)).to(device))

    def _run(self, number: int, token: Any, part: Mapping[int, np.ndarray]) -> tuple[str, object]:
        """Run sequences; part: by chunk, bool[M], which of them there."""
        given, engine = self._fetch(token), self._engines[number]
        _use_threads(given["threads"])
        engine.agree(given)
        self._counted = engine, engine.counts.row_runs, engine.counts.row_heads
        loads, bytes_read, told = engine.counts.weight_loads, engine.counts.weight_bytes, 0.0

        def progress(done: int, total: int) -> None:
            nonlocal told
            if self._stopping():
                raise Stopped
            if time.monotonic() - told >= EVERY:
                told = time.monotonic()
                self._say("progress", (done, total))

        engine.start(given["sequences"], part, progress)
        read = engine.counts.weight_loads - loads, engine.counts.weight_bytes - bytes_read
        return "done", (
            engine.counts.peak_activation_bytes,
            engine.cache.bytes,
            dict(engine.cache.hits),
            *read,
        )

    def _say(self, kind: str, value: object) -> None:
        engine, runs, heads = self._counted
        if engine is not None:
            self._counted = engine, engine.counts.row_runs, engine.counts.row_heads
            runs, heads = engine.counts.row_runs - runs, engine.counts.row_heads - heads
        self._emit((kind, value, runs, heads))

    def _warn(self, message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        if issubclass(category, RuntimeWarning):
            self._say("warning", str(message))


def _check_alike(found: Mapping, expected: Mapping) -> None:
    """Raise InputError, naming what it is, where something that bits depend on is not the same as
    at the caller's."""
    for name in sorted({*found, *expected}):
        here, there = found.get(name), expected.get(name)
        if here == there:
            continue
        if isinstance(here, Mapping) and isinstance(there, Mapping):
            _check_alike(here, there)
        raise InputError(
            f"its {name} is {here}, not {there}, so that its numbers would have other bits"
        )


def _use_threads(count: int) -> None:
    if torch.get_num_threads() != count:
        torch.set_num_threads(count)


def serve(number: int) -> None:
    """Answer what comes over the pipe of this file number, until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal, meant for who started this
    pipe = Connection(number)
    import_transformers()

    def stopping() -> bool:
        return pipe.poll() and bool(
            pipe.recv()
        )  # while a request is at hand, nothing comes but "stop"

    def fetch(token: tuple) -> Any:
        kind, *where = token
        if kind == "file":
            return torch.UntypedStorage.from_file(where[0], False, where[1])
        return pickle.loads(where[0])  # from who started this, as all that comes over the pipe

    worker = Worker(pipe.send, stopping, fetch)
    try:
        pipe.send(("ready", None, 0, 0))
        while True:
            worker.answer(*pipe.recv())
    except (EOFError, OSError):  # who started this has gone
        return
