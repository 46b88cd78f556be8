"""Commands run in forked children: killed, short of disk, lied to; and what may come of it.

A child costs a few milliseconds, since everything is loaded already; what it patches, limits or
breaks is its own.
"""

from __future__ import annotations

import itertools
import os
import resource
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

import fastprune.cli
from fastprune.engine.store import SumStore
from fastprune.models import FusedRunner, GenericRunner

EFFORT = float(os.environ.get("FASTPRUNE_TORTURE", "1"))  # 1 in the suite; make torture takes more
MOST_SECONDS, MOST_BYTES = (
    60,
    3 << 30,
)  # of one command on tiny inputs: processor time, and memory beyond what is held
LONGEST_LINE = 400
OPENED_A_PICKLE = 99


@dataclass(frozen=True)
class Outcome:
    """The end of a child: its exit status (minus the signal that killed it), and its output."""

    status: int
    out: str
    err: str
    seconds: float

    @property
    def is_one_line(self) -> bool:
        return (
            self.err.count("\n") == 1
            and self.err.endswith("\n")
            and len(self.err) <= LONGEST_LINE + 1
        )


def forked(work: Callable[[], int | None]) -> Outcome:
    """The outcome of work() in a child of its own, whose time and memory are limited."""
    started = time.monotonic()
    pipes = os.pipe(), os.pipe()  # not files, whose size a test may limit
    child = os.fork()
    if not child:
        status = 70
        try:
            for number, (_, end) in enumerate(pipes, 1):
                os.dup2(end, number)
            for end in (end for pipe in pipes for end in pipe):
                os.close(end)  # a grandchild must not hold them open
            sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))  # noqa: SIM115 (for good)
            warnings.simplefilter("ignore")
            torch.set_num_threads(1)  # a forked child has no threads to compute with
            _limit(resource.RLIMIT_CPU, MOST_SECONDS)
            _limit(resource.RLIMIT_AS, _address_space() + MOST_BYTES)
            status = work() or 0
        except SystemExit as end:
            status = end.code
        except BaseException:
            traceback.print_exc()
        finally:
            with suppress(OSError, ValueError):
                sys.stdout.flush()
            os._exit(status)
    for _, end in pipes:
        os.close(end)
    with ThreadPoolExecutor(2) as readers:
        texts = list(readers.map(_read_all, (end for end, _ in pipes)))
    _, raw = os.waitpid(child, 0)
    return Outcome(os.waitstatus_to_exitcode(raw), *texts, time.monotonic() - started)


def _read_all(end: int) -> str:
    with open(end, "rb") as file:
        return file.read().decode(errors="replace")


def command(*arguments: object) -> int:
    """The exit status of the command line, in this process; pickles are not opened."""

    def trap(*_, **__):
        os._exit(OPENED_A_PICKLE)

    torch.load = trap
    sys.argv = ["fastprune", *map(str, arguments)]
    try:
        fastprune.cli.main()
    except SystemExit as end:
        return end.code
    return 0


@contextmanager
def unit_runs(tell: Callable[[int], None]) -> Iterator[None]:
    """Inside, tell(n) is called before the n-th unit run, from 1."""
    numbers = itertools.count(1)
    own = {kind: kind.run for kind in (GenericRunner, FusedRunner)}

    def told(run):
        def counted(self, *arguments, **options):
            tell(next(numbers))
            return run(self, *arguments, **options)

        return counted

    for kind, run in own.items():
        kind.run = told(run)
    try:
        yield
    finally:
        for kind, run in own.items():
            kind.run = run


@dataclass(frozen=True)
class Work:
    """A command's unit runs: how many; those before the store was first told of finished ones,
    which begin every run anew; and the most between two times that it was told, or after the last,
    which is what a kill can lose."""

    runs: int
    first: int
    longest_gap: int

    def most_again(self, number: int) -> int:
        """The most unit runs of a command that is given again after it was killed before its
        n-th."""
        return self.runs - (number - 1) + self.first + self.longest_gap


def watched(directory: Path, *arguments: object) -> tuple[Outcome, Work]:
    """A command, run to its end, and its unit runs."""
    note = directory / "work"

    def work() -> int:
        count = gap = last = first = 0

        def tell(number: int) -> None:
            nonlocal count
            count = number

        put = SumStore.put

        def told(self, *more):
            nonlocal gap, last, first
            put(self, *more)
            first = first or count
            gap, last = max(gap, count - last), count

        SumStore.put = told
        with unit_runs(tell):
            status = command(*arguments)
        note.write_text(f"{count} {first} {max(gap, count - last)}")
        return status

    outcome = forked(work)
    counted = map(int, note.read_text().split()) if note.exists() else (0, 0, 0)
    work_done = Work(*counted)
    note.unlink(missing_ok=True)
    return outcome, work_done


def killed_at(number: int, *arguments: object) -> Outcome:
    """A command that is killed before its n-th unit run, as by a power cut."""

    def tell(now: int) -> None:
        if now == number:
            os.kill(os.getpid(), signal.SIGKILL)

    def work() -> int:
        with unit_runs(tell):
            return command(*arguments)

    return forked(work)


def killed_after(seconds: float, *arguments: object) -> Outcome:
    """A command that is killed after so many seconds, wherever it then is, by a signal that nobody
    handles."""

    def work() -> int:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        return command(*arguments)

    return forked(work)


@contextmanager
def failing(
    owner: object, name: str, number: int, error: Callable[[], BaseException]
) -> Iterator[None]:
    """Inside, the n-th call of owner.name raises an error instead."""
    numbers, own = itertools.count(1), getattr(owner, name)

    def call(*arguments, **options):
        if next(numbers) == number:
            raise error()
        return own(*arguments, **options)

    setattr(owner, name, call)
    try:
        yield
    finally:
        setattr(owner, name, own)


def how_often(directory: Path, owner: object, name: str, *arguments: object) -> int:
    """The number of calls of owner.name in a command."""
    note = directory / "calls"

    def work() -> int:
        count, own = itertools.count(), getattr(owner, name)

        def call(*given, **options):
            next(count)
            return own(*given, **options)

        setattr(owner, name, call)
        try:
            return command(*arguments)
        finally:
            setattr(owner, name, own)
            note.write_text(str(next(count)))

    assert forked(work).status == 0
    return int(note.read_text())


def small_files(most_bytes: int) -> None:
    """From now on in this process no file grows beyond so many bytes: a disk that is full."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    _limit(resource.RLIMIT_FSIZE, most_bytes)


def spread(count: int, most: int) -> list[int]:
    """At most `most` of the numbers 1 .. count, evenly spread, the first and the last among
    them."""
    if count <= most:
        return list(range(1, count + 1))
    return sorted({1 + round(i * (count - 1) / (most - 1)) for i in range(most)})


def _limit(kind: int, value: int) -> None:
    _, hard = resource.getrlimit(kind)
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (value, hard))


def _address_space() -> int:
    try:
        return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except OSError:
        return 1 << 40
