"""Layouts: a calibration set cut into chunks and tiles, from the data and a byte limit alone.

All masks run over the same chunks. Every matrix product then has the same shape, whatever else the
call scores, so a score has the same bits alone and in company.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Literal, TypeAlias

import numpy as np

from ..data import TokenBatch
from ..errors import InputError, shown
from .racing import look_of, look_rows

RUN_TOKENS = 32  # the fixed cost of a chunk's run, in tokens: mostly reading the weights


@dataclass(frozen=True)
class Layout:
    """The rows that run together, and the positions that go through the head together.

    Attributes:
        chunks: The rows of each chunk. Each row is in one chunk; a chunk holds plain rows or trees.
        tile: The number of positions of a chunk that go through the head at once.
        content_hash: `TokenBatch.content_hash` of the calibration set.

    Examples:
        >>> import fastprune as fp
        >>> from fastprune.plan.layout import Layout
        >>> layout = Layout(((0, 2), (1,)), tile=64, content_hash="")
        >>> Layout.from_json(layout.to_json()) == layout
        True
    """

    chunks: tuple[tuple[int, ...], ...]
    tile: int
    content_hash: str

    def to_json(self) -> str:
        """Write the layout as JSON.

        Returns:
            The text, which `from_json` reads.

        Examples:
            >>> from fastprune.plan.layout import Layout
            >>> Layout(((0,),), tile=64, content_hash="").to_json()
            '{"chunks": [[0]], "tile": 64, "content_hash": ""}'
        """
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Layout:
        """Read a layout.

        Args:
            text: The text that `to_json` wrote.

        Returns:
            The layout.

        Raises:
            InputError: The text is another one.

        Examples:
            >>> from fastprune.plan.layout import Layout
            >>> Layout.from_json('{"chunks": [[0]], "tile": 64, "content_hash": ""}').tile
            64
        """
        try:
            layout = json.loads(text)
            return cls(tuple(map(tuple, layout["chunks"])), layout["tile"], layout["content_hash"])
        except (ValueError, TypeError, KeyError, RecursionError):
            raise InputError(f"not a layout as Layout.to_json writes it: {shown(text)}") from None

    def looks(self, batch: TokenBatch) -> np.ndarray:
        """Number the look of a race in which each row runs. A chunk runs in one look.

        Args:
            batch: The calibration set.

        Returns:
            int64[R]. All are 0 if the rows of a chunk belong to different looks.

        Examples:
            >>> import fastprune as fp
            >>> batch = fp.TokenBatch.from_ids([[5, 6, 7], [5, 8]])
            >>> layout = fp.plan.layout.make_layout(batch, max_tokens=64, tile=64)
            >>> layout.looks(batch)  # too few rows to race
            array([0, 0])
        """
        looks = look_of(batch)
        one_look_each = all((looks[list(chunk)] == looks[chunk[0]]).all() for chunk in self.chunks)
        return looks if one_look_each else np.zeros_like(looks)

    def check(self, batch: TokenBatch) -> None:
        """Check that this is a layout of a batch.

        Args:
            batch: The calibration set.

        Raises:
            InputError: The layout belongs to other data, or is damaged.

        Examples:
            >>> import fastprune as fp
            >>> batch = fp.TokenBatch.from_ids([[5, 6, 7], [5, 8]])
            >>> fp.plan.layout.make_layout(batch, max_tokens=64, tile=64).check(batch)
        """
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
        if batch.split_trees and any(
            len(chunk) > 1 and batch.row_is_tree[chunk[0]] for chunk in self.chunks
        ):
            raise InputError(
                "the layout runs several questions together, but this model runs each choice as a "
                "row; leave layout out"
            )
        if type(self.tile) is not int or self.tile < 1:
            raise InputError(
                f"the layout's tile must be a number of positions, not {shown(self.tile)}"
            )


Cut: TypeAlias = Layout | Literal["rows"] | None  # "rows": each row alone; None: as memory allows


def make_layout(batch: TokenBatch, max_tokens: int, tile: int) -> Layout:
    """Cut a calibration set into chunks.

    No chunk of several rows crosses a look of a race. Within a look, rows are sorted by kind and
    length. Cuts balance padding, which large chunks add, against the fixed cost of small ones.

    Args:
        batch: The calibration set.
        max_tokens: The most tokens of a chunk, padding included. A longer row is a chunk alone.
        tile: Positions that go through the head at once.
    """
    groups = [group for rows in look_rows(batch) for group in _group_rows(batch, rows, max_tokens)]
    return Layout(tuple(map(tuple, groups)), tile, batch.content_hash)


def _group_rows(batch: TokenBatch, rows: np.ndarray, max_tokens: int) -> list[list[int]]:
    """Group plain rows, then trees, longest first, for the least cost of padded tokens and runs.

    Rows of 8, 8 and 4 tokens cost 24 + 32 in one chunk: three rows of 8, and RUN_TOKENS for its
    run. Chunks of 8, 8 and of 4 cost 20 + 64. So they stay together.
    """
    groups = []
    for kind in (False, True):
        alike = rows[batch.row_is_tree[rows] == kind]
        alike = alike[np.lexsort((alike, -batch.row_lengths[alike]))]
        if kind and batch.split_trees:  # the branches of one tree fill a chunk
            groups += [[int(row)] for row in alike]
            continue
        lengths, count = batch.row_lengths[alike], len(alike)
        # least[i]: the cost of rows i, i + 1, ... in their best chunks; sizes[i]: the rows of the
        # first of these chunks. With lengths 8 8 4, least is 56 48 36 0 and sizes 3 2 1.
        least, sizes = np.zeros(count + 1), np.zeros(count, dtype=np.int64)
        for start in reversed(range(count)):
            most = min(count - start, max(1, max_tokens // int(lengths[start])))
            costs = (  # of a first chunk with most, most - 1, ..., 1 rows
                lengths[start] * np.arange(most, 0, -1)
                + RUN_TOKENS
                + least[start + 1 : start + 1 + most][::-1]
            )
            best = int(costs.argmin())  # the first minimum has the most rows
            least[start], sizes[start] = costs[best], most - best
        start = 0
        while start < count:
            groups.append(alike[start : start + sizes[start]].tolist())
            start += sizes[start]
    return groups
