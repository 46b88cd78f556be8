"""Rows of a calibration set as a rectangular batch on the model's device, and its targets in
tiles."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from ..data import TokenBatch


@dataclass(frozen=True)
class Chunk:
    """B rows of about T tokens, padded at the end to T, with their targets.

    ids int64[B, T]; positions and branch int64[B, T], or None for plain causal rows. sources
    int64[P]: the flat indices in [B * T] whose states predict a target, ascending and distinct.
    target_source int64[M] (index into sources, ascending), target_token int64[M]. continuation
    int64[M] (NumPy): which continuation of the batch each target belongs to.
    """

    ids: torch.Tensor
    positions: torch.Tensor | None
    branch: torch.Tensor | None
    sources: torch.Tensor
    target_source: torch.Tensor
    target_token: torch.Tensor
    continuation: np.ndarray
    rows: np.ndarray

    @property
    def num_tokens(self) -> int:
        return self.ids.numel()

    @cached_property
    def continuations(self) -> np.ndarray:
        """The continuations of the batch that have their targets here, all of them, ascending."""
        return np.unique(self.continuation)

    @cached_property
    def key(self) -> bytes:
        """SHA-256 of the shape, the tokens, and the targets by continuation: what a sum over this
        chunk is a sum of."""
        parts = (
            self.ids,
            self.positions,
            self.branch,
            self.sources,
            self.target_source,
            self.target_token,
        )
        arrays = [None if part is None else part.cpu().numpy() for part in parts]
        digest = hashlib.sha256()
        for array in (*arrays, np.searchsorted(self.continuations, self.continuation)):
            digest.update(
                b"none"
                if array is None
                else f"{array.shape}".encode() + array.astype("<i8").tobytes()
            )
        return digest.digest()

    def tiles(self, size: int) -> list[Tile]:
        """The targets, cut into tiles of at most `size` positions."""
        tiles = []
        starts = range(0, len(self.sources), size)
        bounds = np.searchsorted(
            self.target_source.cpu().numpy(), [*starts, len(self.sources)]
        ).tolist()
        for start, first, last in zip(starts, bounds[:-1], bounds[1:], strict=True):
            positions = slice(start, min(start + size, len(self.sources)))
            rows = self.target_source[first:last] - start
            tiles.append(
                Tile(positions, self.sources[positions], rows, self.target_token[first:last])
            )
        return tiles


@dataclass(frozen=True)
class Tile:
    """Positions of a chunk that go through the head together.

    positions: which of the chunk's sources; sources int64[P]: those. rows int64[M] (ascending, into
    the P positions) and tokens int64[M]: the targets.
    """

    positions: slice
    sources: torch.Tensor
    rows: torch.Tensor
    tokens: torch.Tensor

    @cached_property
    def table(self) -> torch.Tensor:
        """The tokens by position, int64[P, K], filled up with -1; K is at least 1."""
        table = self.tokens.new_full((len(self.sources), self._columns[1]), -1)
        table.view(-1)[self.places] = self.tokens
        return table

    @cached_property
    def places(self) -> torch.Tensor:
        """Where each target stands in the flattened table, int64[M]."""
        column, count = self._columns
        return self.rows * count + column

    @cached_property
    def _columns(self) -> tuple[torch.Tensor, int]:
        """Each target's number among those of its position, and the most that a position has."""
        per_row = torch.bincount(self.rows, minlength=len(self.sources))
        column = (
            torch.arange(len(self.rows), device=self.rows.device)
            - (per_row.cumsum(0) - per_row)[self.rows]
        )
        return column, max(1, int(per_row.max()))


def make_chunk(batch: TokenBatch, rows: Sequence[int] | np.ndarray, device: torch.device) -> Chunk:
    """One chunk of these rows, which must be all trees or all plain."""
    rows = np.asarray(rows)
    width = int(batch.row_lengths[rows].max())
    is_tree = bool(batch.row_is_tree[rows[0]])
    # padding sees itself and the trunk, and nothing sees it: it comes last, in a branch of its own
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

    def on_device(parts: list[np.ndarray]) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(parts)).to(device)

    return Chunk(
        ids=torch.from_numpy(ids).to(device),
        positions=torch.from_numpy(positions).to(device) if is_tree else None,
        branch=torch.from_numpy(branch).to(device) if is_tree else None,
        sources=on_device(sources),
        target_source=on_device(target_sources),
        target_token=on_device(tokens),
        continuation=np.concatenate(continuations),
        rows=rows,
    )
