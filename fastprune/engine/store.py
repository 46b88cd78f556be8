"""Finished sums on disk (SQLite), by mask, chunk and context."""

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
    device, software. So two objectives with the same tokens and measure share their sums. A sum is
    kept as its eight bytes with a checksum: it comes back to the bit or not at all. Every `put` is
    one transaction, so a killed run keeps all finished sums. Threads and processes may share a
    file.

    The file may fail later: a full disk, another program's lock, a damaged row. Then one
    RuntimeWarning says so, and the store returns and keeps nothing from then on.

    Args:
        path: The file; a new one is made.

    Raises:
        InputError: The file is no store, is damaged, or has another version. It is not overwritten.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        if str(path) == ":memory:":
            raise InputError("a store is a file, not ':memory:'; leave it out to keep nothing")
        if not self.path.parent.is_dir():
            raise InputError(f"{self.path}: the folder of the store does not exist")
        if self.path.exists() and not self.path.is_file():
            raise InputError(f"{self.path}: is not a file; name a file for the store")
        # SQLite opens these files beside its own, and would wait for a FIFO
        refuse_special(Path(f"{path}{suffix}") for suffix in ("-wal", "-shm", "-journal"))
        self._turn = threading.RLock()
        self._failed = False
        self._keys: dict[int, bytes] = {}  # keys of contexts, by number
        self._chunks: dict[bytes, int] = {}  # numbers of chunks, by key; chunks are never removed
        try:
            self._db = sqlite3.connect(self.path, timeout=60, check_same_thread=False)
            self._open()
            # in WAL mode, a commit then does not wait for the disk, and still survives a kill
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
        """The number of a context in this file; -1 after the store has failed.

        A new context is written with its settings as readable text.
        """
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
        """Look up sums of a chunk, float64[C], by the key of the units that ran."""
        known: dict[bytes, np.ndarray] = {}
        keys = iter(keys)
        with self._turn:
            if self._failed:
                return {}
            try:
                number = self._number(chunk)
                while number is not None and (part := list(itertools.islice(keys, _AT_ONCE))):
                    marks = ",".join("?" * len(part))
                    query = (
                        f"SELECT units, sums, checksum FROM sums WHERE context = ? AND chunk = ? "
                        f"AND units IN ({marks})"
                    )
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
        rows = [
            (units, np.ascontiguousarray(values, dtype="<f8").tobytes())
            for units, values in sums.items()
        ]
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
        """The number of a chunk in this file; None for an unknown chunk."""
        if chunk not in self._chunks:
            row = self._db.execute("SELECT id FROM chunks WHERE key = ?", (chunk,)).fetchone()
            if row is None:
                return None
            self._chunks[chunk] = row[0]
        return self._chunks[chunk]

    # -- looking at a file -------------------------------------------------------------------------

    def contexts(self) -> dict[int, tuple[dict, int]]:
        """The settings and the number of sums of each context, by its number in the file."""
        query = (
            "SELECT id, determined_by, (SELECT count(*) FROM sums WHERE context = id) FROM "
            "contexts ORDER BY id"
        )
        with self._turn, self._naming():
            return {
                number: (json.loads(text), count) for number, text, count in self._db.execute(query)
            }

    def rows(self) -> Iterator[tuple[int, bytes, tuple[int, ...], np.ndarray | None]]:
        """Yield all rows: context, chunk, units that ran, sums. A damaged row's sums are None."""
        for context, _, chunk, units, values in self._rows():
            yield context, chunk or b"", tuple(np.frombuffer(units, dtype="<u2").tolist()), values

    def _rows(self) -> Iterator[tuple[int, int, bytes | None, bytes, np.ndarray | None]]:
        """Yield all rows: context, number of the chunk, its key, units, sums."""
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
        """Remove contexts with their sums, or damaged rows.

        Args:
            contexts: Numbers of contexts.
            damaged: Whether to remove the damaged rows of all contexts.

        Returns:
            The number of removed sums.
        """
        rows = self._rows() if damaged else ()
        broken = [
            (context, number, units) for context, number, _, units, values in rows if values is None
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
        """Turn SQLite's exception about a damaged file into one line that names the file."""
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
    """Tables, indexes, views and triggers with their definitions, ten at most."""
    return set(database.execute("SELECT type, name, sql FROM sqlite_master LIMIT 10").fetchall())


@functools.cache
def _expected_objects() -> set[tuple]:
    """The objects of a store. Any other, such as a trigger, would run its author's statements."""
    with closing(sqlite3.connect(":memory:")) as database:
        database.executescript(_SCHEMA)
        return _objects(database)


def holds_sums(path: str | os.PathLike) -> bool:
    """Whether a file is a store with sums. It is only read, and not made."""
    if not Path(path).is_file():
        return False
    try:
        uri = f"{Path(path).absolute().as_uri()}?mode=ro"
        with closing(sqlite3.connect(uri, uri=True, timeout=1)) as database:
            return database.execute("SELECT 1 FROM sums LIMIT 1").fetchone() is not None
    except _FAILURES:
        return False


def units_key(sequence: Iterable[int]) -> bytes:
    """The key of the units that run, in order."""
    return np.fromiter(sequence, dtype="<u2").tobytes()
