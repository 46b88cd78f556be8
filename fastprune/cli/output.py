"""Printed output: plain text on every terminal, and never a reason to lose a result.

Commands write their files first and print afterwards, inside `printing`.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import click
from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn
from rich.table import Table
from rich.text import Text

from ..errors import InputError
from ..io import json_text
from ..plan.progress import ProgressCallback, ProgressEvent

LINE_SECONDS = 30  # between two lines of progress if no terminal shows a bar
WAITING_SECONDS = 2.0  # before a line about work that reports no progress, without a terminal
NARROWEST = 80  # columns if the environment names none
WIDE = 240  # columns of a table in a file or a pipe: enough for all of ours


class Terminal(Console):
    """A console that takes text as it is: a model's folder may be named `m[/x]` or `:smile:`."""

    def __init__(self, **settings: Any):
        super().__init__(markup=False, emoji=False, **settings)

    def on_broken_pipe(self) -> None:
        raise  # the BrokenPipeError in hand, for `printing` to see


err = Terminal(stderr=True)


def say(what: RenderableType, style: str | None = None) -> None:
    """Print a table, or a line of text. Lines are wrapped on a terminal only."""
    out = (
        Terminal()
    )  # a new one each time: one whose stream has failed would print its buffer again
    if not out.is_terminal and "COLUMNS" not in os.environ:
        out.width = WIDE
    elif out.width < 1:  # COLUMNS=0, upon which rich prints nothing
        out.width = NARROWEST
    text = isinstance(what, str) or hasattr(what, "plain")
    out.print(
        what, style=style, highlight=False if text else None, soft_wrap=text and not out.is_terminal
    )


def say_values(values: Iterable[tuple[str, object]]) -> None:
    """Print names with their values, a line for each."""
    table = Table(show_header=False, box=None)
    for name, value in values:
        table.add_row(name, str(value))
    say(table)


def say_json(value: object) -> None:
    """Print one JSON document, and nothing else, on stdout."""
    click.echo(json_text(value), nl=False)


def note(message: str) -> None:
    """Print a line on stderr, if it can be printed."""
    with suppress(OSError):
        err.print(message, style="dim", highlight=False, soft_wrap=not err.is_terminal)


def note_progress(message: str) -> None:
    """Print a line about long work on stderr. In a file, it begins with the time of day."""
    is_live = err.is_terminal or err.is_jupyter
    note(message if is_live else f"{time.strftime('%H:%M:%S')} {message}")


@contextmanager
def printing(written: object = None) -> Iterator[None]:
    """A context in which a command only prints.

    A reader may close the pipe early; this is no error. Upon another failure of stdout, a written
    result is kept, with a line on stderr. Without one, click.ClickException is raised.

    Args:
        written: The file or folder with the result, or None.
    """
    try:
        yield
        sys.stdout.flush()
    except (OSError, UnicodeError) as error:
        _silence()
        if isinstance(error, BrokenPipeError):
            return
        if written is None:
            raise click.ClickException(cannot_print(error)) from None
        note(f"fastprune: {cannot_print(error)}; the result goes to {written}")


@contextmanager
def written_somewhere(
    path: Path | None, write: Callable[[Path], None]
) -> Iterator[tuple[Path | None, str]]:
    """Write a finished result before the block, which prints. No path: nothing is written.

    Yields:
        The file, and a line for the user, as from `_write_somewhere`.

    Raises:
        click.ClickException: The file is not the path; raised after the block, with the line.
    """
    written, trouble = _write_somewhere(path, write) if path else (None, "")
    yield written, trouble
    if trouble:
        raise click.ClickException(trouble)


def _write_somewhere(path: Path, write: Callable[[Path], None]) -> tuple[Path | None, str]:
    """Write a finished result by write(path), or to another place if that fails.

    Places are tried in turn: the path, its folder's parent, the working folder, the folder for
    temporary files.

    Returns:
        The file, or None if no place could be written; and a line for the user, which is empty if
        the file is the path.
    """
    why = ""
    for folder in (path.parent, path.parent.parent, Path.cwd(), Path(tempfile.gettempdir())):
        place = (
            folder / path.name if not why else folder / f"{path.stem}-{os.getpid()}{path.suffix}"
        )
        try:
            write(place)
        except (OSError, InputError) as error:
            reason = getattr(error, "strerror", None) or error
            why = why or (
                str(error)
                if isinstance(error, InputError)
                else f"{path}: cannot be written ({reason})"
            )
        else:
            return place, why and f"{why}; the result is in {place}"
    return None, f"{why}; the result is printed only"


def cannot_print(error: Exception) -> str:
    return f"stdout cannot be written to ({getattr(error, 'strerror', None) or error})"


def is_of_printing(error: Exception) -> bool:
    """Whether stdout failed while click printed --help or --version; if so, silence stdout."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    is_clicks = isinstance(error, OSError) and frame.f_code is click.echo.__code__
    if is_clicks:
        _silence()
    return is_clicks


def prepare_streams() -> None:
    """Let stdout take any text in any encoding, and discard the output of a closed stream."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (for as long as the process lives)
    stdout: Any = sys.stdout
    with suppress(
        AttributeError
    ):  # a stream that a caller has put there need not be one of text over bytes
        stdout.reconfigure(errors="backslashreplace")


