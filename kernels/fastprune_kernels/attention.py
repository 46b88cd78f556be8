"""Tree attention: causal over packed rows; a token sees the trunk of its row and its own branch.

Tiles of queries and blocks of keys are cut from the beginning of each row, so a row's bits do not
depend on the rows packed with it. A `TreePlan` lists the blocks that each tile visits. It is made
once for a batch of tokens, and serves every layer and every mask. A block that no query of the tile
sees is not listed. A block that all queries of the tile see is visited without a mask.

T packed tokens in R rows, Dh columns of a head. In the kernels: M queries of a tile, N keys of a
block. Prefixes: p_ pointers, i_ indices, o_ offsets, m_ masks, b_ blocks of values.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from triton import next_power_of_2

from .launch import (
    FLOATS,
    MAX_HEAD,
    Config,
    architecture,
    check,
    check_output,
    check_tensor,
    on_device,
    tree_attention_config,
)
from .numeric import LEAST, LOG2_E, cast, dot, soft_cap


@triton.jit
def tree_attention_kernel(
    p_qkv,
    p_out,
    p_branch,
    p_position,
    p_tile_start,
    p_tile_end,
    p_lists,
    p_blocks,
    p_sinks,
    scale,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DH: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    BLOCK_DH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    STRIDE: tl.constexpr = (HEADS + 2 * KV_HEADS) * DH
    i_tile = tl.program_id(0) // HEADS
    i_head = tl.program_id(0) % HEADS
    i_kv = i_head // (HEADS // KV_HEADS)
    i_start = tl.load(p_tile_start + i_tile)
    i_end = tl.load(p_tile_end + i_tile)  # the end of the tile's row

    o_m = i_start + tl.arange(0, BLOCK_M)
    m_m = o_m < i_end
    o_d = tl.arange(0, BLOCK_DH)
    m_q = m_m[:, None] & (o_d < DH)[None, :]
    p_q = p_qkv + i_start.to(tl.int64) * STRIDE + i_head * DH
    b_q = tl.load(p_q + tl.arange(0, BLOCK_M)[:, None] * STRIDE + o_d[None, :], mask=m_q, other=0.0)
    b_branch = tl.load(p_branch + o_m, mask=m_m, other=0)
    b_position = tl.load(p_position + o_m, mask=m_m, other=0)

    b_max = tl.full([BLOCK_M], LEAST, tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    if p_sinks is not None:  # the first score of the softmax, with a weight of 1 and no value
        b_sink = tl.load(p_sinks + i_head).to(tl.float32)
        if b_q.dtype != tl.float32:  # powers of 2
            b_sink *= LOG2_E
        b_max = tl.maximum(b_max, b_sink)
        b_sum += 1.0
    b_out = tl.zeros([BLOCK_M, BLOCK_DH], tl.float32)
    p_k = p_qkv + (HEADS + i_kv) * DH
    p_v = p_k + KV_HEADS * DH
    i_whole = tl.load(p_lists + 2 * i_tile)
    i_part = tl.load(p_lists + 2 * i_tile + 1)
    i_last = tl.load(p_lists + 2 * i_tile + 2)
    # the next block's index is loaded one step early: only then are a block's copies issued while
    # the blocks before it are computed
    i_key = tl.load(p_blocks + i_whole)
    for i_block in range(i_whole, i_part):
        i_next = tl.load(p_blocks + i_block + 1)
        b_out, b_max, b_sum = _attend(
            b_q, b_out, b_max, b_sum, p_k, p_v, i_key, i_end, scale,
            p_branch, p_position, o_m, b_branch, b_position, False,
            STRIDE, DH, WINDOW, SOFT_CAP, BLOCK_DH, BLOCK_N,
        )  # fmt: skip
        i_key = i_next
    for i_block in range(i_part, i_last):
        i_next = tl.load(p_blocks + i_block + 1)
        b_out, b_max, b_sum = _attend(
            b_q, b_out, b_max, b_sum, p_k, p_v, i_key, i_end, scale,
            p_branch, p_position, o_m, b_branch, b_position, True,
            STRIDE, DH, WINDOW, SOFT_CAP, BLOCK_DH, BLOCK_N,
        )  # fmt: skip
        i_key = i_next
    b_out = b_out / b_sum[:, None]
    p_o = p_out + i_start.to(tl.int64) * (HEADS * DH) + i_head * DH
    o_out = tl.arange(0, BLOCK_M)[:, None] * (HEADS * DH) + o_d[None, :]
    tl.store(p_o + o_out, cast(b_out, p_out.dtype.element_ty), mask=m_q)


@triton.jit
def _attend(
    b_q, b_out, b_max, b_sum, p_k, p_v, i_key, i_end, scale,
    p_branch, p_position, o_m, b_branch, b_position, MASKED: tl.constexpr,
    STRIDE: tl.constexpr, DH: tl.constexpr, WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr,
    BLOCK_DH: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax, over the block of keys that begins at i_key."""
    o_n = i_key + tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_DH)
    o_kv = tl.arange(0, BLOCK_N)[:, None] * STRIDE + o_d[None, :]
    m_kv = (o_d < DH)[None, :]
    if MASKED:  # a whole block ends within the row
        m_kv = m_kv & (o_n < i_end)[:, None]
    o_block = i_key.to(tl.int64) * STRIDE
    b_k = tl.load(p_k + o_block + o_kv, mask=m_kv, other=0.0)  # [N, Dh]
    b_scores = dot(b_q, tl.trans(b_k), tl.zeros([b_q.shape[0], BLOCK_N], tl.float32))  # [M, N]
    # 2 ** (scaled score - scaled maximum) takes one operation a score, but its rounding would show
    # in float32
    POWERS: tl.constexpr = b_q.dtype != tl.float32
    if SOFT_CAP is not None or not POWERS:
        b_scores = soft_cap(b_scores * scale, SOFT_CAP)
    if MASKED:
        # keys behind the row's end come after all of its queries, so this hides them too
        m_seen = o_m[:, None] >= o_n[None, :]
        b_key_branch = tl.load(p_branch + o_n, mask=o_n < i_end, other=0)
        m_seen = m_seen & (
            (b_key_branch[None, :] == 0) | (b_branch[:, None] == b_key_branch[None, :])
        )
        if WINDOW is not None:
            b_key_position = tl.load(p_position + o_n, mask=o_n < i_end, other=0)
            m_seen = m_seen & (b_position[:, None] - b_key_position[None, :] < WINDOW)
        b_scores = tl.where(m_seen, b_scores, float("-inf"))
    b_high = tl.max(b_scores, axis=1)
    if POWERS:
        factor = LOG2_E if SOFT_CAP is not None else scale * LOG2_E
        b_new_max = tl.maximum(
            b_max, b_high * factor
        )  # at least LEAST, so that no two infinities are subtracted
        b_p = tl.exp2(b_scores * factor - b_new_max[:, None])
        b_scale = tl.exp2(b_max - b_new_max)
    else:
        b_new_max = tl.maximum(b_max, b_high)
        b_p = tl.exp(b_scores - b_new_max[:, None])
        b_scale = tl.exp(b_max - b_new_max)
    b_sum = b_sum * b_scale + tl.sum(b_p, axis=1)
    b_v = tl.load(p_v + o_block + o_kv, mask=m_kv, other=0.0)
    b_out = dot(cast(b_p, b_v.dtype), b_v, b_out * b_scale[:, None])
    return b_out, b_new_max, b_sum


