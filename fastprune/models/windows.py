"""The sliding window of each layer, from the masks that the model's own forward passes to it.

Families differ in the keys of a config that they read. So a config or module only decides the
length of the probed row, whose masks must show every window.
"""

from __future__ import annotations

from typing import Any

import torch

from .rotary import switch_length
from .tree import tree_mask

LONGEST_PROBE = 8192  # tokens of a row whose masks are read once, when a model opens
NO_WINDOW_FORM = 0  # in place of a window, for a mask of another form than a causal window


def longest_window(hf: Any) -> int:
    """The largest number that a module or config of the model calls a window; 0 if none does."""
    sources: list[dict] = []
    for module in hf.modules():
        sources.append(vars(module))
        config = getattr(module, "config", None)
        if hasattr(config, "__dict__"):
            sources.append(vars(config))
    sizes = (
        value
        for source in sources
        for name, value in source.items()
        if "window" in name and isinstance(value, int) and not isinstance(value, bool)
    )
    return max(sizes, default=0)


def probe_length(model: Any) -> int:
    """The length of the row whose masks are read when a model opens.

    It exceeds every window, if the model's positions and `LONGEST_PROBE` allow that.
    """
    limits = (LONGEST_PROBE, model.max_positions, switch_length(model.config))
    return min(longest_window(model.hf) + 1, *(limit for limit in limits if limit is not None))


def window_of(mask: torch.Tensor | None) -> int | None:
    """Read the sliding window from a layer's mask of a plain row.

    Args:
        mask: [1, 1, T, T]: True at visible keys, or 0 there if it is not boolean.

    Returns:
        The window. None if the mask hides no earlier token, and `NO_WINDOW_FORM` for another form.
    """
    if mask is None:
        return None
    if not isinstance(mask, torch.Tensor) or mask.dim() != 4 or mask.shape[2] != mask.shape[3]:
        return NO_WINDOW_FORM
    seen = (mask if mask.dtype == torch.bool else mask == 0)[:1]
    length = seen.shape[2]
    steps = torch.arange(length, device=seen.device)[None]
    size = int(seen[0, 0, -1].sum())
    window = size if size < length else None
    expected = tree_mask(steps, torch.zeros_like(steps), window)
    return window if torch.equal(seen, expected.expand_as(seen)) else NO_WINDOW_FORM


def windows_of(masks: list[torch.Tensor | None]) -> list[int | None]:
    """`window_of` each layer's mask; layers that share a mask share the work."""
    windows: dict[int, int | None] = {}
    for mask in masks:
        if id(mask) not in windows:
            windows[id(mask)] = window_of(mask)
    return [windows[id(mask)] for mask in masks]
