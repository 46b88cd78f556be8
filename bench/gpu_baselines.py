"""The baselines of linear_nll: other ways to get losses from states and a head. Each
returns float[P]."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch.nn import functional as F

from fastprune_kernels.launch import on_device

Loss = Callable[[], torch.Tensor]


def losses(
    hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, chunk: int
) -> dict[str, Loss]:
    """By name, those that are installed. hidden [P, D], weight [V, D], target int64[P]; chunk: how
    many positions' logits are held at once."""

    def chunked(of_logits: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Loss:
        def run() -> torch.Tensor:
            parts = zip(hidden.split(chunk), target.split(chunk))
            return torch.cat([of_logits(F.linear(part, weight), wanted) for part, wanted in parts])

        return run

    found = {
        f"torch, float32 logits, {chunk} at a time": chunked(
            lambda logits, wanted: F.cross_entropy(logits.float(), wanted, reduction="none")
        ),
        f"cuBLAS, one pass over its logits, {chunk} at a time": chunked(nll_of_logits),
    }
    if hasattr(F, "linear_cross_entropy"):  # torch 2.13 and later
        found["torch, linear_cross_entropy"] = lambda: F.linear_cross_entropy(
            hidden, weight, target, reduction="none"
        )
    try:
        from liger_kernel.transformers.fused_linear_cross_entropy import (
            LigerFusedLinearCrossEntropyLoss,
        )
    except ImportError:
        pass
    else:
        liger = LigerFusedLinearCrossEntropyLoss(reduction="none")
        found["Liger"] = lambda: liger(weight, hidden, target)
    try:
        from cut_cross_entropy import linear_cross_entropy
    except ImportError:
        pass
    else:
        found["Cut Cross-Entropy"] = lambda: linear_cross_entropy(
            hidden, weight, target, reduction="none"
        )
    return found


def nll_of_logits(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of logits [P, V] in their own dtype, each read once. Returns float32[P]."""
    out = logits.new_empty(len(logits), dtype=torch.float32)
    with on_device(logits):
        nll_of_logits_kernel[(len(logits),)](
            logits, target, out, logits.shape[1], BLOCK_V=4096, num_warps=8
        )
    return out


@triton.jit
def nll_of_logits_kernel(p_logits, p_target, p_nll, vocab, BLOCK_V: tl.constexpr):
    i_p = tl.program_id(0).to(tl.int64)
    p_row = p_logits + i_p * vocab
    b_max = tl.full([BLOCK_V], -1e30, tl.float32)
    b_sum = tl.zeros([BLOCK_V], tl.float32)
    for i_v in range(0, vocab, BLOCK_V):
        o_v = i_v + tl.arange(0, BLOCK_V)
        b_logits = tl.load(p_row + o_v, mask=o_v < vocab, other=float("-inf")).to(tl.float32)
        b_new_max = tl.maximum(b_max, b_logits)
        b_sum = b_sum * tl.exp(b_max - b_new_max) + tl.exp(b_logits - b_new_max)
        b_max = b_new_max
    greatest = tl.max(b_max, axis=0)
    total = tl.sum(b_sum * tl.exp(b_max - greatest), axis=0)
    own = tl.load(p_row + tl.load(p_target + i_p)).to(tl.float32)
    tl.store(p_nll + i_p, tl.log(total) + greatest - own)
