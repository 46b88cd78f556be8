"""Residual add and RMSNorm in one pass. M states of D columns."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import (
    FLOATS,
    MAX_ROW,
    Config,
    check,
    check_output,
    check_tensor,
    norm_config,
    on_device,
)
from .numeric import cast


@triton.jit
def add_rms_norm_kernel(
    p_states,
    p_branch,
    p_weight,
    p_bias,
    p_residual,
    p_normed,
    eps,
    D: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
    CENTERED: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    b_state = tl.load(p_states + i_row * D + o_d, mask=m_d, other=0.0)  # [D]
    b_x = b_state.to(tl.float32)
    if p_branch is not None:
        b_x += tl.load(p_branch + i_row * D + o_d, mask=m_d, other=0.0).to(tl.float32)
        # the norm reads the same value as the next layer: the rounded sum
        b_x = cast(b_x, b_state.dtype).to(tl.float32)
    if p_residual is not None:
        tl.store(p_residual + i_row * D + o_d, cast(b_x, b_state.dtype), mask=m_d)
    if CENTERED:
        b_x = tl.where(m_d, b_x - tl.sum(b_x, axis=0) / D, 0.0)
    b_mean_square = tl.sum(b_x * b_x, axis=0) / D
    b_normed = b_x * tl.rsqrt(b_mean_square + eps)
    if p_weight is not None:
        b_scale = tl.load(p_weight + o_d, mask=m_d, other=0.0).to(tl.float32)
        if UNIT_OFFSET:
            b_scale += 1.0
        b_normed *= b_scale
    if p_bias is not None:
        b_normed += tl.load(p_bias + o_d, mask=m_d, other=0.0).to(tl.float32)
    tl.store(p_normed + i_row * D + o_d, cast(b_normed, p_normed.dtype.element_ty), mask=m_d)


def add_rms_norm(
    states: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    *,
    branch: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    normed: torch.Tensor | None = None,
    unit_offset: bool = False,
    centered: bool = False,
    bias: torch.Tensor | None = None,
    config: Config | None = None,
) -> torch.Tensor:
    """Compute x = states + branch, and x / rms(x) * weight + bias.

    Args:
        states: [M, D].
        weight: [D]; None for 1.
        eps: Added to the mean square.
        branch: The term that a unit adds, [M, D]; None adds nothing. The sum is rounded to the
            dtype of the states before the norm.
        residual: Receives x, [M, D]; it may be `states` itself. None keeps no sums.
        normed: Receives the result, [M, D]; None makes a new tensor.
        unit_offset: The scale is 1 + weight (Gemma).
        centered: The norm is taken of x without its mean (LayerNorm).
        bias: [D]; None for 0.
        config: The block size; by default that for D.

    Returns:
        normed, [M, D].

    Raises:
        ValueError: An argument has another shape, dtype or device.
    """
    check(states.dim() == 2, lambda: f"states must have shape [M, D], not {list(states.shape)}")
    (count, size), device = states.shape, states.device
    check(0 < size <= MAX_ROW, lambda: f"states must have 1 to {MAX_ROW} columns, not {size}")
    check_tensor("states", states, (count, size), FLOATS, device)
    if weight is not None:
        check_tensor("weight", weight, (size,), FLOATS, device)
    if bias is not None:
        check_tensor("bias", bias, (size,), FLOATS, device)
    if branch is not None:
        check_tensor("branch", branch, (count, size), states.dtype, device)
    if residual is not None:
        check_tensor("residual", residual, (count, size), states.dtype, device)
    normed = check_output("normed", normed, (count, size), states.dtype, device)
    config = config or norm_config(size)
    check(
        config["BLOCK_D"] >= size,
        lambda: f"BLOCK_D must be at least {size}, not {config['BLOCK_D']}",
    )
    if count:
        with on_device(states):
            add_rms_norm_kernel[(count,)](
                states,
                branch,
                weight,
                bias,
                residual,
                normed,
                eps,
                D=size,
                UNIT_OFFSET=unit_offset,
                CENTERED=centered,
                **config.launch,
            )
    return normed
