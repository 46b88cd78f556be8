"""Residual add and RMSNorm: gathered, added, scattered, normed, in one pass."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import DEVICE, DTYPES, assert_as_exact, double, integers, nans, random

from fastprune_kernels import reference
from fastprune_kernels.norm import add_rms_norm

pytestmark = pytest.mark.usefixtures("arithmetic")

EPS = 1e-5


def approximations(truth: torch.Tensor) -> float:
    """x / root(sum / D): the root halves the error of the division, and adds a unit; all relative to the result."""
    return 1.5 * truth.abs().max().item()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "size"), [(63, 60), (1, 60), (5, 1), (7, 128), (3, 1025)])
@pytest.mark.parametrize("unit_offset", [False, True])
def test_gathers_adds_and_norms(rows, size, dtype, unit_offset):
    pool = random(rows + 9, size, dtype=dtype, seed=1)
    branch = random(rows, size, dtype=dtype, seed=2)
    weight = random(size, dtype=dtype, seed=3)
    source = integers(rows, high=len(pool), seed=4)
    target = torch.randperm(rows + 5, generator=torch.Generator().manual_seed(5))[:rows].to(DEVICE)
    residual, normed = nans(rows + 5, size, dtype=dtype), nans(rows, size, dtype=dtype)
    result = add_rms_norm(
        pool, weight, EPS, branch=branch, source=source, residual=residual, target=target, normed=normed,
        unit_offset=unit_offset,
    )  # fmt: skip
    assert result is normed
    same_sum, same = reference.add_rms_norm(pool, weight, EPS, branch, source, unit_offset)
    assert torch.equal(residual[target], same_sum)  # one addition in float32, rounded once
    untouched = torch.ones(rows + 5, dtype=torch.bool, device=DEVICE)
    untouched[target] = False
    assert residual[untouched].isnan().all()
    # the norm is taken of the rounded sum
    _, truth = reference.add_rms_norm(*double(same_sum, weight), EPS, unit_offset=unit_offset)
    assert_as_exact(normed, same, truth, approximations(truth))


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_branch_index_or_residual(dtype):
    states, weight = random(63, 60, dtype=dtype, seed=1), random(60, dtype=dtype, seed=2)
    normed = nans(63, 60, dtype=dtype)
    add_rms_norm(states, weight, EPS, normed=normed)
    _, truth = reference.add_rms_norm(*double(states, weight), EPS)
    assert_as_exact(normed, reference.add_rms_norm(states, weight, EPS)[1], truth, approximations(truth))


def test_adds_in_place():
    states, branch, weight = random(9, 60, seed=1), random(9, 60, seed=2), random(60, seed=3)
    expected = states + branch
    rows = torch.arange(9, device=DEVICE)
    normed = add_rms_norm(states, weight, EPS, branch=branch, source=rows, residual=states, target=rows)
    assert torch.equal(states, expected)
    assert torch.equal(normed, add_rms_norm(expected, weight, EPS))


def test_rows_have_the_same_bits_alone_and_together():
    pool, branch, weight = random(40, 60, seed=1), random(63, 60, seed=2), random(60, seed=3)
    source = integers(63, high=40, seed=4)
    together = add_rms_norm(pool, weight, EPS, branch=branch, source=source)
    assert torch.equal(together, add_rms_norm(pool, weight, EPS, branch=branch, source=source))
    order = torch.randperm(63, generator=torch.Generator().manual_seed(6)).to(DEVICE)[:17]
    apart = add_rms_norm(pool, weight, EPS, branch=branch[order], source=source[order])
    assert torch.equal(together[order], apart)


def test_no_rows():
    assert add_rms_norm(random(4, 60)[:0], random(60), EPS).shape == (0, 60)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": random(61)}, r"weight must have shape \[60\], not \[61\]"),
        ({"branch": random(5, 60, dtype=torch.float16)}, "branch must be float32, not float16"),
        ({"branch": random(60, 5).T}, "branch must be contiguous"),
        ({"source": torch.zeros(4, device=DEVICE)}, "source must be int32 or int64, not float32"),
        ({"target": integers(5, high=5)}, "target needs a residual"),
        ({"residual": random(4, 60)}, "without a target, residual must have at least 5 rows, not 4"),
        ({"branch": random(6, 60)}, "without a source, states must have at least 6 rows, not 5"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    arguments = {"states": random(5, 60), "weight": random(60), "eps": EPS, **change}
    with pytest.raises(ValueError, match=message):
        add_rms_norm(**arguments)
