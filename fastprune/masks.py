"""Depth masks, bool[N, U], True for a kept unit; sequences, tuples of units in running order.

A mask is a sequence that ascends. Records and tables name a mask by the units that it removes, and
any other sequence by its units.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .errors import InputError, shown
from .io import read_bytes, read_jsonl, read_npy
from .validate import is_integer

ALL = "all"  # as text, every unit of the model
MAX_UNITS = 100_000  # named by one text; no model has as many
MAX_LENGTH = 4096  # units of a sequence


def as_masks(masks: Any, num_units: int) -> np.ndarray:
    """Check masks.

    Args:
        masks: Bool or 0/1 array-like [N, U], or [U] for a single mask. Torch tensors count.
        num_units: U.

    Returns:
        The masks, bool[N, U].

    Raises:
        InputError: The masks have another length, other dimensions, or values besides 0 and 1.
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
    """Check removed units.

    Args:
        removed: Indices of units, or text such as "9-11" or "all".
        num_units: U.
        what: The word for the units in errors.

    Returns:
        The units as a sorted tuple.

    Raises:
        InputError: An index is out of range, is given twice, or is no integer.
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


def check_sequences(sequences: Iterable[Iterable[int]], num_units: int) -> list[tuple[int, ...]]:
    """Check sequences of unit indices.

    Returns:
        The sequences as tuples.

    Raises:
        InputError: An index is out of range or no integer, or a sequence has more than 4,096
            units.
    """
    if not isinstance(sequences, Iterable):
        raise InputError(
            f"sequences are given as a list such as [(0, 1, 1, 2)], not {shown(sequences)}"
        )
    return [
        check_sequence(sequence, num_units, f"sequence {number}")
        for number, sequence in enumerate(sequences)
    ]


def check_sequence(
    sequence: Iterable[int], num_units: int, what: str = "sequence"
) -> tuple[int, ...]:
    """Check one sequence of unit indices, and return it as a tuple; errors call it `what`.

    Raises:
        InputError: As in `check_sequences`.
    """
    if not isinstance(sequence, Iterable) or isinstance(sequence, (str, bytes)):
        raise InputError(
            f"{what} must be a list of unit indices such as (0, 1, 1, 2), not {shown(sequence)}"
        )
    units = tuple(itertools.islice(sequence, MAX_LENGTH + 1))
    if len(units) > MAX_LENGTH:
        raise InputError(f"{what} has more than {MAX_LENGTH} units")
    for unit in units:
        if not is_integer(unit) or not 0 <= unit < num_units:
            raise InputError(
                f"{what}: {shown(unit)} is no unit; the model's units are 0 to {num_units - 1}"
            )
    return tuple(map(int, units))


def from_removed(removed: Iterable[Iterable[int] | str], num_units: int) -> np.ndarray:
    """Make masks from the units that they remove.

    Args:
        removed: N collections of unit indices, or texts such as "9-11".
        num_units: U, the units of the model.

    Returns:
        The masks, bool[N, U], True for a kept unit.

    Raises:
        InputError: An index is out of range, is given twice, or is no integer.

    Examples:
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
    """List the units that a mask removes.

    Args:
        mask: Bool or 0/1 [U], 1 for a kept unit.

    Returns:
        The indices of the removed units, ascending.

    Raises:
        InputError: The value is not one mask of 0 and 1.

    Examples:
        >>> import fastprune as fp
        >>> fp.to_removed([1, 0, 0, 1])
        (1, 2)
    """
    array = np.asarray(mask)
    if array.ndim != 1:
        raise InputError(f"to_removed takes one mask of shape [U], not {list(array.shape)}")
    return tuple(np.flatnonzero(~as_masks(array, len(array))[0]).tolist())


def is_mask(sequence: Sequence[int]) -> bool:
    """Whether the units ascend: then the sequence is the model with units left out."""
    return all(a < b for a, b in itertools.pairwise(sequence))


def removed_by(sequence: Sequence[int], num_units: int) -> tuple[int, ...] | None:
    """The units that an ascending sequence leaves out; None for any other sequence.

    Examples:
        >>> from fastprune.masks import removed_by
        >>> removed_by((0, 3), 4), removed_by((0, 1, 1), 4)
        ((1, 2), None)
    """
    if not is_mask(sequence):
        return None
    return tuple(sorted(set(range(num_units)) - set(sequence)))


