"""A study's folder: its settings, its lock, and the finished cells.

study.toml is the document. inputs.json has the settings that a later run must share. cells/ has a
file for each finished search, and scores.db the sums.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..engine.store import SumStore
from ..errors import InputError, shown
from ..io import parse_json, write_json
from ..masks import Candidate
from ..plan.cost import Cost
from ..search.sizes import Key

LOCK, INPUTS, DOCUMENT, STORE = ".lock", "inputs.json", "study.toml", "scores.db"
_LEFT_BEHIND = re.compile(
    rf"{re.escape(LOCK)}|\.inputs\.json\.\d+"
)  # files of a run that was killed at its start

# Settings by their names in inputs.json: their place in the document, and whether further values
# only add cells.
_PLACES = {
    "models": ("model.path (or its weights)", True),
    "dtype": ("model.dtype", True),
    "backend": ("model.backend", False),
    "objectives": ("objective (or its calibration set)", True),
    "algorithms": ("search.algorithms", True),
    "budgets": ("search.num_remove", True),
    "seed": ("search.seed", False),
    "racing": ("search.racing", False),
    "protect": ("search.protect", False),
    "granularity": ("search.granularity", False),
}

_COSTS = ("masks", "unit_runs", "asked_unit_runs", "naive_unit_runs", "seconds")  # in cells


@dataclass(frozen=True)
class Cell:
    """One search of a study: its result, its cost, and the machine that ran it.

    Attributes:
        model: The model's name.
        objective: The label of the objective.
        num_remove: A number of units, or the text of a budget; None for a search over sequences.
        algorithm: The algorithm's name.
        removed: The removed units; None for a search over sequences, and after an error.
        sequence: The chosen sequence; None for other searches.
        loss: The loss under the search's own objective; None after an error.
        error: The reason why the search found nothing.
        losses: The losses of the chosen candidate under every objective of the study, by label.
        cost: The cost. Its unit runs were made. Without the store's scores of other searches, it
            would be asked_unit_runs. Its masks are those whose exact loss is known.
        decided_early: The number of subsets that left a race early.
        machine: The key of its fingerprint in `machines` of inputs.json.
        costs: `SearchResult.costs` under a budget.
    """

    model: str
    objective: str
    num_remove: Key
    algorithm: str
    removed: tuple[int, ...] | None = None
    loss: float | None = None
    error: str | None = None
    decided_early: int = 0
    cost: Cost = field(default_factory=Cost)
    machine: str = ""
    losses: Mapping[str, float] | None = None
    sequence: tuple[int, ...] | None = None
    costs: Mapping[str, Any] | None = None

    @property
    def candidate(self) -> Candidate | None:
        """The mask or sequence that the search chose; None if it found nothing."""
        return None if self.error else Candidate(self.removed, self.sequence)

    def to_dict(self) -> dict[str, Any]:
        """Convert the cell to plain values, with the fields of the cost in `_COSTS`."""
        plain = {name: value for name, value in vars(self).items() if name != "cost"}
        return {**plain, **{name: getattr(self.cost, name) for name in _COSTS}}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Cell:
        """Make a cell from the values of `to_dict`."""
        plain = dict(record)
        cost = Cost(**{name: plain.pop(name) for name in _COSTS})
        chosen = vars(Candidate.of(plain))
        return cls(**{**plain, **chosen}, cost=cost)


def check_label(label: str) -> None:
    """Raise InputError for a label that cannot be a part of file names."""
    if not isinstance(label, str) or not re.fullmatch(r"[A-Za-z0-9_-]{1,60}", label):
        raise InputError(
            f"a label is made of up to 60 letters, digits, - and _, not {shown(label)}"
        )


def check_study_folder(
    folder: Path, settings: Mapping[str, object], document: str | None = None
) -> dict | None:
    """Check whether settings continue or extend the study in a folder. Nothing is written.

    Further algorithms, budgets, objectives and models extend a study; any other change is refused.
    Machines may differ.

    Args:
        folder: The study's folder; it need not exist.
        settings: The new settings, or those known so far.
        document: The document's text. A new study may start in a folder that holds only this text.

    Returns:
        The settings of the study in the folder; None for a new study.

    Raises:
        InputError: The folder holds something else or another study, another process writes
            there, or its store cannot be read.
    """
    if (folder / LOCK).exists():
        with hold(folder):
            pass
    inputs, store = folder / INPUTS, folder / STORE
    if not os.path.lexists(inputs):
        if folder.exists() and not all(
            _may_be_in_a_new_study(p, document) for p in folder.iterdir()
        ):
            raise InputError(f"{folder}: is not empty and holds no study; name another folder")
        return None
    kept = None
    if inputs.is_file():
        with suppress(InputError):
            kept = parse_json(inputs.read_bytes(), str(inputs))
    if not isinstance(kept, dict) or not isinstance(kept.get("machines", {}), dict):
        raise InputError(f"{inputs}: is not what a study has written; name another folder")
    plain = json.loads(json.dumps(settings))
    changes = [
        change
        for name, value in plain.items()
        if name != "machines"
        for change in _changes(name, kept.get(name), value)
    ]
    if changes:
        raise InputError(
            f"{folder}: holds a study with other settings: {'; '.join(changes)}; "
            f"name another folder"
        )
    if os.path.lexists(store):
        if not store.is_file():
            raise InputError(f"{store}: is not a file, and so no store of scores")
        SumStore(store).close()
    return kept


def _may_be_in_a_new_study(path: Path, document: str | None) -> bool:
    if path.name == DOCUMENT and document is not None and path.is_file():
        return path.read_bytes() == document.encode()
    return bool(_LEFT_BEHIND.fullmatch(path.name))


def _changes(name: str, kept: object, new: object) -> Iterator[str]:
    """Yield the changes of one setting that do more than add cells, in words."""
    place, adds = _PLACES.get(name, (name, False))
    if adds and isinstance(kept, dict) and isinstance(new, dict):
        for key, value in kept.items():
            if key not in new:
                yield f"{place} no longer has {shown(key)}"
            elif isinstance(value, dict) and isinstance(new[key], dict):  # an algorithm's options
                for option in {**value, **new[key]}:
                    before, now = value.get(option), new[key].get(option)
                    if before != now:
                        where = f"search.options.{shown(key)[1:-1]}.{shown(option)[1:-1]}"
                        yield f"{where} was {shown(before)} and is {shown(now)}"
            elif value != new[key]:
                yield f"{place} differs at {shown(key)}"
    elif adds and isinstance(kept, list) and isinstance(new, list):
        if missing := [value for value in kept if value not in new]:
            yield f"{place} no longer has {', '.join(map(shown, missing))}"
    elif kept != new:
        yield f"{place} was {shown(kept)} and is {shown(new)}"


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Create the folder and lock it; the lock ends with the process.

    Raises InputError if another process holds the lock.
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
    """Write a finished search, with a checksum over its result and its settings."""
    record = cell.to_dict()
    write_json(path, {**record, "checksum": _checksum(record, made_with)}, replace=True)


def read_cell(path: Path, made_with: Mapping[str, object]) -> Cell | None:
    """The cell that `write_cell` wrote; None if it is damaged or of other settings."""
    try:
        record = parse_json(path.read_bytes(), str(path))
        checksum = record.pop("checksum")
        cell = Cell.from_dict(record)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except (InputError, AttributeError, LookupError, TypeError):
        return None
    return cell if checksum == _checksum(record, made_with) else None


def _checksum(record: Mapping[str, object], made_with: Mapping[str, object]) -> str:
    text = json.dumps([record, made_with], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
