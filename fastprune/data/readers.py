"""Read rows from files and data sets: each format is one function that yields rows.

A row is the content of one line, record or element, usually a dict. Other files interpret rows:
`loaders` reads texts, `chats` conversations, `questions` questions.
"""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from ..errors import InputError, brief, shown
from ..io import parse_json, parse_jsonl, read_npy
from ..validate import check_path, require

HUB_ROWS = 10_000  # documents read from the beginning of a hub data set
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[^/:]*){0,2}")
SPLITS = ("train", "validation", "test")  # "name:validation" names a split, not a config
SAVED = ("dataset_dict.json", "dataset_info.json", "state.json")  # of datasets' save_to_disk
MOST_EXPANSION = 200  # a file may expand to 200 times its size; text expands 20 times at most
LEAST_EXPANDED = 2**26  # bytes; any compressed file may expand to as many


class Row(NamedTuple):
    """One record, and its place for errors: file and line, or data set and row."""

    place: str
    value: Any


class Source(NamedTuple):
    """Rows, read one by one, and the name of the file or data set."""

    name: str
    rows: Iterator[Row]


def open_rows(data: object, what: str, formats: Sequence[str]) -> Source:
    """Open a file, a data set or a Python value, to read its rows.

    Args:
        data: The path of a file, or of a folder that `datasets` saved; the name of a data set of
            the hub, as NAME:CONFIG:SPLIT; a `datasets.Dataset`; a DataFrame or one of its columns;
            strings or dicts.
        what: The kind of data in errors, such as "calibration".
        formats: The suffixes of the files that the caller reads.

    Returns:
        The name and the rows. A hub data set gives its first 10,000 rows.

    Raises:
        InputError: The file does not exist, or the value is of another kind.
    """
    if isinstance(data, (str, os.PathLike)):
        return _open_path(data, what, formats)
    if isinstance(data, Mapping):
        names = ", ".join(map(str, data))
        example = f"such as data[{next(iter(data), None)!r}]"
        if any(isinstance(column, (list, tuple, np.ndarray)) for column in data.values()):
            raise InputError(
                f"data must be one column of a dict of columns, {example}, or a list of rows; its "
                f"columns are {names}"
            )
        raise InputError(
            f"data must be one split of a data set; those of this one are {names}; {example}"
        )
    name = type(data).__name__
    if hasattr(data, "column_names"):  # a Dataset
        return Source(name, _numbered(name, data))  # type: ignore[arg-type]
    if hasattr(data, "columns"):  # a DataFrame, of pandas or polars
        return Source(name, _numbered(name, _records(data)))
    values = data.to_list() if hasattr(data, "to_list") else data  # a Series
    if isinstance(values, bytes) or not isinstance(values, Iterable):
        raise InputError(
            f"data must be a path, the name of a data set, a data set, a DataFrame or a list of "
            f"strings, not {shown(data)}"
        )
    rows = (Row(f"data[{i}]", value) for i, value in enumerate(values))
    return Source("text in memory" if name in ("list", "tuple") else name, rows)


def is_data(name: str) -> bool:
    """Whether a name is that of a file, of a folder that `datasets` saved, or of a hub data set.

    The hub is not asked.

    Raises:
        InputError: The library `datasets` is needed and missing.
    """
    path, _ = _split_of(name)
    is_saved = path.is_dir() and any((path / file).is_file() for file in SAVED)
    if is_saved or _is_hub_name(name):
        require("data", "datasets")
        return True
    return path.is_file()


def read_ids(path: Path) -> np.ndarray:
    """Read token ids int64[S, T] from a .npy file, or from a .safetensors file of one tensor."""
    if path.suffix == ".npy":
        ids = read_npy(path)
    else:
        from safetensors.numpy import load_file

        try:
            tensors = load_file(path)
        except Exception:
            raise InputError(f"{path}: not a readable .safetensors file") from None
        if len(tensors) != 1:
            raise InputError(f"{path}: expected one tensor of token ids, found {len(tensors)}")
        (ids,) = tensors.values()
    if ids.ndim != 2 or ids.dtype.kind not in "iu":
        raise InputError(
            f"{path}: token ids must be an integer array [S, T], not {ids.dtype} {list(ids.shape)}"
        )
    if ids.size == 0:
        raise InputError(f"{path}: holds no token ids")
    return ids.astype(np.int64)


