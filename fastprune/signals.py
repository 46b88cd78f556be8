"""Signals that end the program: Ctrl-C, and SIGTERM, which `kill` and batch systems send."""

from __future__ import annotations

import signal
from contextlib import suppress


class Terminated(KeyboardInterrupt):
    """SIGTERM has arrived. Work ends as upon Ctrl-C: finished sums are kept."""


def raise_upon_sigterm() -> None:
    """Raise Terminated in the main thread when SIGTERM arrives."""

    def end(*_: object) -> None:
        raise Terminated

    with suppress(ValueError):  # only the main thread can handle signals
        signal.signal(signal.SIGTERM, end)


def word_and_status(error: BaseException) -> tuple[str, int]:
    """The word for the end of a run, and its exit status, as a shell's own commands have it."""
    if isinstance(error, Terminated):
        return "terminated", 128 + signal.SIGTERM
    return "interrupted", 128 + signal.SIGINT
