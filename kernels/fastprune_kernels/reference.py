"""The definition of each operator, in plain torch.

These functions may be slow; tests compare every faster version with them. They compute in the dtype
of their inputs, so that float64 inputs give the true values.

T packed tokens in R rows, P positions, M targets, D columns of a state, V tokens of the vocabulary,
Dh columns of a head.
"""

from __future__ import annotations

import torch


def token_nll(logits: torch.Tensor, row: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    """Compute the negative log-likelihood of tokens, in nats.

    Args:
        logits: [P, V]. The result is float64 for float64 logits, else float32.
        row: The row of each token, int64[M].
        token: int64[M].

    Returns:
        logsumexp(logits[row_m]) - logits[row_m, token_m], [M].

    Examples:
        >>> import torch
        >>> from fastprune_kernels.reference import token_nll
        >>> token_nll(torch.zeros(1, 4), torch.tensor([0]), torch.tensor([2])).exp()
        tensor([4.])
    """
    return -log_probabilities(logits)[row, token]


def token_kl(dense: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
    """Compute KL(p || q) = sum_v p(v) (log p(v) - log q(v)), in nats.

    Args:
        dense: Logits of p, [P, V].
        masked: Logits of q, [P, V].

    Returns:
        [P].
    """
    return kl_from(log_probabilities(dense), masked)


def log_probabilities(logits: torch.Tensor) -> torch.Tensor:
    """Compute log p(v) in nats, [P, V], from logits [P, V], in float32 or float64."""
    return torch.log_softmax(_at_least_float32(logits), dim=-1)


def kl_from(log_p: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
    """Compute `token_kl` from the dense `log_probabilities`, which many masks share."""
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
    """Compute x = states + branch, and x / sqrt(mean(x^2) + eps) * weight + bias.

    Args:
        states: [M, D].
        weight: [D]; None for 1.
        eps: Added to the mean square.
        branch: [M, D]; None for 0.
        unit_offset: The scale is 1 + weight (Gemma).
        centered: The norm is taken of x without its mean (LayerNorm).
        bias: [D]; None for 0.

    Returns:
        x and its norm, [M, D] each.
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
    """Compute the norm over the last dimension, in at least float32.

    The weight multiplies in x's dtype, unless it has another dtype itself, or a unit offset or a
    bias beside it.
    """
    wide = _at_least_float32(x)
    if centered:
        wide = wide - wide.mean(-1, keepdim=True)
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    wider = weight is not None and weight.dtype != x.dtype
    if weight is not None and (unit_offset or bias is not None or wider):
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
    """Rotate the heads of q and k: columns i and R + i of a head, for i < R.

    Args:
        qkv: q, then k, then v, [T, (num_heads + 2 num_kv_heads) * Dh].
        cos: Cosines of the angles, [N, R]. Columns from 2R on are not rotated.
        sin: Sines of the angles, [N, R].
        position: Each token's row of the tables, int[T].
        num_heads: Query heads.
        num_kv_heads: Key heads.
        q_weight: Weight of an RMSNorm of each query head before the rotation, [Dh].
        k_weight: The same for key heads.
        eps: Added to the mean square.
        unit_offset: The norm's scale is 1 + weight.
        interleaved: Columns 2i and 2i + 1 rotate together.
        norm_after: The norm comes after the rotation.

    Returns:
        A new tensor like qkv.
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
    """Compute act(gate) * up.

    Args:
        gate_up: The gate, then up, [T, 2F].
        activation: "silu", "gelu" (by the error function) or "gelu_tanh".

    Returns:
        [T, F].
    """
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
    """Compute the keys that each query of packed rows sees.

    Query t sees key s if s is in t's row, not after t, and in the trunk or in t's branch.

    Args:
        row_starts: The first token of each row, int[R + 1].
        branch: Each token's branch in its row, 0 for the trunk, int[T].
        position: Each token's position in its own sequence, int[T].
        window: A token sees keys fewer than this number of positions away; None for all.

    Returns:
        bool[T, T], True for a query (first) that sees a key (second).
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
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute softmax(scale * q k^T) v over the keys that each query sees.

    Args:
        qkv: q, then k, then v, [T, (num_heads + 2 num_kv_heads) * Dh].
        seen: The keys that each query sees, bool[T, T], as `tree_mask` returns them.
        num_heads: Query heads. num_heads / num_kv_heads of them share a key head.
        num_kv_heads: Key heads.
        scale: The factor of scores; None for 1 / sqrt(Dh).
        soft_cap: Scores become soft_cap * tanh(scores / soft_cap) before the mask.
        sinks: One more score of each head, whose weight multiplies no value, [num_heads].

    Returns:
        [T, num_heads * Dh].
    """
    heads = qkv.unflatten(1, (num_heads + 2 * num_kv_heads, -1)).transpose(0, 1)  # [H, T, Dh]
    q, k, v = heads.split([num_heads, num_kv_heads, num_kv_heads])
    k, v = (x.repeat_interleave(num_heads // num_kv_heads, dim=0) for x in (k, v))
    scores = q @ k.transpose(1, 2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if soft_cap is not None:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    scores = scores.masked_fill(~seen, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks[:, None, None].expand(-1, len(qkv), 1)], dim=-1)
    weights = torch.softmax(_at_least_float32(scores), dim=-1).to(qkv.dtype)
    return (weights[..., : len(qkv)] @ v).transpose(0, 1).flatten(1)


def head_logits(
    hidden: torch.Tensor, weight: torch.Tensor, soft_cap: float | None = None
) -> torch.Tensor:
    """Compute hidden [P, D] @ weight [V, D]^T; with a cap, soft_cap * tanh(logits / soft_cap)."""
    logits = hidden @ weight.T
    return logits if soft_cap is None else soft_cap * torch.tanh(logits / soft_cap)


def linear_nll(
    hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, soft_cap: float | None = None
) -> torch.Tensor:
    """Compute the negative log-likelihood of targets under the head's logits.

    Args:
        hidden: Normed states, [P, D].
        weight: The head, [V, D].
        target: int[P] or int[P, K]; -1 is no target and gives 0.
        soft_cap: As in `head_logits`.

    Returns:
        The losses in nats, of target's shape.
    """
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
    """Compute KL(p || q) in nats, with q from the masked states.

    Args:
        dense: Logits of p, [P, V].
        masked: Normed states of the masked model, [P, D].
        weight: The head, [V, D].
        soft_cap: As in `head_logits`, for q.

    Returns:
        [P].
    """
    return token_kl(dense, head_logits(masked, weight, soft_cap))


def _at_least_float32(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()
