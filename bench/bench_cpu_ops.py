"""The compiled operators on a CPU against the torch code that transformers runs, side by side in
one run.

Shapes of the demo model (d = 128) and of d = 512. Torch is timed half before and half after the
operator, on the same number of threads, in inference mode; both allocate their outputs, except for
what the operators write in place. Their errors against the float64 reference are compared before
anything is timed. With BENCH=full, torch.compile of the same code is timed beside them.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from fastprune.models import native
from fastprune_kernels import reference

ROUNDS = 50
ROW = 256
FULL = os.environ.get("BENCH") == "full"
EPS = 1e-5


@dataclass(frozen=True)
class Shape:
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocabulary: int


SHAPES = {128: Shape(128, 4, 2, 32, 320, 1024), 512: Shape(512, 8, 4, 64, 1408, 8192)}


@dataclass(frozen=True)
class Case:
    """Two ways to the same tensor, the operator's and torch's, and the truth in float64."""

    native: Callable[[], torch.Tensor]
    torch: Callable
    truth: torch.Tensor
    shaped: Callable = lambda x: x  # torch's result in the shape of the others
    roundings: float = 1.0  # by which the error may exceed torch's


def add_rms_norm(shape: Shape, tokens: int, dtype: torch.dtype) -> Case:
    states, branch = (torch.randn(tokens, shape.width).to(dtype) for _ in range(2))
    norm = LlamaRMSNorm(shape.width, EPS).to(dtype)
    residual = torch.empty_like(states)
    return Case(
        lambda: native.add_rms_norm(states, norm.weight, EPS, branch=branch, residual=residual),
        lambda: norm(states + branch),
        reference.rms_norm((states + branch).double(), norm.weight.double(), EPS),
    )


def rotary(shape: Shape, tokens: int, dtype: torch.dtype) -> Case:
    heads, kv_heads, head_dim = shape.heads, shape.kv_heads, shape.head_dim
    angles = torch.arange(tokens)[:, None] * 1e4 ** -(torch.arange(head_dim // 2) / (head_dim // 2))
    cos, sin, position = angles.cos(), angles.sin(), torch.arange(tokens)
    wide_cos, wide_sin = (torch.cat([table, table], dim=1).to(dtype)[None] for table in (cos, sin))
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * head_dim).to(dtype)
    packed = qkv.clone()  # the operator rotates it in place, over and over
    values = (heads + kv_heads) * head_dim
    q, k = (
        x.contiguous()
        for x in qkv[:, :values].split([heads * head_dim, kv_heads * head_dim], dim=1)
    )

    def by_transformers():
        q_heads, k_heads = (x.view(1, tokens, -1, head_dim).transpose(1, 2) for x in (q, k))
        return apply_rotary_pos_emb(q_heads, k_heads, wide_cos, wide_sin)

    return Case(
        lambda: native.rotary(packed, cos, sin, position, heads, kv_heads)[:, :values],
        by_transformers,
        reference.rotary(qkv.double(), cos.double(), sin.double(), position, heads, kv_heads)[
            :, :values
        ],
        lambda rotated: torch.cat([x[0].transpose(0, 1).flatten(1) for x in rotated], dim=1),
    )


def attention(shape: Shape, tokens: int, dtype: torch.dtype) -> Case:
    """Rows of ROW tokens. A rounding of a score is one of the weight that it becomes."""
    heads, kv_heads, head_dim = shape.heads, shape.kv_heads, shape.head_dim
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * head_dim).to(dtype)
    ends = torch.arange(1, ROW + 1, dtype=torch.int32)
    seen = torch.stack([ends * 0, ends, ends, ends], dim=-1)[None]
    rows = qkv.view(-1, ROW, heads + 2 * kv_heads, head_dim).transpose(1, 2)
    q, k, v = rows.split([heads, kv_heads, kv_heads], dim=1)
    grouped = k.double().repeat_interleave(heads // kv_heads, dim=1)

    def by_torch(q=q, k=k, v=v) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    def flat(out: torch.Tensor) -> torch.Tensor:
        return out.transpose(1, 2).reshape(tokens, -1)

    return Case(
        lambda: native.attention(qkv, seen, heads, kv_heads, head_dim**-0.5),
        by_torch,
        flat(by_torch(q.double(), k.double(), v.double())),
        flat,
        1 + (q.double() @ grouped.transpose(-1, -2)).abs().max().item() * head_dim**-0.5,
    )


def gated_mlp(shape: Shape, tokens: int, dtype: torch.dtype) -> Case:
    gate, up = (torch.randn(tokens, shape.ffn).to(dtype) for _ in range(2))
    gate_up = torch.cat([gate, up], dim=1)
    return Case(
        lambda: native.gated_mlp(gate_up),
        lambda: F.silu(gate) * up,
        reference.gated_mlp(gate_up.double()),
    )


def log_sum_exp(shape: Shape, tokens: int, dtype: torch.dtype) -> Case:
    logits = torch.randn(tokens, shape.vocabulary).to(dtype)
    rows, targets = torch.arange(tokens), torch.randint(shape.vocabulary, (tokens,))
    return Case(
        lambda: logits[rows, targets] - native.log_sum_exp(logits),
        lambda: torch.log_softmax(logits.float(), -1)[rows, targets],
        -reference.token_nll(logits.double(), rows, targets),
    )


OPERATORS = [add_rms_norm, rotary, attention, gated_mlp, log_sum_exp]


@pytest.mark.skipif(not native.available(), reason="the extension is not built")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tokens", [1024, 2048])
@pytest.mark.parametrize("width", SHAPES)
@pytest.mark.parametrize("make", OPERATORS, ids=lambda make: make.__name__)
@torch.inference_mode()
def test_operator(benchmark, report, make, width, tokens, dtype):
    torch.manual_seed(0)
    case = make(SHAPES[width], tokens, getattr(torch, dtype))
    check(case, case.native(), case.shaped(case.torch()))

    others = {"torch": case.torch}
    if FULL:
        torch.compiler.reset()
        others["compiled"] = torch.compile(case.torch, dynamic=False)
        check(case, *map(case.shaped, (others["compiled"](), case.torch())))
    seconds = {name: timed(other, ROUNDS // 2) for name, other in others.items()}
    benchmark.pedantic(case.native, rounds=ROUNDS, warmup_rounds=2)
    for name, other in others.items():
        seconds[name] += timed(other, ROUNDS // 2)
    if benchmark.disabled:
        return
    ours, theirs = (
        benchmark.stats.stats.median * 1e6,
        {name: statistics.median(s) * 1e6 for name, s in seconds.items()},
    )
    report(
        operator=make.__name__,
        d=width,
        tokens=tokens,
        dtype=dtype,
        threads=torch.get_num_threads(),
        kernels=native.instruction_set(),
        native_us=ours,
        **{f"{name}_us": taken for name, taken in theirs.items()},
        **{f"{name}_ratio": taken / ours for name, taken in theirs.items()},
    )


def check(case: Case, found: torch.Tensor, same: torch.Tensor) -> None:
    """The greatest error is at most torch's plus one rounding, or a few where the case says so."""
    error, allowed = ((x.double() - case.truth).abs().max().item() for x in (found, same))
    assert (
        error
        <= allowed
        + case.roundings * torch.finfo(found.dtype).eps / 2 * case.truth.abs().max().item()
    )


def timed(work: Callable, rounds: int) -> list[float]:
    work()
    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return seconds
