"""Head and loss, tile by tile over the vocabulary: cross-entropy, and KL from the dense model.

No mask needs a [P, V] tensor. The dense model's logits, with which each divergence compares, are
made once. The vocabulary is cut into splits of SPLIT_V tokens; the configuration alone decides this
number. One program runs the head for BLOCK_P positions and one split, and writes a partial result.
A second, small kernel combines the splits in order.

So even a few positions fill a GPU, and a position's bits depend on its own numbers only. The number
of positions never specialises the code, so it is compiled once for all.

P positions, K targets of a position, D columns of a state, V tokens of the vocabulary. Prefixes: p_
pointers, i_ indices, o_ offsets, m_ masks, b_ blocks of values.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .launch import (
    FLOATS,
    Config,
    architecture,
    cdiv,
    check,
    check_output,
    check_tensor,
    has_tma,
    linear_kl_config,
    linear_nll_config,
    on_device,
)
from .numeric import LEAST, LOG2_E, dot, soft_cap

# A row of kept logits takes a multiple of ROW_UNIT numbers, so that each row begins aligned and
# holds whole tiles.
ROW_UNIT = 256
# A number above every token. Partial results are float32, which holds all integers up to it.
NO_TOKEN = tl.constexpr(2**24)


@triton.jit
def _grouped(num_rows, num_splits, BLOCK_P: tl.constexpr, GROUP_P: tl.constexpr):
    """This program's block of positions, and its split.

    Groups of GROUP_P blocks run next to each other and share weight tiles in the cache. With 5
    blocks, 2 splits and GROUP_P 2, programs 0 to 9 run the (block, split) pairs
    (0, 0) (1, 0) (0, 1) (1, 1) (2, 0) (3, 0) (2, 1) (3, 1) (4, 0) (4, 1).
    """
    i_program = tl.program_id(0)
    num_blocks = tl.cdiv(num_rows, BLOCK_P)
    in_group = GROUP_P * num_splits
    i_first = i_program // in_group * GROUP_P
    group_size = min(num_blocks - i_first, GROUP_P)
    i_p = i_first + i_program % in_group % group_size
    i_split = i_program % in_group // group_size
    return i_p, i_split


@triton.jit
def _tile(
    source, i_row, i_column, num_rows,
    D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TMA: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """The tile [ROWS, COLUMNS] at (i_row, i_column) of a matrix [num_rows, D]; zeros outside.

    WHOLE: all rows of the tile exist.
    """
    if TMA:
        b_x = source.load([i_row, i_column])
    else:
        o_x = tl.arange(0, ROWS)[:, None] * D + tl.arange(0, COLUMNS)[None, :]
        p_x = source + tl.cast(i_row, tl.int64) * D + i_column + o_x
        if WHOLE and D % COLUMNS == 0:
            b_x = tl.load(p_x)
        else:
            m_x = (i_row + tl.arange(0, ROWS) < num_rows)[:, None]
            if D % COLUMNS != 0:
                m_x = m_x & (tl.arange(0, COLUMNS) < D - i_column)[None, :]
            b_x = tl.load(p_x, mask=m_x, other=0.0)
    return b_x


@triton.jit
def _logits(
    hidden, weight, i_row, i_v, num_rows, vocab,
    D: tl.constexpr, SOFT_CAP: tl.constexpr, TMA: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The logits float32[BLOCK_P, BLOCK_V] at (i_row, i_v). Ignore columns from vocab on."""
    b_logits = tl.zeros([BLOCK_P, BLOCK_V], tl.float32)
    for i_d in range(0, D, BLOCK_D):
        b_h = _tile(hidden, i_row, i_d, num_rows, D, BLOCK_P, BLOCK_D, TMA, False)
        b_w = _tile(weight, i_v, i_d, vocab, D, BLOCK_V, BLOCK_D, TMA, WHOLE)
        b_logits = dot(b_h, tl.trans(b_w), b_logits)
    return soft_cap(b_logits, SOFT_CAP)


@triton.jit
def _power(x, OF_TWO: tl.constexpr):
    return tl.exp2(x) if OF_TWO else tl.exp(x)