def _open_path(data: str | os.PathLike, what: str, formats: Sequence[str]) -> Source:
    name = os.fspath(data)
    if not isinstance(name, str):
        raise InputError(f"data must be the path of a file as text, not {shown(name)}")
    try:
        check_path(name)
    except InputError as error:
        raise InputError(f"{error}; texts are given as a list of strings") from None
    path, split = _split_of(name)
    if not is_data(name):
        hint = "; the folder was not written by datasets' save_to_disk" if path.is_dir() else ""
        if " " in name.strip() and not path.suffix:
            hint = "; texts are given as a list of strings"
        raise InputError(f"{name}: no such {what} file{hint}")
    if _is_hub_name(name):
        return Source(name, _read_hub(name))
    if path.is_dir():
        return Source(name, _read_saved(path, split))
    suffix = path.with_suffix("").suffix if path.suffix in COMPRESSED else path.suffix
    if suffix not in formats or suffix not in READERS:
        raise InputError(
            f"{path}: {what} data is read from {', '.join(formats[:-1])} and {formats[-1]} files, "
            f"text also from those that are compressed as {' and '.join(COMPRESSED)}"
        )
    return Source(name, READERS[suffix](path))


# -- files -----------------------------------------------------------------------------------------


def _read_txt(path: Path) -> Iterator[Row]:
    """Read the whole file as one text."""
    with _opened(path) as file:
        yield Row(str(path), {"text": file.read()})


def _read_jsonl(path: Path) -> Iterator[Row]:
    with _opened(path) as file:
        for number, value in parse_jsonl(file, str(path)):
            yield Row(f"{path}:{number}", value)


def _read_json(path: Path) -> Iterator[Row]:
    """Read a list of rows, or an object with one such list, as in {"data": [...]}."""
    with _opened(path) as file:
        value = parse_json(file.read(), str(path))
    if isinstance(value, dict):
        lists = [item for item in value.values() if isinstance(item, list)]
        value = lists[0] if len(lists) == 1 else value
    if not isinstance(value, list):
        raise InputError(f"{path}: expected a list of rows, or an object with one such list")
    yield from _numbered(str(path), value)


def _read_csv(path: Path) -> Iterator[Row]:
    """Read rows as dicts, keyed by the first line."""
    limit = csv.field_size_limit(2**31 - 1)  # the default refuses documents above 128 KiB
    try:
        with _opened(path, newline="") as file:
            reader = csv.DictReader(file, strict=True)
            for row in reader:
                yield Row(f"{path}:{reader.line_num}", row)
    except csv.Error as error:
        raise InputError(f"{path}: not a readable .csv file ({error})") from None
    finally:
        csv.field_size_limit(limit)


def _read_parquet(path: Path) -> Iterator[Row]:
    require("data", "pyarrow")
    from pyarrow import ArrowException, parquet

    try:
        with parquet.ParquetFile(path) as file:
            batches = file.iter_batches(batch_size=256)
            rows = itertools.chain.from_iterable(batch.to_pylist() for batch in batches)
            yield from _numbered(str(path), rows)
    except ArrowException as error:
        raise _unreadable(path, ".parquet file", error) from None


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def _open_zstandard(path: Path) -> Any:
    require("data", "zstandard")
    import zstandard

    return zstandard.open(path, "rb")


COMPRESSED: dict[str, Callable[[Path], Any]] = {".gz": gzip.open, ".zst": _open_zstandard}


class _Expanding(io.RawIOBase):
    """The bytes of a compressed file, up to a limit, so that a small file cannot fill memory."""

    def __init__(self, path: Path, file: Any):
        self._path, self._file, self._count = path, file, 0
        self._most = max(LEAST_EXPANDED, MOST_EXPANSION * path.stat().st_size)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._file.read(len(buffer))
        except Exception as error:  # each library raises exceptions of its own
            raise _unreadable(self._path, f"{self._path.suffix} file", error) from None
        buffer[: len(data)] = data
        self._count += len(data)
        if self._count > self._most:
            raise InputError(
                f"{self._path}: expands to more than {self._most:,} bytes, {MOST_EXPANSION} times "
                f"its size; decompress it first"
            )
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()


