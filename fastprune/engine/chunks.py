"""Rows of a calibration set as a rectangle of tokens, and their targets, cut into tiles.

B rows, T tokens of the longest row, P positions that predict targets, M targets, C continuations.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from ..data import TokenBatch
from ..models.head import Targets


@dataclass(frozen=True)
class ChunkRows:
    """B rows of at most T tokens, padded at the end to T, with their targets, as NumPy arrays.

    Attributes:
        rows: Numbers of the batch's rows, int64[B].
        num_read: The number of their tokens, without padding.
        ids: Token ids, int64[B, T].
        positions: Positions of a tree's tokens, int64[B, T]; None for plain causal rows.
        branch: Branches of a tree's tokens, int64[B, T]; None for plain causal rows.
        sources: Indices in [B * T] of the states that predict targets, int64[P], ascending.
        target_source: The index in `sources` of each target, int64[M], ascending.
        target_token: The targets, int64[M].
        continuation: The batch's continuation of each target, int64[M].
    """

    rows: np.ndarray
    num_read: int
    ids: np.ndarray
    positions: np.ndarray | None
    branch: np.ndarray | None
    sources: np.ndarray
    target_source: np.ndarray
    target_token: np.ndarray
    continuation: np.ndarray

    @property
    def num_tokens(self) -> int:
        return self.ids.size

    @cached_property
    def continuations(self) -> np.ndarray:
        """The batch's continuations with targets in this chunk, ascending, int64[C]."""
        return np.unique(self.continuation)

    @cached_property
    def places(self) -> np.ndarray:
        """The index in `continuations` of each target's continuation, int64[M]."""
        return np.searchsorted(self.continuations, self.continuation)

    @cached_property
    def key(self) -> bytes:
        """SHA-256 of the shape, the tokens, and the targets by continuation."""
        digest = hashlib.sha256()
        for array in (
            self.ids,
            self.positions,
            self.branch,
            self.sources,
            self.target_source,
            self.target_token,
            self.places,
        ):
            digest.update(
                b"none"
                if array is None
                else f"{array.shape}".encode() + array.astype("<i8").tobytes()
            )
        return digest.digest()

    def to(self, device: torch.device) -> Chunk:
        """Copy the rows to tensors on a device."""
        numbers = (self.ids, self.positions, self.branch)
        targets = (self.sources, self.target_source, self.target_token)
        ids, positions, branch = (
            None if array is None else torch.from_numpy(array).to(device) for array in numbers
        )
        assert ids is not None
        sources, target_source, target_token = (
            torch.from_numpy(array).to(device) for array in targets
        )
        return Chunk(
            self.num_read,
            ids,
            positions,
            branch,
            sources,
            target_source,
            target_token,
            self.continuation,
        )


@dataclass(frozen=True)
class Chunk:
    """The rows of a chunk and their targets as tensors on the model's device; see `ChunkRows`."""

    num_read: int
    ids: torch.Tensor
    positions: torch.Tensor | None
    branch: torch.Tensor | None
    sources: torch.Tensor
    target_source: torch.Tensor
    target_token: torch.Tensor
    continuation: np.ndarray

    @property
    def num_tokens(self) -> int:
        return self.ids.numel()

    def tiles(self, size: int) -> list[Tile]:
        """Cut the targets into tiles of at most `size` positions."""
        tiles = []
        starts = range(0, len(self.sources), size)
        bounds = np.searchsorted(
            self.target_source.cpu().numpy(), [*starts, len(self.sources)]
        ).tolist()
        for start, first, last in zip(starts, bounds[:-1], bounds[1:], strict=True):
            positions = slice(start, min(start + size, len(self.sources)))
            sources, rows = self.sources[positions], self.target_source[first:last] - start
            tiles.append(
                Tile(len(sources), rows, self.target_token[first:last], positions, sources)
            )
        return tiles


@dataclass(frozen=True)
class Tile(Targets):
    """Positions of a chunk that go through the head together.

    Attributes:
        positions: Their range in the chunk's sources.
        sources: The chunk's sources in this range, int64[P].
    """

    positions: slice
    sources: torch.Tensor


def chunk_rows(batch: TokenBatch, rows: Sequence[int] | np.ndarray) -> ChunkRows:
    """Make a chunk of rows of a batch, which must be all trees or all plain."""
    rows = np.asarray(rows)
    is_tree = bool(batch.row_is_tree[rows[0]])
    if is_tree and batch.split_trees:
        (row,) = rows
        return _split_tree(batch, int(row))
    width = int(batch.row_lengths[rows].max())
    # padding comes last, in a branch of its own: it sees itself and the trunk, no token sees it
    ids, positions, branch = np.zeros((3, len(rows), width), dtype=np.int64)
    branch -= 1
    sources: list[np.ndarray] = []
    target_sources, tokens, continuations = [], [], []
    for i, row in enumerate(rows):
        start, stop = batch.row_starts[row], batch.row_starts[row + 1]
        ids[i, : stop - start] = batch.ids[start:stop]
        positions[i, : stop - start] = batch.positions[start:stop]
        branch[i, : stop - start] = batch.branch[start:stop]
        targets = batch.targets_by_row[row]
        distinct, inverse = np.unique(batch.target_source[targets], return_inverse=True)
        target_sources.append(inverse + sum(map(len, sources)))
        sources.append(distinct - start + i * width)
        tokens.append(batch.target_token[targets])
        continuations.append(batch.target_continuation[targets])
    return ChunkRows(
        rows=rows,
        num_read=int(batch.row_lengths[rows].sum()),
        ids=ids,
        positions=positions if is_tree else None,
        branch=branch if is_tree else None,
        sources=np.concatenate(sources),
        target_source=np.concatenate(target_sources),
        target_token=np.concatenate(tokens),
        continuation=np.concatenate(continuations),
    )


