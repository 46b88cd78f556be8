"""Check arguments and paths, each check in one place. A wrong value raises InputError."""

from __future__ import annotations

import difflib
import importlib.util
import math
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

from .errors import InputError, brief, shown

Kind = TypeVar("Kind")

MOST = 2**31 - 1  # the largest count
MOST_SEED = 2**63 - 1
LONGEST_NAME = 240  # bytes: the limit of file systems, less the marks of a partial file's name


def check_path(text: str) -> str:
    """Return the path if a file system can take it; else raise InputError."""
    if not text:
        raise InputError("the path is empty; name a file or folder")
    if "\0" in text:
        raise InputError(f"{text!r} holds a NUL character, which no path can")
    try:
        encoded = text.encode()
    except UnicodeEncodeError:
        raise InputError(f"{text!r} is not valid UTF-8; rename it, or reach it by a link") from None
    if max(map(len, encoded.split(b"/"))) > LONGEST_NAME or len(encoded) > 4000:
        raise InputError(f"{text!r} is too long; a name may have {LONGEST_NAME} bytes, a path 4000")
    return text


def check_folder(folder: Path) -> Path:
    """Return the folder if it can be written to, or created; else raise InputError."""
    existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not existing.is_dir():
        raise InputError(f"{folder}: {existing} is a file, not a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"{folder}: {existing} cannot be written to")
    return folder


def refuse_existing(path: Path) -> Path:
    """Return the path if it is free and its folder can hold it; else raise InputError."""
    check_folder(path.parent)
    if os.path.lexists(path):  # sees a dangling link too
        raise InputError(
            f"{path}: exists already and is not overwritten; name another file or remove it"
        )
    return path


def is_integer(value: object) -> TypeGuard[int]:
    """Whether a value is an integer of Python or NumPy. True and False are not."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value is a real number of Python or NumPy. True and False are not."""
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer that no float can hold
        return False


def check_integer(
    name: str, value: Any, least: int | None = None, most: int | None = None, of: str = ""
) -> int:
    """Check an integer of Python or NumPy.

    Args:
        name: The name of the argument, for the error.
        value: Its value.
        least: The smallest valid integer.
        most: The largest valid integer.
        of: The origin of the limits, in words, such as "the number of masks".

    Returns:
        The value as an integer of Python.

    Raises:
        InputError: The value is no integer, or outside the limits.

    Examples:
        >>> from fastprune.validate import check_integer
        >>> check_integer("keep", 3, 1, 5)
        3
    """
    _check_limits(name, value, "an integer", is_integer(value), least, most, of)
    return int(value)


def check_number(
    name: str, value: Any, least: float | None = None, most: float | None = None
) -> float:
    """Check a finite real number of Python or NumPy, within its limits. Raises InputError.

    Examples:
        >>> from fastprune.validate import check_number
        >>> check_number("tolerance", 0, least=0)
        0.0
    """
    is_finite = is_number(value) and _is_finite(value)
    _check_limits(name, value, "a number", is_finite, least, most)
    return float(value)


def _check_limits(
    name: str,
    value: Any,
    kind: str,
    is_of_kind: bool,
    least: float | None,
    most: float | None,
    of: str = "",
) -> None:
    """Raise InputError unless a value is of its kind and within the limits."""
    low = -math.inf if least is None else least
    high = math.inf if most is None else most
    if not is_of_kind or not low <= value <= high:
        if most is None:
            limits = "" if least is None else f" of at least {least}"
        else:
            limits = f" of at most {most}" if least is None else f" from {least} to {most}"
        raise InputError(
            f"{name} must be {kind}{limits}{of and f', {of}'}, not {shown(value)}",
            argument=name,
            least=least,
            most=most,
        )


def check_probability(name: str, value: Any) -> float:
    """Check a number above 0 and below 1, such as a confidence. Raises InputError.

    Examples:
        >>> from fastprune.validate import check_probability
        >>> check_probability("confidence", 0.99)
        0.99
    """
    if not is_number(value) or not 0 < value < 1:
        raise InputError(
            f"{name} must be between 0 and 1, such as 0.99, not {shown(value)}",
            argument=name,
            least=0,
            most=1,
        )
    return float(value)


def refuse_special(paths: Iterable[Path]) -> None:
    """Raise InputError for a FIFO, a socket or a device, since reading one may never end.

    A path without a file passes.
    """
    for path in paths:
        try:
            mode = path.stat().st_mode
        except OSError:  # no file, or a dangling link
            continue
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise InputError(f"{path}: is a FIFO, a socket or a device, not a file; remove it")


@contextmanager
def tokenizing(place: object) -> Iterator[None]:
    """Turn a panic of the tokenizers library, which is no Exception, into InputError."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        reason = brief(str(error), 120)
        raise InputError(f"{place}: the tokenizers library cannot use it: {reason}") from None


def check_bytes(name: str, value: Any, least: int) -> int | None:
    """Check a whole number of bytes, at least `least`; None stays None. Raises InputError.

    Examples:
        >>> from fastprune.validate import check_bytes
        >>> check_bytes("memory_bytes", 2.0**20, 1)
        1048576
    """
    if value is None:
        return None
    if not is_number(value) or not least <= value < math.inf or int(value) != value:
        raise InputError(
            f"{name} must be a number of bytes, at least {least}, not {shown(value)}",
            argument=name,
            least=least,
        )
    return int(value)


def check_one_of(name: str, value: Any, known: Iterable[str], also: str = "") -> str:
    """Check that a value is one of those known.

    Raises:
        InputError: The value is unknown. The message suggests the nearest known value; `also`
            adds other valid values to it.

    Examples:
        >>> from fastprune.validate import check_one_of
        >>> check_one_of("backend", "fused", ("auto", "fused"))
        'fused'
    """
    known = tuple(known)
    if not isinstance(value, str) or value not in known:
        close = difflib.get_close_matches(str(value), known, n=1, cutoff=0.5)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise InputError(
            f"{name} must be {also and f'{also}, or '}one of {', '.join(known)}, not "
            f"{shown(value)}{hint}",
            argument=name,
        )
    return value


def check_kind(name: str, value: object, kind: type[Kind], right: str) -> Kind:
    """Check that a value is of a class; `right` names valid values in the error. Raises InputError.

    Examples:
        >>> from fastprune.validate import check_kind
        >>> check_kind("path", "a.txt", str, "the path of a file")
        'a.txt'
    """
    if not isinstance(value, kind):
        raise InputError(f"{name} must be {right}, not {type(value).__name__}", argument=name)
    return value


def check_callable(name: str, value: Any, right: str) -> Any:
    """Check that a value can be called; `right` names valid values in the error. Raises InputError.

    Examples:
        >>> from fastprune.validate import check_callable
        >>> check_callable("progress", print, "a function")
        <built-in function print>
    """
    if not callable(value):
        raise InputError(f"{name} must be {right}, not {shown(value)}", argument=name)
    return value


def require(extra: str, *modules: str) -> None:
    """Raise InputError if a module of an extra is not installed. No module is imported."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise InputError(
                f"{module} is needed for this and not installed: pip install 'fastprune[{extra}]'"
            )
