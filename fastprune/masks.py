"""Depth masks: bool[N, U], True for a kept unit."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .errors import InputError, shown
from .io import read_bytes, read_jsonl, read_npy
from .validate import is_integer

ALL = "all"  # as text, every unit of the model
MAX_UNITS = 100_000  # that one text may name; no model has as many


def as_masks(masks: Any, num_units: int) -> np.ndarray:
    """Check masks and return them as bool[N, U].

    masks: bool or 0/1 array-like of shape [N, U], or [U] for a single one (torch tensors included).
    Raises InputError for another length, other values than 0 and 1, or an array of other
    dimensions.
    """
    if hasattr(masks, "detach"):
        masks = masks.detach().cpu()
        masks = (masks.double() if masks.is_floating_point() else masks).numpy()
    try:
        array = np.asarray(masks)
    except ValueError:  # rows of different lengths
        raise InputError(
            f"masks must be a rectangular array [N, {num_units}], but its rows differ"
        ) from None
    if array.size == 0 and array.ndim < 2:
        array = array.reshape(0, num_units)
    if array.ndim == 1:
        array = array[None]
    if array.ndim != 2:
        raise InputError(f"masks must have shape [N, {num_units}], not {list(array.shape)}")
    if array.shape[1] != num_units:
        raise InputError(
            f"a mask has {array.shape[1]} entries, but the model has {num_units} units "
            "(1 = kept, 0 = removed; from_removed makes masks from unit indices)"
        )
    if array.dtype == bool:
        return array
    if array.dtype.kind not in "iuf":
        raise InputError(f"masks must hold bool or 0/1 numbers, not {array.dtype}")
    wrong = np.argwhere((array != 0) & (array != 1))
    if len(wrong):
        row, unit = wrong[0]
        raise InputError(
            f"mask {row} has the value {array[row, unit]} at unit {unit}; only 0 and 1 are allowed"
        )
    return array.astype(bool)


def check_removed(
    removed: Iterable[int] | str, num_units: int, what: str = "removed"
) -> tuple[int, ...]:
    """The removed units as a sorted tuple, given as indices or as text such as "9-11" or "all";
    errors call them `what`.

    Raises InputError for an index out of range or given twice.
    """
    units = []
    if isinstance(removed, str):
        removed = range(num_units) if removed.strip() == ALL else parse_removed(removed)
    if not isinstance(removed, Iterable):
        raise InputError(
            f"{what} units are given as a collection such as (9, 10), not {shown(removed)}"
        )
    for unit in removed:
        if not is_integer(unit):
            raise InputError(f"{what} unit {shown(unit)} is not an integer")
        if not 0 <= unit < num_units:
            number = shown(int(unit))
            raise InputError(
                f"{what} unit {number} is out of range; the model's units are 0 to {num_units - 1}"
            )
        units.append(int(unit))
    units.sort()
    for unit, following in itertools.pairwise(units):
        if unit == following:
            raise InputError(f"{what} unit {unit} is given twice")
    return tuple(units)


MAX_LENGTH = 4096  # units of a sequence


def check_sequences(sequences: Iterable[Iterable[int]], num_units: int) -> list[tuple[int, ...]]:
    """Sequences of unit indices as tuples. Raises InputError for an index out of range or no
    integer, and for a sequence of more than 4,096 units."""
    if not isinstance(sequences, Iterable):
        raise InputError(f"sequences are given as a list such as [(0, 1, 1, 2)], not {sequences!r}")
    checked = []
    for number, sequence in enumerate(sequences):
        if not isinstance(sequence, Iterable) or isinstance(sequence, (str, bytes)):
            raise InputError(
                f"sequence {number} must be a list of unit indices such as (0, 1, 1, 2), not "
                f"{sequence!r}"
            )
        units = tuple(itertools.islice(sequence, MAX_LENGTH + 1))
        if len(units) > MAX_LENGTH:
            raise InputError(f"sequence {number} has more than {MAX_LENGTH} units")
        for unit in units:
            if not is_integer(unit) or not 0 <= unit < num_units:
                raise InputError(
                    f"sequence {number}: {unit!r} is no unit; the model's units are 0 to "
                    f"{num_units - 1}"
                )
        checked.append(tuple(map(int, units)))
    return checked


def from_removed(removed: Iterable[Iterable[int] | str], num_units: int) -> np.ndarray:
    """Masks bool[N, U] from N collections of removed unit indices, or texts such as "9-11".

    Raises InputError for an index out of range, given twice, or no integer.

    >>> import fastprune as fp
    >>> fp.from_removed([(1, 2), ()], 4).astype(int)
    array([[1, 0, 0, 1],
           [1, 1, 1, 1]])
    """
    rows = [check_removed(units, num_units) for units in removed]
    masks = np.ones((len(rows), num_units), dtype=bool)
    for mask, units in zip(masks, rows, strict=True):
        mask[list(units)] = False
    return masks


def to_removed(mask: Any) -> tuple[int, ...]:
    """The sorted tuple of unit indices that a mask (bool or 0/1 [U]) removes.

    Raises InputError for anything but one mask of 0 and 1.

    >>> import fastprune as fp
    >>> fp.to_removed([1, 0, 0, 1])
    (1, 2)
    """
    array = np.asarray(mask)
    if array.ndim != 1:
        raise InputError(f"to_removed takes one mask of shape [U], not {list(array.shape)}")
    return tuple(np.flatnonzero(~as_masks(array, len(array))[0]).tolist())


def parse_removed(text: str) -> tuple[int, ...]:
    """'9,10' or '9-11 14', as tables print it, as a tuple of integers; '' and '-' are no units.

    Raises InputError for anything else, and for more units than any model has.

    >>> from fastprune.masks import parse_removed
    >>> parse_removed("9-11 14")
    (9, 10, 11, 14)
    """
    units: list[int] = []
    text = text.strip()
    for part in re.split(r"\s*,\s*|\s+", text) if text not in ("", "-") else []:
        single, run = (
            re.fullmatch(r"-?\d{1,18}", part),
            re.fullmatch(r"(\d{1,18})-(\d{1,18})", part),
        )
        if single:
            units.append(int(part))
        elif run and int(run[1]) <= int(run[2]):
            if int(run[2]) - int(run[1]) + len(units) >= MAX_UNITS:
                raise InputError(f"{shown(text)} names more than {MAX_UNITS} units")
            units += range(int(run[1]), int(run[2]) + 1)
        elif run:
            raise InputError(f"{part} runs backwards; the lower unit comes first")
        else:
            raise InputError(
                f"units must be integers separated by commas, such as 9,10 or 9-11,14, not "
                f"{shown(text)}"
            )
    return tuple(units)


def load_masks(path: str | Path, num_units: int) -> np.ndarray:
    """Masks bool[N, U] from a .npy file (bool, or 1 = kept, 0 = removed), .jsonl rows {"removed":
    [9, 10]}, or a configuration file of EvoPress (.txt).

    Such a file holds one mask. Each line names the removed parts of a block: none, attn, mlp or
    attn+mlp. It has a line for each block: where units are blocks, none or attn+mlp.

    Raises InputError, with the file's name, for a file missing, of another kind, damaged or empty,
    and for masks of another number of units or other values.

    >>> import tempfile
    >>> from pathlib import Path
    >>> import fastprune as fp
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "masks.jsonl")
    ...     _ = path.write_text('{"removed": [1, 2]}')
    ...     fp.load_masks(path, 4).astype(int)
    array([[1, 0, 0, 1]])
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such masks file")
    if path.suffix == ".npy":
        masks = _named(path, as_masks, read_npy(path), num_units)
    elif path.suffix == ".jsonl":
        masks = _named(path, from_removed, _removed_rows(path), num_units)
    elif path.suffix == ".txt":
        masks = _named(path, _of_drop_config, path, num_units)
    else:
        raise InputError(f"{path}: masks are read from .npy, .jsonl or .txt files")
    if len(masks) == 0:
        raise InputError(f"{path}: holds no masks")
    return masks


