"""Checks of arguments and paths, each made once. A wrong one raises InputError in one line."""

from __future__ import annotations

import importlib.util
import os
from numbers import Real
from pathlib import Path
from typing import Any

from .errors import InputError

LONGEST_NAME = 240  # bytes: what file systems take, less what the names of partial files add


def check_path(text: str) -> str:
    """The path, if it is one that a file system can take. Raises InputError."""
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
