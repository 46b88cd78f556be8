"""Runs the sections of the GPU benchmark in a process of their own, and survives whatever becomes
of it.

A process that waits for a device which never answers can be stopped by nothing but its end: no
signal handler of its own runs. So another one watches it, that touches no device.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable

GRACE = 15  # seconds in which a section may end by itself, after its limit
STARTING = 180  # seconds until the first section begins: imports, and a device that wakes up


class Reports:
    """The worker's side: tells the watcher which section runs, and how long it may."""

    def __init__(self, descriptor: int):
        self._descriptor = descriptor

    def begins(self, section: str, limit: float) -> None:
        os.write(self._descriptor, f"{limit:.1f} {section}\n".encode())


def watch(
    command: Callable[[list[str], int], list[str]],
    sections: list[str],
    failed: Callable[[str, Exception], None],
    grace=GRACE,
) -> bool:
    """Run sections, in as many processes as it takes; False when a process ended before it had
    begun any.

    command(sections, descriptor): of a process that runs them in order, and reports each to the
    descriptor as it begins. failed(section, error) is told of the section in which a process was
    killed (TimeoutError) or ended with an error; those after it run in a new one.
    """
    left = list(sections)
    while left:
        reading, writing = os.pipe()
        try:
            process = subprocess.Popen(
                command(left, writing), pass_fds=(writing,), start_new_session=True
            )
        finally:
            os.close(writing)
        try:
            begun, late = _follow(process, reading, grace)
        finally:
            os.close(reading)
            _end(process)
        if not begun:
            return False
        left = left[left.index(begun[-1]) + 1 :]
        if late:
            hung = TimeoutError(f"killed {grace:.3g} s after its limit: it hung")
            failed(begun[-1], hung)
        elif process.returncode:
            ended = RuntimeError(f"its process ended with status {process.returncode}")
            failed(begun[-1], ended)
    return True


def failure(error: Exception) -> dict[str, object]:
    """An error as results hold it. Running out of time says nothing of a goal, so it is marked."""
    words = f"{type(error).__name__}: {str(error)[:500]}"
    return {"failed": words, "timed_out": isinstance(error, TimeoutError)}


def _follow(process: subprocess.Popen, reading: int, grace: float) -> tuple[list[str], bool]:
    """The sections that a process began, and whether the last of them ran past its limit and the
    grace."""
    begun: list[str] = []
    until, said = time.monotonic() + STARTING, b""
    while True:
        ended = process.poll() is not None  # looked at before the last reports are read
        while select.select([reading], [], [], 0)[0] and (read := os.read(reading, 4096)):
            said += read
        *lines, said = said.split(b"\n")
        for line in lines:
            limit, section = line.decode().split(" ", 1)
            begun.append(section)
            until = time.monotonic() + float(limit)
        if ended or time.monotonic() > until + grace:
            return begun, not ended
        time.sleep(0.1)


def _end(process: subprocess.Popen) -> None:
    """Kill a process with all that it has started, unless it has ended: they hold the device's
    memory."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
