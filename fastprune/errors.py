"""Wrong inputs, and the end of a run by Ctrl-C or SIGTERM, which batch systems send."""

from __future__ import annotations

import difflib
import signal
from collections.abc import Iterable, Mapping
from contextlib import suppress


class InputError(ValueError):
    """A file, flag or argument is wrong. The message is one line: the error, and the remedy.

    Args:
        message: The error in words. It spells arguments as Python does, and begins with
            `argument` if that is known.
        argument: The name of the wrong argument, such as "memory_bytes".
        least: The smallest valid value.
        most: The largest valid value.
        fits: Valid values by the names of arguments; any one of them would do. The message ends
            with them.

    Examples:
        >>> import fastprune as fp
        >>> try:
        ...     fp.from_removed([(4,)], num_units=4)
        ... except fp.InputError as error:
        ...     print(type(error).__name__)
        InputError
        >>> try:
        ...     fp.load_text("t.txt", None, num_samples=0)
        ... except fp.InputError as error:
        ...     print(error.argument, error.least)
        num_samples 1
    """

    def __init__(
        self,
        message: str,
        *,
        argument: str | None = None,
        least: float | None = None,
        most: float | None = None,
        fits: Mapping[str, object] | None = None,
    ):
        self.message, self.argument, self.least, self.most = message, argument, least, most
        self.fits = dict(fits or {})
        values = " or ".join(f"{name}={value}" for name, value in self.fits.items())
        super().__init__(f"{message}; what fits: {values}" if values else message)

    def restated(self, message: str) -> InputError:
        """Make the same error with another message."""
        return InputError(
            message, argument=self.argument, least=self.least, most=self.most, fits=self.fits
        )


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an 'unknown name' message: the nearest known name, then all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}known: {', '.join(known)}"


def shown(value: object, limit: int = 40) -> str:
    """A wrong value as a message quotes it: its repr, shortened."""
    try:
        return brief(repr(value), limit)
    except ValueError:  # Python prints no integer of more than 4,300 digits
        return "an integer of thousands of digits"


def brief(text: str, limit: int) -> str:
    """The text in one line of at most `limit` characters; a longer text loses its middle."""
    text = " ".join("".join(char if char.isprintable() else " " for char in text).split())
    if len(text) <= limit:
        return text
    head = (limit - 5) * 2 // 3
    return f"{text[:head]} ... {text[len(text) - (limit - 5 - head) :]}"


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