def kept_by(removed: Iterable[int], num_units: int) -> tuple[int, ...]:
    """The units that stay when these are removed, ascending.

    Examples:
        >>> from fastprune.masks import kept_by
        >>> kept_by((1, 2), 4)
        (0, 3)
    """
    return tuple(sorted(set(range(num_units)) - set(removed)))


def record_units(sequence: Sequence[int], num_units: int) -> dict[str, list[int]]:
    """A candidate as files name it.

    A mask is {"removed": [1, 2]}, any other sequence {"sequence": [0, 1, 1]}.
    """
    removed = removed_by(sequence, num_units)
    return {"sequence": list(sequence)} if removed is None else {"removed": list(removed)}


@dataclass(frozen=True)
class Candidate:
    """A mask or another sequence, as records name it: by the units that a mask removes, or by those
    that run, in order. One of the two is None.

    >>> from fastprune.masks import Candidate
    >>> Candidate.of({"removed": [1, 2]}).units(4), Candidate(sequence=(0, 0)).record
    ((0, 3), {'sequence': [0, 0]})
    """

    removed: tuple[int, ...] | None = None
    sequence: tuple[int, ...] | None = None

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Candidate:
        """The candidate of a record with "removed" or "sequence"."""
        values = (record.get("removed"), record.get("sequence"))
        removed, sequence = (None if units is None else tuple(units) for units in values)
        return cls(removed, sequence)

    @property
    def record(self) -> dict[str, list[int]]:
        """The candidate as files name it."""
        if self.removed is not None:
            return {"removed": list(self.removed)}
        return {"sequence": list(self.sequence or ())}

    def units(self, num_units: int) -> tuple[int, ...]:
        """The units that run, in order."""
        if self.removed is not None:
            return kept_by(self.removed, num_units)
        return self.sequence or ()


def repeated(num_units: int, windows: Iterable[tuple[int, int]], times: int = 2) -> tuple[int, ...]:
    """The sequence of the whole model with some windows of units run several times in a row.

    Args:
        num_units: U.
        windows: The first unit of each window, and the unit after its last. They do not overlap.
        times: How many times each window runs.

    Examples:
        >>> from fastprune.masks import repeated
        >>> repeated(5, [(1, 3)])
        (0, 1, 2, 1, 2, 3, 4)
    """
    sequence: list[int] = []
    end = 0
    for first, stop in sorted(windows):
        sequence += [*range(end, first), *list(range(first, stop)) * times]
        end = stop
    return (*sequence, *range(end, num_units))


