"""Rotary embedding in place, with the norm of each head."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import DEVICE, DTYPES, assert_as_exact, double, integers, random

from fastprune_kernels import reference
from fastprune_kernels.rope import rotary

pytestmark = pytest.mark.usefixtures("arithmetic")


def make(tokens: int, heads: int, kv_heads: int, head_dim: int, half: int, dtype: torch.dtype):
    qkv = random(tokens, (heads + 2 * kv_heads) * head_dim, dtype=dtype, seed=1)
    angles = torch.arange(50, device=DEVICE)[:, None] * 100.0 ** -(
        torch.arange(half, device=DEVICE) / half
    )
    return qkv, angles.cos(), angles.sin(), integers(tokens, high=50, seed=2), heads, kv_heads


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", [None, "weight", "unit_offset", "after"])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "head_dim", "half"),
    [
        (63, 4, 2, 16, 8),
        (1, 3, 1, 64, 32),
        (5, 2, 1, 80, 40),
        (3, 3, 3, 128, 64),
        (7, 2, 1, 20, 5),
        (3, 1, 1, 80, 12),
    ],
)
def test_rotates_q_and_k(tokens, heads, kv_heads, head_dim, half, norm, interleaved, dtype):
    arguments = make(tokens, heads, kv_heads, head_dim, half, dtype)
    extra = {"interleaved": interleaved}
    if norm is not None:
        weights = {
            "q_weight": random(head_dim, dtype=dtype, seed=3),
            "k_weight": random(head_dim, dtype=dtype, seed=4),
        }
        extra |= {**weights, "eps": 1e-6, "unit_offset": norm == "unit_offset"}
        extra |= {"norm_after": norm == "after"}
    same = reference.rotary(*arguments, **extra)
    wide = {name: double(x) if torch.is_tensor(x) else x for name, x in extra.items()}
    truth = reference.rotary(*double(*arguments[:4]), heads, kv_heads, **wide)
    qkv = arguments[0].clone()
    assert rotary(qkv, *arguments[1:], **extra) is qkv
    # one factor for all of a head, x / root(sum / Dh): the division is halved by the root, which
    # has a unit of its own
    assert_as_exact(qkv, same, truth, 0 if norm is None else 1.5 * truth.abs().max().item())
    values = (heads + kv_heads) * head_dim
    assert torch.equal(qkv[:, values:], arguments[0][:, values:])
    if norm is None:
        rest = qkv.unflatten(1, (-1, head_dim))[..., 2 * half :]
        assert torch.equal(rest, arguments[0].unflatten(1, (-1, head_dim))[..., 2 * half :])


def test_rows_have_the_same_bits_alone_and_together():
    qkv, cos, sin, position, heads, kv_heads = make(63, 4, 2, 16, 8, torch.float32)
    weights = {"q_weight": random(16, seed=3), "k_weight": random(16, seed=4)}
    together = rotary(qkv.clone(), cos, sin, position, heads, kv_heads, **weights)
    assert torch.equal(
        together, rotary(qkv.clone(), cos, sin, position, heads, kv_heads, **weights)
    )
    order = torch.randperm(63, generator=torch.Generator().manual_seed(6)).to(DEVICE)[:10]
    apart = rotary(qkv[order], cos, sin, position[order], heads, kv_heads, **weights)
    assert torch.equal(together[order], apart)


def test_wrong_arguments_are_named():
    qkv, cos, sin, position, heads, kv_heads = make(5, 4, 2, 16, 8, torch.float32)
    with pytest.raises(ValueError, match=r"qkv must have shape \[T, 9 \* Dh\]"):
        rotary(qkv, cos, sin, position, 5, kv_heads)
    with pytest.raises(ValueError, match=r"cos must have shape \[N, 1 to 8\]"):
        rotary(qkv, torch.cat([cos, cos], 1), sin, position, heads, kv_heads)
    with pytest.raises(ValueError, match=r"sin must have shape \[50, 8\], not \[49, 8\]"):
        rotary(qkv, cos, sin[1:], position, heads, kv_heads)
    with pytest.raises(ValueError, match="position must be int32 or int64, not float32"):
        rotary(qkv, cos, sin, position.float(), heads, kv_heads)
    with pytest.raises(ValueError, match="must be given together"):
        rotary(qkv, cos, sin, position, heads, kv_heads, q_weight=random(16))
