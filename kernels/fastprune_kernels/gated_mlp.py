"""SwiGLU and GeGLU on the packed gate-up projection. T tokens, F columns of gate and of up."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import (
    FLOATS,
    Config,
    cdiv,
    check,
    check_output,
    check_tensor,
    gated_mlp_config,
    on_device,
)
from .numeric import cast

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")


@triton.jit
def gated_mlp_kernel(
    p_gate_up, p_out, F: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_F: tl.constexpr
):
    i_row = tl.program_id(0).to(tl.int64)
    o_f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    m_f = o_f < F
    b_gate = tl.load(p_gate_up + i_row * (2 * F) + o_f, mask=m_f, other=0.0).to(tl.float32)
    b_up = tl.load(p_gate_up + i_row * (2 * F) + F + o_f, mask=m_f, other=0.0).to(tl.float32)
    if ACTIVATION == "silu":
        b_act = b_gate / (1.0 + tl.exp(-b_gate))
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh(u)) / 2 = 1 / (1 + exp(-2u)), which does not cancel for a very negative u
        b_u = 0.7978845608028654 * (b_gate + 0.044715 * b_gate * b_gate * b_gate)
        b_act = b_gate / (1.0 + tl.exp(-2.0 * b_u))
    else:
        b_act = 0.5 * b_gate * (1.0 + tl.erf(b_gate * 0.7071067811865476))
    tl.store(p_out + i_row * F + o_f, cast(b_act * b_up, p_out.dtype.element_ty), mask=m_f)


def gated_mlp(
    gate_up: torch.Tensor,
    activation: str = "silu",
    *,
    out: torch.Tensor | None = None,
    config: Config | None = None,
) -> torch.Tensor:
    """Compute act(gate) * up.

    Args:
        gate_up: The gate, then up, [T, 2F].
        activation: "silu" (SwiGLU), "gelu" (GeGLU, by the error function) or "gelu_tanh" (GeGLU, by
            its approximation).
        out: Receives the result; None makes a new tensor.
        config: The block size; by default the one for all devices.

    Returns:
        [T, F].

    Raises:
        ValueError: An argument has another shape, dtype or device, or the activation is another.
    """
    check(
        activation in ACTIVATIONS,
        lambda: f"activation must be one of {', '.join(ACTIVATIONS)}, not {activation!r}",
    )
    check(
        gate_up.dim() == 2 and gate_up.shape[1] > 0 and gate_up.shape[1] % 2 == 0,
        lambda: f"gate_up must have shape [T, 2F], not {list(gate_up.shape)}",
    )
    count, size = gate_up.shape[0], gate_up.shape[1] // 2
    check_tensor("gate_up", gate_up, (None, 2 * size), FLOATS, gate_up.device)
    out = check_output("out", out, (count, size), gate_up.dtype, gate_up.device)
    config = config or gated_mlp_config()
    if count:
        with on_device(gate_up):
            grid = (count, cdiv(size, config["BLOCK_F"]))
            gated_mlp_kernel[grid](gate_up, out, F=size, ACTIVATION=activation, **config.launch)
    return out
