"""Head and loss, tile by tile over the vocabulary: cross-entropy, and KL divergence from the dense model.

No [P, V] tensor is made. The vocabulary is cut into splits of SPLIT_V tokens, a number that depends on nothing but the
configuration. One program runs the head for BLOCK_P positions and one split, and leaves a partial result; a second,
small kernel combines the splits in order. So a few positions fill a GPU too, and a position's bits depend on its own
numbers only: nor is the code compiled anew for a number of positions that is 1, or a multiple of 16.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import (
    FLOATS,
    Config,
    architecture,
    cdiv,
    check,
    check_output,
    check_tensor,
    linear_kl_config,
    linear_nll_config,
    on_device,
)
from .numeric import LEAST, dot, soft_cap

MAX_TARGETS = 16


@triton.jit
def _grouped(num_rows, num_splits, BLOCK_P: tl.constexpr, GROUP_P: tl.constexpr):
    """This program's block of positions and split: groups of GROUP_P blocks share their weight tiles in the cache."""
    i_program = tl.program_id(0)
    num_blocks = tl.cdiv(num_rows, BLOCK_P)
    in_group = GROUP_P * num_splits
    i_first = i_program // in_group * GROUP_P
    group_size = min(num_blocks - i_first, GROUP_P)
    i_p = i_first + i_program % in_group % group_size
    i_split = i_program % in_group // group_size
    return i_p, i_split


