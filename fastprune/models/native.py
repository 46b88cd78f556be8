"""The compiled operators of the fused path on a CPU: argument checks, then the call.

Tensors are float32 or bfloat16, on the CPU, contiguous. Sums are float32, and results are rounded
once. A row's result depends on the row alone, not on other rows or on the number of threads, which
is torch's own. In attention a row is a row of tokens. No gradient is recorded.
`fastprune_kernels.reference` defines the results.

M states of D columns, B rows of L tokens, T = B * L, Dh columns of a head, R angles of a head, N
positions of the tables, F columns of gate and of up, P positions, V tokens of the vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch

try:
    from fastprune import _native
except ImportError:
    _native = None

extension: Any = _native  # None if it is not built

FLOATS = (torch.float32, torch.bfloat16)
ACTIVATIONS = ("silu", "gelu_tanh")


def available() -> bool:
    """Whether the extension was built."""
    return extension is not None


def instruction_set() -> str:
    """The instruction set in use: avx512, avx2 or generic; "none" without the extension."""
    return "none" if extension is None else extension.instruction_set()


def add_rms_norm(
    states: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    *,
    branch: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    normed: torch.Tensor | None = None,
    unit_offset: bool = False,
    centered: bool = False,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute x = states + branch, rounded, and x / sqrt(mean(x^2) + eps) * weight + bias.

    Args:
        states: [M, D].
        weight: [D]; None for 1.
        eps: Added to the mean square.
        branch: [M, D]; None for 0.
        residual: Receives x, [M, D]; it may be `states` itself. None keeps no sums.
        normed: Receives the result, [M, D]; None makes a new tensor.
        unit_offset: The scale is 1 + weight.
        centered: The norm is taken of x without its mean (LayerNorm).
        bias: [D]; None for 0.

    Returns:
        normed, [M, D].
    """
    _check_matrix("states", states)
    rows, columns = shape = states.shape
    dtype = states.dtype
    if normed is None:
        normed = torch.empty_like(states)
    elif residual is not None and normed.data_ptr() == residual.data_ptr():
        raise ValueError("normed and residual must be two tensors, not one")
    extension.add_rms_norm(
        states.data_ptr(),
        0 if branch is None else _address("branch", branch, shape, dtype),
        0 if weight is None else _address("weight", weight, (columns,), dtype),
        0 if residual is None else _address("residual", residual, shape, dtype),
        _address("normed", normed, shape, dtype),
        0 if bias is None else _address("bias", bias, (columns,), dtype),
        rows,
        columns,
        eps,
        centered,
        float(unit_offset),
        dtype is torch.bfloat16,
        torch.get_num_threads(),
    )
    return normed


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
) -> torch.Tensor:
    """Rotate q and k in place: the first 2 * R columns of each head, as pairs (i, R + i).

    Args:
        qkv: q, then k, then v, [T, (num_heads + 2 num_kv_heads) * Dh].
        cos: Cosines, float32[N, R], R <= Dh / 2.
        sin: Sines, float32[N, R].
        position: Each token's row of the tables, int64[T].
        num_heads: Query heads.
        num_kv_heads: Key heads.
        q_weight: Weight of an RMSNorm of each query head before the rotation, [Dh].
        k_weight: The same for key heads.
        eps: Added to the mean square.
        unit_offset: The norm's scale is 1 + weight.
        interleaved: Pairs are (2i, 2i + 1).
        norm_after: The norm comes after the rotation.

    Returns:
        qkv.
    """
    _check_matrix("qkv", qkv)
    rows, dtype = len(qkv), qkv.dtype
    head_dim = _head_dim(qkv, num_heads, num_kv_heads)
    _check_matrix("cos", cos, (torch.float32,))
    positions, half = cos.shape
    if not 1 <= half <= head_dim // 2:
        raise ValueError(f"cos must have shape [N, 1 to {head_dim // 2}], not {list(cos.shape)}")
    if (q_weight is None) != (k_weight is None):
        raise ValueError("q_weight and k_weight must be given together")
    extension.rotary(
        qkv.data_ptr(),
        cos.data_ptr(),
        _address("sin", sin, (positions, half), torch.float32),
        _address("position", position, (rows,), torch.int64),
        0 if q_weight is None else _address("q_weight", q_weight, (head_dim,), dtype),
        0 if k_weight is None else _address("k_weight", k_weight, (head_dim,), dtype),
        rows,
        positions,
        num_heads,
        num_kv_heads,
        head_dim,
        half,
        eps,
        float(unit_offset),
        interleaved,
        norm_after,
        dtype is torch.bfloat16,
        torch.get_num_threads(),
    )
    return qkv


