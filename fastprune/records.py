"""JSON and JSON lines, in and out. Numbers that are not finite are written as strings ("nan", "inf"), never dropped."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from .errors import InputError


def read_jsonl(path: Path) -> Iterator[tuple[int, object]]:
    """Yield (line number, value) for each line of a .jsonl file that is not blank."""
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    try:
                        yield number, json.loads(line)
                    except json.JSONDecodeError as error:
                        raise InputError(f"{path}:{number}: not valid JSON ({error.msg})") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not a text file in UTF-8") from None


def write_jsonl(path: Path, rows: Iterable[dict]) -> None:
    """Write rows to a new file, which appears only when it is complete; an existing one is refused."""
    _write(path, "".join(json.dumps(_plain(row)) + "\n" for row in rows), replace=False)


def write_json(path: Path, value: dict, replace: bool = False) -> None:
    """Write one value, indented, to a file that appears only when it is complete; an existing one is refused."""
    _write(path, json.dumps(_plain(value), indent=1) + "\n", replace)


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
    if path.exists():
        raise InputError(f"{path}: exists already and is not overwritten; name another file or remove it")
    return path


def _write(path: Path, text: str, replace: bool) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    try:
        if replace:
            partial.replace(path)
        else:
            os.link(partial, path)  # at once, and never over another file
    except FileExistsError:
        refuse_existing(path)
    finally:
        partial.unlink(missing_ok=True)


def _plain(value):
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