@triton.jit
def _tile(p_x, m_row, num_columns, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[ROWS, COLUMNS] of a matrix of row size D; zeros outside."""
    o_x = tl.arange(0, ROWS)[:, None] * D + tl.arange(0, COLUMNS)[None, :]
    m_x = m_row[:, None]
    if D % COLUMNS != 0:
        m_x = m_x & (tl.arange(0, COLUMNS) < num_columns)[None, :]
    return tl.load(p_x + o_x, mask=m_x, other=0.0)


@triton.jit(do_not_specialize=["num_rows"])
def linear_nll_kernel(
    p_hidden,
    p_weight,
    p_target,
    p_max,
    p_sum,
    p_logit,
    num_rows,
    vocab,
    D: tl.constexpr,
    TARGETS: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    SPLIT_V: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_P: tl.constexpr,
):
    i_p, i_split = _grouped(num_rows, tl.cdiv(vocab, SPLIT_V), BLOCK_P, GROUP_P)
    o_p = i_p * BLOCK_P + tl.arange(0, BLOCK_P)
    m_p = o_p < num_rows
    p_h = p_hidden + (i_p * BLOCK_P).to(tl.int64) * D

    b_max = tl.full([BLOCK_P], LEAST, tl.float32)
    b_sum = tl.zeros([BLOCK_P], tl.float32)
    for i_v in range(i_split * SPLIT_V, min((i_split + 1) * SPLIT_V, vocab), BLOCK_V):
        o_v = i_v + tl.arange(0, BLOCK_V)
        m_v = o_v < vocab
        p_w = p_weight + tl.cast(i_v, tl.int64) * D
        b_logits = tl.zeros([BLOCK_P, BLOCK_V], tl.float32)
        for i_d in range(0, D, BLOCK_D):
            b_h = _tile(p_h + i_d, m_p, D - i_d, D, BLOCK_P, BLOCK_D)
            b_w = _tile(p_w + i_d, m_v, D - i_d, D, BLOCK_V, BLOCK_D)
            b_logits = dot(b_h, tl.trans(b_w), b_logits)
        b_logits = soft_cap(b_logits, SOFT_CAP)
        b_logits = tl.where(m_v[None, :], b_logits, float("-inf"))
        b_new_max = tl.maximum(b_max, tl.max(b_logits, axis=1))
        b_sum = b_sum * tl.exp(b_max - b_new_max) + tl.sum(tl.exp(b_logits - b_new_max[:, None]), axis=1)
        b_max = b_new_max
        for i_t in tl.static_range(TARGETS):
            o_target = o_p.to(tl.int64) * TARGETS + i_t
            b_target = tl.load(p_target + o_target, mask=m_p, other=-1)
            b_place = (b_target - i_v).to(tl.int32)  # in this tile, if it is here
            b_logit = tl.sum(tl.where(tl.arange(0, BLOCK_V)[None, :] == b_place[:, None], b_logits, 0.0), axis=1)
            # every token lies in one tile of one split, so that each logit is written once
            m_here = m_p & (b_target >= i_v) & (b_target < min(i_v + BLOCK_V, vocab))
            tl.store(p_logit + o_target, b_logit, mask=m_here)
    o_partial = i_split.to(tl.int64) * num_rows + o_p
    tl.store(p_max + o_partial, b_max, mask=m_p)
    tl.store(p_sum + o_partial, b_sum, mask=m_p)


@triton.jit(do_not_specialize=["num_rows"])
def combine_nll_kernel(
    p_max, p_sum, p_logit, p_target, p_nll, num_rows, vocab, num_splits, TARGETS: tl.constexpr, BLOCK: tl.constexpr
):
    o_p = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_p = o_p < num_rows
    b_max = tl.full([BLOCK], LEAST, tl.float32)
    b_sum = tl.zeros([BLOCK], tl.float32)
    for i_split in range(num_splits):
        o_partial = tl.cast(i_split, tl.int64) * num_rows + o_p
        b_part_max = tl.load(p_max + o_partial, mask=m_p, other=0.0)
        b_part_sum = tl.load(p_sum + o_partial, mask=m_p, other=1.0)
        b_new_max = tl.maximum(b_max, b_part_max)
        b_sum = b_sum * tl.exp(b_max - b_new_max) + b_part_sum * tl.exp(b_part_max - b_new_max)
        b_max = b_new_max
    b_log_sum = tl.log(b_sum)
    for i_t in tl.static_range(TARGETS):
        o_target = o_p.to(tl.int64) * TARGETS + i_t
        b_target = tl.load(p_target + o_target, mask=m_p, other=-1)
        m_in = m_p & (b_target >= 0) & (b_target < vocab)
        b_logit = tl.load(p_logit + o_target, mask=m_in, other=0.0)
        b_nll = (b_max - b_logit) + b_log_sum
        b_nll = tl.where(b_target < 0, 0.0, tl.where(b_target < vocab, b_nll, float("nan")))
        tl.store(p_nll + o_target, b_nll, mask=m_p)


@triton.jit(do_not_specialize=["num_rows"])
def linear_kl_kernel(
    p_dense,
    p_masked,
    p_weight,
    p_partial,
    num_rows,
    vocab,
    D: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    SPLIT_V: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_P: tl.constexpr,
):
    i_p, i_split = _grouped(num_rows, tl.cdiv(vocab, SPLIT_V), BLOCK_P, GROUP_P)
    o_p = i_p * BLOCK_P + tl.arange(0, BLOCK_P)
    m_p = o_p < num_rows
    p_a = p_dense + (i_p * BLOCK_P).to(tl.int64) * D
    p_b = p_masked + (i_p * BLOCK_P).to(tl.int64) * D

    b_max_a = tl.full([BLOCK_P], LEAST, tl.float32)
    b_max_b = tl.full([BLOCK_P], LEAST, tl.float32)
    b_sum = tl.zeros([BLOCK_P], tl.float32)
    b_excess = tl.zeros([BLOCK_P], tl.float32)
    b_cross = tl.zeros([BLOCK_P], tl.float32)
    for i_v in range(i_split * SPLIT_V, min((i_split + 1) * SPLIT_V, vocab), BLOCK_V):
        o_v = i_v + tl.arange(0, BLOCK_V)
        m_v = o_v < vocab
        p_w = p_weight + tl.cast(i_v, tl.int64) * D
        b_a = tl.zeros([BLOCK_P, BLOCK_V], tl.float32)
        b_b = tl.zeros([BLOCK_P, BLOCK_V], tl.float32)
        for i_d in range(0, D, BLOCK_D):
            b_w = tl.trans(_tile(p_w + i_d, m_v, D - i_d, D, BLOCK_V, BLOCK_D))
            b_a = dot(_tile(p_a + i_d, m_p, D - i_d, D, BLOCK_P, BLOCK_D), b_w, b_a)
            b_b = dot(_tile(p_b + i_d, m_p, D - i_d, D, BLOCK_P, BLOCK_D), b_w, b_b)
        b_a = tl.where(m_v[None, :], soft_cap(b_a, SOFT_CAP), LEAST)
        b_b = tl.where(m_v[None, :], soft_cap(b_b, SOFT_CAP), LEAST)
        b_new_a = tl.maximum(b_max_a, tl.max(b_a, axis=1))
        b_new_b = tl.maximum(b_max_b, tl.max(b_b, axis=1))
        b_sum, b_excess, b_cross = _rescale(b_max_a, b_max_b, b_sum, b_excess, b_cross, b_new_a, b_new_b)
        b_a -= b_new_a[:, None]
        b_b -= b_new_b[:, None]
        b_p = tl.exp(b_a)
        b_tile_excess, b_tile_cross = _differences(b_p, tl.exp(b_b), b_a - b_b)
        b_sum += tl.sum(b_p, axis=1)
        b_excess += tl.sum(b_tile_excess, axis=1)
        b_cross += tl.sum(b_tile_cross, axis=1)
        b_max_a = b_new_a
        b_max_b = b_new_b
    p_part = p_partial + i_split.to(tl.int64) * 5 * num_rows + o_p
    tl.store(p_part, b_max_a, mask=m_p)
    tl.store(p_part + num_rows, b_max_b, mask=m_p)
    tl.store(p_part + num_rows * 2, b_sum, mask=m_p)
    tl.store(p_part + num_rows * 3, b_excess, mask=m_p)
    tl.store(p_part + num_rows * 4, b_cross, mask=m_p)


# With logits a of the dense model and b of the masked one, each taken relative to its own maximum, and d = a - b:
#   sum    = sum_v exp(a)
#   excess = sum_v exp(b) - exp(a)
#   cross  = sum_v exp(a) (d + exp(-d) - 1)
#   KL     = cross / sum - (x - log(1 + x)),  x = excess / sum
# Every term of cross and the bracket are of second order where the models agree, as the divergence itself is. The
# textbook form, sum_v p (a - b) - logsumexp(a) + logsumexp(b), is a difference of numbers as great as the logits.


@triton.jit
def _differences(b_p, b_q, b_d):
    """exp(b) - exp(a) and exp(a) (d + exp(-d) - 1), given exp(a), exp(b) and d = a - b; by series where d is small."""
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
    """sum, excess and cross, taken relative to new maxima."""
    b_shift_a = b_max_a - b_new_a
    b_shift_b = b_max_b - b_new_b
    b_scale = tl.exp(b_shift_a)
    b_first, b_second = _differences(b_scale, tl.exp(b_shift_b), b_shift_a - b_shift_b)
    b_cross = b_cross * b_scale + b_sum * b_second + b_excess * b_first
    b_excess = b_excess * b_scale + (b_sum + b_excess) * b_first
    return b_sum * b_scale, b_excess, b_cross


@triton.jit(do_not_specialize=["num_rows"])
def combine_kl_kernel(p_partial, p_kl, num_rows, num_splits, BLOCK: tl.constexpr):
    o_p = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_p = o_p < num_rows
    b_max_a = tl.full([BLOCK], LEAST, tl.float32)
    b_max_b = tl.full([BLOCK], LEAST, tl.float32)
    b_sum = tl.zeros([BLOCK], tl.float32)
    b_excess = tl.zeros([BLOCK], tl.float32)
    b_cross = tl.zeros([BLOCK], tl.float32)
    for i_split in range(num_splits):
        p_part = p_partial + tl.cast(i_split, tl.int64) * 5 * num_rows + o_p
        b_part_a = tl.load(p_part, mask=m_p, other=0.0)
        b_part_b = tl.load(p_part + num_rows, mask=m_p, other=0.0)
        b_part_sum = tl.load(p_part + num_rows * 2, mask=m_p, other=1.0)
        b_part_excess = tl.load(p_part + num_rows * 3, mask=m_p, other=0.0)
        b_part_cross = tl.load(p_part + num_rows * 4, mask=m_p, other=0.0)
        b_new_a = tl.maximum(b_max_a, b_part_a)
        b_new_b = tl.maximum(b_max_b, b_part_b)
        b_sum, b_excess, b_cross = _rescale(b_max_a, b_max_b, b_sum, b_excess, b_cross, b_new_a, b_new_b)
        b_part_sum, b_part_excess, b_part_cross = _rescale(
            b_part_a, b_part_b, b_part_sum, b_part_excess, b_part_cross, b_new_a, b_new_b
        )
        b_sum += b_part_sum
        b_excess += b_part_excess
        b_cross += b_part_cross
        b_max_a = b_new_a
        b_max_b = b_new_b
    b_x = b_excess / b_sum
    b_series = 1.0 / 7.0 - b_x * (1.0 / 8.0 - b_x * (1.0 / 9.0))
    b_series = 1.0 / 4.0 - b_x * (1.0 / 5.0 - b_x * (1.0 / 6.0 - b_x * b_series))
    b_series = b_x * b_x * (1.0 / 2.0 - b_x * (1.0 / 3.0 - b_x * b_series))
    b_bracket = tl.where(tl.abs(b_x) < 0.1, b_series, b_x - tl.log(1.0 + b_x))
    tl.store(p_kl + o_p, b_cross / b_sum - b_bracket, mask=m_p)


@triton.jit
def segment_sum_kernel(p_values, p_starts, p_sums, BLOCK: tl.constexpr):
    i_segment = tl.program_id(0)
    i_first = tl.load(p_starts + i_segment)
    i_last = tl.load(p_starts + i_segment + 1)
    b_sum = tl.zeros([BLOCK], tl.float64)
    for i_value in range(i_first, i_last, BLOCK):
        o_value = i_value + tl.arange(0, BLOCK)
        b_sum += tl.load(p_values + o_value, mask=o_value < i_last, other=0.0).to(tl.float64)
    tl.store(p_sums + i_segment, tl.sum(b_sum, axis=0))


def linear_nll(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    *,
    soft_cap: float | None = None,
    out: torch.Tensor | None = None,
    config: Config | None = None,
) -> torch.Tensor:
    """Negative log-likelihood, in nats, of target tokens under softmax(hidden @ weight.T). Returns float32 like target.

    hidden [P, D]: normed states of the positions that count; weight [V, D]: the head. target int[P], or [P, K] where
    a position predicts up to K tokens (the first ones of a tree's branches): -1 stands for none and gives 0, a token
    outside the vocabulary gives NaN. soft_cap: logits become cap * tanh(logits / cap) (Gemma 2).
    """
    count, size, vocab, device = _check_head(hidden, weight, soft_cap)
    shape = tuple(target.shape)
    check(len(shape) in (1, 2), f"target must have shape [P] or [P, K], not {list(shape)}")
    num_targets = shape[1] if len(shape) == 2 else 1
    check(0 < num_targets <= MAX_TARGETS, f"a position must have 1 to {MAX_TARGETS} targets, not {num_targets}")
    check_tensor("target", target, (count, *shape[1:]), (torch.int32, torch.int64), device)
    out = check_output("out", out, shape, torch.float32, device)
    if config is None:
        config = linear_nll_config(architecture(device), hidden.element_size(), soft_cap is not None, num_targets)
    _check_splits(config)
    if count:
        num_splits = cdiv(vocab, config["SPLIT_V"])
        maxima, sums = hidden.new_empty(2, num_splits, count, dtype=torch.float32)
        logits = torch.empty_like(out)
        with on_device(hidden):
            linear_nll_kernel[(cdiv(count, config["BLOCK_P"]) * num_splits,)](
                hidden,
                weight,
                target,
                maxima,
                sums,
                logits,
                count,
                vocab,
                D=size,
                TARGETS=num_targets,
                SOFT_CAP=soft_cap,
                **config.launch,
            )
            combine_nll_kernel[(cdiv(count, COMBINE_BLOCK),)](
                maxima,
                sums,
                logits,
                target,
                out,
                count,
                vocab,
                num_splits,
                TARGETS=num_targets,
                BLOCK=COMBINE_BLOCK,
                num_warps=COMBINE_WARPS,
            )
    return out


def linear_kl(
    dense: torch.Tensor,
    masked: torch.Tensor,
    weight: torch.Tensor,
    *,
    soft_cap: float | None = None,
    out: torch.Tensor | None = None,
    config: Config | None = None,
) -> torch.Tensor:
    """KL(p || q) in nats, p = softmax(dense @ weight.T), q = softmax(masked @ weight.T). Returns float32[P].

    dense, masked [P, D]: normed states; weight [V, D]: the head. soft_cap as in linear_nll.
    """
    count, size, vocab, device = _check_head(masked, weight, soft_cap)
    check_tensor("dense", dense, (count, size), masked.dtype, device)
    out = check_output("out", out, (count,), torch.float32, device)
    config = config or linear_kl_config(architecture(device), masked.element_size(), soft_cap is not None)
    _check_splits(config)
    if count:
        num_splits = cdiv(vocab, config["SPLIT_V"])
        partial = masked.new_empty(num_splits, 5, count, dtype=torch.float32)
        with on_device(masked):
            linear_kl_kernel[(cdiv(count, config["BLOCK_P"]) * num_splits,)](
                dense, masked, weight, partial, count, vocab, D=size, SOFT_CAP=soft_cap, **config.launch
            )
            combine_kl_kernel[(cdiv(count, COMBINE_BLOCK),)](
                partial, out, count, num_splits, BLOCK=COMBINE_BLOCK, num_warps=COMBINE_WARPS
            )
    return out


def segment_sums(values: torch.Tensor, starts: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """Sums of values[starts_c : starts_c+1], in an order that depends on the segment's length only. float64[C].

    values float32[M]; starts int[C + 1], ascending, in range.
    """
    check(values.dim() == 1, f"values must have shape [M], not {list(values.shape)}")
    check_tensor("values", values, (None,), torch.float32, values.device)
    check(starts.dim() == 1 and len(starts) > 0, f"starts must have shape [C + 1], not {list(starts.shape)}")
    check_tensor("starts", starts, (None,), (torch.int32, torch.int64), values.device)
    count = len(starts) - 1
    out = check_output("out", out, (count,), torch.float64, values.device)
    if count:
        with on_device(values):
            segment_sum_kernel[(count,)](values, starts, out, BLOCK=SEGMENT_BLOCK, num_warps=COMBINE_WARPS)
    return out


# of the small kernels, on every architecture
COMBINE_BLOCK, COMBINE_WARPS, SEGMENT_BLOCK = 128, 4, 128


def _check_head(hidden: torch.Tensor, weight: torch.Tensor, soft_cap: float | None):
    check(hidden.dim() == 2 and hidden.shape[1] > 0, f"hidden states must have shape [P, D], not {list(hidden.shape)}")
    count, size = hidden.shape
    check_tensor("hidden states", hidden, (None, size), FLOATS, hidden.device)
    check(weight.dim() == 2 and weight.shape[0] > 0, f"weight must have shape [V, {size}], not {list(weight.shape)}")
    check_tensor("weight", weight, (None, size), hidden.dtype, hidden.device)
    check(soft_cap is None or soft_cap > 0, f"soft_cap must be above 0, not {soft_cap}")
    # within a tile, offsets are of 32 bits
    check(size <= 2**22, f"hidden states must have at most {2**22} columns, not {size}")
    check(count < 2**31 - 2**10, f"{count} positions are too many; split them")
    return count, size, weight.shape[0], hidden.device


def _check_splits(config: Config) -> None:
    split, block = config["SPLIT_V"], config["BLOCK_V"]
    check(split % block == 0, f"SPLIT_V must be a multiple of BLOCK_V, not {split} of {block}")
