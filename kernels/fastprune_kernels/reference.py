"""The definition of each operator, in plain torch. Slow is fine; every faster version is tested
against this.

Each computes in the dtype it is given, so that float64 gives the truth.
"""

from __future__ import annotations

import torch


def token_nll(logits: torch.Tensor, row: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of tokens, in nats: logsumexp(logits[row_m]) - logits[row_m,
    token_m].

    logits [P, V] (float, any precision; computed in float32, or float64 if given), row int64[M]
    into them, token int64[M]. Returns [M].
    """
    return -log_probabilities(logits)[row, token]


def token_kl(dense: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
    """KL(p || q) = sum_v p(v) (log p(v) - log q(v)) in nats, p from the dense logits and q from the
    masked ones.

    dense, masked: logits [P, V]. Returns [P].
    """
    return kl_from(log_probabilities(dense), masked)


def log_probabilities(logits: torch.Tensor) -> torch.Tensor:
    """log p(v) in nats, [P, V], of logits [P, V], in float32 or float64."""
    return torch.log_softmax(_at_least_float32(logits), dim=-1)


def kl_from(log_p: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
    """`token_kl` from the dense `log_probabilities`, which many masks share."""
    return (log_p.exp() * (log_p - log_probabilities(masked))).sum(-1)


def add_rms_norm(
    states: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    branch: torch.Tensor | None = None,
    unit_offset: bool = False,
    centered: bool = False,
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(x, norm(x)), x = states + branch, norm(x) = x / sqrt(mean(x^2) + eps) * weight + bias.

    states, branch [M, D]. unit_offset: the scale is 1 + weight (Gemma). centered: the norm is taken
    of x without its mean (LayerNorm). weight None: 1. bias None: 0.
    """
    x = states if branch is None else states + branch
    return x, rms_norm(x, weight, eps, unit_offset, centered, bias)


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    unit_offset: bool = False,
    centered: bool = False,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Over the last dimension, in at least float32; but weight multiplies in x's dtype. (Gemma's
    does not, nor does one beside a bias.)"""
    wide = _at_least_float32(x)
    if centered:
        wide = wide - wide.mean(-1, keepdim=True)
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if weight is not None and (unit_offset or bias is not None):
        wide = wide * (_at_least_float32(weight) + unit_offset)
        weight = None
    if bias is not None:
        wide = wide + _at_least_float32(bias)
    if weight is None:
        return wide.to(x.dtype)
    return wide.to(x.dtype) * weight


def rotary(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    position: torch.Tensor,
    num_heads: int,
    num_kv_heads: int,
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    unit_offset: bool = False,
    interleaved: bool = False,
    norm_after: bool = False,
) -> torch.Tensor:
    """qkv with its q and k heads rotated: columns i and R + i of a head, i < R, by the angle of cos
    and sin [N, R].

    qkv [T, (num_heads + 2 num_kv_heads) * Dh]: q, then k, then v. position int[T]: each token's row
    of the tables. q_weight, k_weight [Dh]: RMSNorm of each head before the rotation, or after it
    (norm_after). Columns from 2R on are not rotated. interleaved: columns 2i and 2i + 1 instead.
    """
    heads = qkv.unflatten(1, (num_heads + 2 * num_kv_heads, -1))
    q, k, v = heads.split([num_heads, num_kv_heads, num_kv_heads], dim=1)

    def norm(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        return x if weight is None else rms_norm(x, weight, eps, unit_offset)

    if not norm_after:
        q, k = norm(q, q_weight), norm(k, k_weight)
    half = cos.shape[1]
    cos, sin = (table[position].to(qkv.dtype)[:, None] for table in (cos, sin))  # [T, 1, R]

    def rotate(x: torch.Tensor) -> torch.Tensor:
        pairs, rest = x[..., : 2 * half], x[..., 2 * half :]
        pairs = pairs.unflatten(-1, (half, 2) if interleaved else (2, half))
        axis = -1 if interleaved else -2
        first, second = pairs.unbind(axis)
        turned = torch.stack([first * cos - second * sin, second * cos + first * sin], axis)
        return torch.cat([turned.flatten(-2), rest], dim=-1)

    q, k = rotate(q), rotate(k)
    if norm_after:
        q, k = norm(q, q_weight), norm(k, k_weight)
    return torch.cat([q, k, v], dim=1).flatten(1)


def gated_mlp(gate_up: torch.Tensor, activation: str = "silu") -> torch.Tensor:
    """act(gate) * up from [T, 2F], gate first. activation: "silu", "gelu" (by erf) or
    "gelu_tanh"."""
    gate, up = gate_up.chunk(2, dim=-1)
    functional = torch.nn.functional
    if activation == "silu":
        return functional.silu(gate) * up
    return functional.gelu(gate, approximate={"gelu": "none", "gelu_tanh": "tanh"}[activation]) * up


def tree_mask(
    row_starts: torch.Tensor,
    branch: torch.Tensor,
    position: torch.Tensor,
    window: int | None = None,
) -> torch.Tensor:
    """bool[T, T], True where query t sees key s: s is in t's row, not after it, in the trunk
    (branch 0) or t's branch.

    row_starts int[R + 1]: the first index of each row of packed tokens; branch, position int[T]:
    branch in the row, position in its own sequence. window: only keys less than that many positions
    away.
    """
    steps = torch.arange(len(branch), device=branch.device)
    row = torch.searchsorted(row_starts.to(steps)[1:], steps, right=True)
    seen = (
        (row[:, None] == row)
        & (steps[:, None] >= steps)
        & ((branch == 0) | (branch[:, None] == branch))
    )
    if window is not None:
        seen &= position[:, None] - position < window
    return seen


def tree_attention(
    qkv: torch.Tensor,
    seen: torch.Tensor,
    num_heads: int,
    num_kv_heads: int,
    scale: float | None = None,
    soft_cap: float | None = None,
) -> torch.Tensor:
    """softmax(scale * q k^T) v over the visible keys, bool[T, T]. Returns [T, num_heads * Dh].

    qkv [T, (num_heads + 2 num_kv_heads) * Dh]; num_heads / num_kv_heads query heads share a key
    head. scale: 1 / sqrt(Dh) when None. soft_cap: scores become cap * tanh(scores / cap) before the
    mask.
    """
    heads = qkv.unflatten(1, (num_heads + 2 * num_kv_heads, -1)).transpose(0, 1)  # [H, T, Dh]
    q, k, v = heads.split([num_heads, num_kv_heads, num_kv_heads])
    k, v = (x.repeat_interleave(num_heads // num_kv_heads, dim=0) for x in (k, v))
    scores = q @ k.transpose(1, 2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if soft_cap is not None:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    scores = scores.masked_fill(~seen, -torch.inf)
    weights = torch.softmax(_at_least_float32(scores), dim=-1).to(qkv.dtype)
    return (weights @ v).transpose(0, 1).flatten(1)


def head_logits(
    hidden: torch.Tensor, weight: torch.Tensor, soft_cap: float | None = None
) -> torch.Tensor:
    """hidden [P, D] @ weight [V, D]^T, then cap * tanh(logits / cap) if a cap is set."""
    logits = hidden @ weight.T
    return logits if soft_cap is None else soft_cap * torch.tanh(logits / soft_cap)


def linear_nll(
    hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, soft_cap: float | None = None
) -> torch.Tensor:
    """Negative log-likelihood of target int[P] or [P, K] under the head's logits; 0 if the target
    is -1."""
    logits = head_logits(hidden, weight, soft_cap)
    row = (
        torch.arange(len(target), device=target.device)
        .reshape(-1, *[1] * (target.dim() - 1))
        .expand_as(target)
    )
    nll = token_nll(logits, row.flatten(), target.clamp(min=0).flatten().long()).view_as(target)
    return nll.masked_fill(target < 0, 0)


def linear_kl(
    dense: torch.Tensor, masked: torch.Tensor, weight: torch.Tensor, soft_cap: float | None = None
) -> torch.Tensor:
    """KL(p || q) [P], p from the dense model's logits [P, V], q from the head's logits of the
    masked states [P, D]."""
    return token_kl(dense, head_logits(masked, weight, soft_cap))


def _at_least_float32(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()
