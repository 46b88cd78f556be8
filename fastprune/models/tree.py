"""Which earlier tokens of its row a token sees: the trunk's, and those of its own branch."""

from __future__ import annotations

import torch


def tree_mask(positions: torch.Tensor, branch: torch.Tensor, window: int | None) -> torch.Tensor:
    """bool[B, 1, T, T], True = seen, for rows with positions and branch int64[B, T] (branch 0 is the trunk).

    window: only keys less than that many positions away.
    """
    steps = torch.arange(branch.shape[1], device=branch.device)
    query, key = branch[:, :, None], branch[:, None, :]
    seen = ((key == 0) | (key == query)) & (steps[:, None] >= steps)
    if window is not None:
        seen &= positions[:, :, None] - positions[:, None, :] < window
    return seen[:, None]


def layer_windows(config, num_blocks: int) -> list[int | None]:
    """The sliding window of each layer, None where attention is full."""
    window = getattr(config, "sliding_window", None)
    if getattr(config, "use_sliding_window", True) is False:
        window = None
    types = getattr(config, "layer_types", None)
    if types is None:
        return [window] * num_blocks
    return [window if kind == "sliding_attention" else None for kind in types]
