"""Tree attention against a dense mask."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from kernel_checks import DEVICE, DTYPES, assert_as_exact, double, nans, random

from fastprune_kernels import reference
from fastprune_kernels.attention import TreePlan, plan_tree, tree_attention

pytestmark = pytest.mark.usefixtures("arithmetic")

TEXT = [(63, [])]
SHORT = [(1, [])]
TREE = [(21, [5, 1, 17])]
MIXED = [(7, [3, 4]), (40, []), (1, [1, 2, 1]), (33, [2, 19, 3])]  # trunk, branches of each row


def tokens(rows: list[tuple[int, list[int]]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """row_starts, branch, position of rows of (trunk length, branch lengths)."""
    branch, position, starts = [], [], [0]
    for trunk, leaves in rows:
        branch += [0] * trunk
        position += range(trunk)
        for number, length in enumerate(leaves, 1):
            branch += [number] * length
            position += range(trunk, trunk + length)
        starts.append(len(branch))
    return tuple(torch.tensor(x, device=DEVICE) for x in (starts, branch, position))


def run(qkv, tree, heads, kv_heads, window=None, out=None, **options):
    head_dim = qkv.shape[1] // (heads + 2 * kv_heads)
    plan = plan_tree(*tree, head_dim=head_dim, dtype=qkv.dtype, device=qkv.device, window=window)
    return tree_attention(qkv, plan, heads, kv_heads, out=out, **options)


def check(rows, heads, kv_heads, head_dim, dtype, window=None, **options):
    tree = tokens(rows)
    qkv = random(len(tree[1]), (heads + 2 * kv_heads) * head_dim, dtype=dtype, seed=1)
    wide = {name: double(x) if torch.is_tensor(x) else x for name, x in options.items()}
    out = nans(len(qkv), heads * head_dim, dtype=dtype)
    assert run(qkv, tree, heads, kv_heads, window, out, **options) is out
    seen = reference.tree_mask(*tree, window)
    truth = reference.tree_attention(double(qkv), seen, heads, kv_heads, **wide)
    # The scores are products over a head's columns, and their last bits follow the order of the
    # sum: torch's error is the greatest over a few orders.
    worst = torch.zeros_like(truth)
    for seed in range(4):
        order = torch.randperm(head_dim, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
        permuted = qkv.unflatten(1, (-1, head_dim))[..., order].flatten(1)
        same = reference.tree_attention(permuted, seen, heads, kv_heads, **options).double()
        error = same.unflatten(1, (-1, head_dim))[..., order.argsort()].flatten(1) - truth
        worst = torch.where(error.abs() > worst.abs(), error, worst)
    # a weight is off by its exponential, and with a cap by that and the division of the cap, in the
    # sum of products and in the sum of weights; their quotient by the division
    greatest = qkv[:, (heads + kv_heads) * head_dim :].abs().max().item()
    assert_as_exact(out, truth + worst, truth, (3 + 4 * options.get("soft_cap", 0)) * greatest)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [TEXT, SHORT, TREE, MIXED])
def test_rows_and_trees(rows, dtype):
    check(rows, 2, 1, 16, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"),
    [(4, 2, 64), (3, 3, 80), (2, 1, 128), (2, 1, 20), (1, 1, 8), (6, 2, 16)],
)
def test_heads(heads, kv_heads, head_dim, dtype):
    check([(30, [15, 19]), (3, [])], heads, kv_heads, head_dim, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [1, 7, 16, 33])
@pytest.mark.parametrize("rows", [TEXT, MIXED])
def test_sliding_window_is_by_position(rows, window, dtype):
    check(rows, 2, 1, 16, dtype, window=window)


@pytest.mark.parametrize("dtype", DTYPES)
def test_soft_cap_and_scale(dtype):
    check(MIXED, 2, 2, 16, dtype, soft_cap=2.0, scale=0.5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("soft_cap", [None, 2.0])
@pytest.mark.parametrize("rows", [TEXT, MIXED])
def test_sinks_take_weight_and_add_no_value(rows, soft_cap, dtype):
    """A sink below all scores, one among them, and one above."""
    sinks = torch.tensor([-9.0, 0.5, 6.0, 40.0], device=DEVICE, dtype=dtype)
    options = {} if soft_cap is None else {"soft_cap": soft_cap}
    check(rows, 4, 2, 16, dtype, window=9, sinks=sinks, **options)


def test_rows_have_the_same_bits_alone_and_packed():
    qkv = random(sum(trunk + sum(leaves) for trunk, leaves in MIXED), 4 * 16, seed=1)
    tree = tokens(MIXED)
    packed = run(qkv, tree, 2, 1)
    assert torch.equal(packed, run(qkv, tree, 2, 1))
    bounds = tree[0].tolist()
    pieces = [qkv[a:b] for a, b in pairwise(bounds)]
    alone = [run(x.contiguous(), tokens([row]), 2, 1) for x, row in zip(pieces, MIXED)]
    assert torch.equal(packed, torch.cat(alone))
    assert torch.equal(
        torch.cat(alone[::-1]), run(torch.cat(pieces[::-1]), tokens(MIXED[::-1]), 2, 1)
    )


@pytest.mark.filterwarnings("ignore:All-NaN slice")
def test_what_is_not_seen_does_not_matter():
    """NaN in a row, or in keys after a query, stays there."""
    tree = tokens([(20, []), (30, [])])
    qkv = random(50, 4 * 16, seed=1)
    clean = run(qkv, tree, 2, 1)
    qkv[20:] = torch.nan
    assert torch.equal(run(qkv, tree, 2, 1)[:20], clean[:20])


def visited(plan: TreePlan) -> int:
    return int(plan.lists[-1])


def plan(rows, window=None) -> TreePlan:
    return plan_tree(*tokens(rows), head_dim=16, dtype=torch.float32, device=DEVICE, window=window)


def test_blocks_that_nothing_sees_are_not_visited():
    m, n = (plan([(1, [])]).config[name] for name in ("BLOCK_M", "BLOCK_N"))
    assert visited(plan([(8 * m, [])])) == sum(-(-(i + 1) * m // n) for i in range(8))
    # rows do not see each other
    assert visited(plan([(8 * m, [])] * 3)) == 3 * visited(plan([(8 * m, [])]))
    # nor do branches: each one visits the trunk and itself
    size = max(m, n)
    tree = plan([(4 * size, [size] * 5)])
    trunk, leaf = (
        visited(plan([(4 * size, [])])),
        (size // m) * (4 * size // n) + visited(plan([(size, [])])),
    )
    assert visited(tree) == trunk + 5 * leaf
    # a window leaves a diagonal
    assert visited(plan([(16 * size, [])], window=size)) <= 3 * (16 * size // m) * (size // n)


def test_the_lists_hold_every_block_that_is_seen():
    tree = tokens(MIXED)
    for window in (None, 1, 9):
        p = plan(MIXED, window)
        m, n = p.config["BLOCK_M"], p.config["BLOCK_N"]
        seen = reference.tree_mask(*tree, window)
        listed = torch.zeros_like(seen)
        for i in range(p.num_tiles):
            a, b = int(p.tile_start[i]), min(int(p.tile_start[i]) + m, int(p.tile_end[i]))
            whole, part, last = p.lists[2 * i : 2 * i + 3].tolist()
            for j in range(whole, last):
                first = int(p.blocks[j])
                assert not listed[a:b, first].any()
                listed[a:b, first : min(first + n, int(p.tile_end[i]))] = True
                if j < part:
                    assert seen[a:b, first : first + n].all()
        assert not (seen & ~listed).any()


def test_wrong_arguments_are_named():
    starts, branch, position = tokens(TREE)
    options = {"head_dim": 16, "dtype": torch.float32, "device": DEVICE}
    with pytest.raises(ValueError, match="row_starts must ascend from 0 to the 44 tokens"):
        plan_tree(starts[:1], branch, position, **options)
    with pytest.raises(ValueError, match=r"position must have shape \[44\], not \[43\]"):
        plan_tree(starts, branch, position[1:], **options)
    with pytest.raises(ValueError, match="window must be above 0, not 0"):
        plan_tree(starts, branch, position, window=0, **options)
    p, qkv = plan(TREE), random(44, 64)
    with pytest.raises(ValueError, match="num_heads must be a multiple of the 2 key heads, not 3"):
        tree_attention(qkv, p, 3, 2)
    with pytest.raises(ValueError, match=r"qkv must have shape \[44, 64\], not \[43, 64\]"):
        tree_attention(qkv[1:], p, 2, 1)
    with pytest.raises(ValueError, match="scale must be above 0, not -1"):
        tree_attention(qkv, p, 2, 1, scale=-1)
    with pytest.raises(ValueError, match=r"sinks must have shape \[2\], not \[3\]"):
        tree_attention(qkv, p, 2, 1, sinks=random(3))
    with pytest.raises(ValueError, match=r"out must have shape \[44, 32\], not \[44, 64\]"):
        tree_attention(qkv, p, 2, 1, out=qkv)
