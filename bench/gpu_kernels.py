"""Each kernel against its floor and against torch, at the shapes of LLaMA-3 8B and Qwen3 8B, in
bfloat16.

A kernel is timed only after its result was compared with float64, on the inputs and at the size it
is timed at (for the largest, on some of the rows).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from gpu_baselines import losses
from gpu_measure import Bench, relative_error, time_limit
from gpu_watch import failure
from torch.nn import functional as F

from fastprune.engine.memory import peak_bytes
from fastprune_kernels import attention, gated_mlp, linear_loss, norm, reference, rope
from fastprune_kernels.launch import Config, gated_mlp_config, norm_config, rotary_config

COMPILE_SECONDS = 45  # at most, for one operator by torch.compile
ROUNDED, EXACT = (
    1e-2,
    1e-3,
)  # relative error allowed to what is rounded to bfloat16, and to what stays float32


@dataclass
class Case:
    """One kernel at one shape.

    moved, flops: what it must do at the least. error: against float64. others: what it is measured
    against, by name.
    like: whether what one of these returns is the same.
    compiled: what torch.compile is given. variants: other configurations, tried when asked for.
    keeps: whether the memory it takes besides its operands is of interest.
    """

    shape: str
    ours: Callable[[], object]
    error: Callable[[], float]
    moved: float = 0
    flops: float = 0
    tolerance: float = ROUNDED
    others: dict[str, Callable[[], Any]] = field(default_factory=dict)
    like: Callable[[Any], bool] | None = None
    compiled: Callable[[], object] | None = None
    variants: dict[str, Callable[[], object]] = field(default_factory=dict)
    keeps: bool = False


def run(bench: Bench, section: str) -> None:
    """Measure every kernel of a section, "loss" or "kernels", or torch.compile beside the latter;
    what fails is noted and the others go on. What an earlier run has measured stays."""
    before = bench.results.get(section, {})
    found = {name: of for name, of in before.items() if isinstance(of, dict) and "ms" in of}
    cases = {"loss": loss, "kernels": others, "compiled": compilable}
    for name, make in cases[section]():
        if name in found:
            continue
        if bench.left() < bench.pick(10, 1):
            found[name] = {"skipped": "no time left"}
        else:
            try:
                measure = _measure_compiled if section == "compiled" else _measure
                found[name] = measure(bench, make(bench))
            except Exception as error:
                found[name] = failure(error)
                if bench.is_broken():
                    bench.save(section, found)
                    raise
        print(f"  {name}: {found[name].get('ms', found[name])}", flush=True)
        bench.save(section, found)
        bench.free()


def _measure(bench: Bench, case: Case) -> dict:
    result = {"shape": case.shape, "bytes": case.moved, "flops": case.flops, "error": case.error()}
    if not result["error"] <= case.tolerance:
        return {
            **result,
            "failed": f"wrong: error {result['error']:.3g}, at most {case.tolerance:.3g} is "
            f"allowed",
        }
    result |= bench.time(case.ours)
    result |= bench.against_floor(result["ms"], case.moved, case.flops)
    if case.keeps:
        result["extra_bytes"] = peak_bytes(case.ours)[1]
    for name, other in case.others.items():
        result[name] = _attempt(bench, other, like=case.like)
    if bench.tune or bench.tiny:
        result["variants"] = {
            name: _attempt(bench, variant) for name, variant in case.variants.items()
        }
    return result


def _measure_compiled(bench: Bench, case: Case) -> dict:
    """Torch's compiler takes long, so that it comes last."""
    assert case.compiled is not None
    work = torch.compile(case.compiled, dynamic=False) if bench.compiles else case.compiled
    return _attempt(bench, work, min(COMPILE_SECONDS, bench.left()))


def _attempt(
    bench: Bench,
    work: Callable[[], Any],
    limit: float = 60,
    like: Callable[[Any], bool] | None = None,
) -> dict:
    """Its timing, or why there is none: memory, shared memory, time, or another result."""
    try:
        with time_limit(limit):
            if like is not None and not like(work()):
                return {"failed": "it gives something else"}
            return bench.time(work)
    except Exception as error:
        if bench.is_broken():
            raise
        return failure(error)
    finally:
        bench.free()


