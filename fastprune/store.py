"""Finished scores on disk (SQLite), keyed by everything that determines them."""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from .errors import InputError

_SCHEMA = """
CREATE TABLE IF NOT EXISTS contexts (context TEXT PRIMARY KEY, determined_by TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS scores (
  context TEXT NOT NULL, mask BLOB NOT NULL, loss BLOB NOT NULL, PRIMARY KEY (context, mask)
) WITHOUT ROWID;
"""


class ScoreStore:
    """Losses by (context, mask). Every `put` is one transaction, so a killed run keeps all that it had finished.

    A context is the hash of what determines a score besides the mask: weights, data, objective, dtype, device,
    software, the shapes that were run. Losses are kept as their eight bytes, so that they come back to the bit.
    Threads may share a store: they take turns.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        if not self.path.parent.is_dir():
            raise InputError(f"{self.path}: the folder of the score store does not exist")
        self._turn = threading.RLock()
        try:
            self._db = sqlite3.connect(self.path, timeout=60, check_same_thread=False)
            tables = {sql for (sql,) in self._db.execute("SELECT sql FROM sqlite_master WHERE type = 'table'")}
            if tables and not all("context TEXT" in sql for sql in tables):
                raise InputError(f"{self.path}: a database of something else; name another file for the score store")
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.executescript(_SCHEMA)
        except sqlite3.Error as error:
            raise InputError(f"{self.path}: not a score store ({error})") from None

    def context(self, determined_by: Mapping[str, object]) -> str:
        """The key of a context, noted readably when it is new."""
        text = json.dumps(determined_by, sort_keys=True)
        key = hashlib.sha256(text.encode()).hexdigest()
        with self._turn, self._db:
            self._db.execute("INSERT OR IGNORE INTO contexts VALUES (?, ?)", (key, text))
        return key

    def get(self, context: str, keys: Iterable[bytes]) -> dict[bytes, float]:
        """The losses that are known, by mask key."""
        known = {}
        query = "SELECT loss FROM scores WHERE context = ? AND mask = ?"
        with self._turn:
            for key in keys:
                row = self._db.execute(query, (context, key)).fetchone()
                if row is not None:
                    known[key] = float(np.frombuffer(row[0], dtype="<f8")[0])
        return known

    def put(self, context: str, keys: Iterable[bytes], losses: Iterable[float]) -> None:
        """Keep the losses of masks, given by their keys."""
        rows = [(context, key, np.float64(loss).astype("<f8").tobytes()) for key, loss in zip(keys, losses)]
        with self._turn, self._db:
            self._db.executemany("INSERT OR REPLACE INTO scores VALUES (?, ?, ?)", rows)

    def close(self) -> None:
        with self._turn:
            self._db.close()


def mask_keys(masks: np.ndarray) -> list[bytes]:
    """One key per mask bool[N, U]: its packed bits."""
    return [row.tobytes() for row in np.packbits(masks, axis=1)]
