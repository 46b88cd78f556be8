"""Masks of token trees: a token sees earlier tokens of the trunk and of its own branch.

B rows of T tokens, Q queries, K keys.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

FEW = 8  # branches
SEGMENT = 256  # queries that attend together


def tree_mask(positions: torch.Tensor, branch: torch.Tensor, window: int | None) -> torch.Tensor:
    """Compute the mask of rows of token trees.

    Args:
        positions: Each token's position in its own sequence, int64[B, T].
        branch: Each token's branch, 0 for the trunk, int64[B, T].
        window: A token sees keys fewer than this number of positions away; None for all.

    Returns:
        bool[B, 1, T, T], True = seen.
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
    """A part of `tree_mask`, bool[B, Q, K], at places int64[Q] and int64[K] of every row."""
    query, key = branch[:, queries, None], branch[:, None, keys]
    seen = ((key == 0) | (key == query)) & (queries[:, None] >= keys)
    if window is not None:
        seen &= positions[:, queries, None] - positions[:, None, keys] < window
    return seen


def seen_runs(
    positions: torch.Tensor, branch: torch.Tensor, window: int | None
) -> torch.Tensor | None:
    """Compute `tree_mask` as two runs of places in the row.

    The first run covers the trunk; a token of the trunk has an empty one. The second covers the
    token's own branch, up to itself. Padding (branch -1) sees at least itself, and nothing behind
    it. A trunk of 3 tokens with branches of 2 and 1 gives, without a window,

        token        0        1        2        3        4        5
        branch       0        0        0        1        1        2
        runs     0:0 0:1  0:0 0:2  0:0 0:3  0:3 3:4  0:3 3:5  0:3 5:6

    Returns:
        Begin and end of both runs, int32[B, T, 4]. None if the trunk or a branch is not contiguous
        or, with a window, if its positions skip a number.
    """
    place = torch.arange(branch.shape[1], device=branch.device)
    on_trunk = branch == 0
    trunk = on_trunk.sum(dim=1, keepdim=True)
    goes_on = branch[:, 1:] == branch[:, :-1]
    steps = (
        branch.sort(dim=1).values.diff(dim=1) != 0
    )  # the number of branches less one, whatever their order
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
    """Cut one row into runs of queries, each with the keys that any of them sees.

    Some queries see only the trunk and a few branches. So no [T, T] mask or product is needed.

    Args:
        positions: int64[T].
        branch: int64[T].
        window: As for `tree_mask`.

    Returns:
        Pairs of queries, int64[Q], and keys, int64[K]: places in the row.
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
    """Choose some of a row's branches: the longest, then from the last one backwards.

    Args:
        branch: The branch of each token, int64[T].
        most_tokens: The most tokens of the trunk and the chosen branches; None chooses `FEW`
            branches. The longest branch is chosen in any case.

    Returns:
        Numbers of branches, int64[N]; [0] for a row that is a trunk alone.
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
