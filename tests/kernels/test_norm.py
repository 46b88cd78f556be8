"""Residual add and RMSNorm, in one pass."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import DEVICE, DTYPES, assert_as_exact, double, nans, random

from fastprune_kernels import reference
from fastprune_kernels.norm import add_rms_norm

pytestmark = pytest.mark.usefixtures("arithmetic")

EPS = 1e-5


def approximations(truth: torch.Tensor) -> float:
    """x / root(sum / D): the root halves the error of the division, and adds a unit; all relative
    to the result."""
    return 1.5 * truth.abs().max().item()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "size"), [(63, 60), (1, 60), (5, 1), (7, 128), (3, 1025)])
@pytest.mark.parametrize(
    ("unit_offset", "centered", "biased"),
    [(False, False, False), (True, False, False), (False, True, False), (True, True, True)],
)
def test_adds_and_norms(rows, size, dtype, unit_offset, centered, biased):
    states, branch = (
        random(rows, size, dtype=dtype, seed=1),
        random(rows, size, dtype=dtype, seed=2),
    )
    weight = random(size, dtype=dtype, seed=3)
    residual, normed = nans(rows, size, dtype=dtype), nans(rows, size, dtype=dtype)
    out = {"residual": residual, "normed": normed}
    kind = {"unit_offset": unit_offset, "centered": centered}
    bias = random(size, dtype=dtype, seed=4) if biased else None
    assert add_rms_norm(states, weight, EPS, branch=branch, bias=bias, **out, **kind) is normed
    same_sum, same = reference.add_rms_norm(states, weight, EPS, branch, bias=bias, **kind)
    assert torch.equal(residual, same_sum)  # one addition in float32, rounded once
    # the norm is taken of the rounded sum
    exact = None if bias is None else bias.double()
    _, truth = reference.add_rms_norm(*double(same_sum, weight), EPS, bias=exact, **kind)
    cancelled = 0.0
    if centered:  # the mean is off by a rounding, and so is each difference from it
        spread = same_sum.double().std(dim=-1, correction=0).min().clamp(min=EPS**0.5)
        sizes = (1 + weight.abs().max()) * (1 + same_sum.abs().max())
        cancelled = 2 * float(sizes / spread)
    assert_as_exact(normed, same, truth, approximations(truth) + cancelled)


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_branch_or_residual(dtype):
    states, weight = random(63, 60, dtype=dtype, seed=1), random(60, dtype=dtype, seed=2)
    normed = nans(63, 60, dtype=dtype)
    add_rms_norm(states, weight, EPS, normed=normed)
    _, truth = reference.add_rms_norm(*double(states, weight), EPS)
    assert_as_exact(
        normed, reference.add_rms_norm(states, weight, EPS)[1], truth, approximations(truth)
    )


def test_adds_in_place():
    states, branch, weight = random(9, 60, seed=1), random(9, 60, seed=2), random(60, seed=3)
    expected = states + branch
    normed = add_rms_norm(states, weight, EPS, branch=branch, residual=states)
    assert torch.equal(states, expected)
    assert torch.equal(normed, add_rms_norm(expected, weight, EPS))


def test_rows_have_the_same_bits_alone_and_together():
    states, branch, weight = random(63, 60, seed=1), random(63, 60, seed=2), random(60, seed=3)
    together = add_rms_norm(states, weight, EPS, branch=branch)
    assert torch.equal(together, add_rms_norm(states, weight, EPS, branch=branch))
    order = torch.randperm(63, generator=torch.Generator().manual_seed(6)).to(DEVICE)[:17]
    assert torch.equal(
        together[order], add_rms_norm(states[order], weight, EPS, branch=branch[order])
    )


def test_no_rows():
    assert add_rms_norm(random(4, 60)[:0], random(60), EPS).shape == (0, 60)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": random(61)}, r"weight must have shape \[60\], not \[61\]"),
        ({"branch": random(5, 60, dtype=torch.float16)}, "branch must be float32, not float16"),
        ({"branch": random(60, 5).T}, "branch must be contiguous"),
        ({"bias": random(61)}, r"bias must have shape \[60\], not \[61\]"),
        ({"residual": random(4, 60)}, r"residual must have shape \[5, 60\], not \[4, 60\]"),
        ({"branch": random(6, 60)}, r"branch must have shape \[5, 60\], not \[6, 60\]"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    arguments = {"states": random(5, 60), "weight": random(60), "eps": EPS, **change}
    with pytest.raises(ValueError, match=message):
        add_rms_norm(**arguments)
