"""Workers on Ray (extra `ray`): an actor with a model of its own for each GPU or group of cores.

Ray places the actors, carries large objects (calibration sets, models in memory, sums) in its
object store, and reports an actor that dies. `plan.split` decides the work of each, as for
processes of one machine.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import tempfile
import threading
import time
import warnings
import weakref
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import InputError, brief
from ..validate import require
from .messages import LAST, Stop, Word
from .processes import MOST_STARTS, MOST_WORKERS, Workers, check_workers, import_path

if TYPE_CHECKING:  # an address is checked without torch
    import torch

ANSWER_WITHIN = 5  # seconds for a cluster to answer
START_WITHIN = 300  # seconds for an actor to be placed
GIVEN_BACK_WITHIN = 5  # seconds until Ray frees the resources of an ended actor
LISTEN = 5  # seconds for which a call waits for a word


def check_address(address: str) -> None:
    """Raise InputError, within seconds, unless Ray is installed and a cluster answers.

    Args:
        address: "local", "auto" (this machine's cluster) or HOST:PORT of a cluster's head.
    """
    require("ray", "ray")
    if address in ("local", "auto"):
        return
    found = re.fullmatch(r"([\w.-]+|\[[\da-fA-F:]+\]):(\d{1,5})", address)
    if not found or not 0 < int(found[2]) < 1 << 16:
        raise InputError(
            f"a Ray address is local, auto or HOST:PORT, not {brief(repr(address), 80)}"
        )
    try:
        socket.create_connection(
            (found[1].strip("[]"), int(found[2])), timeout=ANSWER_WITHIN
        ).close()
    except OSError as error:
        raise InputError(f"nobody answers at {address}: {error.strerror or error}") from None


class RayWorkers(Workers):
    """Actors on a Ray cluster as workers of an Evaluator. They start at once.

    Ray spreads the actors over its machines. Each machine needs fastprune, and the files of a model
    in the same place. Each worker has a GPU to itself; on CPUs, it has as many cores as this
    process has threads.

    Args:
        address: "local", "auto" (this machine's cluster) or HOST:PORT of a cluster's head. If this
            process is connected to Ray already, that connection is used.
        device: The device of the model.
        count: The number of workers. By default all that the free resources allow, with a warning
            if others use a part of the cluster.

    Raises:
        InputError: No cluster answers at the address, or it has room for fewer workers.
        RuntimeError: Ray or an actor cannot start.

    Examples:
        >>> import fastprune as fp
        >>> from fastprune.workers.ray import RayWorkers
        >>> workers = RayWorkers("local", count=2)  # doctest: +SKIP
        >>> evaluator = fp.Evaluator(model, objective, workers=workers)  # doctest: +SKIP
    """

    def __init__(
        self, address: str = "local", device: torch.device | None = None, count: int | None = None
    ):
        import torch

        check_address(address)
        if count is not None:
            check_workers(count)
        import ray

        self._ray: Any = ray
        self._gpus = 1 if device is not None and device.type == "cuda" else 0
        self._cores = 1 if self._gpus else torch.get_num_threads()
        self._end = weakref.finalize(self, ray.shutdown) if _connect(ray, address) else lambda: None
        free, total = _nodes(count, self._gpus, self._cores)
        count = choose_count(count, free, total, self._gpus, self._cores)
        super().__init__(count, count)
        self._actor_class = ray.remote(Actor).options(
            num_gpus=self._gpus,
            num_cpus=self._cores,
            max_concurrency=3,
            max_restarts=0,
            scheduling_strategy="SPREAD",
        )
        self._actors: list[Any] = [None] * count
        self._request = [0] * count
        self._listening: dict[Any, int] = {}  # by the reference of a call, its worker
        self._words: deque[tuple[int, Word]] = deque()
        self.pids, self._machines = [0] * count, [""] * count
        for worker in range(count):
            self._actors[worker] = self._actor_class.remote()
        for worker in range(count):
            self._expect_ready(worker)
        self.per_machine = max(Counter(self._machines).values())

    def close(self) -> None:
        """End the actors, and Ray if this object started it. The object is unusable afterwards.

        Examples:
            >>> workers.close()  # doctest: +SKIP
        """
        for actor in self._actors:
            with contextlib.suppress(Exception):  # the actor has ended already
                self._ray.kill(actor)
        self._end()

    def share(self, value: Any) -> Any:
        # in a list, Ray passes on the reference, not the value
        return "object", [self._ray.put(value)]

    def share_tensors(self, tensors: Sequence[torch.Tensor]) -> tuple[list, Any, object]:
        from . import transfer

        at, size = transfer.places(tensors)
        buffer = np.zeros(size, dtype=np.uint8)
        transfer.fill(buffer, tensors, at)
        return at, ("buffer", [self._ray.put(buffer)]), None

    def device(self, worker: int, device: torch.device) -> str:
        return device.type  # an actor sees no GPU but its own

    def per_device(self, device: torch.device) -> int:
        return 1 if device.type == "cuda" else self.per_machine

    def _start(self, worker: int) -> None:
        self._actors[worker] = self._actor_class.remote()
        self._expect_ready(worker)

    def _expect_ready(self, worker: int) -> None:
        exceptions = self._ray.exceptions
        for tries_left in reversed(range(MOST_STARTS)):
            try:
                found = self._ray.get(self._actors[worker].place.remote(), timeout=START_WITHIN)
                self.pids[worker], self._machines[worker] = found
                return
            except exceptions.GetTimeoutError:
                raise RuntimeError(
                    f"worker {worker} could not be placed within {START_WITHIN} s"
                ) from None
            except exceptions.RayError as error:
                lost = isinstance(error, (exceptions.RayActorError, exceptions.OutOfMemoryError))
                # an actor whose own code fails would fail again
                if not lost or not tries_left or "creation task" in str(error):
                    raise RuntimeError(
                        f"worker {worker} could not start: {brief(str(error), 200)}"
                    ) from None
            self._actors[worker] = self._actor_class.remote()

    def _send(self, worker: int, request: tuple) -> None:
        if isinstance(request, Stop):
            self._actors[worker].stop.remote(self._request[worker])
            return
        self._request[worker] += 1
        self._actors[worker].ask.remote(self._request[worker], request)
        self._listen(worker)

    def _listen(self, worker: int) -> None:
        self._listening[self._actors[worker].listen.remote()] = worker

    def _receive(self) -> tuple[int, Word]:
        while not self._words:
            (reference,), _ = self._ray.wait(list(self._listening), num_returns=1)
            worker = self._listening.pop(reference)
            try:
                words = self._ray.get(reference)
            except (
                self._ray.exceptions.RayActorError,
                self._ray.exceptions.OutOfMemoryError,
            ) as error:
                # the first line; Ray's advice follows
                reason = brief(str(error).strip().partition("\n")[0], 120)
                self._words.append((worker, Word("lost", f"process {self.pids[worker]}: {reason}")))
                break
            self._words.extend((worker, word) for word in words)
            if not (words and words[-1].kind in LAST):
                self._listen(worker)
        return self._words.popleft()


class Actor:
    """A `Worker` on Ray: one call does the work, another passes on its words, a third cancels."""

    def __init__(self) -> None:
        from ..models.imports import import_transformers
        from .worker import Worker

        import_transformers()
        self._words: list[Word] = []
        self._news = threading.Condition()
        self._asked = self._stopped = 0
        self._worker = Worker(self._note, lambda: self._stopped >= self._asked, _fetch)

    def place(self) -> tuple[int, str]:
        """The ids of its process and its machine."""
        import ray

        return os.getpid(), ray.get_runtime_context().get_node_id()

    def ask(self, number: int, request: Any) -> None:
        self._asked = number
        self._worker.answer(request)

    def listen(self) -> list[Word]:
        """The words that arrived since the last call; waits for one."""
        with self._news:
            self._news.wait_for(lambda: self._words, timeout=LISTEN)
            words, self._words = self._words, []
            return words

    def stop(self, number: int) -> None:
        self._stopped = number

    def _note(self, word: Word) -> None:
        with self._news:
            self._words.append(word)
            self._news.notify_all()


def _fetch(token: Any) -> Any:
    import ray
    import torch

    kind, (reference,) = token
    value = ray.get(reference)
    if kind == "object":
        return value
    with warnings.catch_warnings():
        # torch warns that memory of the object store is read-only; it is only read
        warnings.simplefilter("ignore")
        return torch.from_numpy(value).untyped_storage()


def _connect(ray: Any, address: str) -> bool:
    """Connect to Ray, unless this process is connected; return whether a connection was made."""
    if ray.is_initialized():
        return False
    own = (
        {"num_cpus": len(os.sched_getaffinity(0)), "include_dashboard": False}
        if address == "local"
        else {}
    )
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(import_path())  # actors here inherit it
    empty = tempfile.TemporaryDirectory(prefix="fastprune-")
    try:
        # an empty working folder for the actors: without one, Ray puts this process's first on
        # their sys.path, and a torch.py there would run as torch
        job = {"runtime_env": {"working_dir": empty.name}}
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", **job, **own)
    except Exception as error:  # Ray raises many kinds, a bare Exception among them
        kind = RuntimeError if own else InputError
        raise kind(f"no Ray at {address}: {brief(str(error), 200)}") from None
    finally:
        os.environ.pop("PYTHONPATH")
        os.environ |= {} if before is None else {"PYTHONPATH": before}
        empty.cleanup()
    return True


def choose_count(
    count: int | None,
    free: Iterable[Mapping[str, float]],
    total: Iterable[Mapping[str, float]],
    gpus: int,
    cores: int,
) -> int:
    """Choose the number of workers.

    Args:
        count: The requested number; None for as many as fit, with a warning if others use a part
            of the cluster.
        free: The free resources of each machine, by Ray's names.
        total: All resources of each machine.
        gpus: GPUs of each worker.
        cores: Cores of each worker.

    Raises:
        InputError: There is room for fewer workers than requested, or for none.
    """
    fitting, in_total = _room(free, gpus, cores), _room(total, gpus, cores)
    each = "a GPU" if gpus else f"{cores} core{'s' * (cores > 1)}"
    room = f"the cluster has room for {fitting} worker{'s' * (fitting != 1)} of {each} each"
    room += f" ({in_total} when nobody else uses it)" * (fitting < in_total)
    if min(fitting, MOST_WORKERS) < (count or 1):
        raise InputError(f"{room}, not for {count or 1}")
    if count is None and fitting < min(in_total, MOST_WORKERS):
        warnings.warn(f"{room}: going on with {fitting}", RuntimeWarning, stacklevel=3)
    return min(fitting, MOST_WORKERS) if count is None else int(count)


def _room(machines: Iterable[Mapping[str, float]], gpus: int, cores: int) -> int:
    """The number of workers of these sizes that fit, each on one machine."""
    needs = {"GPU": gpus, "CPU": cores}
    return sum(
        min(int(machine.get(kind, 0) // n) for kind, n in needs.items() if n)
        for machine in machines
    )


def _nodes(
    count: int | None, gpus: int, cores: int
) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """The free and the total resources of each machine.

    Ray needs a moment to free the resources of ended actors, so this may wait a little.
    """
    # the public functions add up over machines
    from ray._private.state import available_resources_per_node, total_resources_per_node

    until = time.monotonic() + GIVEN_BACK_WITHIN
    while True:
        free, total = (
            [*available_resources_per_node().values()],
            [*total_resources_per_node().values()],
        )
        room = _room(total, gpus, cores)
        wanted = room if count is None else min(room, count)
        if (wanted and _room(free, gpus, cores) >= wanted) or time.monotonic() > until:
            return free, total
        time.sleep(0.1)
