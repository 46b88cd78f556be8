"""What is printed: plain text whatever the terminal, and never a reason to lose a result.

Commands write their files first and print afterwards, inside `printing`.
"""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import click
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..errors import InputError

NARROWEST = 80  # columns where the environment names none
WIDE = 240  # columns of a table that goes to a file or a program: enough for all of ours


class Terminal(Console):
    """A console that takes text as it is: a model's folder may be named `m[/x]` or `:smile:`."""

    def __init__(self, **settings: Any):
        super().__init__(markup=False, emoji=False, **settings)

    def on_broken_pipe(self) -> None:
        raise  # the BrokenPipeError that is being handled, for `printing` to see


err = Terminal(stderr=True)


def say(what: RenderableType, style: str | None = None) -> None:
    """Print a table, or a line of text, which is wrapped for a terminal only, so that a program
    reads it whole."""
    out = (
        Terminal()
    )  # a new one each time: one whose stream has failed would print what it holds again
    if not out.is_terminal and "COLUMNS" not in os.environ:
        out.width = WIDE
    elif out.width < 1:  # COLUMNS=0, upon which rich prints nothing
        out.width = NARROWEST
    text = isinstance(what, str) or hasattr(what, "plain")
    out.print(
        what, style=style, highlight=False if text else None, soft_wrap=text and not out.is_terminal
    )


def note(message: str) -> None:
    """Print a line on stderr, where it can be printed."""
    with suppress(OSError):
        err.print(message, style="dim", highlight=False, soft_wrap=not err.is_terminal)


@contextmanager
def printing(written: object = None) -> Iterator[None]:
    """Where all that is left to do is to print; `written` is the file or folder that has the
    result, if one has.

    A reader that went away has seen enough. When stdout fails otherwise, the result that is written
    stands, with a line on stderr; without one, click.ClickException is raised.
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


def written_somewhere(path: Path, write: Callable[[Path], None]) -> tuple[Path | None, str]:
    """Write a finished result, by write(path), or beside it where that fails.

    Places are tried in turn: the path, its folder's parent, the working folder, the folder for
    temporary files. Returns the file (None where none could be written), and a line for the user
    where it is not the path, else "".
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
    """Whether stdout failed under click's own texts (--help, --version); if so, it is silent from
    now on."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    found = isinstance(error, OSError) and frame.f_code is click.echo.__code__
    if found:
        _silence()
    return found


def prepare_streams() -> None:
    """Let stdout take any text in any encoding; a closed stream is like one to nowhere."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (for as long as the process lives)
    stdout: Any = sys.stdout
    with suppress(
        AttributeError
    ):  # a stream that a caller has put there need not be one of text over bytes
        stdout.reconfigure(errors="backslashreplace")


def _silence() -> None:
    """Send what stdout still holds, and all that follows, to nowhere."""
    with suppress(OSError, ValueError):  # a stream without a file number
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


@contextmanager
def progress_bar(quiet: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A callback (done, total) that moves a bar on stderr, from the first call of a run to its
    last."""
    if quiet or not err.is_terminal:
        yield None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task("unit runs", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
