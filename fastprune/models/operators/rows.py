"""The rows of a chunk, and long rows cut into segments, for plans of attention."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch

from ..tree import seen_by, segments


@dataclass(frozen=True)
class Rows:
    """The rows of a chunk, B of T tokens.

    `positions` and `branch` are int64[B, T], or None for plain causal rows. `dtype` is that of the
    states.
    """

    num_rows: int
    length: int
    positions: torch.Tensor | None
    branch: torch.Tensor | None
    device: torch.device
    dtype: torch.dtype

    def windowed(self, window: int | None) -> int | None:
        """The sliding window; None if every row fits into it."""
        return None if window is None or window >= self.length else window

    @cached_property
    def trees(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Branch and position of every token, int64[B, T]; int64[1, T] for equal plain rows."""
        if self.branch is not None:
            assert self.positions is not None
            return self.branch, self.positions
        steps = torch.arange(self.length, device=self.device)[None]
        return torch.zeros_like(steps), steps


@dataclass(frozen=True)
class Segments:
    """A long row, positions and branch int64[1, T], cut into segments.

    Iteration yields queries, keys and their mask. It computes the masks each time, so that one
    segment's mask is held at a time.
    """

    positions: torch.Tensor
    branch: torch.Tensor
    window: int | None

    @cached_property
    def _pieces(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return segments(self.positions[0], self.branch[0], self.window)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        for queries, keys in self._pieces:
            yield (
                queries,
                keys,
                seen_by(queries, keys, self.positions, self.branch, self.window)[:, None],
            )
