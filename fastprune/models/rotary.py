"""Rotary frequencies: unrounded in a model of any dtype, and the row length at which they
change."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .swap import with_replaced
from .version import plain_attributes

LENGTH_DEPENDENT = ("dynamic", "longrope")


def switch_length(config: Any) -> int | None:
    """The row length beyond which frequencies change for all rows of a chunk; None if none."""
    parameters = getattr(config, "rope_parameters", None) or {}  # one set, or one per layer type
    kinds = [p for p in parameters.values() if isinstance(p, dict) and "rope_type" in p] or [
        parameters
    ]
    changing = [kind for kind in kinds if kind.get("rope_type") in LENGTH_DEPENDENT]
    longest = getattr(config, "max_position_embeddings", None)
    lengths = [kind.get("original_max_position_embeddings") or longest for kind in changing]
    return min((length for length in lengths if length is not None), default=None)


def with_unrounded_frequencies(hf: nn.Module) -> nn.Module:
    """Return the model, or a shallow copy if `.to(dtype)` has rounded its rotary frequencies.

    No checkpoint holds these. The copy has the frequencies that the model's own code computes.
    Frequencies that differ by more than rounding were set on purpose, and stay.
    """
    for name, module in list(hf.named_modules()):
        held = [
            buffer
            for key, buffer in module.named_buffers(recurse=False)
            if key.endswith("inv_freq")
        ]
        if all(buffer.dtype == torch.float32 for buffer in held):
            continue
        try:
            fresh = type(module)(module.config).to(held[0].device)
        except Exception:  # computed by another rule than transformers' own
            continue
        fresh.training = module.training
        alike = dict(fresh.named_buffers()).keys() == dict(module.named_buffers()).keys()
        if (
            not alike
            or any(True for _ in fresh.parameters())
            or plain_attributes(fresh) != plain_attributes(module)
        ):
            continue
        if all(
            torch.equal(buffer.to(held[0].dtype), getattr(module, key))
            for key, buffer in fresh.named_buffers()
        ):
            hf = with_replaced(hf, tuple(name.split(".")), fresh)
    return hf