# With 16-bit operands, maxima and exponents of linear_nll are in units of log(2): then
# 2 ** (scaled logit - scaled maximum) is one fused operation a logit. In float32 its rounding would
# show, so powers of e are used there.


@triton.jit(do_not_specialize=["num_rows", "vocab"])
def linear_nll_kernel(
    hidden,
    weight,
    p_partial,
    num_rows,
    vocab,
    D: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    POWERS: tl.constexpr,
    BEST: tl.constexpr,
    TMA: tl.constexpr,
    WHOLE: tl.constexpr,
    SPLIT_V: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_P: tl.constexpr,
):
    PARTS: tl.constexpr = 4 if BEST else 2
    FACTOR: tl.constexpr = LOG2_E if POWERS else 1.0
    i_p, i_split = _grouped(num_rows, tl.cdiv(vocab, SPLIT_V), BLOCK_P, GROUP_P)
    b_max = tl.full([BLOCK_P], LEAST, tl.float32)
    b_sum = tl.zeros([BLOCK_P], tl.float32)
    if BEST:
        b_best = tl.full([BLOCK_P], float("-inf"), tl.float32)
        b_token = tl.full([BLOCK_P], NO_TOKEN, tl.int32)
    # Whole tiles run in one loop over tiles and columns: the next tile's copies start before this
    # one's exponentials are summed. With a mask in that loop, the assembler would run the products
    # one by one.
    for i_v in tl.range(
        i_split * SPLIT_V, min((i_split + 1) * SPLIT_V, vocab), BLOCK_V, flatten=WHOLE
    ):
        b_logits = _logits(
            hidden,
            weight,
            i_p * BLOCK_P,
            i_v,
            num_rows,
            vocab,
            D,
            SOFT_CAP,
            TMA,
            WHOLE,
            BLOCK_P,
            BLOCK_V,
            BLOCK_D,
        )
        if not WHOLE:  # noqa: SIM102 (decided as the kernel is compiled)
            if i_v + BLOCK_V > vocab:  # the last tile alone reaches beyond it
                b_logits = tl.where(
                    (i_v + tl.arange(0, BLOCK_V) < vocab)[None, :], b_logits, float("-inf")
                )
        b_high = tl.max(b_logits, axis=1)
        if BEST:
            o_v = i_v + tl.arange(0, BLOCK_V)
            m_high = b_logits == b_high[:, None]
            b_first = tl.min(tl.where(m_high, o_v[None, :], NO_TOKEN), axis=1)
            b_token = tl.where(b_high > b_best, b_first, b_token)  # the first of equals stays
            b_best = tl.maximum(b_best, b_high)
        b_new_max = tl.maximum(b_max, b_high * FACTOR)
        b_powers = _power(tl.fma(b_logits, FACTOR, -b_new_max[:, None]), POWERS)
        b_sum = b_sum * _power(b_max - b_new_max, POWERS) + tl.sum(b_powers, axis=1)
        b_max = b_new_max
    o_p = i_p * BLOCK_P + tl.arange(0, BLOCK_P)
    p_part = p_partial + i_split.to(tl.int64) * PARTS * num_rows + o_p
    tl.store(p_part, b_max, mask=o_p < num_rows)
    tl.store(p_part + num_rows, b_sum, mask=o_p < num_rows)
    if BEST:
        tl.store(p_part + num_rows * 2, b_best, mask=o_p < num_rows)
        tl.store(p_part + num_rows * 3, b_token.to(tl.float32), mask=o_p < num_rows)