@dataclass(frozen=True)
class TreePlan:
    """The blocks of keys that each tile of queries visits, for one batch of tokens and one window.

    Attributes:
        num_tokens: T.
        window: The sliding window in positions; None without one.
        config: The block sizes.
        branch: The branch of each token, int32[T].
        position: The position of each token, int32[T].
        tile_start: The first token of each tile, int32[tiles].
        tile_end: The end of each tile's row, int32[tiles].
        lists: int32[2 tiles + 1]. Tile i sees the blocks from lists[2i] to lists[2i + 1] whole, and
            those from there to lists[2i + 2] in part. The numbers are indices of `blocks`.
        blocks: The first token of each listed block, and a last entry, which is read and not used.
    """

    num_tokens: int
    window: int | None
    config: Config
    branch: torch.Tensor
    position: torch.Tensor
    tile_start: torch.Tensor
    tile_end: torch.Tensor
    lists: torch.Tensor
    blocks: torch.Tensor

    @property
    def num_tiles(self) -> int:
        return len(self.tile_start)


def plan_tree(
    row_starts: torch.Tensor,
    branch: torch.Tensor,
    position: torch.Tensor,
    *,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device | str,
    window: int | None = None,
    config: Config | None = None,
) -> TreePlan:
    """Plan tree attention over rows of packed tokens. It runs on the CPU, once for a batch.

    Args:
        row_starts: The first token of each row, ascending from 0 to T, int64[R + 1].
        branch: Each token's branch in its row, 0 for the trunk, int64[T].
        position: Each token's position in its own sequence, int64[T].
        head_dim: Dh of the attention.
        dtype: The dtype of the attention.
        device: The device of the attention.
        window: A token sees keys fewer than this number of positions away; None for all.
        config: Block sizes; by default those for the device.

    Returns:
        The plan, on the device.

    Raises:
        ValueError: An argument has another shape or a wrong value.
    """
    row_starts, branch, position = (x.cpu().long() for x in (row_starts, branch, position))
    fits = row_starts.dim() == 1 and len(row_starts) > 0
    check(fits, lambda: f"row_starts must have shape [R + 1], not {list(row_starts.shape)}")
    count = len(branch)
    check(branch.dim() == 1, lambda: f"branch must have shape [T], not {list(branch.shape)}")
    check(
        position.shape == branch.shape,
        lambda: f"position must have shape [{count}], not {list(position.shape)}",
    )
    lengths = row_starts.diff()
    covers = row_starts[0] == 0 and row_starts[-1] == count and bool((lengths > 0).all())
    check(covers, lambda: f"row_starts must ascend from 0 to the {count} tokens")
    check(count < 2**31 - 2**10, lambda: f"{count} tokens are too many; split them")
    check(window is None or window > 0, lambda: f"window must be above 0, not {window}")
    check(dtype in FLOATS, lambda: f"dtype must be one of {FLOATS}, not {dtype}")
    check(
        0 < head_dim <= MAX_HEAD,
        lambda: f"a head must have 1 to {MAX_HEAD} columns, not {head_dim}",
    )
    device = torch.empty(0, device=device).device  # "cuda" gets its index
    config = config or tree_attention_config(architecture(device), dtype.itemsize, head_dim)

    tiles = _Pieces(row_starts, lengths, config["BLOCK_M"], branch, position)
    blocks = _Pieces(row_starts, lengths, config["BLOCK_N"], branch, position)
    # every pair of a tile and a block of the same row, tile by tile
    per_tile = blocks.per_row[tiles.row]
    tile = _numbers(per_tile)
    within = torch.arange(len(tile)) - (per_tile.cumsum(0) - per_tile)[tile]
    block = (blocks.per_row.cumsum(0) - blocks.per_row)[tiles.row[tile]] + within
    seen, whole = _visibility(tiles, tile, blocks, block, window, config["BLOCK_N"])
    tile, block, whole = tile[seen], block[seen], whole[seen]
    # blocks seen whole come first in a tile's list; tiles with most blocks start first
    heavy = torch.bincount(tile, minlength=len(tiles.start)).argsort(descending=True, stable=True)
    rank = torch.empty_like(heavy)
    rank[heavy] = torch.arange(len(heavy))
    key = 2 * rank[tile] + (~whole).long()
    order = key.argsort(stable=True)
    lists = torch.zeros(2 * len(heavy) + 1, dtype=torch.int64)
    lists[1:] = torch.bincount(key, minlength=2 * len(heavy)).cumsum(0)
    listed = torch.cat(
        [blocks.start[block][order], lists.new_zeros(1)]
    )  # a tile also reads the entry behind its last one
    tensors = (branch, position, tiles.start[heavy], tiles.row_end[heavy], lists, listed)
    return TreePlan(count, window, config, *(x.to(device, torch.int32) for x in tensors))


