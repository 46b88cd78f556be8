"""Finished sums on disk (SQLite): of each mask, on each chunk, under everything that determines
their bits."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
import sqlite3
import threading
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np

from ..errors import InputError
from ..validate import refuse_special

APPLICATION, VERSION = 0x46505255, 3  # PRAGMA application_id and user_version of a store
_SCHEMA = """
CREATE TABLE IF NOT EXISTS contexts (
  id INTEGER PRIMARY KEY, key TEXT UNIQUE NOT NULL, determined_by TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS chunks (id INTEGER PRIMARY KEY, key BLOB UNIQUE NOT NULL);
CREATE TABLE IF NOT EXISTS sums (
  context INTEGER NOT NULL, chunk INTEGER NOT NULL, units BLOB NOT NULL, sums BLOB NOT NULL,
  checksum INTEGER NOT NULL,
  PRIMARY KEY (context, chunk, units)
) WITHOUT ROWID;
"""
_AT_ONCE = 500  # keys of one look-up
_FAILURES = (
    sqlite3.Error,
    UnicodeDecodeError,
    TypeError,
    ValueError,
)  # raised by SQLite over a damaged file


class SumStore:
    """Sums over the continuations of a chunk, by (context, chunk, units that ran).

    A context holds all that determines a sum besides chunk and units: weights, measure, dtype,
    device, software. So any objective that asks for the same tokens under the same measure finds
    the sums of another. Sums are kept as their eight bytes with a checksum, so that they come back
    to the bit or not at all; every `put` is one transaction, so that a killed run keeps all that it
    had finished. Threads and processes may share a file.

    Raises InputError for a file that is no store, is one of another version, or is damaged: none is
    overwritten. When the file fails later (a full disk, another program's lock, a damaged row), a
    RuntimeWarning says so once, and the store keeps and finds nothing from then on.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        if str(path) == ":memory:":
            raise InputError("a store is a file, not ':memory:'; leave it out to keep nothing")
        if not self.path.parent.is_dir():
            raise InputError(f"{self.path}: the folder of the store does not exist")
        if self.path.exists() and not self.path.is_file():
            raise InputError(f"{self.path}: is not a file; name a file for the store")
        # SQLite opens these beside its file, and would wait for a FIFO
        refuse_special(Path(f"{path}{suffix}") for suffix in ("-wal", "-shm", "-journal"))
        self._turn = threading.RLock()
        self._failed = False
        self._keys: dict[int, bytes] = {}  # of contexts, by their number
        self._chunks: dict[bytes, int] = {}  # numbers of chunks, by key; none is ever removed
        try:
            self._db = sqlite3.connect(self.path, timeout=60, check_same_thread=False)
            self._open()
            # in WAL mode a commit then waits for no disk; it outlives the process all the same
            self._db.execute("PRAGMA synchronous=NORMAL")
        except _FAILURES as error:
            raise InputError(f"{self.path}: not a store ({error})") from None

    def _open(self) -> None:
        known = self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if known:
            application = self._db.execute("PRAGMA application_id").fetchone()[0]
            version = self._db.execute("PRAGMA user_version").fetchone()[0]
            names = {
                name
                for (name,) in self._db.execute(
                    "SELECT name FROM sqlite_master WHERE type = 'table' LIMIT 10"
                )
            }
            if application != APPLICATION and names != {"contexts", "scores"}:
                raise InputError(
                    f"{self.path}: a database of something else; name another file for the store"
                )
            if version != VERSION:
                raise InputError(
                    f"{self.path}: a store of another version of fastprune; name another file"
                )
            if _objects(self._db) != _expected_objects():
                raise InputError(
                    f"{self.path}: a damaged store, its tables are not those of a store"
                )
            return
        self._db.execute("PRAGMA journal_mode=WAL")
        pragmas = f"PRAGMA application_id={APPLICATION}; PRAGMA user_version={VERSION};"
        self._db.executescript(
            f"BEGIN IMMEDIATE; {pragmas} {_SCHEMA} COMMIT;"
        )  # another process sees all or nothing

    def context(self, determined_by: Mapping[str, object]) -> int:
        """The number of a context in this file, noted readably when it is new; -1 once the store
        has been given up."""
        if self._failed:
            return -1
        text = json.dumps(determined_by, sort_keys=True)
        key = hashlib.sha256(text.encode()).hexdigest()
        with self._turn:
            query = "SELECT id FROM contexts WHERE key = ?"
            try:
                row = self._db.execute(query, (key,)).fetchone()
                if row is None:
                    with self._db:
                        self._db.execute(
                            "INSERT OR IGNORE INTO contexts (key, determined_by) VALUES (?, ?)",
                            (key, text),
                        )
                    row = self._db.execute(query, (key,)).fetchone()
                self._keys[row[0]] = key.encode()
                return row[0]
            except _FAILURES as error:
                self._give_up(error)
                return -1

    def get(self, context: int, chunk: bytes, keys: Iterable[bytes]) -> dict[bytes, np.ndarray]:
        """The known sums of a chunk, float64[C], by the key of the units that ran."""
        known: dict[bytes, np.ndarray] = {}
        keys = iter(keys)
        with self._turn:
            try:
                number = None if self._failed else self._number(chunk)
            except _FAILURES as error:
                self._give_up(error)
                return {}
            while (
                not self._failed
                and number is not None
                and (part := list(itertools.islice(keys, _AT_ONCE)))
            ):
                marks = ",".join("?" * len(part))
                query = (
                    f"SELECT units, sums, checksum FROM sums WHERE context = ? AND chunk = ? "
                    f"AND units IN ({marks})"
                )
                try:
                    for units, sums, checksum in self._db.execute(query, (context, number, *part)):
                        if self._checksum(context, chunk, units, sums) != checksum or len(sums) % 8:
                            raise sqlite3.DatabaseError("a row is damaged")
                        known[units] = np.frombuffer(sums, dtype="<f8")
                except _FAILURES as error:
                    self._give_up(error)
                    return {}
        return known

    def put(self, context: int, chunk: bytes, sums: Mapping[bytes, np.ndarray]) -> None:
        """Keep the sums of a chunk, by the key of the units that ran."""
        rows = []
        for units, values in sums.items():
            blob = np.ascontiguousarray(values, dtype="<f8").tobytes()
            rows.append((units, blob))
        with self._turn:
            if self._failed:
                return
            try:
                with self._db:
                    number = self._number(chunk)
                    if number is None:
                        self._db.execute("INSERT OR IGNORE INTO chunks (key) VALUES (?)", (chunk,))
                        number = self._number(chunk)
                    self._db.executemany(
                        "INSERT OR REPLACE INTO sums VALUES (?, ?, ?, ?, ?)",
                        [
                            (context, number, *row, self._checksum(context, chunk, *row))
                            for row in rows
                        ],
                    )
            except _FAILURES as error:
                self._give_up(error)

    def _number(self, chunk: bytes) -> int | None:
        """The number of a chunk in this file; None for one that it does not have."""
        if chunk not in self._chunks:
            row = self._db.execute("SELECT id FROM chunks WHERE key = ?", (chunk,)).fetchone()
            if row is None:
                return None
            self._chunks[chunk] = row[0]
        return self._chunks[chunk]

    # -- looking at a file -------------------------------------------------------------------------

    def contexts(self) -> dict[int, tuple[dict, int]]:
        """Each context in the file, by its number: its settings, and its number of sums."""
        query = (
            "SELECT id, determined_by, (SELECT count(*) FROM sums WHERE context = id) FROM "
            "contexts ORDER BY id"
        )
        with self._turn, self._naming():
            return {
                number: (json.loads(text), count) for number, text, count in self._db.execute(query)
            }

    def rows(self) -> Iterator[tuple[int, bytes, tuple[int, ...], np.ndarray | None]]:
        """Everything in the file: (context, chunk, units that ran, sums); the sums of a damaged row
        are None."""
        for context, _, chunk, units, values in self._rows():
            yield context, chunk or b"", tuple(np.frombuffer(units, dtype="<u2").tolist()), values

    def _rows(self) -> Iterator[tuple[int, int, bytes | None, bytes, np.ndarray | None]]:
        """Everything in the file: (context, number of the chunk, its key, units, sums)."""
        query = (
            "SELECT context, chunk, key, units, sums, checksum FROM sums "
            "LEFT JOIN chunks ON chunks.id = chunk"
        )
        with self._turn, self._naming():
            for context, key in self._db.execute("SELECT id, key FROM contexts"):
                self._keys[context] = key.encode()
            for context, number, chunk, units, sums, checksum in self._db.execute(query):
                whole = (
                    context in self._keys
                    and chunk is not None
                    and self._checksum(context, chunk, units, sums) == checksum
                )
                values = np.frombuffer(sums, dtype="<f8") if whole and not len(sums) % 8 else None
                yield context, number, chunk, units, values

    def prune(self, contexts: Iterable[int] = (), damaged: bool = False) -> int:
        """Remove these contexts with their sums, or the damaged rows; return how many sums were
        removed."""
        broken = []
        if damaged:
            broken = [
                (context, number, units)
                for context, number, _, units, values in self._rows()
                if values is None
            ]
        with self._turn, self._naming():
            before = self._db.total_changes
            with self._db:
                self._db.executemany(
                    "DELETE FROM sums WHERE context = ? AND chunk = ? AND units = ?", broken
                )
                for number in contexts:
                    self._db.execute("DELETE FROM sums WHERE context = ?", (number,))
            gone = self._db.total_changes - before
            with self._db:
                self._db.executemany(
                    "DELETE FROM contexts WHERE id = ?", [(number,) for number in contexts]
                )
            self._db.execute("VACUUM")
        return gone

    @contextmanager
    def _naming(self) -> Iterator[None]:
        """Turn SQLite's exception over a damaged file into one line that names the file."""
        try:
            yield
        except _FAILURES as error:
            raise InputError(f"{self.path}: a damaged store ({error})") from None

    def close(self) -> None:
        with self._turn:
            self._db.close()

    def _checksum(self, context: int, chunk: bytes, units: bytes, sums: bytes) -> int:
        return zlib.crc32(b"%b/%b/%b/%b" % (self._keys[context], chunk, units, sums))

    def _give_up(self, error: Exception) -> None:
        if not self._failed:
            self._failed = True
            warnings.warn(
                f"{self.path}: going on without the store: {error}", RuntimeWarning, stacklevel=4
            )


def _objects(database: sqlite3.Connection) -> set[tuple]:
    """Tables, indexes, views and triggers, with their definitions; not all if there are many."""
    return set(database.execute("SELECT type, name, sql FROM sqlite_master LIMIT 10").fetchall())


@functools.cache
def _expected_objects() -> set[tuple]:
    """Those of a store: a view or a trigger would run its author's statements."""
    with closing(sqlite3.connect(":memory:")) as database:
        database.executescript(_SCHEMA)
        return _objects(database)


def units_key(sequence: Iterable[int]) -> bytes:
    """The key of the units that run, in order."""
    return np.fromiter(sequence, dtype="<u2").tobytes()
