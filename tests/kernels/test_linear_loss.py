"""Head and loss, tile by tile over the vocabulary."""

from __future__ import annotations

import math

import pytest
import torch
from kernel_checks import (
    DEVICE,
    DTYPES,
    approximate_units,
    assert_as_exact,
    double,
    integers,
    nans,
    random,
)

from fastprune_kernels import reference
from fastprune_kernels.linear_loss import linear_kl, linear_logits, linear_nll

pytestmark = pytest.mark.usefixtures("arithmetic")

SHAPES = [(63, 60, 131), (1, 60, 131), (5, 33, 7), (40, 16, 1), (33, 96, 200)]  # P, D, V
WHOLE = (5, 96, 512)  # a vocabulary of whole tiles, in every configuration


def make(rows: int, size: int, vocab: int, dtype: torch.dtype):
    return random(rows, size, dtype=dtype, seed=1), random(
        vocab, size, dtype=dtype, seed=2, scale=2 * size**-0.5
    )


def rescalings(vocab: int) -> int:
    """Exponentials that a sum is multiplied by at the most, as its maximum grows: by tiles, then by
    splits."""
    return -(-vocab // 32) + -(-vocab // 64)


def nll_approximations(vocab: int, soft_cap: float | None = None) -> float:
    """log(sum) + max - logit: the sum's terms are off by their exponential and the rescalings, and
    so is their sum, relatively; its logarithm is off by that, and by a unit of its own. A capped
    logit, cap * (1 - 2 / (1 + exp)), is off by an exponential and a division of the cap; two of
    them count."""
    return 1 + rescalings(vocab) + math.log(max(vocab, 2)) + 4 * (soft_cap or 0)


def kl_approximations(
    dense: torch.Tensor, masked: torch.Tensor, weight: torch.Tensor, soft_cap: float | None
) -> float:
    """cross / sum - (x - log(1 + x)), x = excess / sum: the sums hold p |d|, p and q (by their
    exponentials; d the difference of two logits), are rescaled, and divided; the logarithm, at most
    x, has a unit of its own. Capped logits as above."""
    a, b = (x.double() @ weight.double().T for x in (dense, masked))
    if soft_cap is not None:
        a, b = (soft_cap * torch.tanh(x / soft_cap) for x in (a, b))
    a, b = (x - x.amax(1, keepdim=True) for x in (a, b))
    terms = (a.exp() * ((a - b).abs() + 1) + b.exp()).sum(1) / a.exp().sum(1)
    return (3 + rescalings(len(weight)) + 4 * (soft_cap or 0)) * terms.max().item()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("soft_cap", [None, 3.0])
@pytest.mark.parametrize(("rows", "size", "vocab"), [*SHAPES, WHOLE])
def test_nll(rows, size, vocab, soft_cap, dtype):
    hidden, weight = make(rows, size, vocab, dtype)
    target = integers(rows, high=vocab, seed=3)
    out = nans(rows)
    assert linear_nll(hidden, weight, target, soft_cap=soft_cap, out=out) is out
    same = reference.linear_nll(hidden, weight, target, soft_cap)
    truth = reference.linear_nll(*double(hidden, weight), target, soft_cap)
    assert_as_exact(out, same, truth, nll_approximations(vocab, soft_cap))


@pytest.mark.parametrize("dtype", DTYPES)
def test_nll_of_several_targets(dtype):
    hidden, weight = make(35, 60, 131, dtype)
    target = integers(35, 3, high=131, seed=3)
    target[1, 2] = target[4, 1] = target[4, 2] = -1
    target[9] = -1
    out = linear_nll(hidden, weight, target, out=nans(35, 3))
    assert_as_exact(
        out,
        reference.linear_nll(hidden, weight, target),
        reference.linear_nll(*double(hidden, weight), target),
        nll_approximations(131),
    )
    assert (out[target < 0] == 0).all()
    single = linear_nll(hidden, weight, target[:, 0].contiguous().int())
    assert torch.equal(single, out[:, 0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("soft_cap", [None, 3.0])
def test_misses_are_targets_that_are_not_the_most_likely_token(soft_cap, dtype):
    """The first of equal logits is the most likely, in one tile, in one split, or in two of them.
    The loss keeps its bits."""
    hidden, weight = make(70, 60, 131, dtype)
    likely = reference.head_logits(*double(hidden, weight)).argmax(dim=1)
    weight = torch.cat([weight, weight, weight])
    target = torch.stack([likely, likely + 131, (likely + 1) % 131, -torch.ones_like(likely)], 1)
    target[3] = -1
    misses = nans(70, 4)
    out = linear_nll(hidden, weight, target, soft_cap=soft_cap, misses=misses)
    assert torch.equal(out, linear_nll(hidden, weight, target, soft_cap=soft_cap))
    expected = torch.tensor([0.0, 1.0, 1.0, 0.0], device=DEVICE).expand(70, 4).clone()
    expected[3] = 0
    assert torch.equal(misses, expected)


def test_whole_tiles_have_the_bits_of_others():
    """Without misses, a vocabulary of whole tiles has code of its own."""
    hidden, weight = make(5, 60, 512, torch.bfloat16)
    target = integers(5, high=512, seed=3)
    other = linear_nll(hidden, weight, target, misses=nans(5))
    assert torch.equal(linear_nll(hidden, weight, target), other)


def test_positions_without_a_target_are_zero_wherever_they_are():
    """Whole blocks of positions have no second or third target: their programs end at once."""
    hidden, weight = make(200, 60, 131, torch.float32)
    target = torch.full((200, 3), -1, device=DEVICE)
    target[150:, 0] = integers(50, high=131, seed=3)
    target[199, 1] = 7
    found = linear_nll(hidden, weight, target, out=nans(200, 3), misses=nans(200, 3))
    assert (found[target < 0] == 0).all()
    alone = linear_nll(hidden[150:], weight, target[150:, 0].contiguous())
    assert torch.equal(found[150:, 0], alone)
    assert torch.equal(found[199:, 1], linear_nll(hidden[199:], weight, target[199:, 1]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_certain_target_gives_zero(dtype):
    """The number taken off is the one that was added up, however great the logits are."""
    hidden = random(5, 48, dtype=dtype, seed=1, scale=7)
    weight = torch.zeros(131, 48, dtype=dtype, device=DEVICE)
    weight[77] = hidden[2]
    out = linear_nll(hidden[2:3], weight, torch.tensor([77], device=DEVICE))
    assert out.abs().item() < 1e-6


@pytest.mark.parametrize("loss", ["nll", "kl"])
def test_rows_that_are_not_aligned_have_the_same_bits(loss):
    """Tiles come through descriptors where rows are aligned, by pointers where they are not."""
    hidden, weight = make(33, 96, 200, torch.float16)
    other = random(33, 96, dtype=torch.float16, seed=4)
    shifted = (
        torch.empty(33 * 96 + 1, dtype=torch.float16, device=DEVICE)[1:].view(33, 96).copy_(hidden)
    )
    if loss == "nll":
        target = integers(33, high=200, seed=3)
        assert torch.equal(linear_nll(hidden, weight, target), linear_nll(shifted, weight, target))
    else:
        dense = linear_logits(other, weight)
        assert torch.equal(linear_kl(dense, hidden, weight), linear_kl(dense, shifted, weight))


def test_a_target_outside_the_vocabulary_gives_nan():
    hidden, weight = make(3, 60, 131, torch.float32)
    out = linear_nll(hidden, weight, torch.tensor([0, 131, 130], device=DEVICE))
    assert out.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("soft_cap", [None, 3.0])
@pytest.mark.parametrize(("rows", "size", "vocab"), SHAPES)
def test_logits(rows, size, vocab, soft_cap, dtype):
    """Sums in float32, whatever the dtype of what is multiplied. Each of the `size` additions is
    rounded by at most 2^-24 of the sum of magnitudes, in whatever order. A capped logit, cap * (1 -
    2 / (1 + exp)), is rounded six times on its way, each time by half a unit of the cap at most."""
    hidden, weight = make(rows, size, vocab, dtype)
    out = linear_logits(hidden, weight, soft_cap=soft_cap)
    assert out.shape == (rows, vocab)
    assert out.dtype == torch.float32
    truth = reference.head_logits(*double(hidden, weight), soft_cap)
    magnitudes = hidden.double().abs() @ weight.double().abs().T
    allowed = size * 2**-24 * magnitudes.max()
    if soft_cap is not None:
        allowed += (3 + approximate_units() * 4) * soft_cap * 2**-23
    assert (out.double() - truth).abs().max() <= allowed


def divergence(dense, masked, weight, soft_cap=None) -> torch.Tensor:
    return reference.linear_kl(
        reference.head_logits(dense, weight, soft_cap), masked, weight, soft_cap
    )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("soft_cap", [None, 3.0])
@pytest.mark.parametrize(("rows", "size", "vocab"), SHAPES)
def test_kl(rows, size, vocab, soft_cap, dtype):
    masked, weight = make(rows, size, vocab, dtype)
    dense = (masked.double() + random(rows, size, dtype=torch.float64, seed=5, scale=0.3)).to(dtype)
    out = nans(rows)
    kept = linear_logits(dense, weight, soft_cap=soft_cap)
    assert linear_kl(kept, masked, weight, soft_cap=soft_cap, out=out) is out
    same = divergence(dense, masked, weight, soft_cap)
    truth = divergence(*double(dense, masked, weight), soft_cap)
    assert_as_exact(out, same, truth, kl_approximations(dense, masked, weight, soft_cap))


@pytest.mark.parametrize("size_of_change", [0.0, 1e-4, 1e-2, 1.0])
def test_kl_where_models_almost_agree_or_logits_are_large(size_of_change):
    """Logits near 100, a divergence near 0: the difference is taken before the sums, not after."""
    masked, weight = make(20, 60, 131, torch.float32)
    masked = masked * 10
    dense = masked + random(20, 60, seed=5, scale=size_of_change)
    out = linear_kl(linear_logits(dense, weight), masked, weight)
    truth = divergence(*double(dense, masked, weight))
    assert_as_exact(out, divergence(dense, masked, weight), truth)
    if size_of_change == 0:
        assert not out.any()  # both kernels make the same logits


@pytest.mark.parametrize("loss", ["nll", "kl"])
def test_positions_have_the_same_bits_alone_and_together(loss):
    hidden, weight = make(63, 60, 131, torch.float32)
    other = random(63, 60, seed=4)
    target = integers(63, high=131, seed=3)

    def run(rows):
        if loss == "nll":
            return linear_nll(hidden[rows], weight, target[rows])
        return linear_kl(linear_logits(other[rows], weight), hidden[rows], weight)

    everything = torch.arange(63, device=DEVICE)
    together = run(everything)
    assert torch.equal(together, run(everything))
    order = torch.randperm(63, generator=torch.Generator().manual_seed(6)).to(DEVICE)
    assert torch.equal(together[order], run(order))
    assert torch.equal(together[11:12], run(everything[11:12]))


def test_nothing_to_do():
    _, weight = make(1, 60, 131, torch.float32)
    none = random(1, 60)[:0]
    assert linear_nll(none, weight, integers(1, high=2)[:0]).shape == (0,)
    assert linear_kl(linear_logits(none, weight), none, weight).shape == (0,)


def test_wrong_arguments_are_named():
    hidden, weight = make(5, 60, 131, torch.float32)
    target = integers(5, high=131)
    with pytest.raises(ValueError, match=r"weight must have shape \[any, 60\], not \[131, 59\]"):
        linear_nll(hidden, weight[:, 1:].contiguous(), target)
    with pytest.raises(ValueError, match="weight must be float32, not float16"):
        linear_nll(hidden, weight.half(), target)
    with pytest.raises(ValueError, match=r"target must have shape \[5\], not \[4\]"):
        linear_nll(hidden, weight, target[1:])
    with pytest.raises(ValueError, match="soft_cap must be above 0, not 0"):
        linear_nll(hidden, weight, target, soft_cap=0)
    with pytest.raises(ValueError, match=r"misses must have shape \[5\], not \[4\]"):
        linear_nll(hidden, weight, target, misses=nans(4))
    dense = linear_logits(hidden, weight)
    with pytest.raises(
        ValueError, match=r"dense must be float32\[5, 131\] on \S+, not torch.float32\[4, 131\]"
    ):
        linear_kl(dense[1:], hidden, weight)
    with pytest.raises(ValueError, match="dense must have the strides that linear_logits returns"):
        linear_kl(dense.contiguous(), hidden, weight)
    with pytest.raises(ValueError, match="weight must be contiguous"):
        linear_kl(dense, hidden, weight.T.contiguous().T)
