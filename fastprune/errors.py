"""The one exception that a wrong input raises."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable


class InputError(ValueError):
    """A file, flag or argument is wrong. The message is one line: what is wrong, and what would be
    right.

    >>> import fastprune as fp
    >>> try:
    ...     fp.from_removed([(4,)], num_units=4)
    ... except fp.InputError as error:
    ...     print(type(error).__name__)
    InputError
    """


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an 'unknown name' message: the nearest known name, then all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}known: {', '.join(known)}"


def gb_flag(name: str, least: int) -> str:
    """The flag of the command line that gives at least so many bytes, such as --weights-gb
    0.001235."""
    return f"--{name}-gb {math.ceil(least / 2**30 * 1e6) / 1e6:.6f}"


def shown(value: object, limit: int = 40) -> str:
    """A wrong value as a message quotes it: its repr, shortened."""
    try:
        return brief(repr(value), limit)
    except ValueError:  # Python prints no integer of more than 4,300 digits
        return "an integer of thousands of digits"


def brief(text: str, limit: int) -> str:
    """The text in one line of at most `limit` characters; what is too long loses its middle."""
    text = " ".join("".join(char if char.isprintable() else " " for char in text).split())
    if len(text) <= limit:
        return text
    head = (limit - 5) * 2 // 3
    return f"{text[:head]} ... {text[len(text) - (limit - 5 - head) :]}"
