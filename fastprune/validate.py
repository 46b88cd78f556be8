"""Checks of arguments and paths, each made once. A wrong one raises InputError in one line."""

from __future__ import annotations

import importlib.util
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from numbers import Real
from pathlib import Path
from typing import Any

from .errors import InputError, brief


def check_folder(folder: Path) -> Path:
    """The folder, if it is one that can be written to, or can be made."""
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not there.is_dir():
        raise InputError(f"{folder}: {there} is a file, not a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"{folder}: {there} cannot be written to")
    return folder


def refuse_existing(path: Path) -> Path:
    """The path, if nothing is there yet and a folder can hold it."""
    check_folder(path.parent)
    if os.path.lexists(path):  # a link that leads nowhere, too
        raise InputError(
            f"{path}: exists already and is not overwritten; name another file or remove it"
        )
    return path


def refuse_special(paths: Iterable[Path]) -> None:
    """Raise InputError for a FIFO, a socket or a device: who reads one may wait for ever. A path
    where nothing is passes."""
    for path in paths:
        try:
            mode = path.stat().st_mode
        except OSError:  # nothing is there, or a link that leads nowhere
            continue
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise InputError(f"{path}: is a FIFO, a socket or a device, not a file; remove it")


@contextmanager
def tokenizing(place: object) -> Iterator[None]:
    """Turn a panic of the tokenizers library, which is no Exception, into InputError."""
    try:
        yield
    except Exception:
        raise
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        why = brief(str(error), 120)
        raise InputError(f"{place}: the tokenizers library cannot use it: {why}") from None


def check_bytes(name: str, value: Any, least: int) -> int | None:
    """The number of bytes, if it is a whole one of at least `least`; None stays None. Raises
    InputError."""
    if value is None:
        return None
    number = isinstance(value, Real) and not isinstance(value, bool)
    if not number or not least <= value < float("inf") or int(value) != value:
        raise InputError(f"{name} must be a number of bytes, at least {least}, not {value!r}")
    return int(value)


def require(extra: str, *modules: str) -> None:
    """Raise InputError when a module that an extra brings along is not installed. Imports none of
    them."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise InputError(
                f"{module} is needed for this and not installed: pip install 'fastprune[{extra}]'"
            )
