"""How a calibration set is cut into chunks and tiles: decided once, from the data and the byte
budget alone.

Every mask is run over the same chunks, so that every matrix product has the same shape whatever
else is scored in the same call. So a score has the same bits alone and in company. Integers only.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

import numpy as np

from ..data import TokenBatch
from ..errors import InputError, shown
from .racing import look_of, look_rows

RUN_TOKENS = (
    32  # cost of each run of a chunk beside its tokens, in tokens: mostly reading the weights
)


@dataclass(frozen=True)
class Layout:
    """Which rows run together, and how many of their positions go through the head at once.

    chunks: the rows of each, all rows once; a chunk holds either plain rows or trees. tile:
    positions.
    content_hash: of the calibration set that it was made for, `TokenBatch.content_hash`.

    Examples:
        >>> from fastprune.plan.layout import Layout
        >>> layout = Layout(((0, 2), (1,)), tile=64, content_hash="")
        >>> Layout.from_json(layout.to_json()) == layout
        True
    """

    chunks: tuple[tuple[int, ...], ...]
    tile: int
    content_hash: str

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Layout:
        """The layout that `to_json` wrote. Raises InputError for anything else."""
        try:
            found = json.loads(text)
            return cls(tuple(map(tuple, found["chunks"])), found["tile"], found["content_hash"])
        except (ValueError, TypeError, KeyError, RecursionError):
            raise InputError(f"not a layout as Layout.to_json writes it: {shown(text)}") from None

    def looks(self, batch: TokenBatch) -> np.ndarray:
        """The number of each row's look in a race, int64[R]: every chunk runs in one look.

        `racing.look_of`; 0 for all rows if a chunk would need two looks.
        """
        looks = look_of(batch)
        whole = all((looks[list(chunk)] == looks[chunk[0]]).all() for chunk in self.chunks)
        return looks if whole else np.zeros_like(looks)

    def check(self, batch: TokenBatch) -> None:
        """Raise InputError unless this is a layout of the batch."""
        if self.content_hash != batch.content_hash:
            raise InputError("the layout was made for other calibration data")
        rows, every = [row for chunk in self.chunks for row in chunk], list(range(batch.num_rows))
        if (
            not all(self.chunks)
            or not all(type(row) is int for row in rows)
            or sorted(rows) != every
        ):
            raise InputError(
                f"the layout's chunks must hold the rows 0 to {batch.num_rows - 1}, each once"
            )
        if any(len(set(batch.row_is_tree[list(chunk)].tolist())) > 1 for chunk in self.chunks):
            raise InputError("the layout's chunks must hold plain rows or trees, not both")
        if type(self.tile) is not int or self.tile < 1:
            raise InputError(
                f"the layout's tile must be a number of positions, not {shown(self.tile)}"
            )


def make_layout(batch: TokenBatch, max_tokens: int, tile: int) -> Layout:
    """Chunks of at most max_tokens tokens each, padding included (but at least one row each).

    No chunk of several rows crosses a look of a race. Within a look, rows are sorted by kind and
    length, and cut where padding and many small chunks cost the least.
    """
    groups = [group for rows in look_rows(batch) for group in _group_rows(batch, rows, max_tokens)]
    return Layout(tuple(map(tuple, groups)), tile, batch.content_hash)


def _group_rows(batch: TokenBatch, rows: np.ndarray, max_tokens: int) -> list[list[int]]:
    """Plain rows, then trees, longest first, cut so that tokens, with padding, and runs cost the
    least in all."""
    groups = []
    for kind in (False, True):
        alike = rows[batch.row_is_tree[rows] == kind]
        alike = alike[np.lexsort((alike, -batch.row_lengths[alike]))]
        if kind and batch.split_trees:  # the branches of one tree are rows enough
            groups += [[int(row)] for row in alike]
            continue
        lengths, count = batch.row_lengths[alike], len(alike)
        least, sizes = (
            np.zeros(count + 1),
            np.zeros(count, dtype=np.int64),
        )  # of the remaining rows from each row on
        for start in reversed(range(count)):
            most = min(count - start, max(1, max_tokens // int(lengths[start])))
            costs = (
                lengths[start] * np.arange(most, 0, -1)
                + RUN_TOKENS
                + least[start + 1 : start + 1 + most][::-1]
            )
            best = int(costs.argmin())  # of equals that with the most rows
            least[start], sizes[start] = costs[best], most - best
        start = 0
        while start < count:
            groups.append(alike[start : start + sizes[start]].tolist())
            start += sizes[start]
    return groups