def loss() -> Iterator[tuple[str, Callable[[Bench], Case]]]:
    yield "linear_nll", lambda bench: linear_nll(bench, bench.pick(32768, 40))
    yield "linear_nll, 4 targets", lambda bench: linear_nll(bench, bench.pick(8192, 5), 4)
    yield "linear_kl", linear_kl


def others() -> Iterator[tuple[str, Callable[[Bench], Case]]]:
    yield "tree_attention, questions", questions
    yield "tree_attention, plain rows", plain_rows
    yield "add_rms_norm", add_rms_norm
    yield "gated_mlp", gated
    yield "rotary", lambda bench: rotary(bench, with_norm=False)
    yield "rotary, q/k norm", lambda bench: rotary(bench, with_norm=True)


def compilable() -> Iterator[tuple[str, Callable[[Bench], Case]]]:
    """The functions that torch.compile is given."""
    return ((name, make) for name, make in others() if not name.startswith("tree_attention"))


def add_rms_norm(bench: Bench) -> Case:
    rows, width = bench.pick((8192, 4096), (5, 60))
    states, branch, weight = (
        bench.random(rows, width),
        bench.random(rows, width),
        bench.random(width),
    )
    residual, normed = bench.nans(rows, width), bench.nans(rows, width)

    def ours(config: Config | None = None):
        norm.add_rms_norm(
            states, weight, 1e-5, branch=branch, residual=residual, normed=normed, config=config
        )

    def error() -> float:
        ours()
        x, truth = reference.add_rms_norm(states.double(), weight.double(), 1e-5, branch.double())
        return max(relative_error(residual, x), relative_error(normed, truth))

    block = norm_config(width)["BLOCK_D"]
    return Case(
        f"[{rows}, {width}]",
        ours,
        error,
        moved=4 * states.nbytes,
        others={"torch": lambda: reference.add_rms_norm(states, weight, 1e-5, branch)},
        compiled=lambda: reference.add_rms_norm(states, weight, 1e-5, branch),
        variants={f"{w} warps": lambda w=w: ours(Config.of(w, 1, BLOCK_D=block)) for w in (4, 16)},
    )


def gated(bench: Bench) -> Case:
    rows, size = bench.pick((8192, 14336), (3, 44))
    gate_up, out = bench.random(rows, 2 * size), bench.nans(rows, size)

    def ours(config: Config | None = None):
        gated_mlp.gated_mlp(gate_up, out=out, config=config)

    def error() -> float:
        ours()
        return relative_error(out, reference.gated_mlp(gate_up.double()))

    block = gated_mlp_config()["BLOCK_F"]
    return Case(
        f"[{rows}, 2 x {size}]",
        ours,
        error,
        moved=3 * rows * size * gate_up.element_size(),
        others={"torch": lambda: reference.gated_mlp(gate_up)},
        compiled=lambda: reference.gated_mlp(gate_up),
        variants={
            f"{b} columns, {w} warps": lambda b=b, w=w: ours(Config.of(w, 1, BLOCK_F=b))
            for b, w in ((2 * block, 4), (4 * block, 8))
        },
    )


