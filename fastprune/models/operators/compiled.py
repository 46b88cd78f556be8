"""csrc's operators, on a CPU; matrix products are torch's."""

from __future__ import annotations

from typing import Any

import torch

from .. import native
from ..native import add_rms_norm, gated_mlp, rotary
from ..tree import seen_runs
from . import plain
from .plain import head
from .rows import Rows

__all__ = ["add_rms_norm", "attention", "gated_mlp", "head", "numerics", "plan_attention", "rotary"]

name = "native"


def plan_attention(
    rows: Rows, head_dim: int, grouped: bool, window: int | None, altered: bool = False
) -> object:
    """Plan two runs of places for each token. Rows with branches in several pieces run on torch."""
    branch, position = rows.trees
    seen = seen_runs(position, branch, rows.windowed(window))
    if seen is None:
        return plain.plan_attention(rows, head_dim, grouped, window, altered)
    return seen


def attention(
    qkv: torch.Tensor,
    plan: Any,
    num_heads: int,
    num_kv_heads: int,
    scale: float,
    soft_cap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    heads = num_heads, num_kv_heads
    if isinstance(plan, torch.Tensor):
        return native.attention(qkv, plan, *heads, scale, soft_cap=soft_cap, sinks=sinks)
    return plain.attention(qkv, plan, *heads, scale, soft_cap, sinks)


def numerics() -> str:
    return f"{name} {native.instruction_set()}"
