"""Residual add and RMSNorm in one pass, on rows of a pool of states: the fused skip of a layer."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import FLOATS, MAX_ROW, Config, check, check_output, check_tensor, norm_config, on_device
from .numeric import cast


@triton.jit
def add_rms_norm_kernel(
    p_states,
    p_branch,
    p_source,
    p_weight,
    p_residual,
    p_target,
    p_normed,
    eps,
    D: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    i_from = i_row
    if p_source is not None:
        i_from = tl.load(p_source + i_row).to(tl.int64)
    b_state = tl.load(p_states + i_from * D + o_d, mask=m_d, other=0.0)  # [D]
    b_x = b_state.to(tl.float32)
    if p_branch is not None:
        b_x += tl.load(p_branch + i_row * D + o_d, mask=m_d, other=0.0).to(tl.float32)
        # the norm reads what the next layer will read: the rounded sum
        b_x = cast(b_x, b_state.dtype).to(tl.float32)
    if p_residual is not None:
        i_to = i_row
        if p_target is not None:
            i_to = tl.load(p_target + i_row).to(tl.int64)
        tl.store(p_residual + i_to * D + o_d, cast(b_x, b_state.dtype), mask=m_d)
    b_scale = tl.load(p_weight + o_d, mask=m_d, other=0.0).to(tl.float32)
    if UNIT_OFFSET:
        b_scale += 1.0
    b_mean_square = tl.sum(b_x * b_x, axis=0) / D
    b_normed = b_x * tl.rsqrt(b_mean_square + eps) * b_scale
    tl.store(p_normed + i_row * D + o_d, cast(b_normed, p_normed.dtype.element_ty), mask=m_d)


def add_rms_norm(
    states: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    branch: torch.Tensor | None = None,
    source: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    target: torch.Tensor | None = None,
    normed: torch.Tensor | None = None,
    unit_offset: bool = False,
    config: Config | None = None,
) -> torch.Tensor:
    """x_m = states[source_m] + branch_m; residual[target_m] = x_m; returns normed_m = x_m / rms(x_m) * weight.

    states [N, D]: the pool that rows are read from, source int[M] (None: rows 0 to M - 1 in order).
    branch [M, D], what a unit adds; None adds nothing. The sum is rounded to the pool's dtype before the norm.
    residual [N', D], where the sums go, at rows target int[M] (None: 0 to M - 1); None keeps none of them. It may be
        `states` itself if no program's target is another's source. Targets must differ, indices be in range.
    normed [M, D]: made when None. unit_offset: the scale is 1 + weight (Gemma).
    """
    check(states.dim() == 2, f"states must have shape [N, D], not {list(states.shape)}")
    size, device = states.shape[1], states.device
    check(0 < size <= MAX_ROW, f"states must have 1 to {MAX_ROW} columns, not {size}")
    check_tensor("states", states, (None, size), FLOATS, device)
    check_tensor("weight", weight, (size,), FLOATS, device)
    given = next((x for x in (source, branch, target, normed) if x is not None), states)
    count = given.shape[0]
    indices = (torch.int32, torch.int64)
    if branch is not None:
        check_tensor("branch", branch, (count, size), states.dtype, device)
    if source is not None:
        check_tensor("source", source, (count,), indices, device)
    else:
        check(count <= len(states), f"without a source, states must have at least {count} rows, not {len(states)}")
    if target is not None:
        check(residual is not None, "target needs a residual to write to")
        check_tensor("target", target, (count,), indices, device)
    if residual is not None:
        check_tensor("residual", residual, (None, size), states.dtype, device)
        enough = target is not None or len(residual) >= count
        check(enough, f"without a target, residual must have at least {count} rows, not {len(residual)}")
    normed = check_output("normed", normed, (count, size), states.dtype, device)
    config = config or norm_config(size)
    check(config["BLOCK_D"] >= size, f"BLOCK_D must be at least {size}, not {config['BLOCK_D']}")
    if count:
        with on_device(states):
            add_rms_norm_kernel[(count,)](
                states,
                branch,
                source,
                weight,
                residual,
                target,
                normed,
                eps,
                D=size,
                UNIT_OFFSET=unit_offset,
                **config.launch,
            )
    return normed
