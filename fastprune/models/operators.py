"""The operators of the fused path: Triton's on a GPU, csrc's on a CPU, and plain torch's, which
define them.

Every set has the same methods. States are [T, D], the rows of a chunk one after the other; `qkv` is
packed as [T, (heads + 2 kv_heads) * Dh], `gate_up` as [T, 2F].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch.nn import functional as F

from fastprune_kernels import reference

from . import native
from .head import Head, TritonHead
from .model import Model
from .tree import seen_by, seen_runs, segments, tree_mask

# tokens of a row: up to here one mask of [T, T] serves all its heads, longer ones go by segments
DENSE = 512


@dataclass(frozen=True)
class Rows:
    """The rows of a chunk, B of T tokens. positions and branch int64[B, T]; None for plain causal
    rows."""

    num_rows: int
    length: int
    positions: torch.Tensor | None
    branch: torch.Tensor | None
    device: torch.device

    def windowed(self, window: int | None) -> int | None:
        """The sliding window, None if every row fits into it."""
        return None if window is None or window >= self.length else window

    @cached_property
    def trees(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Branch and position of every token, int64[B, T]; of plain rows, which are all alike,
        int64[1, T]."""
        if self.branch is not None:
            assert self.positions is not None
            return self.branch, self.positions
        steps = torch.arange(self.length, device=self.device)[None]
        return torch.zeros_like(steps), steps


@dataclass(frozen=True)
class Segments:
    """A long row, positions and branch int64[1, T], cut into segments: (queries, keys, which of
    these they see).

    Each iteration computes the masks again, so that one segment's mask at a time is held.
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
    """norm(states + branch) * weight + bias; the sum goes to `residual` as well."""
    x, normed = reference.add_rms_norm(states, weight, eps, branch, unit_offset, centered, bias)
    if residual is not None:
        residual.copy_(x)
    return normed


class TorchOperators:
    """Plain torch: the reference for the other sets.

    `reference` says what each operator computes; those on states and heads may work in place.
    """

    name = "torch"
    add_rms_norm: Callable[..., torch.Tensor] = staticmethod(add_rms_norm)
    rotary: Callable[..., torch.Tensor] = staticmethod(reference.rotary)
    gated_mlp: Callable[..., torch.Tensor] = staticmethod(reference.gated_mlp)

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype

    def plan_attention(
        self, rows: Rows, head_dim: int, grouped: bool, window: int | None, capped: bool = False
    ) -> object:
        """The plan of a chunk's rows for `attention`, made once for all layers with this window.

        grouped: whether several heads share a key head. capped: whether scores have a soft cap.
        """
        window = rows.windowed(window)
        if rows.branch is None and window is None:
            return rows, None
        branch, position = rows.trees
        if rows.length <= DENSE:
            return rows, tree_mask(position, branch, window)
        return rows, [Segments(pos[None], br[None], window) for pos, br in zip(position, branch)]

    def attention(
        self,
        qkv: torch.Tensor,
        plan: Any,
        num_heads: int,
        num_kv_heads: int,
        scale: float,
        soft_cap: float | None = None,
    ) -> torch.Tensor:
        """[T, heads * Dh]: causal attention within each row, along its tree, by torch's fused
        kernels."""
        rows, seen = plan
        heads = qkv.view(rows.num_rows, rows.length, num_heads + 2 * num_kv_heads, -1).transpose(
            1, 2
        )
        q, k, v = heads.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
        attend = partial(
            F.scaled_dot_product_attention, scale=scale, enable_gqa=num_heads != num_kv_heads
        )
        if soft_cap is not None:
            attend = partial(_capped_attention, scale=scale, soft_cap=soft_cap)
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
        self,
        model: Model,
        norm: Callable[[torch.Tensor], torch.Tensor],
        scale: float,
        soft_cap: float | None,
    ) -> Head:
        """A model's head, for these operators. scale, soft_cap: of its logits."""
        return Head(model, norm)

    def numerics(self) -> str:
        """The settings that decide the bits of a result besides torch's own."""
        return self.name


def _capped_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attn_mask: torch.Tensor | None,
    scale: float,
    soft_cap: float,
    is_causal: bool = False,
) -> torch.Tensor:
    """softmax(cap * tanh(scale * q k^T / cap)) v, [B, H, Q, Dh]; several heads may share keys."""
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    scores = soft_cap * torch.tanh(q @ k.transpose(2, 3) * (scale / soft_cap))
    if is_causal:
        attn_mask = torch.ones(scores.shape[2:], dtype=torch.bool, device=q.device).tril()
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    return torch.softmax(scores.float(), dim=-1).to(q.dtype) @ v