def _named(path: Path, function: Callable[..., np.ndarray], *args: Any) -> np.ndarray:
    try:
        return function(*args)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _of_drop_config(path: Path, num_units: int) -> np.ndarray:
    """The mask of EvoPress's configuration, bool[1, U]."""
    halves = {"none": (), "attn": (0,), "mlp": (1,), "attn+mlp": (0, 1)}
    lines = read_bytes(path, 16 * MAX_UNITS).decode(errors="replace").split()
    for number, line in enumerate(lines, 1):
        if line not in halves:
            raise InputError(
                f"line {number} must be none, attn, mlp or attn+mlp, not {shown(line)}"
            )
    if 2 * len(lines) == num_units:
        return from_removed(
            [[2 * i + h for i, s in enumerate(lines) for h in halves[s]]], num_units
        )
    if len(lines) != num_units:
        raise InputError(
            f"holds {len(lines)} lines; {num_units} units need a line for each block, or for each "
            "two sublayers"
        )
    for number, line in enumerate(lines, 1):
        if line in ("attn", "mlp"):
            raise InputError(f"line {number} removes {line} alone, which needs sublayers as units")
    return from_removed([[i for i, line in enumerate(lines) if halves[line]]], num_units)


def _removed_rows(path: Path) -> Sequence[Sequence[int]]:
    rows = []
    for number, row in read_jsonl(path):
        if not isinstance(row, dict) or not isinstance(row.get("removed"), list):
            raise InputError(f'{path}:{number}: expected a row like {{"removed": [9, 10]}}')
        rows.append(row["removed"])
    return rows
