"""Each Triton kernel beside torch's reference on a GPU, at the shapes of models from 135M to 70B.

Results are compared with float64 on some rows before anything is timed; reached is the share of the
bytes or FLOPs a second that a copy or a matrix product reaches on the same card, in the same run.
Without a GPU the cases are skipped; TRITON_INTERPRET=1 runs them there at tiny sizes, which checks
the cases and times nothing of interest.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from fastprune_kernels import reference

TINY = os.environ.get("TRITON_INTERPRET") == "1" and not torch.cuda.is_available()
DEVICE = "cpu" if TINY else "cuda"
TOKENS = 9 if TINY else 8192
CHECKED = 64  # rows that are compared with float64

pytestmark = pytest.mark.skipif(
    not TINY and not torch.cuda.is_available(),
    reason="needs a GPU, or TRITON_INTERPRET=1 for a dry run at tiny sizes",
)


@dataclass(frozen=True)
class Shape:
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int


MODELS = {
    "135M": Shape(576, 1536, 9, 3, 64, 49152),
    "1B": Shape(2048, 8192, 32, 8, 64, 128256),
    "8B": Shape(4096, 14336, 32, 8, 128, 128256),
    "70B": Shape(8192, 28672, 64, 8, 128, 128256),
}
if TINY:
    MODELS = {"tiny": Shape(36, 44, 2, 1, 16, 131)}
DTYPES = ["float32"] if TINY else ["bfloat16", "float16", "float32"]


@dataclass(frozen=True)
class Work:
    """ours(), plain(): by the kernel and by torch, [rows, ...]; truth(rows): some of its rows in
    float64. moved bytes and flops: the least that has to be done."""

    ours: Callable[[], torch.Tensor]
    plain: Callable[[], torch.Tensor]
    truth: Callable[[torch.Tensor], torch.Tensor]
    moved: int
    flops: int = 0


def random(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape, device=DEVICE) * scale).to(dtype)


def add_rms_norm(shape: Shape, dtype: torch.dtype) -> Work:
    from fastprune_kernels.norm import add_rms_norm

    states, branch = (random(TOKENS, shape.hidden, dtype=dtype) for _ in range(2))
    weight = random(shape.hidden, dtype=dtype)
    residual = torch.empty_like(states)
    return Work(
        lambda: add_rms_norm(states, weight, 1e-5, branch=branch, residual=residual),
        lambda: reference.add_rms_norm(states, weight, 1e-5, branch)[1],
        lambda rows: reference.add_rms_norm(
            states[rows].double(), weight.double(), 1e-5, branch[rows].double()
        )[1],
        moved=4 * states.nbytes,
    )


def gated_mlp(shape: Shape, dtype: torch.dtype) -> Work:
    from fastprune_kernels.gated_mlp import gated_mlp

    gate_up = random(TOKENS, 2 * shape.ffn, dtype=dtype)
    return Work(
        lambda: gated_mlp(gate_up),
        lambda: reference.gated_mlp(gate_up),
        lambda rows: reference.gated_mlp(gate_up[rows].double()),
        moved=gate_up.nbytes * 3 // 2,
    )


def rotary(shape: Shape, dtype: torch.dtype) -> Work:
    from fastprune_kernels.rope import rotary

    width, size = (shape.heads + 2 * shape.kv_heads) * shape.head_dim, shape.head_dim
    given = random(TOKENS, width, dtype=dtype)
    turned = given.clone()
    angles = torch.arange(TOKENS, device=DEVICE)[:, None] * 1e4 ** -(
        torch.arange(size // 2, device=DEVICE) * 2 / size
    )
    tables = angles.cos(), angles.sin()
    position = torch.arange(TOKENS, device=DEVICE)
    heads = shape.heads, shape.kv_heads

    def ours() -> torch.Tensor:
        turned.copy_(given)  # the kernel turns in place
        rotary(turned, *tables, position, *heads)
        return turned

    return Work(
        ours,
        lambda: reference.rotary(given, *tables, position, *heads),
        lambda rows: reference.rotary(given[rows].double(), *tables, position[rows], *heads),
        moved=2 * given.nbytes + 2 * given.nbytes,  # the copy, and the turn
    )


def tree_attention(shape: Shape, dtype: torch.dtype) -> Work:
    """Questions of 100 tokens with four choices of 20."""
    from fastprune_kernels import attention

    trunk, length = (3, 2) if TINY else (100, 20)
    row = torch.cat([torch.zeros(trunk), torch.arange(1, 5).repeat_interleave(length)]).long()
    at = torch.cat([torch.arange(trunk), torch.arange(trunk, trunk + length).repeat(4)])
    count = max(1, TOKENS // len(row))
    starts = torch.arange(0, count * len(row) + 1, len(row))
    qkv = random(count * len(row), (shape.heads + 2 * shape.kv_heads) * shape.head_dim, dtype=dtype)
    heads = shape.heads, shape.kv_heads
    plan = attention.plan_tree(
        starts,
        row.repeat(count),
        at.repeat(count),
        head_dim=shape.head_dim,
        dtype=dtype,
        device=qkv.device,
    )
    mask = reference.tree_mask(starts[:2], row, at).to(DEVICE)

    def by_torch(packed: torch.Tensor) -> torch.Tensor:
        return torch.cat(
            [reference.tree_attention(part, mask, *heads) for part in packed.split(len(row))]
        )

    def truth(rows: torch.Tensor) -> torch.Tensor:
        of = torch.unique(rows // len(row))
        parts = {int(i): by_torch(qkv[i * len(row) : (i + 1) * len(row)].double()) for i in of}
        return torch.stack([parts[int(i) // len(row)][int(i) % len(row)] for i in rows])

    pairs = trunk * (trunk + 1) // 2 + 4 * (length * trunk + length * (length + 1) // 2)
    return Work(
        lambda: attention.tree_attention(qkv, plan, *heads),
        lambda: by_torch(qkv),
        truth,
        moved=qkv.nbytes * 2,
        flops=4 * shape.heads * shape.head_dim * pairs * count,
    )


def in_parts(work: Callable[..., torch.Tensor], *rows: torch.Tensor) -> torch.Tensor:
    """2,048 rows at a time: logits of all would not fit."""
    return torch.cat(
        [work(*parts) for parts in zip(*(part.split(2048) for part in rows), strict=True)]
    )


def linear_nll(shape: Shape, dtype: torch.dtype) -> Work:
    from fastprune_kernels.linear_loss import linear_nll

    hidden = random(TOKENS, shape.hidden, dtype=dtype)
    weight = random(shape.vocabulary, shape.hidden, dtype=dtype, scale=0.02)
    target = torch.randint(shape.vocabulary, (TOKENS, 1), device=DEVICE)

    return Work(
        lambda: linear_nll(hidden, weight, target),
        lambda: in_parts(
            lambda part, wanted: reference.linear_nll(part, weight, wanted), hidden, target
        ),
        lambda rows: reference.linear_nll(hidden[rows].double(), weight.double(), target[rows]),
        moved=hidden.nbytes + weight.nbytes,
        flops=2 * TOKENS * weight.numel(),
    )


def linear_kl(shape: Shape, dtype: torch.dtype) -> Work:
    """The dense model's logits, made once for all masks, are there."""
    from fastprune_kernels.linear_loss import linear_kl, linear_logits

    dense = random(TOKENS, shape.hidden, dtype=dtype)
    masked = dense + random(TOKENS, shape.hidden, dtype=dtype, scale=0.3)
    weight = random(shape.vocabulary, shape.hidden, dtype=dtype, scale=0.02)

    kept = linear_logits(dense, weight)

    def truth(rows) -> torch.Tensor:
        wide = weight.double()
        return reference.linear_kl(dense[rows].double() @ wide.T, masked[rows].double(), wide)

    return Work(
        lambda: linear_kl(kept, masked, weight),
        lambda: in_parts(lambda p, q: reference.linear_kl(p, q, weight), kept, masked),
        truth,
        moved=kept.nbytes + masked.nbytes + weight.nbytes,
        flops=2 * TOKENS * weight.numel(),
    )