class NativeOperators(TorchOperators):
    """csrc's, on a CPU; matrix products are torch's."""

    name = "native"
    add_rms_norm = staticmethod(native.add_rms_norm)
    rotary = staticmethod(native.rotary)
    gated_mlp = staticmethod(native.gated_mlp)

    def plan_attention(
        self, rows: Rows, head_dim: int, grouped: bool, window: int | None, capped: bool = False
    ) -> object:
        """Two runs of places for each token; rows whose branches do not each stand in one piece go
        to torch."""
        branch, position = rows.trees
        seen = seen_runs(position, branch, rows.windowed(window))
        if seen is None:
            return super().plan_attention(rows, head_dim, grouped, window, capped)
        return seen

    def attention(
        self,
        qkv: torch.Tensor,
        plan: Any,
        num_heads: int,
        num_kv_heads: int,
        scale: float,
        soft_cap: float | None = None,
    ) -> torch.Tensor:
        heads = num_heads, num_kv_heads
        if isinstance(plan, torch.Tensor):
            return native.attention(qkv, plan, *heads, scale, soft_cap=soft_cap)
        return super().attention(qkv, plan, *heads, scale, soft_cap)

    def numerics(self) -> str:
        return f"{self.name} {native.instruction_set()}"


class TritonOperators(TorchOperators):
    """Triton's, on a GPU; matrix products are torch's, and attention over plain rows, see
    `plan_attention`."""

    name = "triton"

    def __init__(self, dtype: torch.dtype):
        from fastprune_kernels import attention, gated_mlp, norm, rope

        super().__init__(dtype)
        self._attention = attention
        self.add_rms_norm = norm.add_rms_norm
        self.rotary, self.gated_mlp = rope.rotary, gated_mlp.gated_mlp

    def plan_attention(
        self, rows: Rows, head_dim: int, grouped: bool, window: int | None, capped: bool = False
    ) -> object:
        """Plain rows go to torch's flash attention if it serves them, and in float32 to its
        memory-efficient kernel. This one takes no grouped heads: torch would hold all scores of a
        row, so they go to tree_attention, as trees, windows and soft caps do."""
        window = rows.windowed(window)
        plain = rows.branch is None and window is None and not capped
        if plain and not (grouped and self.dtype is torch.float32):
            return super().plan_attention(rows, head_dim, grouped, window)
        branch, position = (x.expand(rows.num_rows, -1).flatten() for x in rows.trees)
        starts = torch.arange(0, len(branch) + 1, rows.length)
        return self._attention.plan_tree(
            starts,
            branch,
            position,
            head_dim=head_dim,
            dtype=self.dtype,
            device=rows.device,
            window=window,
        )

    def attention(
        self,
        qkv: torch.Tensor,
        plan: Any,
        num_heads: int,
        num_kv_heads: int,
        scale: float,
        soft_cap: float | None = None,
    ) -> torch.Tensor:
        heads = num_heads, num_kv_heads
        if isinstance(plan, self._attention.TreePlan):
            return self._attention.tree_attention(qkv, plan, *heads, scale=scale, soft_cap=soft_cap)
        return super().attention(qkv, plan, *heads, scale, soft_cap)

    def head(
        self,
        model: Model,
        norm: Callable[[torch.Tensor], torch.Tensor],
        scale: float,
        soft_cap: float | None,
    ) -> Head:
        if model.output_head.bias is not None:
            return Head(model, norm)
        return TritonHead(model, norm, scale, soft_cap)

    def numerics(self) -> str:
        import triton

        return f"{self.name} {triton.__version__}"


OPERATORS = {
    operators.name: operators for operators in (TorchOperators, NativeOperators, TritonOperators)
}


def fast_operators(device: torch.device, dtype: torch.dtype) -> str | None:
    """The name of the set made for a device, None if none can run."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return None
    if device.type == "cuda":
        try:
            from fastprune_kernels.launch import architecture

            architecture(device)
        except (ImportError, ValueError):
            return None
        return "triton"
    if device.type == "cpu" and dtype != torch.float16:
        return "native" if native.available() else None
    return None
