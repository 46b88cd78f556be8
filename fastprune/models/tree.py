"""Which earlier tokens of its row a token sees: the trunk's, and those of its own branch."""

from __future__ import annotations

import torch
from torch.nn import functional as F

FEW = 8
SEGMENT = 256  # queries that look at their keys together


def tree_mask(positions: torch.Tensor, branch: torch.Tensor, window: int | None) -> torch.Tensor:
    """bool[B, 1, T, T], True = seen, for rows with positions and branch int64[B, T] (branch 0 is
    the trunk).

    window: only keys less than that many positions away.
    """
    everything = torch.arange(branch.shape[1], device=branch.device)
    return seen_by(everything, everything, positions, branch, window)[:, None]


def seen_by(
    queries: torch.Tensor,
    keys: torch.Tensor,
    positions: torch.Tensor,
    branch: torch.Tensor,
    window: int | None,
) -> torch.Tensor:
    """bool[B, Q, K], True = seen: the part of `tree_mask` at these places, int64[Q] and int64[K],
    of every row."""
    query, key = branch[:, queries, None], branch[:, None, keys]
    seen = ((key == 0) | (key == query)) & (queries[:, None] >= keys)
    if window is not None:
        seen &= positions[:, queries, None] - positions[:, None, keys] < window
    return seen


def seen_runs(
    positions: torch.Tensor, branch: torch.Tensor, window: int | None
) -> torch.Tensor | None:
    """`tree_mask` as two runs of places, int32[B, T, 4], begin and end of each.

    The first is of the trunk, if a token is on a branch, the second of its own branch up to itself.
    Padding (branch -1) sees at least itself, and nothing behind it.

    None if the trunk and then each branch are not contiguous or, with a window, their positions
    skip some.
    """
    place = torch.arange(branch.shape[1], device=branch.device)
    on_trunk = branch == 0
    trunk = on_trunk.sum(dim=1, keepdim=True)
    goes_on = branch[:, 1:] == branch[:, :-1]
    steps = (
        branch.sort(dim=1).values.diff(dim=1) != 0
    )  # one between two branches, in whatever order they stand
    if bool((on_trunk != (place < trunk)).any()) or bool(
        (steps.sum(dim=1) != (~goes_on).sum(dim=1)).any()
    ):
        return None
    own = torch.where(F.pad(goes_on, (1, 0)), 0, place).cummax(dim=1).values
    shared = torch.zeros_like(own)
    if window is not None:
        if bool((goes_on & (branch[:, 1:] >= 0) & (positions.diff(dim=1) != 1)).any()):
            return None
        own = own.maximum(place - window + 1)
        shared = (positions - positions[:, :1] - window + 1).clamp(min=0).minimum(trunk)
    of_trunk = torch.where(on_trunk, 0, shared), torch.where(on_trunk, 0, trunk)
    return torch.stack([*of_trunk, own, (place + 1).expand_as(own)], dim=-1).int()


def segments(
    positions: torch.Tensor, branch: torch.Tensor, window: int | None
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """One row, int64[T] each, cut into runs of queries, int64[Q], each with the places int64[K]
    that any of it sees.

    A few queries see the trunk and a few branches: so no mask of [T, T] is ever made, nor a product
    of that size.
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
    """Some of a row's branches, int64[N]: a few (the longest, the last), or as many as give a row
    of `most_tokens` tokens.

    The longest comes first, and is one of them in any case; the trunk alone is a branch if it has
    no other.
    """
    numbers, lengths = branch.unique(return_counts=True)
    trunk = int(lengths[numbers == 0].sum())
    numbers, lengths = numbers[numbers != 0], lengths[numbers != 0]
    if not len(numbers):
        return branch.new_zeros(1)
    order = torch.cat(
        [lengths.argmax()[None], torch.arange(len(numbers), device=branch.device).flip(0)]
    )
    if most_tokens is None:
        return numbers[order[:FEW]].unique()
    fits = trunk + lengths[order].cumsum(0) <= most_tokens
    fits[0] = True
    return numbers[order[fits]].unique()