def attention(
    qkv: torch.Tensor,
    seen: torch.Tensor,
    num_heads: int,
    num_kv_heads: int,
    scale: float,
    *,
    soft_cap: float | None = None,
    sinks: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute softmax(scale * q k^T) v over the keys of its row that each query sees.

    Args:
        qkv: q, then k, then v, [T, (num_heads + 2 num_kv_heads) * Dh].
        seen: The keys that each query sees, as begin and end of two runs of places in its row,
            int32[B, L, 4], or int32[1, L, 4] for all rows. The first run comes before the second. A
            query that sees no key gets NaN, or 0 beside a sink.
        num_heads: Query heads. num_heads / num_kv_heads of them share a key head.
        num_kv_heads: Key heads.
        scale: The factor of scores.
        soft_cap: Scores become soft_cap * tanh(scores / soft_cap).
        sinks: One more score of each head, whose weight multiplies no value, [num_heads].
        out: Receives the result; None makes a new tensor.

    Returns:
        out, [T, num_heads * Dh].
    """
    _check_matrix("qkv", qkv)
    dtype = qkv.dtype
    head_dim = _head_dim(qkv, num_heads, num_kv_heads)
    if num_heads % num_kv_heads:
        raise ValueError(
            f"num_heads must be a multiple of num_kv_heads, not {num_heads} of {num_kv_heads}"
        )
    if seen.dim() != 3 or seen.shape[2] != 4:
        raise ValueError(f"seen must have shape [B or 1, L, 4], not {list(seen.shape)}")
    num_masks, length, _ = seen.shape
    rows = len(qkv) // max(length, 1)
    if rows * length != len(qkv) or num_masks not in (1, rows):
        raise ValueError(f"seen {list(seen.shape)} does not fit qkv of {len(qkv)} tokens")
    shape = (len(qkv), num_heads * head_dim)
    if out is None:
        out = torch.empty(shape, dtype=dtype)
    extension.attention(
        qkv.data_ptr(),
        _address("seen", seen, (num_masks, length, 4), torch.int32),
        _address("out", out, shape, dtype),
        0 if sinks is None else _address("sinks", sinks, (num_heads,), dtype),
        rows,
        num_masks != 1,
        length,
        num_heads,
        num_kv_heads,
        head_dim,
        scale,
        soft_cap or 0.0,
        dtype is torch.bfloat16,
        torch.get_num_threads(),
    )
    return out


def gated_mlp(
    gate_up: torch.Tensor, activation: str = "silu", *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Compute act(gate) * up.

    Args:
        gate_up: The gate, then up, [T, 2F].
        activation: "silu" or "gelu_tanh".
        out: Receives the result; None makes a new tensor.

    Returns:
        out, [T, F].
    """
    _check_matrix("gate_up", gate_up)
    rows, width = gate_up.shape
    dtype = gate_up.dtype
    if width % 2:
        raise ValueError(f"gate_up must have shape [T, 2F], not {list(gate_up.shape)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be {' or '.join(ACTIVATIONS)}, not {activation!r}")
    shape = (rows, width // 2)
    if out is None:
        out = torch.empty(shape, dtype=dtype)
    extension.gated_mlp(
        gate_up.data_ptr(),
        _address("out", out, shape, dtype),
        rows,
        width // 2,
        activation == "gelu_tanh",
        dtype is torch.bfloat16,
        torch.get_num_threads(),
    )
    return out


def log_sum_exp(logits: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Compute log(sum(exp(row))) of each row.

    Args:
        logits: [P, V], contiguous within a row; it may be a slice of wider rows.
        out: Receives the result; None makes a new tensor.

    Returns:
        out, float32[P].
    """
    rows, columns = _check_rows("logits", logits)
    if out is None:
        out = torch.empty(rows, dtype=torch.float32)
    extension.log_sum_exp(
        logits.data_ptr(),
        _address("out", out, (rows,), torch.float32),
        rows,
        columns,
        logits.stride(0),
        logits.dtype is torch.bfloat16,
        torch.get_num_threads(),
    )
    return out


def exact_log_sum_exp(logits: torch.Tensor) -> torch.Tensor:
    """Compute log(sum(exp(row))) of each row of logits [P, V] as float64[P], without rounding."""
    rows, columns = _check_rows("logits", logits)
    sums = torch.empty(rows, dtype=torch.float64)
    extension.divergence(
        logits.data_ptr(),
        0,
        0,
        sums.data_ptr(),
        0,
        rows,
        columns,
        logits.stride(0),
        0,
        logits.dtype is torch.bfloat16,
        torch.get_num_threads(),
    )
    return sums


def divergence(
    dense: torch.Tensor, dense_sums: torch.Tensor, logits: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the two terms of a divergence from the dense model, row by row.

    Args:
        dense: The dense model's logits, [P, V]; it may be a slice of wider rows.
        dense_sums: Their log-sum-exps, float64[P].
        logits: The masked model's logits, [P, V]; likewise.

    Returns:
        sum_v exp(dense - s) * (dense - logits), with s = dense_sums rounded to float32; and
        `exact_log_sum_exp(logits)`. float64[P] each.
    """
    rows, columns = _check_rows("logits", logits)
    if _check_rows("dense", dense, (logits.dtype,)) != (rows, columns):
        raise ValueError(f"dense must have shape {[rows, columns]}, not {list(dense.shape)}")
    means, sums = torch.empty(2, rows, dtype=torch.float64)
    extension.divergence(
        logits.data_ptr(),
        dense.data_ptr(),
        _address("dense_sums", dense_sums, (rows,), torch.float64),
        sums.data_ptr(),
        means.data_ptr(),
        rows,
        columns,
        logits.stride(0),
        dense.stride(0),
        logits.dtype is torch.bfloat16,
        torch.get_num_threads(),
    )
    return means, sums


def _check_rows(
    name: str, x: torch.Tensor, dtypes: tuple[torch.dtype, ...] = FLOATS
) -> tuple[int, int]:
    """The shape of a matrix that may be a slice of wider rows."""
    _check_matrix(name, x, dtypes, contiguous=False)
    rows, columns = x.shape
    if columns > 1 and x.stride(1) != 1:
        raise ValueError(f"{name} must be contiguous within a row")
    return rows, columns


def _head_dim(qkv: torch.Tensor, num_heads: int, num_kv_heads: int) -> int:
    if num_heads < 1 or num_kv_heads < 1:
        raise ValueError(
            f"num_heads and num_kv_heads must be at least 1, not {num_heads} and {num_kv_heads}"
        )
    total = num_heads + 2 * num_kv_heads
    head_dim, rest = divmod(qkv.shape[1], total)
    if head_dim == 0 or rest:
        raise ValueError(f"qkv must have shape [T, {total} * Dh], not {list(qkv.shape)}")
    return head_dim


def _check_matrix(
    name: str, x: torch.Tensor, dtypes: tuple[torch.dtype, ...] = FLOATS, contiguous: bool = True
) -> None:
    if x.dim() != 2:
        raise ValueError(f"{name} must be a matrix, not of shape {list(x.shape)}")
    _check_memory(name, x, dtypes, contiguous)


def _address(name: str, x: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> int:
    if x.shape != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, not {list(x.shape)}")
    _check_memory(name, x, (dtype,), contiguous=True)
    return x.data_ptr()


def _check_memory(
    name: str, x: torch.Tensor, dtypes: tuple[torch.dtype, ...], contiguous: bool
) -> None:
    if x.dtype not in dtypes:
        raise ValueError(f"{name} must be {' or '.join(map(_name, dtypes))}, not {_name(x.dtype)}")
    if not x.is_cpu:
        raise ValueError(f"{name} must be on the CPU, not on {x.device}")
    if contiguous and not x.is_contiguous():
        raise ValueError(f"{name} must be contiguous")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