def rotary(bench: Bench, with_norm: bool) -> Case:
    tokens, heads, kv_heads, size = bench.pick((8192, 32, 8, 128), (6, 2, 1, 16))
    length = tokens // 2
    qkv = bench.random(tokens, (heads + 2 * kv_heads) * size)
    steps = torch.arange(length, device=bench.device)
    angles = steps[:, None] * 1e4 ** -(torch.arange(size // 2, device=bench.device) / (size // 2))
    tables = angles.cos(), angles.sin(), torch.arange(tokens, device=bench.device) % length
    weights = (
        {"q_weight": bench.random(size), "k_weight": bench.random(size), "eps": 1e-6}
        if with_norm
        else {}
    )

    def ours(config: Config | None = None):  # in place: turned once more each time
        rope.rotary(qkv, *tables, heads, kv_heads, config=config, **weights)

    def error() -> float:
        before = qkv.double()
        wide = {name: x.double() if torch.is_tensor(x) else x for name, x in weights.items()}
        ours()
        return relative_error(qkv, reference.rotary(before, *tables, heads, kv_heads, **wide))

    def torchs():
        return reference.rotary(qkv, *tables, heads, kv_heads, **weights)

    block = rotary_config(size)["BLOCK_R"]
    return Case(
        f"{tokens} tokens, {heads} + {kv_heads} heads of {size}",
        ours,
        error,
        moved=2 * tokens * (heads + kv_heads) * size * qkv.element_size(),
        others={"torch": torchs},
        compiled=torchs,
        variants={
            f"{b} pairs, {w} warps": lambda b=b, w=w: ours(Config.of(w, 1, BLOCK_R=b))
            for b, w in ((block // 2, 4), (2 * block, 4), (2 * block, 8))
        },
    )


def questions(bench: Bench) -> Case:
    """Choices that share a question, one row each, against a dense mask, and against every choice
    run by itself."""
    rows, trunk, choices, length = bench.pick((128, 100, 4, 20), (2, 5, 2, 3))
    branch = torch.cat(
        [torch.zeros(trunk), torch.arange(1, choices + 1).repeat_interleave(length)]
    ).long()
    position = torch.cat([torch.arange(trunk), torch.arange(trunk, trunk + length).repeat(choices)])
    pairs = trunk * (trunk + 1) // 2 + choices * (length * trunk + length * (length + 1) // 2)
    return _attention(bench, rows, branch, position, pairs, alone=(choices, trunk + length))


def plain_rows(bench: Bench) -> Case:
    """Text, where torch's own kernels serve as well: the faster of the two should."""
    rows, length = bench.pick((4, 2048), (2, 21))
    branch, position = torch.zeros(length).long(), torch.arange(length)
    return _attention(bench, rows, branch, position, length * (length + 1) // 2, alone=None)


def _attention(
    bench: Bench, rows: int, branch, position, pairs: int, alone: tuple[int, int] | None
) -> Case:
    heads, kv_heads, size = bench.pick((32, 8, 128), (2, 1, 16))
    length = len(branch)
    starts = torch.arange(0, rows * length + 1, length)
    tree = starts, branch.repeat(rows), position.repeat(rows)
    qkv = bench.random(rows * length, (heads + 2 * kv_heads) * size)
    out = bench.nans(rows * length, heads * size)

    def planned(config: Config | None = None):
        options = {"head_dim": size, "dtype": qkv.dtype, "device": qkv.device, "config": config}
        plan = attention.plan_tree(*tree, **options)
        return lambda: attention.tree_attention(qkv, plan, heads, kv_heads, out=out)

    ours = planned()
    seen = reference.tree_mask(starts[:2], branch, position).to(bench.device)

    def error() -> float:
        """On the first row and the last."""
        ours()
        errors = []
        for row in (slice(0, length), slice((rows - 1) * length, None)):
            truth = reference.tree_attention(qkv[row].double(), seen, heads, kv_heads)
            errors.append(relative_error(out[row], truth))
        return max(errors)

    def sdpa(packed: torch.Tensor, mask: torch.Tensor | None = None):
        split = packed.unflatten(-1, (heads + 2 * kv_heads, size)).transpose(1, 2)
        q, k, v = split.split([heads, kv_heads, kv_heads], dim=1)
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True
        )

    def by(backend: str):
        def work():
            with torch.nn.attention.sdpa_kernel(getattr(torch.nn.attention.SDPBackend, backend)):
                return sdpa(qkv.view(rows, length, -1))

        return work

    if alone:
        apart = bench.random(rows * alone[0], alone[1], qkv.shape[1])
        others = {
            "torch, dense mask": lambda: sdpa(qkv.view(rows, length, -1), seen[None, None]),
            "torch, choices apart": lambda: sdpa(apart),
        }
    else:
        others = {"torch": lambda: sdpa(qkv.view(rows, length, -1))}
        others |= {"torch, flash": by("FLASH_ATTENTION"), "torch, cuDNN": by("CUDNN_ATTENTION")}
    tiles = bench.pick(
        ((128, 128, 8, 2), (64, 64, 4, 3), (128, 64, 4, 3), (128, 32, 4, 4)), ((16, 32, 1, 1),)
    )
    return Case(
        f"{rows} rows of {length}, {heads} and {kv_heads} heads of {size}",
        ours,
        error,
        moved=qkv.nbytes + out.nbytes,
        flops=4 * heads * size * pairs * rows,
        others=others,
        variants={
            f"{m} x {n}, {w} warps, {s} stages": _later(
                lambda m=m, n=n, w=w, s=s: planned(_tile(m, n, w, s))
            )
            for m, n, w, s in tiles
        },
    )


def _tile(m: int, n: int, warps: int, stages: int) -> Config:
    return Config.of(warps, stages, BLOCK_M=m, BLOCK_N=n)


def _later(make: Callable[[], Callable[[], object]]) -> Callable[[], object]:
    """Makes the work when it is first run, so that a plan is made for those variants that are
    tried."""
    made: list[Callable[[], object]] = []

    def work():
        if not made:
            made.append(make())
        return made[0]()

    return work


def _head(bench: Bench, positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    vocab, width = bench.pick((128256, 4096), (131, 36))
    return bench.random(positions, width), bench.random(vocab, width, scale=0.02)


def _some(bench: Bench, count: int) -> torch.Tensor:
    """Rows that are compared with float64: of the first block, the last and between."""
    return torch.linspace(0, count - 1, min(count, 64), device=bench.device).long()


def linear_nll(bench: Bench, positions: int, targets: int = 1) -> Case:
    """targets: of a position, as where choices branch."""
    chunk = bench.pick(4096, 16)
    hidden, weight = _head(bench, positions)
    target = bench.integers(len(weight), positions, targets)

    def ours(config: Config | None = None):
        return linear_loss.linear_nll(hidden, weight, target, config=config)

    def error() -> float:
        rows = _some(bench, positions)
        truth = reference.linear_nll(hidden[rows].double(), weight.double(), target[rows])
        return relative_error(ours()[rows], truth)

    def like(found: torch.Tensor) -> bool:  # of logits that are rounded
        return relative_error(found, ours()[:, 0]) < ROUNDED

    tiles = ((128, 256, 64, 8, 3), (256, 128, 64, 8, 4), (128, 128, 64, 8, 4), (128, 128, 64, 4, 4))
    return Case(
        f"{positions} positions x {len(weight)} tokens x {weight.shape[1]}, targets: {targets}",
        ours,
        error,
        moved=hidden.nbytes + weight.nbytes,
        flops=2 * positions * weight.numel(),
        tolerance=EXACT,
        others=losses(hidden, weight, target[:, 0].contiguous(), chunk),
        like=like,
        variants=_matrix_variants(bench, ours, tiles),
        keeps=True,
    )


def linear_kl(bench: Bench) -> Case:
    positions, chunk = bench.pick((8192, 2048), (40, 16))
    dense, weight = _head(bench, positions)
    masked = dense + bench.random(*dense.shape, scale=0.3)
    kept = linear_loss.linear_logits(dense, weight)

    def ours(config: Config | None = None):
        return linear_loss.linear_kl(kept, masked, weight, config=config)

    def error() -> float:
        if linear_loss.linear_kl(kept, dense, weight).any():
            return float("inf")  # of a model from itself: both kernels make the same logits
        rows, wide = _some(bench, positions), weight.double()
        truth = reference.linear_kl(dense[rows].double() @ wide.T, masked[rows].double(), wide)
        return relative_error(ours()[rows], truth)

    def chunked():
        for a, b in zip(kept.split(chunk), masked.split(chunk)):
            reference.linear_kl(a, b, weight)

    tiles = ((64, 256, 64, 8, 4), (128, 128, 32, 8, 4), (64, 128, 64, 4, 4), (128, 64, 64, 4, 4))
    return Case(
        f"{positions} positions x {len(weight)} tokens x {weight.shape[1]}",
        ours,
        error,
        moved=kept.nbytes + masked.nbytes + weight.nbytes,
        flops=2 * positions * weight.numel(),
        tolerance=EXACT,
        others={f"torch, {chunk} at a time": chunked},
        variants=_matrix_variants(bench, ours, tiles),
        keeps=True,
    )


def _matrix_variants(bench: Bench, ours, tiles) -> dict[str, Callable[[], object]]:
    split = bench.pick(1024, 64)

    def config(p, v, d, warps, stages) -> Config:
        return Config.of(warps, stages, BLOCK_P=p, BLOCK_V=v, BLOCK_D=d, SPLIT_V=split, GROUP_P=8)

    tiles = bench.pick(tiles, ((16, 32, 16, 1, 1),))
    return {
        f"{p} x {v} x {d}, {w} warps, {s} stages": lambda p=p, v=v, d=d, w=w, s=s: ours(
            config(p, v, d, w, s)
        )
        for p, v, d, w, s in tiles
    }
