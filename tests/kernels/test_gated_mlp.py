"""SwiGLU and GeGLU on the packed projection."""

from __future__ import annotations

import pytest
import torch
import triton_interpreter
from kernel_checks import DTYPES, INTERPRETED, assert_as_exact, double, nans, random

from fastprune_kernels import reference
from fastprune_kernels.gated_mlp import ACTIVATIONS, gated_mlp

pytestmark = pytest.mark.usefixtures("arithmetic")


def approximations(activation: str, truth: torch.Tensor) -> float:
    """x / (1 + exp(-x)): the exponential, which is at most all of the sum, and the division; erf is
    exact."""
    return (0 if activation == "gelu" else 2) * truth.abs().max().item()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("rows", "size"), [(63, 60), (1, 60), (3, 1), (2, 129)])
def test_activates_and_multiplies(rows, size, activation, dtype):
    gate_up = random(rows, 2 * size, dtype=dtype, seed=1, scale=3.0)
    out = nans(rows, size, dtype=dtype)
    assert gated_mlp(gate_up, activation, out=out) is out
    truth = reference.gated_mlp(double(gate_up), activation)
    assert_as_exact(
        out, reference.gated_mlp(gate_up, activation), truth, approximations(activation, truth)
    )


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_far_from_zero(activation):
    """Neither end overflows into NaN."""
    gate = torch.tensor([[-1e4, -100.0, -20.0, -0.0, 20.0, 100.0, 1e4]])
    gate_up = torch.cat([gate, torch.ones_like(gate)], dim=1).to(random(1).device)
    truth = reference.gated_mlp(double(gate_up), activation)
    assert_as_exact(
        gated_mlp(gate_up, activation),
        reference.gated_mlp(gate_up, activation),
        truth,
        approximations(activation, truth),
    )


@pytest.mark.skipif(not INTERPRETED, reason="compiled code approximates by itself")
def test_approximate_arithmetic_is_off_by_a_little_and_always_the_same():
    gate_up = random(63, 120, seed=1)
    with triton_interpreter.approximate():
        first, second = gated_mlp(gate_up), gated_mlp(gate_up)
    exact = reference.gated_mlp(gate_up)
    assert torch.equal(first, second)
    assert (first != exact).float().mean() > 0.3
    torch.testing.assert_close(first, exact, rtol=4 * torch.finfo(torch.float32).eps, atol=0)


def test_rows_have_the_same_bits_alone_and_together():
    gate_up = random(63, 120, seed=1)
    together = gated_mlp(gate_up)
    assert torch.equal(together, gated_mlp(gate_up))
    assert torch.equal(together[11:12], gated_mlp(gate_up[11:12]))


def test_wrong_arguments_are_named():
    with pytest.raises(
        ValueError, match="activation must be one of silu, gelu, gelu_tanh, not 'relu'"
    ):
        gated_mlp(random(3, 4), "relu")
    with pytest.raises(ValueError, match=r"gate_up must have shape \[T, 2F\], not \[3, 5\]"):
        gated_mlp(random(3, 5))
    with pytest.raises(ValueError, match="gate_up must be contiguous"):
        gated_mlp(random(4, 6).T)
    with pytest.raises(
        ValueError, match="gate_up must be float32 or float16 or bfloat16, not float64"
    ):
        gated_mlp(random(3, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"out must have shape \[3, 2\], not \[3, 4\]"):
        gated_mlp(random(3, 4), out=random(3, 4))
