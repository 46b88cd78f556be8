"""JSON and JSON lines, in and out. Numbers that are not finite are written as strings ("nan", "inf"), never dropped."""

from __future__ import annotations

import json
import math
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
    """Write rows to a new file; an existing one is refused."""
    with refuse_existing(path).open("x", encoding="utf-8") as file:
        file.writelines(json.dumps(_plain(row)) + "\n" for row in rows)


def write_json(path: Path, value: dict) -> None:
    """Write one value to a new file, indented; an existing one is refused."""
    with refuse_existing(path).open("x", encoding="utf-8") as file:
        json.dump(_plain(value), file, indent=1)
        file.write("\n")


def refuse_existing(path: Path) -> Path:
    """The path, if nothing is there yet; its folder is made when it is missing."""
    if path.exists():
        raise InputError(f"{path}: exists already and is not overwritten; name another file or remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _plain(value):
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
