"""A worker: it holds models and a `LocalRuns` for each problem, and runs its part of a call.

It does not know other workers. Requests and words are plain values (`messages`), which a pipe
(`serve`) or Ray (`workers.ray`) carries.
"""

from __future__ import annotations

import pickle
import signal
import time
import warnings
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any

import torch

from ..engine.local import LocalRuns, open_for
from ..engine.problem import Problem
from ..errors import InputError
from ..models import Model, load_model
from ..models.device import is_out_of_memory
from ..models.imports import import_transformers
from ..models.offload.placement import to_device
from ..plan.cost import Cost
from .messages import Open, Run, Setup, Stop, Word
from .transfer import unpack, views

PROGRESS_SECONDS = 0.1  # between two reports of progress


class Cancelled(Exception):
    """The caller has cancelled the request."""


class Worker:
    """Answers requests with words.

    Args:
        emit: Sends a `Word`.
        is_cancelled: Tells whether the present request is cancelled.
        fetch: Returns the value of a token in a request.
    """

    def __init__(
        self,
        emit: Callable[[Word], object],
        is_cancelled: Callable[[], bool],
        fetch: Callable[[Any], Any] = lambda token: token,
    ):
        self._emit, self._is_cancelled, self._fetch = emit, is_cancelled, fetch
        self._models: dict[str, Model] = {}  # by digest
        # by number: the problem, its model and its runs
        self._problems: dict[int, tuple[Problem, Model, LocalRuns]] = {}
        self._runs: LocalRuns | None = None  # of the present request
        self._counted = Cost()  # the part of its cost that words have reported

    def answer(self, request: Open | Run | Stop) -> None:
        """Serve a request. The last word is one of `messages.LAST`; a late `Stop` has no answer."""
        if isinstance(request, Stop):
            return
        opens = isinstance(request, Open)
        last: tuple[str, Any]
        try:
            with warnings.catch_warnings():
                # the caller has seen the warnings of opening
                warnings.simplefilter("ignore" if opens else "always")
                warnings.showwarning = self._warn
                last = self._open(request) if isinstance(request, Open) else self._run(request)
        except InputError as error:
            last = "wrong", error
        except Cancelled:
            last = "stopped", None
        except Exception as error:
            cause = error.__cause__ or error
            out_of_memory = is_out_of_memory(error) or is_out_of_memory(cause)
            last = (
                "memory" if out_of_memory else "failed",
                f"{type(cause).__name__}: {cause}",
            )
        self._say(*last)

    def _open(self, request: Open) -> tuple[str, Any]:
        setup: Setup = self._fetch(request.setup)
        if torch.get_num_threads() != setup.threads:
            torch.set_num_threads(setup.threads)
        self._problems = {
            number: opened
            for number, opened in self._problems.items()
            if number in request.alive and number != request.number
        }
        self._runs, self._counted = None, Cost()
        if request.model is not None:
            self._models[request.digest] = self._make_model(request.model, request.device)
            if self._models[request.digest].digest != request.digest:
                del self._models[request.digest]
                raise InputError(
                    "the model that it opened is not the same as here: weights, config, hooks or "
                    "switches"
                )
        model = self._models[request.digest]
        self._problems[request.number] = setup.problem, model, _open_problem(model, setup)
        used = {id(model) for _, model, _ in self._problems.values()}
        self._models = {key: model for key, model in self._models.items() if id(model) in used}
        return "opened", list(self._models)

    def _make_model(self, how: tuple, device: str) -> Model:
        kind, *arguments = how
        if kind == "load":
            place, dtype, trust_remote_code, weights_bytes = arguments
            return load_model(
                place,
                device,
                dtype,
                trust_remote_code=trust_remote_code,
                weights_bytes=weights_bytes,
            )
        modules, places, buffer = arguments
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            hf = unpack(modules, views(self._fetch(buffer), places))
            return Model(to_device(hf, torch.device(device)))

    def _run(self, request: Run) -> tuple[str, Any]:
        problem, model, runs = self._problems[request.number]
        self._runs, self._counted = runs, runs.cost
        last_report = 0.0

        def progress(done: int, total: int) -> None:
            nonlocal last_report
            if self._is_cancelled():
                raise Cancelled
            if time.monotonic() - last_report >= PROGRESS_SECONDS:
                last_report = time.monotonic()
                self._say("progress", (done, total))

        with model.evaluation():
            sequences = self._fetch(request.sequences)
            for part in runs.run(problem, sequences, request.part, progress):
                self._say("sums", part)
        return "done", runs.held

    def _say(self, kind: str, value: Any = None) -> None:
        cost = Cost()
        if self._runs is not None:
            cost = self._runs.cost - self._counted
            self._counted = self._runs.cost
        self._emit(Word(kind, value, cost))

    def _warn(self, message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        if issubclass(category, RuntimeWarning):
            self._say("warning", str(message))


def _open_problem(model: Model, setup: Setup) -> LocalRuns:
    """Open a model for the caller's problem; raise InputError if bits would differ."""
    problem: Problem = setup.problem
    own, runner, limit = open_for(
        model,
        setup.backend,
        problem.batch,
        problem.measure_name,
        problem.granularity,
        setup.memory_bytes,
        problem.layout,
    )
    _check_alike(own.numerics, problem.numerics)
    caches = (setup.cache_bytes, setup.cache_dir, setup.per_machine, setup.per_device)
    return LocalRuns(model, runner, limit, *caches)


def _check_alike(settings: Mapping, expected: Mapping) -> None:
    """Raise InputError, with its name, if a setting that decides bits differs from the caller's."""
    for name in sorted({*settings, *expected}):
        value, caller_value = settings.get(name), expected.get(name)
        if value == caller_value:
            continue
        if isinstance(value, Mapping) and isinstance(caller_value, Mapping):
            _check_alike(value, caller_value)
        raise InputError(
            f"its {name} is {value}, not {caller_value}, so that its numbers would have other bits"
        )


def serve(number: int) -> None:
    """Answer the requests from the pipe of this file number, until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent process
    pipe = Connection(number)
    import_transformers()

    def is_cancelled() -> bool:
        # during a request, only `Stop` arrives
        return pipe.poll() and pipe.recv() is not None

    def fetch(token: tuple) -> Any:
        kind, *content = token
        if kind == "file":
            return torch.UntypedStorage.from_file(content[0], False, content[1])
        return pickle.loads(content[0])  # the pipe carries bytes of the parent process only

    worker = Worker(pipe.send, is_cancelled, fetch)
    try:
        pipe.send(Word("ready"))
        while True:
            worker.answer(pipe.recv())
    except (EOFError, OSError):  # the parent process has ended
        return
