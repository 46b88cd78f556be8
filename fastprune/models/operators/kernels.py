"""Triton's operators, on a GPU. Matrix products, and attention over plain rows, are torch's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton

from fastprune_kernels.attention import TreePlan, plan_tree, tree_attention
from fastprune_kernels.gated_mlp import gated_mlp
from fastprune_kernels.norm import add_rms_norm
from fastprune_kernels.rope import rotary

from ..head import Head, TritonHead
from ..model import Model
from . import plain
from .rows import Rows

__all__ = ["add_rms_norm", "attention", "gated_mlp", "head", "numerics", "plan_attention", "rotary"]

name = "triton"


def plan_attention(
    rows: Rows, head_dim: int, grouped: bool, window: int | None, altered: bool = False
) -> object:
    """Choose the kernel of attention.

    Plain rows run on torch's flash attention if it supports them, and in float32 on its
    memory-efficient kernel. The latter does not support grouped heads: torch would hold all scores
    of a row. So grouped heads in float32, trees, windows, soft caps and sinks run
    on tree_attention.
    """
    window = rows.windowed(window)
    is_plain = rows.branch is None and window is None and not altered
    if is_plain and not (grouped and rows.dtype is torch.float32):
        return plain.plan_attention(rows, head_dim, grouped, window)
    branch, position = (x.expand(rows.num_rows, -1).flatten() for x in rows.trees)
    starts = torch.arange(0, len(branch) + 1, rows.length)
    return plan_tree(
        starts,
        branch,
        position,
        head_dim=head_dim,
        dtype=rows.dtype,
        device=rows.device,
        window=window,
    )


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
    if isinstance(plan, TreePlan):
        return tree_attention(qkv, plan, *heads, scale=scale, soft_cap=soft_cap, sinks=sinks)
    return plain.attention(qkv, plan, *heads, scale, soft_cap, sinks)


def head(
    model: Model,
    norm: Callable[[torch.Tensor], torch.Tensor],
    scale: float,
    soft_cap: float | None,
) -> Head:
    if model.output_head.bias is not None:
        return Head(model, norm)
    return TritonHead(model, norm, scale, soft_cap)


def numerics() -> str:
    return f"{name} {triton.__version__}"