def _silence() -> None:
    """Discard the text that stdout still holds, and all further text."""
    with suppress(OSError, ValueError):  # a stream without a file number
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


class Bar:
    """Shows events: one bar on a terminal or in a notebook, else a line every 30 seconds.

    Args:
        clock: A function that returns seconds, such as `time.monotonic`.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._said = clock()
        self._work: tuple[str | None, ...] = ()  # the work that the pace is of
        self._first: tuple[float, float] | None = None  # the time and share of its first event
        self._share = 0.0  # of its last event
        self._is_live = err.is_terminal or err.is_jupyter
        self._bar: Progress | None = None
        self._task = TaskID(0)

    def __call__(self, event: ProgressEvent) -> None:
        self._note_pace(event)
        if self._is_live:
            self._move(event)
        elif self._clock() - self._said >= LINE_SECONDS:
            self._said = self._clock()
            note_progress(f"fastprune: {self.line(event)}")

    def line(self, event: ProgressEvent) -> str:
        """The event in words, without the bar."""
        parts = [event.cell or event.algorithm or "scoring"]
        if event.round is not None:
            of = f" of {event.rounds}" * (event.rounds is not None)
            parts.append(f"round {event.round}{of}")
        if event.best is not None:
            parts.append(f"best {event.best}")
        if event.candidates is not None:
            parts.append(f"{event.candidates} candidates left")
        if event.share is not None and not self._is_live:
            parts.append(f"{event.share:.0%} done")
        parts.append(self._time_left(event))
        return ", ".join(part for part in parts if part)

    def _time_left(self, event: ProgressEvent) -> str:
        """The time left at the pace of the unit runs so far; '' if it is unknown."""
        if event.share is None or self._first is None:
            return ""
        seconds, share = self._clock() - self._first[0], event.share - self._first[1]
        if seconds < 1 or share <= 0:
            return ""
        left = _duration(seconds * (1 - event.share) / share)
        return f"{left} left{' of this search' * (event.cell is not None)}"

    def _note_pace(self, event: ProgressEvent) -> None:
        work = event.cell, event.algorithm
        if event.share is None:
            self._first = None
            return
        if self._first is None or work != self._work or event.share < self._share:
            self._work, self._first = work, (self._clock(), event.share)
        self._share = event.share

    def _move(self, event: ProgressEvent) -> None:
        if self._bar is None:
            columns = (BarColumn(20), TaskProgressColumn(), TextColumn("{task.description}"))
            self._bar = Progress(*columns, console=err, transient=True)
            self._task = self._bar.add_task("", total=None)
            self._bar.start()
        known = event.share is not None
        self._bar.update(
            self._task,
            total=1.0 if known else None,
            completed=event.share or 0.0,
            description=self.line(event),
        )

    def close(self) -> None:
        """Remove the bar from the terminal."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


@contextmanager
def progress_bar(quiet: bool = False) -> Iterator[ProgressCallback | None]:
    """Show the progress of long work, on stderr or in a notebook. Use it in a `with` statement.

    A terminal or notebook shows one bar, which disappears when the block ends. Other outputs, such
    as a file under nohup, get a line every 30 seconds, with the time of day. Print results after
    the block, not in it.

    Args:
        quiet: Show nothing; the callback is None.

    Yields:
        A callback for the argument `progress` of an evaluator, a search or a study.

    Examples:
        >>> import fastprune as fp
        >>> batch = fp.TokenBatch.from_ids([[5, 6, 7, 8, 9], [10, 11, 12]])
        >>> ev = fp.Evaluator(fp.load_model("demo"), fp.Perplexity(batch))
        >>> with fp.progress_bar() as progress:
        ...     result = fp.run_search(ev, "greedy", num_remove=2, progress=progress)
        >>> len(result.removed)
        2
    """
    with nullcontext() if quiet else closing(Bar()) as bar:
        yield bar


@contextmanager
def waiting(work: str, quiet: bool = False) -> Iterator[None]:
    """Show on stderr that work is going on that reports no progress, such as "opening demo".

    A terminal shows a spinner until the block ends. Elsewhere a line comes after WAITING_SECONDS.
    """
    if quiet:
        yield
    elif err.is_terminal:
        with err.status(Text(work)):
            yield
    else:
        timer = threading.Timer(WAITING_SECONDS, note_progress, (f"fastprune: {work}",))
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()


class _NoteHandler(logging.Handler):
    """Writes records as notes, above the bar."""

    def emit(self, record: logging.LogRecord) -> None:
        note(f"{record.name}: {record.getMessage()}")


@contextmanager
def decisions_noted(verbosity: int) -> Iterator[None]:
    """Send the library's log to stderr: from 1 on its decisions, from 2 on every call."""
    if not verbosity:
        yield
        return
    logger, handler = logging.getLogger("fastprune"), _NoteHandler()
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO if verbosity == 1 else logging.DEBUG)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
