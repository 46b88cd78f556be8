"""The compiled operators of the fused path on a CPU: argument checks, then the call.

Tensors are float32 or bfloat16, on the CPU, contiguous; sums are float32 and results are rounded
once. A row's result (in attention that of a row of tokens) depends on nothing but the row: not on
the other rows, nor on the number of threads, which is torch's own. No gradient is recorded.
fastprune_kernels.reference defines the result of each.
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
    """Whether the extension is there."""
    return extension is not None


def instruction_set() -> str:
    """The one in use: avx512, avx2 or generic; "none" without the extension."""
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
    """normed = x / sqrt(mean(x^2) + eps) * weight + bias, x = states + branch, rounded; residual =
    x. Returns normed.

    states, branch [M, D]; weight [D], None: 1; bias [D], None: 0; outputs residual, normed [M, D].
    residual may be states: added in place. unit_offset: the scale is 1 + weight. centered: the norm
    is taken of x without its mean (LayerNorm).
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
    """Rotates q and k in place, each head's first 2 * R columns as pairs (i, R + i); returns qkv.

    qkv [T, (num_heads + 2 num_kv_heads) * Dh]: q, then k, then v. position int64[T]: each token's
    row of the tables cos and sin, float32 [N, R], R <= Dh / 2. q_weight, k_weight [Dh]: RMSNorm of
    each head before the rotation, or after it (norm_after); unit_offset: its scale is 1 + weight.
    interleaved: pairs are (2i, 2i + 1).
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
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """out = softmax(scale * q k^T) v over the keys of its row that each query sees. Returns out.

    out [B * L, num_heads * Dh], qkv [B * L, (num_heads + 2 num_kv_heads) * Dh]: q, then k, then v;
    num_heads / num_kv_heads query heads share a key head. seen int32[B or 1, L, 4]: begin and end
    of two runs of places in the row, the first before the second; 1: all rows alike. A query that
    sees no key gets NaN. soft_cap: scores become cap * tanh(score / cap).
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
    given, length, _ = seen.shape
    rows = len(qkv) // max(length, 1)
    if rows * length != len(qkv) or given not in (1, rows):
        raise ValueError(f"seen {list(seen.shape)} does not fit qkv of {len(qkv)} tokens")
    shape = (len(qkv), num_heads * head_dim)
    if out is None:
        out = torch.empty(shape, dtype=dtype)
    extension.attention(
        qkv.data_ptr(),
        _address("seen", seen, (given, length, 4), torch.int32),
        _address("out", out, shape, dtype),
        rows,
        given != 1,
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
    """out [T, F] = act(gate) * up from gate_up [T, 2F], gate first. Returns out.

    activation: "silu" or "gelu_tanh".
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
    """out float32[P]: log(sum(exp(row))) of each row of logits [P, V]. Returns out.

    Rows may stand apart (a slice of wider rows); within a row the logits are contiguous.
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
    """log(sum(exp(row))) of each row of logits [P, V], float64[P], not rounded to float32."""
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
    """means = sum(exp(dense - s) * (dense - logits)) of each row, s dense_sums rounded to float32,
    and sums = exact_log_sum_exp(logits). Returns means, sums, float64[P].

    dense, logits [P, V], whose rows may stand apart; dense_sums float64[P]: log-sum-exps of dense.
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
    """The shape of a matrix whose rows may stand apart."""
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
    if x.dtype not in dtypes:
        raise ValueError(f"{name} must be {' or '.join(map(_name, dtypes))}, not {_name(x.dtype)}")
    if not x.is_cpu:
        raise ValueError(f"{name} must be on the CPU, not on {x.device}")
    if contiguous and not x.is_contiguous():
        raise ValueError(f"{name} must be contiguous")


def _address(name: str, x: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> int:
    if x.shape != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, not {list(x.shape)}")
    if x.dtype is not dtype:
        raise ValueError(f"{name} must be {_name(dtype)}, not {_name(x.dtype)}")
    if not x.is_cpu:
        raise ValueError(f"{name} must be on the CPU, not on {x.device}")
    if not x.is_contiguous():
        raise ValueError(f"{name} must be contiguous")
    return x.data_ptr()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