@triton.jit(do_not_specialize=["num_rows", "vocab", "num_splits", "num_targets"])
def finish_nll_kernel(
    p_hidden,
    p_weight,
    p_target,
    p_partial,
    p_nll,
    p_misses,
    num_rows,
    vocab,
    num_splits,
    num_targets,
    D: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    POWERS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Combine the splits, and compute each target's loss.

    One program takes one target of each of BLOCK_P positions.
    """
    PARTS: tl.constexpr = 2 if p_misses is None else 4
    FACTOR: tl.constexpr = LOG2_E if POWERS else 1.0
    i_p = tl.program_id(0) * BLOCK_P
    o_p = i_p + tl.arange(0, BLOCK_P)
    m_p = o_p < num_rows
    o_target = o_p.to(tl.int64) * num_targets + tl.program_id(1)
    b_target = tl.load(p_target + o_target, mask=m_p, other=-1)
    if tl.max(b_target, axis=0) < 0:
        # the table has as many columns as the position with most targets, and others have -1
        b_none = tl.zeros([BLOCK_P], tl.float32)
        tl.store(p_nll + o_target, b_none, mask=m_p)
        if p_misses is not None:
            tl.store(p_misses + o_target, b_none, mask=m_p)
        return
    m_in = (b_target >= 0) & (b_target < vocab)
    # The targets' logits are the diagonal of a product of positions with their targets' rows. It is
    # wasteful, yet a thousandth of the head's work. It sums a logit in the order of
    # linear_nll_kernel, so that it subtracts the same number that was added there.
    p_w = (
        p_weight
        + tl.where(m_in, b_target, 0).to(tl.int64)[:, None] * D
        + tl.arange(0, BLOCK_D)[None, :]
    )
    b_products = tl.zeros([BLOCK_P, BLOCK_P], tl.float32)
    for i_d in range(0, D, BLOCK_D):
        b_h = _tile(p_hidden, i_p, i_d, num_rows, D, BLOCK_P, BLOCK_D, False, False)
        m_w = m_in[:, None]
        if D % BLOCK_D != 0:
            m_w = m_w & (tl.arange(0, BLOCK_D) < D - i_d)[None, :]
        b_products = dot(b_h, tl.trans(tl.load(p_w + i_d, mask=m_w, other=0.0)), b_products)
    m_own = tl.arange(0, BLOCK_P)[:, None] == tl.arange(0, BLOCK_P)[None, :]
    b_logit = soft_cap(tl.sum(tl.where(m_own, b_products, 0.0), axis=0), SOFT_CAP)

    o_row = tl.minimum(o_p, num_rows - 1)  # rows beyond them are computed and not kept
    b_max = tl.full([BLOCK_P], LEAST, tl.float32)
    b_sum = tl.zeros([BLOCK_P], tl.float32)
    if p_misses is not None:
        b_best = tl.full([BLOCK_P], float("-inf"), tl.float32)
        b_token = tl.full([BLOCK_P], NO_TOKEN, tl.float32)
    for i_split in range(0, num_splits, BLOCK_S):
        o_s = i_split + tl.arange(0, BLOCK_S)
        m_part = (o_s < num_splits)[:, None]
        p_part = p_partial + o_s.to(tl.int64)[:, None] * PARTS * num_rows + o_row[None, :]
        b_part_max = tl.load(p_part, mask=m_part, other=LEAST)
        b_part_sum = tl.load(p_part + num_rows, mask=m_part, other=0.0)
        b_new_max = tl.maximum(b_max, tl.max(b_part_max, axis=0))
        b_part_sum *= _power(b_part_max - b_new_max[None, :], POWERS)
        b_sum = b_sum * _power(b_max - b_new_max, POWERS) + tl.sum(b_part_sum, axis=0)
        b_max = b_new_max
        if p_misses is not None:
            b_part_best = tl.load(p_part + num_rows * 2, mask=m_part, other=float("-inf"))
            b_part_token = tl.load(p_part + num_rows * 3, mask=m_part, other=NO_TOKEN)
            b_high = tl.max(b_part_best, axis=0)
            m_high = b_part_best == b_high[None, :]
            b_first = tl.min(tl.where(m_high, b_part_token, NO_TOKEN), axis=0)
            b_token = tl.where(b_high > b_best, b_first, b_token)
            b_best = tl.maximum(b_best, b_high)
    # a fused product as in linear_nll_kernel: rounded separately, it would differ from the target's
    # own term in the sum
    b_below = -tl.fma(b_logit, FACTOR, -b_max)
    b_nll = (b_below + tl.log2(b_sum)) * (1.0 / LOG2_E) if POWERS else b_below + tl.log(b_sum)
    b_nll = tl.where(b_target < 0, 0.0, tl.where(m_in, b_nll, float("nan")))
    tl.store(p_nll + o_target, b_nll, mask=m_p)
    if p_misses is not None:
        m_miss = (b_target >= 0) & (b_target.to(tl.int32).to(tl.float32) != b_token)
        tl.store(p_misses + o_target, m_miss.to(tl.float32), mask=m_p)


@triton.jit(do_not_specialize=["num_rows", "vocab"])
def linear_logits_kernel(
    hidden,
    weight,
    p_logits,
    num_rows,
    vocab,
    STRIDE: tl.constexpr,
    D: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    TMA: tl.constexpr,
    SPLIT_V: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_P: tl.constexpr,
):
    i_p, i_split = _grouped(num_rows, tl.cdiv(vocab, SPLIT_V), BLOCK_P, GROUP_P)
    for i_v in range(i_split * SPLIT_V, min((i_split + 1) * SPLIT_V, vocab), BLOCK_V):
        b_logits = _logits(
            hidden,
            weight,
            i_p * BLOCK_P,
            i_v,
            num_rows,
            vocab,
            D,
            SOFT_CAP,
            TMA,
            False,
            BLOCK_P,
            BLOCK_V,
            BLOCK_D,
        )
        p_tile, m_tile = _kept(p_logits, i_p * BLOCK_P, i_v, num_rows, STRIDE, BLOCK_P, BLOCK_V)
        tl.store(p_tile, b_logits, mask=m_tile & (i_v + tl.arange(0, BLOCK_V) < vocab)[None, :])


@triton.jit
def _kept(
    p_logits,
    i_row,
    i_v,
    num_rows,
    STRIDE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """The pointers to a tile of kept logits, and a mask of the rows that exist."""
    o_p = tl.arange(0, BLOCK_P)
    o_tile = o_p[:, None] * STRIDE + tl.arange(0, BLOCK_V)[None, :]
    return p_logits + i_row.to(tl.int64) * STRIDE + i_v + o_tile, (o_p < num_rows - i_row)[:, None]


@triton.jit(do_not_specialize=["num_rows", "vocab"])
def linear_kl_kernel(
    p_dense,
    masked,
    weight,
    p_partial,
    num_rows,
    vocab,
    STRIDE: tl.constexpr,
    D: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    TMA: tl.constexpr,
    SPLIT_V: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_P: tl.constexpr,
):
    i_p, i_split = _grouped(num_rows, tl.cdiv(vocab, SPLIT_V), BLOCK_P, GROUP_P)
    b_max_a = tl.full([BLOCK_P], LEAST, tl.float32)
    b_max_b = tl.full([BLOCK_P], LEAST, tl.float32)
    b_sum = tl.zeros([BLOCK_P], tl.float32)
    b_excess = tl.zeros([BLOCK_P], tl.float32)
    b_cross = tl.zeros([BLOCK_P], tl.float32)
    for i_v in range(i_split * SPLIT_V, min((i_split + 1) * SPLIT_V, vocab), BLOCK_V):
        p_tile, m_tile = _kept(p_dense, i_p * BLOCK_P, i_v, num_rows, STRIDE, BLOCK_P, BLOCK_V)
        b_a = tl.load(p_tile, mask=m_tile, other=0.0)
        b_b = _logits(
            masked,
            weight,
            i_p * BLOCK_P,
            i_v,
            num_rows,
            vocab,
            D,
            SOFT_CAP,
            TMA,
            False,
            BLOCK_P,
            BLOCK_V,
            BLOCK_D,
        )
        if i_v + BLOCK_V > vocab:  # the last tile alone reaches beyond it
            b_b = tl.where((i_v + tl.arange(0, BLOCK_V) < vocab)[None, :], b_b, LEAST)
        b_a = tl.where(
            b_b == LEAST, LEAST, b_a
        )  # this also moves b_a into the register layout of b_b at once
        b_new_a = tl.maximum(b_max_a, tl.max(b_a, axis=1))
        b_new_b = tl.maximum(b_max_b, tl.max(b_b, axis=1))
        b_sum, b_excess, b_cross = _rescale(
            b_max_a, b_max_b, b_sum, b_excess, b_cross, b_new_a, b_new_b
        )
        b_a -= b_new_a[:, None]
        b_b -= b_new_b[:, None]
        b_p = tl.exp(b_a)
        b_tile_excess, b_tile_cross = _differences(b_p, tl.exp(b_b), b_a - b_b)
        b_sum += tl.sum(b_p, axis=1)
        b_excess += tl.sum(b_tile_excess, axis=1)
        b_cross += tl.sum(b_tile_cross, axis=1)
        b_max_a = b_new_a
        b_max_b = b_new_b
    o_p = i_p * BLOCK_P + tl.arange(0, BLOCK_P)
    m_p = o_p < num_rows
    p_part = p_partial + i_split.to(tl.int64) * 5 * num_rows + o_p
    tl.store(p_part, b_max_a, mask=m_p)
    tl.store(p_part + num_rows, b_max_b, mask=m_p)
    tl.store(p_part + num_rows * 2, b_sum, mask=m_p)
    tl.store(p_part + num_rows * 3, b_excess, mask=m_p)
    tl.store(p_part + num_rows * 4, b_cross, mask=m_p)


# With logits a of the dense model and b of the masked one, each taken relative to its own maximum,
# and d = a - b:
#     sum    = sum_v exp(a)
#     excess = sum_v exp(b) - exp(a)
#     cross  = sum_v exp(a) (d + exp(-d) - 1)
#     KL     = cross / sum - (x - log(1 + x)),  x = excess / sum
# If the models agree, every term of cross and the bracket are of second order, as is the
# divergence. The textbook form, sum_v p (a - b) - logsumexp(a) + logsumexp(b), subtracts numbers of
# the size of the logits, and loses these digits.


@triton.jit
def _differences(b_p, b_q, b_d):
    """Compute exp(b) - exp(a) and exp(a) (d + exp(-d) - 1) from exp(a), exp(b) and d = a - b.

    A series replaces both if d is small.
    """
    b_series = 1.0 / 5040.0 - b_d * (1.0 / 40320.0)
    b_series = 1.0 / 720.0 - b_d * b_series
    b_series = 1.0 / 120.0 - b_d * b_series
    b_series = 1.0 / 24.0 - b_d * b_series
    b_series = 1.0 / 6.0 - b_d * b_series
    b_series = b_d * b_d * (0.5 - b_d * b_series)
    m_small = tl.abs(b_d) < 0.5
    b_excess = tl.where(m_small, b_p * (b_series - b_d), b_q - b_p)
    b_cross = tl.where(m_small, b_p * b_series, b_p * b_d + (b_q - b_p))
    return b_excess, b_cross


@triton.jit
def _rescale(b_max_a, b_max_b, b_sum, b_excess, b_cross, b_new_a, b_new_b):
    """Convert sum, excess and cross to new maxima."""
    b_shift_a = b_max_a - b_new_a
    b_shift_b = b_max_b - b_new_b
    b_scale = tl.exp(b_shift_a)
    b_first, b_second = _differences(b_scale, tl.exp(b_shift_b), b_shift_a - b_shift_b)
    b_cross = b_cross * b_scale + b_sum * b_second + b_excess * b_first
    b_excess = b_excess * b_scale + (b_sum + b_excess) * b_first
    return b_sum * b_scale, b_excess, b_cross


@triton.jit(do_not_specialize=["num_rows", "num_splits"])
def combine_kl_kernel(
    p_partial, p_kl, num_rows, num_splits, BLOCK_S: tl.constexpr, BLOCK_P: tl.constexpr
):
    o_p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    o_row = tl.minimum(o_p, num_rows - 1)  # rows beyond them are computed and not kept
    b_max_a = tl.full([BLOCK_P], LEAST, tl.float32)
    b_max_b = tl.full([BLOCK_P], LEAST, tl.float32)
    b_sum = tl.zeros([BLOCK_P], tl.float32)
    b_excess = tl.zeros([BLOCK_P], tl.float32)
    b_cross = tl.zeros([BLOCK_P], tl.float32)
    for i_split in range(0, num_splits, BLOCK_S):
        o_s = i_split + tl.arange(0, BLOCK_S)
        m_part = (o_s < num_splits)[:, None]
        p_part = p_partial + o_s.to(tl.int64)[:, None] * 5 * num_rows + o_row[None, :]
        b_part_a = tl.load(p_part, mask=m_part, other=LEAST)
        b_part_b = tl.load(p_part + num_rows, mask=m_part, other=LEAST)
        b_part_sum = tl.load(p_part + num_rows * 2, mask=m_part, other=0.0)
        b_part_excess = tl.load(p_part + num_rows * 3, mask=m_part, other=0.0)
        b_part_cross = tl.load(p_part + num_rows * 4, mask=m_part, other=0.0)
        b_new_a = tl.maximum(b_max_a, tl.max(b_part_a, axis=0))
        b_new_b = tl.maximum(b_max_b, tl.max(b_part_b, axis=0))
        b_sum, b_excess, b_cross = _rescale(
            b_max_a, b_max_b, b_sum, b_excess, b_cross, b_new_a, b_new_b
        )
        b_part_sum, b_part_excess, b_part_cross = _rescale(
            b_part_a,
            b_part_b,
            b_part_sum,
            b_part_excess,
            b_part_cross,
            b_new_a[None, :],
            b_new_b[None, :],
        )
        b_sum += tl.sum(b_part_sum, axis=0)
        b_excess += tl.sum(b_part_excess, axis=0)
        b_cross += tl.sum(b_part_cross, axis=0)
        b_max_a = b_new_a
        b_max_b = b_new_b
    b_x = b_excess / b_sum
    b_series = 1.0 / 7.0 - b_x * (1.0 / 8.0 - b_x * (1.0 / 9.0))
    b_series = 1.0 / 4.0 - b_x * (1.0 / 5.0 - b_x * (1.0 / 6.0 - b_x * b_series))
    b_series = b_x * b_x * (1.0 / 2.0 - b_x * (1.0 / 3.0 - b_x * b_series))
    b_bracket = tl.where(tl.abs(b_x) < 0.1, b_series, b_x - tl.log(1.0 + b_x))
    tl.store(p_kl + o_p, b_cross / b_sum - b_bracket, mask=o_p < num_rows)


def linear_nll(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    *,
    soft_cap: float | None = None,
    out: torch.Tensor | None = None,
    misses: torch.Tensor | None = None,
    config: Config | None = None,
) -> torch.Tensor:
    """Compute the negative log-likelihood of targets under softmax(hidden @ weight.T), in nats.

    Args:
        hidden: Normed states of the positions that count, [P, D].
        weight: The head, [V, D].
        target: Target tokens, int[P]; or int[P, K] if a position predicts up to K tokens, such as
            the first ones of a tree's branches. -1 is no target and gives 0. A token outside the
            vocabulary gives NaN.
        soft_cap: Logits become soft_cap * tanh(logits / soft_cap) (Gemma 2).
        out: Receives the result; None makes a new tensor.
        misses: Receives 1 if another token than the target is the most likely one, the first of
            equals, else 0. float32 of target's shape.
        config: Block sizes; by default those for the device.

    Returns:
        float32 of target's shape.

    Raises:
        ValueError: An argument has another shape, dtype or device, or a wrong value.
    """
    count, size, vocab, device = _check_head(hidden, weight, soft_cap)
    shape = tuple(target.shape)
    check(len(shape) in (1, 2), lambda: f"target must have shape [P] or [P, K], not {list(shape)}")
    num_targets = shape[1] if len(shape) == 2 else 1
    check(
        0 < num_targets < 2**16,
        lambda: f"a position must have 1 to {2**16 - 1} targets, not {num_targets}",
    )
    check_tensor("target", target, (count, *shape[1:]), (torch.int32, torch.int64), device)
    out = check_output("out", out, shape, torch.float32, device)
    if misses is not None:
        check_tensor("misses", misses, shape, torch.float32, device)
        most = NO_TOKEN.value
        check(vocab <= most, lambda: f"weight must have at most {most} rows, not {vocab}")
    arch = architecture(device)
    config = config or linear_nll_config(arch, hidden.element_size())
    _check_splits(config)
    if count:
        num_splits = cdiv(vocab, config["SPLIT_V"])
        parts = 2 if misses is None else 4
        partial = hidden.new_empty(num_splits, parts, count, dtype=torch.float32)
        powers = hidden.dtype != torch.float32
        with on_device(hidden):
            tma, sources = _sources(config, hidden, weight)
            linear_nll_kernel[(cdiv(count, config["BLOCK_P"]) * num_splits,)](
                *sources,
                partial,
                count,
                vocab,
                D=size,
                SOFT_CAP=soft_cap,
                POWERS=powers,
                BEST=misses is not None,
                TMA=tma,
                WHOLE=has_whole_tiles(arch, config, vocab, powers, misses is not None),
                **config.launch,
            )
            finish_nll_kernel[(cdiv(count, FINISH["BLOCK_P"]), num_targets)](
                hidden,
                weight,
                target,
                partial,
                out,
                misses,
                count,
                vocab,
                num_splits,
                num_targets,
                D=size,
                SOFT_CAP=soft_cap,
                POWERS=powers,
                BLOCK_D=config["BLOCK_D"],
                **FINISH.launch,
            )
    return out


def linear_logits(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    *,
    soft_cap: float | None = None,
    config: Config | None = None,
) -> torch.Tensor:
    """Compute the dense model's logits, hidden @ weight.T, with which `linear_kl` compares.

    They are not rounded to the dtype of `hidden`.

    Args:
        hidden: Normed states, [P, D].
        weight: The head, [V, D].
        soft_cap: Logits become soft_cap * tanh(logits / soft_cap).
        config: The configuration of `linear_kl`; its tiles give the same logits to the bit.

    Returns:
        float32[P, V]. The stride of a row is a multiple of ROW_UNIT numbers.

    Raises:
        ValueError: An argument has another shape, dtype or device, or a wrong value.
    """
    count, size, vocab, device = _check_head(hidden, weight, soft_cap)
    config = config or linear_kl_config(architecture(device), hidden.element_size())
    _check_splits(config)
    logits = hidden.new_empty(count, _row(vocab), dtype=torch.float32)
    if count:
        grid = (cdiv(count, config["BLOCK_P"]) * cdiv(vocab, config["SPLIT_V"]),)
        with on_device(hidden):
            tma, sources = _sources(config, hidden, weight)
            linear_logits_kernel[grid](
                *sources,
                logits,
                count,
                vocab,
                STRIDE=_row(vocab),
                D=size,
                SOFT_CAP=soft_cap,
                TMA=tma,
                **config.launch,
            )
    return logits[:, :vocab]


def linear_kl(
    dense: torch.Tensor,
    masked: torch.Tensor,
    weight: torch.Tensor,
    *,
    soft_cap: float | None = None,
    out: torch.Tensor | None = None,
    config: Config | None = None,
) -> torch.Tensor:
    """Compute KL(p || q) in nats, for p = softmax(dense) and q = softmax(masked @ weight.T).

    Args:
        dense: The dense model's logits, float32[P, V], from `linear_logits`. One call serves any
            number of masks.
        masked: Normed states of the masked model, [P, D].
        weight: The head, [V, D].
        soft_cap: The masked model's logits become soft_cap * tanh(logits / soft_cap).
        out: Receives the result; None makes a new tensor.
        config: Block sizes; by default those for the device.

    Returns:
        float32[P].

    Raises:
        ValueError: An argument has another shape, dtype or device, or a wrong value.
    """
    count, size, vocab, device = _check_head(masked, weight, soft_cap)
    check(
        dense.shape == (count, vocab) and dense.dtype == torch.float32 and dense.device == device,
        lambda: f"dense must be float32[{count}, {vocab}] on {device}, not {_described(dense)}",
    )
    check(
        dense.stride() == (_row(vocab), 1) and dense.data_ptr() % 16 == 0,
        lambda: "dense must have the strides that linear_logits returns",
    )
    out = check_output("out", out, (count,), torch.float32, device)
    config = config or linear_kl_config(architecture(device), masked.element_size())
    _check_splits(config)
    if count:
        num_splits = cdiv(vocab, config["SPLIT_V"])
        partial = masked.new_empty(num_splits, 5, count, dtype=torch.float32)
        with on_device(masked):
            tma, sources = _sources(config, masked, weight)
            linear_kl_kernel[(cdiv(count, config["BLOCK_P"]) * num_splits,)](
                dense,
                *sources,
                partial,
                count,
                vocab,
                STRIDE=_row(vocab),
                D=size,
                SOFT_CAP=soft_cap,
                TMA=tma,
                **config.launch,
            )
            combine_kl_kernel[(cdiv(count, FINISH["BLOCK_P"]),)](
                partial, out, count, num_splits, **FINISH.launch
            )
    return out


def has_whole_tiles(arch: str, config: Config, vocab: int, powers: bool, best: bool) -> bool:
    """Whether linear_nll's code is that of whole tiles: no mask of tokens, one flat loop.

    Bits are the same either way. In float32, or with the most likely token, that code spills. On
    gfx942, with a soft cap, its registers leave room for half the programs of the masked code.

    Args:
        arch: The architecture.
        config: Block sizes.
        vocab: Tokens of the vocabulary.
        powers: Whether operands have 16 bits.
        best: Whether the pass notes the most likely token.
    """
    return vocab % config["BLOCK_V"] == 0 and powers and not best and arch != "gfx942"


# the configuration of the kernels that combine splits, on every architecture
FINISH = Config.of(4, 4, BLOCK_P=64, BLOCK_S=32)


def _check_head(hidden: torch.Tensor, weight: torch.Tensor, soft_cap: float | None):
    check(
        hidden.dim() == 2 and hidden.shape[1] > 0,
        lambda: f"hidden states must have shape [P, D], not {list(hidden.shape)}",
    )
    count, size = hidden.shape
    check_tensor("hidden states", hidden, (None, size), FLOATS, hidden.device)
    check(
        weight.dim() == 2 and weight.shape[0] > 0,
        lambda: f"weight must have shape [V, {size}], not {list(weight.shape)}",
    )
    check_tensor("weight", weight, (None, size), hidden.dtype, hidden.device)
    check(soft_cap is None or soft_cap > 0, lambda: f"soft_cap must be above 0, not {soft_cap}")
    # offsets within a tile have 32 bits
    check(size <= 2**22, lambda: f"hidden states must have at most {2**22} columns, not {size}")
    check(count < 2**31 - 2**10, lambda: f"{count} positions are too many; split them")
    return count, size, weight.shape[0], hidden.device


def _sources(config: Config, hidden: torch.Tensor, weight: torch.Tensor) -> tuple[bool, list]:
    """Whether TMA loads the tiles, and their sources: descriptors for TMA, else the tensors.

    Bits are the same either way.
    """
    tensors = {"BLOCK_P": hidden, "BLOCK_V": weight}
    aligned = hidden.shape[1] * hidden.element_size() % 16 == 0 and all(
        x.data_ptr() % 16 == 0 for x in tensors.values()
    )
    if not (aligned and has_tma(hidden)):
        return False, [hidden, weight]
    return True, [
        TensorDescriptor.from_tensor(x, [config[rows], config["BLOCK_D"]])
        for rows, x in tensors.items()
    ]


def _described(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype}{list(tensor.shape)} on {tensor.device}"


def _row(vocab: int) -> int:
    """The stride of a row of kept logits, in numbers."""
    return ROW_UNIT * cdiv(vocab, ROW_UNIT)


def _check_splits(config: Config) -> None:
    split, block = config["SPLIT_V"], config["BLOCK_V"]
    check(ROW_UNIT % block == 0, lambda: f"BLOCK_V must divide {ROW_UNIT}, not {block}")
    check(
        split % block == 0, lambda: f"SPLIT_V must be a multiple of BLOCK_V, not {split} of {block}"
    )
