"""A study's folder: whose it is, who is writing there, and the cells that are finished.

inputs.json says what makes the study this study, cells/ holds a file per finished search, scores.db
the sums.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ..engine.store import SumStore
from ..errors import InputError, shown
from ..io import parse_json, write_json

LOCK = ".lock"
_LEFT_BEHIND = re.compile(
    rf"{re.escape(LOCK)}|\.inputs\.json\.\d+"
)  # by a run that was killed as it began


@dataclass(frozen=True)
class Cell:
    """One search of a study, what it found and what it cost.

    error: why the search found nothing; `removed` and `loss` are then None. losses: of the chosen
    mask under every objective of the study, by label. unit_runs: unit runs that were made;
    asked_unit_runs: those it would have made alone, without scores that other searches had left in
    the store. decided_early: subsets that left a race early.
    """

    model: str
    objective: str
    num_remove: int
    algorithm: str
    removed: tuple[int, ...] | None = None
    loss: float | None = None
    error: str | None = None
    masks: int = 0
    decided_early: int = 0
    unit_runs: float = 0
    asked_unit_runs: float = 0
    naive_unit_runs: float = 0
    seconds: float = 0
    losses: Mapping[str, float] | None = None


def check_label(label: str) -> None:
    """Raise InputError for an objective's label that cannot be a part of file names."""
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,60}", label):
        raise InputError(
            f"a label is made of up to 60 letters, digits, - and _, not {shown(label)}"
        )


def check_study_folder(folder: Path, known: Mapping[str, object]) -> bool:
    """Whether a folder holds a study of these inputs already; `known` may be a part of them, as
    yet.

    Raises InputError, and touches nothing, for a folder that holds something else, in which another
    process is at work, or whose store cannot be read.
    """
    if (folder / LOCK).exists():
        with hold(folder):
            pass
    inputs, store = folder / "inputs.json", folder / "scores.db"
    if not os.path.lexists(inputs):
        if folder.exists() and not all(
            _LEFT_BEHIND.fullmatch(path.name) for path in folder.iterdir()
        ):
            raise InputError(f"{folder}: is not empty and holds no study; name another folder")
        return False
    found = None
    if inputs.is_file():
        with suppress(InputError):
            found = parse_json(inputs.read_bytes(), str(inputs))
    if not isinstance(found, dict):
        raise InputError(f"{inputs}: is not what a study has written; name another folder")
    plain = json.loads(json.dumps(known))
    others = [name for name, value in plain.items() if found.get(name) != value]
    if others == ["machine"]:
        what = ", ".join(sorted(_differing(found.get("machine"), plain["machine"])))
        raise InputError(
            f"{folder}: holds a study made on another kind of machine ({what}); name another folder"
        )
    if others:
        raise InputError(
            f"{folder}: holds a study with other {', '.join(others)}; name another folder"
        )
    if os.path.lexists(store):
        if not store.is_file():
            raise InputError(f"{store}: is not a file, and so no store of scores")
        SumStore(store).close()
    return True


def _differing(a: object, b: object, name: str = "unknown") -> set[str]:
    """The names of the innermost values that differ."""
    if not isinstance(a, dict) or not isinstance(b, dict):
        return {name} if a != b else set()
    return {inner for key in {*a, *b} for inner in _differing(a.get(key), b.get(key), key)}


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Be the only one who writes into the folder, which is made. Raises InputError where somebody
    else is.

    The lock goes with the process, however it ends.
    """
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        raise InputError(f"{folder / LOCK}: cannot be opened ({error.strerror})") from None
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"{folder}: another process is running a study there; wait for its end, or name "
                f"another folder"
            ) from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(lock)


def write_cell(path: Path, cell: Cell, made_with: Mapping[str, object]) -> None:
    """Keep a finished search, with a checksum over what it found and over the settings that it was
    made with."""
    record = vars(cell)
    write_json(path, {**record, "checksum": _checksum(record, made_with)}, replace=True)


def read_cell(path: Path, made_with: Mapping[str, object]) -> Cell | None:
    """The cell that `write_cell` has left; None where it is cut short, altered, or made with other
    settings."""
    try:
        record = parse_json(path.read_bytes(), str(path))
        checksum = record.pop("checksum")
        cell = Cell(**record)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except (InputError, AttributeError, LookupError, TypeError):
        return None
    if checksum != _checksum(record, made_with):
        return None
    return cell if cell.removed is None else Cell(**{**record, "removed": tuple(cell.removed)})


def _checksum(record: Mapping[str, object], made_with: Mapping[str, object]) -> str:
    text = json.dumps([record, made_with], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