@contextmanager
def _opened(path: Path, newline: str | None = None) -> Iterator[IO[str]]:
    """Open a file as text in UTF-8, decompressed as it is read, without a byte order mark.

    Raises:
        InputError: The text that is read inside is not UTF-8.
    """
    if path.suffix in COMPRESSED:
        raw = io.BufferedReader(_Expanding(path, COMPRESSED[path.suffix](path)), 2**16)
        text: IO[str] = io.TextIOWrapper(raw, encoding="utf-8-sig", newline=newline)
    else:
        text = path.open(encoding="utf-8-sig", newline=newline)
    with text:
        try:
            yield text
        except UnicodeDecodeError:
            raise InputError(f"{path}: not a text file in UTF-8") from None


# -- data sets -------------------------------------------------------------------------------------


def _is_hub_name(name: str) -> bool:
    """Whether a name has the form of a hub data set: a colon, or an owner and no suffix."""
    path, split = _split_of(name)
    if path.exists() or split or not HUB_NAME.fullmatch(name):
        return False
    return ":" in name or ("/" in name and not Path(name).suffix)


def _split_of(name: str) -> tuple[Path, str | None]:
    """The path and the split of FOLDER:SPLIT. A path that exists has no split."""
    path = Path(name)
    base, _, split = name.rpartition(":")
    if base and not path.exists() and Path(base).is_dir():
        return Path(base), split
    return path, None


def _read_hub(name: str) -> Iterator[Row]:
    require("data", "datasets")
    import datasets

    repository, *parts = name.split(":")
    if len(parts) == 1 and parts[0] in SPLITS:
        parts.insert(0, "")
    config, split = [part or None for part in [*parts, "", ""][:2]]
    try:
        loaded = datasets.load_dataset(repository, config, split=split, streaming=True)
        rows = itertools.islice(_one_split(name, loaded), HUB_ROWS)
        yield from _numbered(name, rows)
    except InputError:
        raise
    except Exception as error:  # the network, the hub and the data set fail in many ways
        raise InputError(
            f"{name}: no such file, and not opened as a data set NAME:CONFIG:SPLIT of the hub "
            f"({brief(str(error), 160)})"
        ) from None


def _read_saved(folder: Path, split: str | None) -> Iterator[Row]:
    require("data", "datasets")
    import datasets

    name = f"{folder}:{split}" if split else str(folder)
    try:
        loaded = datasets.load_from_disk(str(folder))
    except Exception as error:
        raise _unreadable(folder, "data set folder", error) from None
    yield from _numbered(name, _one_split(name, loaded, split))


def _one_split(name: str, loaded: Any, split: str | None = None) -> Iterable:
    """The rows of a split, or of the only split if none is named."""
    if not isinstance(loaded, dict):
        if split:
            raise InputError(f"{name}: the data set has no splits; leave out {split!r}")
        return loaded
    if split is None and len(loaded) == 1:
        (split,) = loaded
    if split not in loaded:
        example = f"{name.removesuffix(f':{split}')}:{next(iter(loaded), 'test')}"
        raise InputError(
            f"{name}: name one of the splits {', '.join(map(str, loaded))}, such as {example}"
        )
    return loaded[split]


def _records(table: Any) -> Iterator[dict]:
    """The rows of a DataFrame."""
    columns = [str(name) for name in table.columns]
    for values in zip(*[table[name].to_list() for name in table.columns]):
        yield dict(zip(columns, values))


def _unreadable(path: Path, form: str, error: Exception) -> InputError:
    return InputError(f"{path}: not a readable {form} ({brief(str(error), 80)})")


def _numbered(name: str, values: Iterable) -> Iterator[Row]:
    for number, value in enumerate(values, 1):
        yield Row(f"{name}: row {number}", value)
