"""A calibration set cut into fixed chunks of rows, each a rectangular batch on the model's device.

The chunks are cut once, from the calibration set and the byte budget alone. Every mask is run over the same
chunks, so that every matrix product has the same shape whatever else is scored in the same call: that is what
makes a score bit-identical alone and in company.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from .calibration import TokenBatch

LEAST_LOOK = 16  # rows of the first look, at least; and one in 16 of all
LEAST_FILL = 7 / 8  # rows of a chunk are at least this share of its longest, so that little is padded


@dataclass(frozen=True)
class Chunk:
    """B rows of about T tokens, padded at the end to T, with their targets.

    ids int64[B, T]; positions and branch int64[B, T], or None for plain causal rows.
    sources int64[P]: the flat indices in [B * T] whose states predict a target, ascending and distinct.
    target_source int64[M] (index into sources, ascending), target_token int64[M].
    continuation int64[M] (NumPy): which continuation of the batch each target belongs to.
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
        """SHA-256 of the shape, the tokens, and the targets by continuation: what a sum over this chunk is a sum of."""
        parts = (self.ids, self.positions, self.branch, self.sources, self.target_source, self.target_token)
        arrays = [None if part is None else part.cpu().numpy() for part in parts]
        digest = hashlib.sha256()
        for array in (*arrays, np.searchsorted(self.continuations, self.continuation)):
            digest.update(b"none" if array is None else f"{array.shape}".encode() + array.astype("<i8").tobytes())
        return digest.digest()

    def tiles(self, size: int) -> list[Tile]:
        """The targets, cut into tiles of at most `size` positions."""
        tiles = []
        starts = range(0, len(self.sources), size)
        bounds = np.searchsorted(self.target_source.cpu().numpy(), [*starts, len(self.sources)]).tolist()
        for start, first, last in zip(starts, bounds[:-1], bounds[1:], strict=True):
            positions = slice(start, min(start + size, len(self.sources)))
            rows = self.target_source[first:last] - start
            tiles.append(Tile(positions, self.sources[positions], rows, self.target_token[first:last]))
        return tiles


@dataclass(frozen=True)
class Tile:
    """Positions of a chunk that go through the head together.

    positions: which of the chunk's sources; sources int64[P]: those. rows int64[M] (ascending, into the P positions)
    and tokens int64[M]: the targets.
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
        column = torch.arange(len(self.rows), device=self.rows.device) - (per_row.cumsum(0) - per_row)[self.rows]
        return column, max(1, int(per_row.max()))


def make_chunks(batch: TokenBatch, max_tokens: int, device: torch.device) -> list[Chunk]:
    """Cut a batch into chunks of at most max_tokens tokens each, padding included (but at least one row each).

    No chunk crosses a look, or is larger than the first, so that a few samples cost about their share. Within a look,
    rows are sorted by kind and length, so that a chunk holds rows of nearly one length.
    """
    looks = look_rows(batch.num_rows)
    groups = [group for rows in looks for group in _group_rows(batch, rows, max_tokens, len(looks[0]))]
    return [make_chunk(batch, rows, device) for rows in groups]


def look_rows(num_rows: int) -> list[np.ndarray]:
    """The rows of each look of a race, in the order in which they are looked at.

    Rows stand in a random order, the same for every set of so many. The first look is at a sixteenth of them (but 16
    rows, and at all where there are fewer than twice as many), and each later one adds two fifths to what has been
    seen: on the demo model's triples this took a tenth less work than doubling. The last adds a quarter or more.
    """
    order = np.random.default_rng(num_rows).permutation(num_rows)
    bound = max(LEAST_LOOK, -(-num_rows // 16))
    bounds = [0]
    while num_rows >= 2 * LEAST_LOOK and 5 * bound <= 4 * num_rows:
        bounds.append(bound)
        bound += 2 * bound // 5
    bounds.append(num_rows)
    return [np.sort(order[start:stop]) for start, stop in itertools.pairwise(bounds)]


def _group_rows(batch: TokenBatch, rows: np.ndarray, max_tokens: int, max_rows: int) -> list[np.ndarray]:
    lengths, is_tree = batch.row_lengths, batch.row_is_tree
    groups: list[list[int]] = []
    for row in rows[np.lexsort((rows, -lengths[rows], is_tree[rows]))].tolist():
        if groups:
            first, size = groups[-1][0], len(groups[-1])
            alike = is_tree[row] == is_tree[first] and lengths[row] >= LEAST_FILL * lengths[first]
            if alike and size < max_rows and (size + 1) * lengths[first] <= max_tokens:
                groups[-1].append(row)
                continue
        groups.append([row])
    return [np.asarray(group) for group in groups]


def make_chunk(batch: TokenBatch, rows: Sequence[int], device: torch.device) -> Chunk:
    """One chunk of these rows, which must be all trees or all plain."""
    rows = np.asarray(rows)
    width = int(batch.row_lengths[rows].max())
    is_tree = bool(batch.row_is_tree[rows[0]])
    # padding sees itself and the trunk, and nothing sees it: it comes last, in a branch of its own
    ids, positions, branch = np.zeros((3, len(rows), width), dtype=np.int64)
    branch -= 1
    sources, target_sources, tokens, continuations = [], [], [], []
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
