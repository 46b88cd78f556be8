"""Which earlier tokens of its row a token sees: the trunk's, and those of its own branch."""

from __future__ import annotations

from typing import Any

import torch

FEW = 8
SEGMENT = 256  # queries that look at their keys together


def tree_mask(positions: torch.Tensor, branch: torch.Tensor, window: int | None) -> torch.Tensor:
    """bool[B, 1, T, T], True = seen, for rows with positions and branch int64[B, T] (branch 0 is the trunk).

    window: only keys less than that many positions away.
    """
    everything = torch.arange(branch.shape[1], device=branch.device)
    return seen_by(everything, everything, positions, branch, window)[:, None]


def seen_by(
    queries: torch.Tensor, keys: torch.Tensor, positions: torch.Tensor, branch: torch.Tensor, window: int | None
) -> torch.Tensor:
    """bool[B, Q, K], True = seen: the part of `tree_mask` at these places, int64[Q] and int64[K], of every row."""
    query, key = branch[:, queries, None], branch[:, None, keys]
    seen = ((key == 0) | (key == query)) & (queries[:, None] >= keys)
    if window is not None:
        seen &= positions[:, queries, None] - positions[:, None, keys] < window
    return seen


def segments(
    positions: torch.Tensor, branch: torch.Tensor, window: int | None
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """One row, int64[T] each, cut into runs of queries, int64[Q], each with the places int64[K] that any of it sees.

    A few queries see the trunk and a few branches: so no mask of [T, T] is ever made, nor a product of that size.
    """
    pieces = []
    for queries in torch.arange(len(branch), device=branch.device).split(SEGMENT):
        stop = queries[-1] + 1
        key = branch[:stop]
        seen = (key == 0) | torch.isin(key, branch[queries].unique())
        if window is not None:
            seen &= positions[queries].min() - positions[:stop] < window
        pieces.append((queries, seen.nonzero()[:, 0]))
    return pieces


def few_branches(branch: torch.Tensor, most_tokens: int | None = None) -> torch.Tensor:
    """Some of a row's branches, int64[N]: a few (the longest, the last), or as many as give a row of so many tokens.

    The longest comes first, and is one of them in any case; the trunk alone is a branch where there is no other.
    """
    numbers, lengths = branch.unique(return_counts=True)
    trunk = int(lengths[numbers == 0].sum())
    numbers, lengths = numbers[numbers != 0], lengths[numbers != 0]
    if not len(numbers):
        return branch.new_zeros(1)
    order = torch.cat([lengths.argmax()[None], torch.arange(len(numbers), device=branch.device).flip(0)])
    if most_tokens is None:
        return numbers[order[:FEW]].unique()
    fits = trunk + lengths[order].cumsum(0) <= most_tokens
    fits[0] = True
    return numbers[order[fits]].unique()


def layer_windows(config: Any, num_blocks: int) -> list[int | None]:
    """The sliding window of each layer, None where attention is full."""
    window = getattr(config, "sliding_window", None)
    if getattr(config, "use_sliding_window", True) is False:
        window = None
    types = getattr(config, "layer_types", None)
    if types is None:
        return [window] * num_blocks
    return [window if kind == "sliding_attention" else None for kind in types]
