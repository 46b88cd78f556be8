"""Read and write records: JSON, JSON lines, and arrays from .npy files.

Infinite numbers and NaN are written as strings ("nan", "inf"), never dropped.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from .errors import InputError, shown
from .validate import refuse_existing

if TYPE_CHECKING:
    import numpy as np


def read_jsonl(path: Path) -> Iterator[tuple[int, object]]:
    """Yield (line number, value) for each line of a .jsonl file.

    Blank lines and a byte order mark are skipped.
    """
    with path.open(encoding="utf-8-sig") as lines:
        yield from parse_jsonl(lines, str(path))


def parse_jsonl(lines: Iterable[str], name: str) -> Iterator[tuple[int, object]]:
    """Yield (line number, value) for each non-blank line; errors name file and line."""
    try:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield number, parse_json(line, f"{name}:{number}")
    except UnicodeDecodeError:
        raise InputError(f"{name}: not a text file in UTF-8") from None


def read_bytes(path: Path, limit: int) -> bytes:
    """Read a file of at most `limit` bytes, and never wait for a FIFO.

    Raises:
        InputError: The path is a FIFO, a socket or a device, or the file is larger.
        OSError: The file cannot be opened.
    """
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"{path}: is a FIFO or a device, not a file")
        if status.st_size > limit:
            raise InputError(f"{path}: has {status.st_size} bytes; at most {limit} are read")
        return file.read(limit)


def parse_json(text: str | bytes, place: str, finite: bool = True) -> Any:
    """Read a JSON text.

    Args:
        text: The text.
        place: Its file and line, for errors.
        finite: Refuse NaN and Infinity, which JSON does not have.

    Raises:
        InputError: The text is not JSON, is nested too deeply, names a key twice in one object,
            or holds half a surrogate pair, which no tokenizer takes.
    """

    def once(pairs: list[tuple[str, object]]) -> dict:
        value = dict(pairs)
        if len(value) < len(pairs):
            (twice, _), *_ = Counter(key for key, _ in pairs).most_common(1)
            raise InputError(f"{place}: the key {shown(twice)} is given twice")
        return value

    def refuse(constant: str) -> NoReturn:
        raise InputError(f"{place}: not valid JSON ({constant} is no JSON number)")

    try:
        value = json.loads(text, object_pairs_hook=once, parse_constant=refuse if finite else None)
        json.dumps(value, ensure_ascii=False).encode()
    except InputError:
        raise
    except RecursionError:
        raise InputError(f"{place}: not valid JSON (nested too deeply)") from None
    except UnicodeEncodeError:
        raise InputError(f"{place}: holds half a surrogate pair, which is not text") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{place}: not valid JSON ({error.msg})") from None
    except UnicodeDecodeError:
        raise InputError(f"{place}: not valid JSON (not text in UTF-8)") from None
    except ValueError:  # Python refuses an integer of more than 4,300 digits
        raise InputError(f"{place}: not valid JSON (a number has too many digits)") from None
    return value


def read_npy(path: Path) -> np.ndarray:
    """Read the array of a .npy file.

    The sizes in its header are compared with the file before memory is allocated.

    Raises:
        InputError: The file is truncated or of another kind, or holds Python objects.
    """
    import numpy as np

    try:
        mapped = np.load(path, mmap_mode="r", allow_pickle=False)
        if isinstance(mapped, np.ndarray):
            return np.array(mapped)
    except Exception:  # numpy raises nearly anything over a damaged header
        pass
    raise InputError(f"{path}: not a readable .npy array")


def file_marks(place: str) -> str | None:
    """A digest of the names, sizes and times of a file, or of the files of a folder.

    It changes when they change. None if the place does not exist, such as a hub id.
    """
    path = Path(place)
    try:
        files = (
            sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]
        )
        marks = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    except OSError:
        return None
    return hashlib.sha256(repr(marks).encode()).hexdigest()[:16]


def write_jsonl(path: Path, rows: Iterable[dict]) -> None:
    """Write rows to a new file, which appears only when it is complete.

    Raises:
        InputError: The file exists.
    """
    write_file(path, "".join(json.dumps(_plain(row)) + "\n" for row in rows))


def write_json(path: Path, value: dict, replace: bool = False) -> None:
    """Write one value, indented, to a file that appears only when it is complete.

    Raises:
        InputError: The file exists, and `replace` is false.
    """
    write_file(path, json_text(value), replace)


def json_text(value: object) -> str:
    """A value as indented JSON with a line end; infinite numbers and NaN are strings."""
    return json.dumps(_plain(value), indent=1) + "\n"


def write_file(path: Path, content: str | bytes, replace: bool = False) -> None:
    """Write a file that appears only when it is complete.

    Its bytes are written under another name, flushed to the disk, then renamed.

    Raises:
        InputError: The file exists, and `replace` is false.
    """
    data = content.encode() if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name[:50]}.{os.getpid()}")
    partial.unlink(missing_ok=True)  # of a run that was killed
    try:
        with partial.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # the content reaches the disk before the name does
        if replace:
            partial.replace(path)
        else:
            _rename_to_new(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _rename_to_new(partial: Path, path: Path) -> None:
    """Rename a finished file to a free name.

    A rename replaces a file of that name, so writers take a lock, then look, then rename. The
    lock of a killed writer ends with its process.

    Raises:
        InputError: The name is taken.
    """
    import fcntl

    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        refuse_existing(path)
        partial.rename(path)
    finally:
        os.close(folder)


def _plain(value: object) -> object:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