OPERATORS = {
    make.__name__: make
    for make in (add_rms_norm, gated_mlp, rotary, tree_attention, linear_nll, linear_kl)
}


@functools.cache
def ceilings(dtype: torch.dtype) -> tuple[float, float]:
    """Bytes a second of a copy, and FLOPs a second of a matrix product, on this card."""
    if TINY:
        return float("nan"), float("nan")
    source = torch.empty(1 << 30, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    a, b = (random(8192, 8192, dtype=dtype) for _ in range(2))
    return 2 * source.nbytes / seconds(lambda: target.copy_(source)), 2 * 8192**3 / seconds(
        lambda: a @ b
    )


def seconds(work: Callable[[], object], rounds: int = 20) -> float:
    """The median of some rounds, by the card's own clock."""
    if TINY:
        work()
        return float("nan")
    found = []
    for _ in range(rounds + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end) / 1000)
    return sorted(found[3:])[rounds // 2]


def run(work: Callable[[], object]) -> None:
    work()
    if not TINY:
        torch.cuda.synchronize()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("operator", OPERATORS)
def test_kernel(benchmark, report, operator, model, dtype):
    torch.manual_seed(0)
    work = OPERATORS[operator](MODELS[model], getattr(torch, dtype))
    found = work.ours()
    found = found[1] if isinstance(found, tuple) else found
    rows = torch.linspace(0, len(found) - 1, min(CHECKED, len(found))).long().to(DEVICE)
    error = relative_error(found[rows].flatten(), work.truth(rows).flatten())
    by_torch = relative_error(work.plain()[rows].flatten(), work.truth(rows).flatten())
    assert error <= max(2 * by_torch, 1e-5), (
        error,
        by_torch,
    )  # no further from the truth than torch is
    benchmark.pedantic(
        run, args=(work.ours,), rounds=1 if TINY else 20, warmup_rounds=0 if TINY else 3
    )
    ours, plain = seconds(work.ours), seconds(work.plain)
    bytes_a_second, flops_a_second = ceilings(getattr(torch, dtype))
    floor = max(work.moved / bytes_a_second, work.flops / flops_a_second)
    report(
        operator=operator,
        model=model,
        dtype=dtype,
        us=ours * 1e6,
        torch_us=plain * 1e6,
        faster=plain / ours,
        reached=floor / ours,
        error=error,
    )


def relative_error(found: torch.Tensor, truth: torch.Tensor) -> float:
    """Root mean square of the difference, by that of the truth."""
    return ((found.double() - truth).square().mean() / truth.square().mean()).sqrt().item()