def parse_removed(text: str) -> tuple[int, ...]:
    """Read units from text such as '9,10' or '9-11 14', as tables print them.

    Args:
        text: Indices and ranges, separated by commas or spaces. '' and '-' name no units.

    Returns:
        The indices, in the order of the text.

    Raises:
        InputError: The text has another form, or names more units than any model has.

    Examples:
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


def format_removed(units: Sequence[int]) -> str:
    """Write units as `parse_removed` reads them, in tables: (3, 4, 5, 9) is '3-5 9'.

    No unit is '-'; the sequence (0, 1, 1, 2) is '0-1 1-2'.
    """
    return " ".join(f"{a}-{b}" if a < b else str(a) for a, b in stretches(units)) or "-"


def stretches(units: Iterable[int]) -> list[tuple[int, int]]:
    """The first and the last unit of each stretch of consecutive units, in running order."""
    found: list[tuple[int, int]] = []
    for unit in units:
        if found and unit == found[-1][1] + 1:
            found[-1] = found[-1][0], unit
        else:
            found.append((unit, unit))
    return found


def load_masks(path: str | Path, num_units: int) -> np.ndarray:
    """Read masks from a file.

    Args:
        path: The file, in one of three formats.

            - .npy holds an array [N, U], bool or 0/1, 1 for a kept unit.
            - .jsonl holds a row {"removed": [9, 10]} for each mask.
            - .txt is a configuration of EvoPress, one mask: a line for each block, which names
              its removed parts (none, attn, mlp or attn+mlp).
        num_units: U, the units of the model.

    Returns:
        The masks, bool[N, U], True for a kept unit.

    Raises:
        InputError: The file is missing, damaged, empty or of another kind. A mask has another
            number of units or other values. A row is a sequence that repeats or reorders units.

    Examples:
        >>> import tempfile
        >>> from pathlib import Path
        >>> import fastprune as fp
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "masks.jsonl")
        ...     _ = path.write_text('{"removed": [1, 2]}')
        ...     fp.load_masks(path, 4).astype(int)
        array([[1, 0, 0, 1]])
    """
    if _is_npy(path):
        return _read_npy(Path(path), num_units)
    sequences = load_sequences(path, num_units)
    for number, sequence in enumerate(sequences):
        if not is_mask(sequence):
            raise InputError(
                f"{path}: row {number} is a sequence that repeats or reorders units, and no mask; "
                f"load_sequences reads it"
            )
    masks = np.zeros((len(sequences), num_units), dtype=bool)
    for mask, units in zip(masks, sequences, strict=True):
        mask[list(units)] = True
    return masks


def load_sequences(path: str | Path, num_units: int) -> list[tuple[int, ...]]:
    """Read masks and sequences from a file.

    Args:
        path: A file as `load_masks` takes it. Rows of a .jsonl file may also be
            {"sequence": [0, 1, 1, 2]}.
        num_units: U, the units of the model.

    Returns:
        N tuples of the units that run, in order. A tuple that ascends is a mask.

    Raises:
        InputError: The file is wrong as in `load_masks`, or a sequence names no unit.

    Examples:
        >>> import tempfile
        >>> from pathlib import Path
        >>> import fastprune as fp
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "masks.jsonl")
        ...     _ = path.write_text('{"removed": [1]}\\n{"sequence": [0, 1, 1, 2]}')
        ...     fp.load_sequences(path, 3)
        [(0, 2), (0, 1, 1, 2)]
    """
    path = Path(path)
    if _is_npy(path):
        return [tuple(np.flatnonzero(mask).tolist()) for mask in _read_npy(path, num_units)]
    if not path.is_file():
        raise InputError(f"{path}: no such masks file")
    if path.suffix == ".txt":
        return [_of_drop_config(path, num_units)]
    if path.suffix != ".jsonl":
        raise InputError(f"{path}: masks are read from .npy, .jsonl or .txt files")
    sequences = [_read_row(path, number, row, num_units) for number, row in read_jsonl(path)]
    return _not_empty(path, sequences)


def _is_npy(path: str | Path) -> bool:
    return Path(path).suffix == ".npy" and Path(path).is_file()


def _read_npy(path: Path, num_units: int) -> np.ndarray:
    array = read_npy(path)
    try:
        masks = as_masks(array, num_units)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return _not_empty(path, masks)


def _of_drop_config(path: Path, num_units: int) -> tuple[int, ...]:
    """The units that a configuration of EvoPress keeps."""
    halves = {"none": (), "attn": (0,), "mlp": (1,), "attn+mlp": (0, 1)}
    lines = read_bytes(path, 16 * MAX_UNITS).decode(errors="replace").split()
    for number, line in enumerate(lines, 1):
        if line not in halves:
            raise InputError(
                f"{path}: line {number} must be none, attn, mlp or attn+mlp, not {shown(line)}"
            )
    if 2 * len(lines) == num_units:
        removed = [2 * i + half for i, line in enumerate(lines) for half in halves[line]]
        return kept_by(removed, num_units)
    if len(lines) != num_units:
        raise InputError(
            f"{path}: holds {len(lines)} lines; {num_units} units need a line for each block, or "
            f"for each two sublayers"
        )
    for number, line in enumerate(lines, 1):
        if line in ("attn", "mlp"):
            raise InputError(
                f"{path}: line {number} removes {line} alone, which needs sublayers as units"
            )
    return kept_by([i for i, line in enumerate(lines) if halves[line]], num_units)


def _read_row(path: Path, number: int, row: object, num_units: int) -> tuple[int, ...]:
    """The units that a row {"removed": [...]} or {"sequence": [...]} runs."""
    fields = row if isinstance(row, dict) else {}
    removed, sequence = fields.get("removed"), fields.get("sequence")
    try:
        if isinstance(removed, list) and sequence is None:
            return kept_by(check_removed(removed, num_units), num_units)
        if isinstance(sequence, list) and removed is None:
            return check_named(check_sequence(sequence, num_units))
    except InputError as error:
        raise InputError(f"{path}:{number}: {error}") from None
    raise InputError(
        f'{path}:{number}: expected a row like {{"removed": [9, 10]}} or '
        f'{{"sequence": [0, 1, 1, 2]}}, one of them'
    )


def check_named(sequence: tuple[int, ...]) -> tuple[int, ...]:
    """Refuse a sequence without units: it is more likely a mistake than a model without blocks."""
    if not sequence:
        raise InputError("a sequence names at least one unit; a mask may remove all")
    return sequence


def _not_empty(path: Path, masks: Any) -> Any:
    if len(masks) == 0:
        raise InputError(f"{path}: holds no masks")
    return masks
