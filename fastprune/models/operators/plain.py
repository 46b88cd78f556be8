"""Plain torch: the reference for the other sets.

`fastprune_kernels.reference` defines the operators. Those on states and heads may work in place.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

from fastprune_kernels import reference
from fastprune_kernels.reference import gated_mlp, rotary

from ..head import Head
from ..model import Model
from ..tree import tree_mask
from .rows import Rows, Segments

__all__ = ["add_rms_norm", "attention", "gated_mlp", "head", "numerics", "plan_attention", "rotary"]

name = "torch"
# the most tokens of a row whose heads share one [T, T] mask; longer rows are cut into segments
DENSE = 512


def add_rms_norm(
    states: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    *,
    branch: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    unit_offset: bool = False,
    centered: bool = False,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute norm(states + branch) * weight + bias; `residual` receives the sum."""
    x, normed = reference.add_rms_norm(states, weight, eps, branch, unit_offset, centered, bias)
    if residual is not None:
        residual.copy_(x)
    return normed


def plan_attention(
    rows: Rows, head_dim: int, grouped: bool, window: int | None, altered: bool = False
) -> object:
    """Plan the attention of a chunk's rows, once for all layers with this window.

    Args:
        rows: The rows.
        head_dim: Columns of a head.
        grouped: Whether several heads share a key head.
        window: The sliding window, or None.
        altered: Whether a soft cap or sinks alter the softmax.
    """
    window = rows.windowed(window)
    if rows.branch is None and window is None:
        return rows, None
    branch, position = rows.trees
    if rows.length <= DENSE:
        return rows, tree_mask(position, branch, window)
    return rows, [Segments(pos[None], br[None], window) for pos, br in zip(position, branch)]


def attention(
    qkv: torch.Tensor,
    plan: Any,
    num_heads: int,
    num_kv_heads: int,
    scale: float,
    soft_cap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention within each row, along its tree, by torch's kernels. [T, heads * Dh]"""
    rows, seen = plan
    heads = qkv.view(rows.num_rows, rows.length, num_heads + 2 * num_kv_heads, -1).transpose(1, 2)
    q, k, v = heads.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    attend = partial(
        F.scaled_dot_product_attention, scale=scale, enable_gqa=num_heads != num_kv_heads
    )
    if soft_cap is not None or sinks is not None:
        attend = partial(_altered_attention, scale=scale, soft_cap=soft_cap, sinks=sinks)
    if not isinstance(seen, list):
        out = attend(q, k, v, attn_mask=seen, is_causal=seen is None).transpose(1, 2)
        return out.reshape(len(qkv), -1)
    out = qkv.new_empty(rows.num_rows, rows.length, num_heads, q.shape[-1])
    for row, pieces in enumerate(seen):
        of = slice(row, row + 1) if rows.branch is not None else slice(None)
        for queries, keys, mask in pieces:
            part = attend(
                q[of][:, :, queries], k[of][:, :, keys], v[of][:, :, keys], attn_mask=mask
            )
            out[of, queries] = part.transpose(1, 2)
    return out.view(len(qkv), -1)


def head(
    model: Model,
    norm: Callable[[torch.Tensor], torch.Tensor],
    scale: float,
    soft_cap: float | None,
) -> Head:
    """A model's head on these operators, with the scale and soft cap of its logits."""
    return Head(model, norm)


def numerics() -> str:
    """The settings that decide the bits of a result besides torch's own."""
    return name


def _altered_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attn_mask: torch.Tensor | None,
    scale: float,
    soft_cap: float | None,
    sinks: torch.Tensor | None,
    is_causal: bool = False,
) -> torch.Tensor:
    """softmax(cap * tanh(scale * q k^T / cap)) v, [B, H, Q, Dh]; several heads may share keys.

    A sink [H] is one more score of its head, whose weight multiplies no value.
    """
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * (scale / (soft_cap or 1.0))
    if soft_cap is not None:
        scores = soft_cap * torch.tanh(scores)
    if is_causal:
        attn_mask = torch.ones(scores.shape[2:], dtype=torch.bool, device=q.device).tril()
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    if sinks is not None:
        of_sinks = sinks.view(-1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, of_sinks], dim=-1)
    weights = torch.softmax(scores.float(), dim=-1).to(q.dtype)
    return weights[..., : k.shape[2]] @ v
