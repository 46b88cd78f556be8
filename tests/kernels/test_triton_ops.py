"""Norm, rotary embedding and gated MLP by Triton's kernels."""

from __future__ import annotations

import pytest
import torch
import triton_interpreter
from kernel_checks import DEVICE, DTYPES, INTERPRETED, assert_as_exact, random
from operator_suite import MlpProperties, NormProperties, Operators, RotaryProperties

from fastprune_kernels import reference
from fastprune_kernels.gated_mlp import ACTIVATIONS, gated_mlp
from fastprune_kernels.norm import add_rms_norm
from fastprune_kernels.rope import rotary

pytestmark = pytest.mark.usefixtures("arithmetic")


@pytest.fixture
def ops():
    return Operators(add_rms_norm, rotary, gated_mlp, assert_as_exact, DEVICE, tokens=63)


@pytest.fixture(params=DTYPES)
def dtype(request):
    return request.param


@pytest.fixture(params=ACTIVATIONS)
def activation(request):
    return request.param


class TestNorm(NormProperties):
    pass


class TestRotary(RotaryProperties):
    pass


@pytest.mark.slow
class TestGatedMlp(MlpProperties):
    pass


@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_activation_far_from_zero(activation):
    """Neither end overflows into NaN."""
    gate = torch.tensor([[-1e4, -100.0, -20.0, -0.0, 20.0, 100.0, 1e4]])
    gate_up = torch.cat([gate, torch.ones_like(gate)], dim=1).to(DEVICE)
    truth = reference.gated_mlp(gate_up.double(), activation)
    # the exponential and the division, see the suite
    approximations = (0 if activation == "gelu" else 2) * truth.abs().max().item()
    same = reference.gated_mlp(gate_up, activation)
    assert_as_exact(gated_mlp(gate_up, activation), same, truth, approximations)


@pytest.mark.skipif(not INTERPRETED, reason="compiled code approximates by itself")
def test_approximate_arithmetic_is_off_by_a_little_and_always_the_same():
    gate_up = random(63, 120, seed=1)
    with triton_interpreter.approximate():
        first, second = gated_mlp(gate_up), gated_mlp(gate_up)
    exact = reference.gated_mlp(gate_up)
    assert torch.equal(first, second)
    assert (first != exact).float().mean() > 0.3
    torch.testing.assert_close(first, exact, rtol=4 * torch.finfo(torch.float32).eps, atol=0)


def test_wrong_arguments_are_named():
    with pytest.raises(
        ValueError, match="activation must be one of silu, gelu, gelu_tanh, not 'relu'"
    ):
        gated_mlp(random(3, 4), "relu")
    with pytest.raises(ValueError, match="gate_up must be contiguous"):
        gated_mlp(random(4, 6).T)
    with pytest.raises(
        ValueError, match="gate_up must be float32 or float16 or bfloat16, not float64"
    ):
        gated_mlp(random(3, 4, dtype=torch.float64))
    angles = random(50, 8)
    with pytest.raises(ValueError, match="position must be int32 or int64, not float32"):
        rotary(random(5, 128), angles, angles, random(5), 4, 2)
