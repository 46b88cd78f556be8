"""Rotary embedding of q and k, with optional RMSNorm of each head, in place on packed qkv.

T tokens, Dh columns of a head, R angles of a head, N positions of the tables.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton import next_power_of_2

from .launch import FLOATS, MAX_HEAD, Config, cdiv, check, check_tensor, on_device, rotary_config
from .numeric import cast


@triton.jit(do_not_specialize=["num_pairs"])
def rotary_kernel(
    p_qkv,
    p_cos,
    p_sin,
    p_position,
    p_q_weight,
    p_k_weight,
    eps,
    num_pairs,
    STRIDE: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DH: tl.constexpr,
    HALF: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    NORM_AFTER: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    # a pair is a token and one of its heads; heads of q come before heads of k
    o_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    m_r = o_r < num_pairs
    o_token = o_r // (HEADS + KV_HEADS)
    o_head = o_r % (HEADS + KV_HEADS)
    o_base = o_token.to(tl.int64) * STRIDE + o_head * DH
    i_position = tl.load(p_position + o_token, mask=m_r, other=0).to(tl.int64)

    o_half = tl.arange(0, BLOCK_HALF)
    m_half = m_r[:, None] & (o_half < HALF)[None, :]
    # two columns rotate together
    if INTERLEAVED:
        o_first = 2 * o_half
        NEXT: tl.constexpr = 1
    else:
        o_first = o_half
        NEXT: tl.constexpr = HALF
    p_first = p_qkv + o_base[:, None] + o_first[None, :]
    b_first = tl.load(p_first, mask=m_half, other=0.0).to(tl.float32)  # [R, HALF]
    b_second = tl.load(p_first + NEXT, mask=m_half, other=0.0).to(tl.float32)
    o_table = i_position[:, None] * HALF + o_half[None, :]
    b_cos = tl.load(p_cos + o_table, mask=m_half, other=0.0).to(tl.float32)
    b_sin = tl.load(p_sin + o_table, mask=m_half, other=0.0).to(tl.float32)

    if NORM_AFTER:
        b_first, b_second = _rotate(b_first, b_second, b_cos, b_sin, p_qkv.dtype.element_ty)
    if p_q_weight is not None:
        b_square = tl.sum(b_first * b_first, axis=1) + tl.sum(b_second * b_second, axis=1)
        if DH > 2 * HALF:
            o_rest = 2 * HALF + tl.arange(0, BLOCK_REST)
            m_rest = m_r[:, None] & (o_rest < DH)[None, :]
            p_rest = p_qkv + o_base[:, None] + o_rest[None, :]
            b_rest = tl.load(p_rest, mask=m_rest, other=0.0).to(tl.float32)
            b_square += tl.sum(b_rest * b_rest, axis=1)
        b_scale = tl.rsqrt(b_square / DH + eps)[:, None]
        m_q = (o_head < HEADS)[:, None]
        b_first = (
            b_first
            * b_scale
            * _head_weight(p_q_weight, p_k_weight, o_first, o_half < HALF, m_q, UNIT_OFFSET)
        )
        b_second = (
            b_second
            * b_scale
            * _head_weight(p_q_weight, p_k_weight, NEXT + o_first, o_half < HALF, m_q, UNIT_OFFSET)
        )
        if DH > 2 * HALF:
            b_rest = (
                b_rest
                * b_scale
                * _head_weight(p_q_weight, p_k_weight, o_rest, o_rest < DH, m_q, UNIT_OFFSET)
            )
            tl.store(p_rest, cast(b_rest, p_qkv.dtype.element_ty), mask=m_rest)

    if not NORM_AFTER:
        b_first, b_second = (
            b_first * b_cos - b_second * b_sin,
            b_second * b_cos + b_first * b_sin,
        )
    tl.store(p_first, cast(b_first, p_qkv.dtype.element_ty), mask=m_half)
    tl.store(p_first + NEXT, cast(b_second, p_qkv.dtype.element_ty), mask=m_half)


@triton.jit
def _rotate(b_first, b_second, b_cos, b_sin, dtype: tl.constexpr):
    """Rotate, and round as a store would: the norm reads the stored values. float32."""
    b_new_first = b_first * b_cos - b_second * b_sin
    b_new_second = b_second * b_cos + b_first * b_sin
    return cast(b_new_first, dtype).to(tl.float32), cast(b_new_second, dtype).to(tl.float32)


@triton.jit
def _head_weight(p_q_weight, p_k_weight, o_d, m_d, m_q, UNIT_OFFSET: tl.constexpr):
    """The scale of each pair's norm, from q or from k. [pairs, columns]"""
    b_q = tl.load(p_q_weight + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_k = tl.load(p_k_weight + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_weight = tl.where(m_q, b_q[None, :], b_k[None, :])
    if UNIT_OFFSET:
        b_weight += 1.0
    return b_weight


def rotary(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    position: torch.Tensor,
    num_heads: int,
    num_kv_heads: int,
    *,
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    unit_offset: bool = False,
    interleaved: bool = False,
    norm_after: bool = False,
    config: Config | None = None,
) -> torch.Tensor:
    """Rotate q and k in place: the first 2 * R columns of each head, as pairs (i, R + i).

    Args:
        qkv: q, then k, then v, [T, (num_heads + 2 num_kv_heads) * Dh].
        cos: Cosines, [N, R], R <= Dh / 2. With a smaller R, the other columns are not rotated.
        sin: Sines, [N, R].
        position: Each token's row of the tables, int[T]. Positions must be below N.
        num_heads: Query heads.
        num_kv_heads: Key heads.
        q_weight: Weight of an RMSNorm of each query head before the rotation (Qwen3), [Dh].
        k_weight: The same for key heads.
        eps: Added to the mean square.
        unit_offset: The norm's scale is 1 + weight.
        interleaved: Pairs are (2i, 2i + 1).
        norm_after: The norm comes after the rotation.
        config: Block sizes; by default those for Dh.

    Returns:
        qkv.

    Raises:
        ValueError: An argument has another shape, dtype or device, or a wrong value.
    """
    check(
        num_heads > 0 and num_kv_heads > 0,
        lambda: f"there must be heads, not {num_heads} and {num_kv_heads}",
    )
    total = num_heads + 2 * num_kv_heads
    check(
        qkv.dim() == 2 and qkv.shape[1] > 0 and qkv.shape[1] % total == 0,
        lambda: f"qkv must have shape [T, {total} * Dh], not {list(qkv.shape)}",
    )
    count, head_dim, device = qkv.shape[0], qkv.shape[1] // total, qkv.device
    check_tensor("qkv", qkv, (None, total * head_dim), FLOATS, device)
    check(
        head_dim <= MAX_HEAD, lambda: f"a head must have at most {MAX_HEAD} columns, not {head_dim}"
    )
    check(
        cos.dim() == 2 and 0 < cos.shape[1] <= head_dim // 2,
        lambda: f"cos must have shape [N, 1 to {head_dim // 2}]",
    )
    half = cos.shape[1]
    check_tensor("cos", cos, (None, half), FLOATS, device)
    check_tensor("sin", sin, tuple(cos.shape), cos.dtype, device)
    check_tensor("position", position, (count,), (torch.int32, torch.int64), device)
    check(
        (q_weight is None) == (k_weight is None),
        lambda: "q_weight and k_weight must be given together",
    )
    if q_weight is not None:
        check_tensor("q_weight", q_weight, (head_dim,), FLOATS, device)
        check_tensor("k_weight", k_weight, (head_dim,), FLOATS, device)
    pairs = count * (num_heads + num_kv_heads)
    check(pairs < 2**31 - 2**10, lambda: f"{count} tokens are too many; split them")
    config = config or rotary_config(head_dim)
    if count:
        with on_device(qkv):
            rotary_kernel[(cdiv(pairs, config["BLOCK_R"]),)](
                qkv,
                cos,
                sin,
                position,
                q_weight,
                k_weight,
                eps,
                pairs,
                STRIDE=total * head_dim,
                HEADS=num_heads,
                KV_HEADS=num_kv_heads,
                DH=head_dim,
                HALF=half,
                UNIT_OFFSET=unit_offset,
                INTERLEAVED=interleaved,
                NORM_AFTER=norm_after,
                BLOCK_HALF=next_power_of_2(half),
                BLOCK_REST=next_power_of_2(max(head_dim - 2 * half, 1)),
                **config.launch,
            )
    return qkv
