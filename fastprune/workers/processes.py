"""Workers as processes of this machine: started, sent requests, and restarted when one dies."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import Pipe, connection
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from ..errors import InputError, brief
from ..validate import check_integer
from .messages import LAST, Stop, Word

if TYPE_CHECKING:  # a command line is checked without torch
    import torch

MOST_WORKERS = 1024
MOST_STARTS = 3  # starts of a worker killed before it is ready
END_WITHIN = 2  # seconds in which all processes together end by themselves
START = Path(__file__).with_name("start.py")


class Workers:
    """Carries requests to workers and their words back. Evaluators may share one; calls take turns.

    A subclass starts workers, and defines `_start(worker)`, `_send(worker, request)` and
    `_receive()`, which waits for the next word of any busy worker. The word of a worker that died
    is "lost", with the reason as its value.

    Attributes:
        count: The number of workers.
        per_machine: The number of workers that share the memory of one machine.
        lock: Held by the call that uses the workers.
        models: The digests of the models that each worker holds.
        problems: The numbers of the problems that each worker holds.
        alive: The problems in use in this process, by number.
    """

    def __init__(self, count: int, per_machine: int):
        self.count, self.per_machine = count, per_machine
        self.lock = threading.RLock()
        self.alive: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
        self.models: list[set[str]] = [set() for _ in range(count)]
        self.problems: list[set[int]] = [set() for _ in range(count)]
        self.busy: set[int] = set()
        self._dead: set[int] = set()

    def send(self, worker: int, request: tuple) -> None:
        """Send a request to an idle worker."""
        self._send(worker, request)
        self.busy.add(worker)

    def receive(self) -> tuple[int, Word]:
        """Wait for the next word of any busy worker."""
        worker, word = self._receive()
        if word.kind in LAST:
            self.busy.discard(worker)
        if word.kind == "lost":
            self._dead.add(worker)
            self.models[worker].clear()
            self.problems[worker].clear()
        return worker, word

    def cancel(self) -> None:
        """Cancel the requests of all busy workers, and wait until they have stopped."""
        for worker in self.busy:
            self._send(worker, Stop())
        while self.busy:
            self.receive()

    def get_ready(self) -> None:
        """Cancel remaining work of an earlier call, and restart workers that died."""
        self.cancel()
        for worker in sorted(self._dead):
            self.restart(worker)

    def restart(self, worker: int) -> None:
        """Restart a worker that died. Raises RuntimeError when it cannot start."""
        self._start(worker)
        self._dead.discard(worker)

    def share(self, value: Any) -> Any:
        """Make a token for a value in requests to several workers, sent or stored once."""
        return value

    def share_tensors(self, tensors: Sequence[torch.Tensor]) -> tuple[list, Any, object]:
        """Put tensors into one buffer (`transfer`) for several workers.

        Returns:
            The place of each tensor in the buffer; a token for the buffer in requests; an object to
            hold as long as a request may refer to the buffer.
        """
        raise NotImplementedError

    def device(self, worker: int, device: torch.device) -> str:
        """The device of a worker, if this process has one of that kind."""
        return str(device)

    def per_device(self, device: torch.device) -> int:
        """The number of workers that share the memory of one device of this kind."""
        return self.per_machine

    def _start(self, worker: int) -> None:
        raise NotImplementedError

    def _send(self, worker: int, request: tuple) -> None:
        raise NotImplementedError

    def _receive(self) -> tuple[int, Word]:
        raise NotImplementedError


@dataclass
class _Member:
    """A process, this end of its pipe, and its printed output."""

    process: subprocess.Popen
    pipe: connection.Connection
    printed: IO[bytes]


class Processes(Workers):
    """Processes of this machine, each with a model of its own.

    They start at once, and end with this object or this process, however that ends. On GPUs the
    workers take the devices of the machine in turn.

    Args:
        count: The number of processes.

    Raises:
        InputError: The count is below 1.
        RuntimeError: A process cannot start.
    """

    def __init__(self, count: int):
        super().__init__(check_workers(count), count)
        self._members: dict[int, _Member] = {}
        self._end = weakref.finalize(self, _end, self._members, os.getpid())
        for worker in range(count):
            self._begin(worker)
        for worker in range(count):
            self._expect_ready(worker)

    @property
    def pids(self) -> list[int]:
        """The process id of each worker."""
        return [self._members[worker].process.pid for worker in range(self.count)]

    def close(self) -> None:
        """End the processes. The object cannot be used afterwards."""
        self._end()

    def share(self, value: Any) -> Any:
        return "pickled", pickle.dumps(value)  # once for all

    def share_tensors(self, tensors: Sequence[torch.Tensor]) -> tuple[list, Any, object]:
        from . import transfer

        at, size = transfer.places(tensors)
        file = tempfile.TemporaryFile()  # noqa: SIM115  (open as long as a worker may read it)
        try:
            # a full disk raises an error here; without this, writing would end in a signal
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            place = tempfile.gettempdir()
            raise InputError(
                f"{place}: no room for a model of {size} bytes that workers share: {error.strerror}"
            ) from None
        transfer.fill(np.memmap(file, dtype=np.uint8, mode="r+", shape=(size,)), tensors, at)
        return at, ("file", f"/proc/{os.getpid()}/fd/{file.fileno()}", size), file

    def device(self, worker: int, device: torch.device) -> str:
        import torch

        return (
            f"cuda:{worker % torch.cuda.device_count()}" if device.type == "cuda" else str(device)
        )

    def per_device(self, device: torch.device) -> int:
        import torch

        return -(-self.count // torch.cuda.device_count()) if device.type == "cuda" else self.count

    def _start(self, worker: int) -> None:
        self._begin(worker)
        self._expect_ready(worker)

    def _begin(self, worker: int) -> None:
        if worker in self._members:
            self._members[worker].pipe.close()
            self._members[worker].printed.close()
        own, other = Pipe()
        printed = tempfile.TemporaryFile()  # noqa: SIM115  (open as long as the process may print)
        process = subprocess.Popen(
            [sys.executable, str(START), str(other.fileno()), *import_path()],
            pass_fds=[other.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=printed,
            stderr=printed,
            env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        )
        other.close()
        self._members[worker] = _Member(process, own, printed)

    def _expect_ready(self, worker: int) -> None:
        for tries_left in reversed(range(MOST_STARTS)):
            member = self._members[worker]
            try:
                member.pipe.recv()
                return
            except (EOFError, OSError):
                reason = _end_of(member)
            killed = (member.process.returncode or 0) < 0  # for lack of memory, for example
            if not killed or not tries_left:
                raise RuntimeError(f"worker {worker} could not start: {reason}")
            self._begin(worker)

    def _send(self, worker: int, request: tuple) -> None:
        with suppress(OSError):  # `_receive` reports a worker that died
            self._members[worker].pipe.send(request)

    def _receive(self) -> tuple[int, Word]:
        worker_of: dict[Any, int] = {self._members[worker].pipe: worker for worker in self.busy}
        pipe: Any = connection.wait(worker_of)[0]
        worker = worker_of[pipe]
        try:
            return worker, pipe.recv()
        except (EOFError, OSError):
            return worker, Word("lost", _end_of(self._members[worker]))


def check_workers(count: Any) -> int:
    return check_integer("workers", count, 1, MOST_WORKERS)


def import_path() -> list[str]:
    """The folders from which this process imports, and from which a worker is to import.

    PYTHONPATH cannot hold them: it splits names at colons, and Python would run a sitecustomize.py
    in any of them.
    """
    return [os.path.abspath(entry) for entry in sys.path if isinstance(entry, str)]


def _end_of(member: _Member) -> str:
    """Describe how a process ended: its signal, or its status and its last printed line."""
    with suppress(subprocess.TimeoutExpired):
        member.process.wait(timeout=5)
    status = member.process.returncode
    if status is not None and status < 0:
        return f"process {member.process.pid} was killed ({signal.Signals(-status).name})"
    member.printed.seek(0)
    lines = [
        line for line in member.printed.read().decode(errors="replace").splitlines() if line.strip()
    ]
    last_line = brief(lines[-1], 200) if lines else "it printed nothing"
    return f"process {member.process.pid} ended with status {status}: {last_line}"


def _end(members: dict[int, _Member], owner: int) -> None:
    """Close every pipe, so that the processes end; kill those too busy to notice."""
    if os.getpid() != owner:  # this is a fork of the process that started them
        return
    for member in members.values():
        member.pipe.close()
    until = time.monotonic() + END_WITHIN
    for member in members.values():
        with suppress(subprocess.TimeoutExpired):
            member.process.wait(timeout=max(0.0, until - time.monotonic()))
    for member in members.values():
        member.process.kill()  # has no effect on a process that has ended
    for member in members.values():
        member.process.wait()
        member.printed.close()
    members.clear()