def _split_tree(batch: TokenBatch, row: int) -> ChunkRows:
    """Make a chunk of one tree, with a plain row for each branch behind a copy of the trunk.

    A trunk of [a b c] with branches [d e] and [f] runs as

        a b c d e        places of the tree's tokens  0 1 2 3 4
        a b c f .                                     0 1 2 5 .

    A target that a token of the trunk predicts is read in the first row.
    """
    start = batch.row_starts[row]
    sequences = _sequences(batch, row)
    ids = np.zeros((len(sequences), max(map(len, sequences))), dtype=np.int64)
    for i, places in enumerate(sequences):
        ids[i, : len(places)] = batch.ids[start + places]
    flat = places_of(batch, row)
    targets = batch.targets_by_row[row]
    source = flat[batch.target_source[targets] - start]
    order = np.argsort(source, kind="stable")
    sources, inverse = np.unique(source[order], return_inverse=True)
    return ChunkRows(
        rows=np.array([row]),
        num_read=sum(map(len, sequences)),
        ids=ids,
        positions=None,
        branch=None,
        sources=sources,
        target_source=inverse,
        target_token=batch.target_token[targets][order],
        continuation=batch.target_continuation[targets][order],
    )


def _sequences(batch: TokenBatch, row: int) -> list[np.ndarray]:
    """For each branch, the tokens of the trunk and the branch, as indices of the tree's row."""
    branch = batch.branch[batch.row_starts[row] : batch.row_starts[row + 1]]
    numbers = np.unique(branch[branch > 0])
    return [np.flatnonzero((branch == 0) | (branch == number)) for number in numbers]


def places_of(batch: TokenBatch, row: int) -> np.ndarray:
    """The first place of each token of a row, int64[T], when the row runs alone in a chunk.

    Places are indices in the chunk's [B * T]. A split tree repeats its trunk in every row.
    """
    length = int(batch.row_lengths[row])
    if not (batch.split_trees and batch.row_is_tree[row]):
        return np.arange(length)
    sequences = _sequences(batch, row)
    width = max(map(len, sequences))
    first = np.empty(length, dtype=np.int64)
    for i, places in reversed(list(enumerate(sequences))):  # the first sequence wins
        first[places] = i * width + np.arange(len(places))
    return first


def cut_row(batch: TokenBatch, row: int, num_tokens: int) -> ChunkRows:
    """Make a chunk of the first tokens of a plain row, with the targets among them.

    Its targets belong to a continuation behind the batch's last one. If the row's last token
    predicts a target, so does the part's last token.
    """
    whole = chunk_rows(batch, [row])
    last = num_tokens - (2 if whole.sources[-1] < whole.num_tokens - 1 else 1)
    count = int(np.searchsorted(whole.sources, last, side="right"))
    num_targets = int(np.searchsorted(whole.target_source, count))
    return ChunkRows(
        rows=whole.rows,
        num_read=num_tokens,
        ids=whole.ids[:, :num_tokens],
        positions=None,
        branch=None,
        sources=whole.sources[:count],
        target_source=whole.target_source[:num_targets],
        target_token=whole.target_token[:num_targets],
        continuation=np.full(num_targets, batch.num_continuations),
    )


class Chunks:
    """The chunks of a layout by number, and behind them parts of rows.

    Number len(chunks) + i is the row of the batch's token i, cut after that token. So a number
    identifies a chunk, to workers, too. With 2 chunks, and rows of 4 and 3 tokens, number 2 + 5 is
    the second row's part of 2 tokens.
    """

    def __init__(self, batch: TokenBatch, chunks: Sequence[Sequence[int]]):
        self._batch = batch
        self._chunks = [chunk_rows(batch, rows) for rows in chunks]
        self._cut: tuple[int, ChunkRows] | None = None  # the last part that was made

    def __len__(self) -> int:
        return len(self._chunks)

    def __iter__(self) -> Iterator[ChunkRows]:
        return iter(self._chunks)

    def __getitem__(self, number: int) -> ChunkRows:
        if number < len(self):
            return self._chunks[number]
        if self._cut is None or self._cut[0] != number:
            row, num_tokens = self._cut_of(number)
            self._cut = number, cut_row(self._batch, row, num_tokens)
        return self._cut[1]

    def number_of(self, row: int, num_tokens: int) -> int:
        """The number of the chunk that holds the first `num_tokens` tokens of a row."""
        return len(self) + int(self._batch.row_starts[row]) + num_tokens - 1

    def home(self, number: int) -> int:
        """The number of the layout's chunk that holds the row of a part; a chunk's own number."""
        return number if number < len(self) else int(self._chunk_of[self._cut_of(number)[0]])

    def _cut_of(self, number: int) -> tuple[int, int]:
        """The row of a part, and the number of its tokens."""
        token = number - len(self)
        row = int(np.searchsorted(self._batch.row_starts, token, side="right")) - 1
        return row, token - int(self._batch.row_starts[row]) + 1

    @cached_property
    def _chunk_of(self) -> np.ndarray:
        """The number of each row's chunk, int64[R]."""
        numbers = np.zeros(self._batch.num_rows, dtype=np.int64)
        for number, chunk in enumerate(self._chunks):
            numbers[chunk.rows] = number
        return numbers