def _numbers(counts: torch.Tensor) -> torch.Tensor:
    """0 counts[0] times, then 1 counts[1] times, and so on: [2, 3] gives 0 0 1 1 1."""
    # 0.01 ms for 16,000 tokens; torch's repeat_interleave took 8 ms, and a plan needs six calls
    return torch.from_numpy(np.repeat(np.arange(len(counts)), counts.numpy()))


class _Pieces:
    """Rows cut into pieces of at most `size` tokens, and the bounds of the values in each."""

    def __init__(self, row_starts, lengths, size: int, branch, position):
        self.per_row = -(-lengths // size)
        self.row = _numbers(self.per_row)
        within = torch.arange(len(self.row)) - (self.per_row.cumsum(0) - self.per_row)[self.row]
        self.start = row_starts[:-1][self.row] + within * size
        self.row_end = row_starts[1:][self.row]
        self.end = torch.minimum(self.start + size, self.row_end)
        piece = _numbers(self.end - self.start)
        self.low_branch, self.high_branch = self._bounds(piece, branch)
        self.low_position, self.high_position = self._bounds(piece, position)
        # the lowest branch besides the trunk
        self.low_leaf = self._bounds(
            piece, torch.where(branch == 0, torch.iinfo(torch.int64).max, branch)
        )[0]

    def _bounds(self, piece, values):
        shape = (len(self.row),)
        low = torch.zeros(shape, dtype=torch.int64).scatter_reduce(
            0, piece, values, "amin", include_self=False
        )
        high = torch.zeros(shape, dtype=torch.int64).scatter_reduce(
            0, piece, values, "amax", include_self=False
        )
        return low, high


def _visibility(q: _Pieces, i, k: _Pieces, j, window: int | None, size: int):
    """Whether tile i may see a part of block j, and whether each query sees the whole block.

    Bounds decide, on the safe side: a block that no query sees may be listed, and a block seen
    whole may be masked.
    """
    shares_branch = (k.low_leaf[j] <= q.high_branch[i]) & (q.low_branch[i] <= k.high_branch[j])
    seen = (k.start[j] < q.end[i]) & ((k.low_branch[j] == 0) | shares_branch)
    one_branch = (k.low_branch[j] == k.high_branch[j]) & (q.low_branch[i] == q.high_branch[i])
    whole = (k.end[j] <= q.start[i] + 1) & (k.end[j] - k.start[j] == size)
    whole &= (k.high_branch[j] == 0) | (one_branch & (k.low_branch[j] == q.low_branch[i]))
    if window is not None:
        seen &= q.low_position[i] - k.high_position[j] < window
        whole &= q.high_position[i] - k.low_position[j] < window
    return seen, seen & whole


def tree_attention(
    qkv: torch.Tensor,
    plan: TreePlan,
    num_heads: int,
    num_kv_heads: int,
    *,
    scale: float | None = None,
    soft_cap: float | None = None,
    sinks: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute softmax(scale * q k^T) v over the keys that each query sees.

    Args:
        qkv: q, then k, then v, [T, (num_heads + 2 num_kv_heads) * Dh].
        plan: The plan for these tokens.
        num_heads: Query heads. num_heads / num_kv_heads of them share a key head.
        num_kv_heads: Key heads.
        scale: The factor of scores; None for 1 / sqrt(Dh).
        soft_cap: Scores become soft_cap * tanh(scores / soft_cap) before the mask (Gemma 2).
        sinks: One more score of each head, whose weight multiplies no value, [num_heads] (gpt-oss).
        out: Receives the result; None makes a new tensor.

    Returns:
        [T, num_heads * Dh].

    Raises:
        ValueError: An argument has another shape, dtype or device, or a wrong value.
    """
    check(num_kv_heads > 0, lambda: f"there must be key heads, not {num_kv_heads}")
    check(
        num_heads > 0 and num_heads % num_kv_heads == 0,
        lambda: f"num_heads must be a multiple of the {num_kv_heads} key heads, not {num_heads}",
    )
    total = num_heads + 2 * num_kv_heads
    check(
        qkv.dim() == 2 and qkv.shape[1] > 0 and qkv.shape[1] % total == 0,
        lambda: f"qkv must have shape [T, {total} * Dh], not {list(qkv.shape)}",
    )
    head_dim = qkv.shape[1] // total
    check_tensor("qkv", qkv, (plan.num_tokens, total * head_dim), FLOATS, qkv.device)
    check(
        head_dim <= MAX_HEAD, lambda: f"a head must have at most {MAX_HEAD} columns, not {head_dim}"
    )
    check(
        plan.branch.device == qkv.device,
        lambda: f"the plan must be on {qkv.device}, not on {plan.branch.device}",
    )
    check(scale is None or scale > 0, lambda: f"scale must be above 0, not {scale}")
    check(soft_cap is None or soft_cap > 0, lambda: f"soft_cap must be above 0, not {soft_cap}")
    if sinks is not None:
        check_tensor("sinks", sinks, (num_heads,), FLOATS, qkv.device)
    check(
        qkv.shape[1] < 2**22,
        lambda: f"qkv must have fewer than {2**22} columns, not {qkv.shape[1]}",
    )  # 32-bit tile offsets
    check(
        plan.num_tiles * num_heads < 2**31,
        lambda: f"{plan.num_tiles} tiles of {num_heads} heads are too many",
    )
    out = check_output("out", out, (len(qkv), num_heads * head_dim), qkv.dtype, qkv.device)
    if plan.num_tiles:
        with on_device(qkv):
            tree_attention_kernel[(plan.num_tiles * num_heads,)](
                qkv,
                out,
                plan.branch,
                plan.position,
                plan.tile_start,
                plan.tile_end,
                plan.lists,
                plan.blocks,
                sinks,
                head_dim**-0.5 if scale is None else scale,
                HEADS=num_heads,
                KV_HEADS=num_kv_heads,
                DH=head_dim,
                WINDOW=plan.window,
                SOFT_CAP=soft_cap,
                BLOCK_DH=max(16, next_power_of_2(head_dim)),
                **plan.config.launch,
            )
    return out
