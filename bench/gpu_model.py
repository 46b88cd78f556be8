"""Expected times of one H100, reckoned without one.

    PYTHONPATH=kernels:. python bench/gpu_model.py [--out bench/results/gpu_model.json]

Registers, shared memory and instructions are read from compiled code, tiles and launches from the
launchers, and laid beside the card's rates. Every number is an expectation, to stand beside what a
run measures, and says what limits it.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import save

from fastprune.plan.trie import kept_units, make_trie
from fastprune_kernels import attention, resources
from fastprune_kernels.launch import cdiv

# One H100 SXM. The product's rate and the copy's are ceilings as usually measured, not the data
# sheet's.
SMS, CLOCK = 132, 1.7e9
PRODUCT, COPY, CACHE = (
    800e12,
    2.9e12,
    10e12,
)  # FLOP/s; bytes/s of memory, read and written; bytes/s of the L2 cache
SHARED = 128 * SMS * CLOCK  # bytes/s
ISSUE = 4 * 0.7 * CLOCK  # instructions/s of an SM, at the rate that dependent code reaches
POWERS = 16 * CLOCK  # exponentials/s of an SM
START = 2.5e-6  # of a kernel: launch, first copies, last stores
FILL = 1e-6  # until the first copies of a tile have come
# Of the host, in microseconds: torch's own operators, a launch of Triton's, and our checks before
# it (CPU time of the launchers with the kernel left out, on a slow core; linear_nll has two
# launches and makes two descriptors).
TORCH, TRITON = 6, 12
CHECKS = {
    "add_rms_norm": 15,
    "rotary": 18,
    "gated_mlp": 8,
    "tree_attention": 17,
    "linear_nll": 33,
    "linear_kl": 32,
}
# instructions of a loss kernel that are not its epilogue: prologue, loop, the last tile's mask
OUTSIDE = 650


@dataclass(frozen=True)
class Model:
    name: str
    width: int
    inner: int
    blocks: int
    heads: int
    kv_heads: int
    head: int
    vocab: int

    @property
    def qkv(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.head


LLAMA = Model("LLaMA-3 8B", 4096, 14336, 32, 32, 8, 128, 128256)
SMALL = Model("Qwen2 0.5B", 896, 4864, 24, 14, 2, 64, 151936)


def compiled(kernel: str, variant: str) -> tuple[resources.Case, resources.Resources]:
    case = next(case for case in resources.cases("sm_90", kernel) if case.variant == variant)
    return case, resources.measure(case)


def programs_at_once(case: resources.Case, found: resources.Resources) -> int:
    """Programs that fit on one SM."""
    threads = 32 * case.config.num_warps
    registers = cdiv(found.registers, 8) * 8 * threads
    return min(228 * 1024 // (found.shared + 1024), 65536 // registers, 2048 // threads, 32)


# -- kernels: seconds, and what limits them --------------------------------------------------------


def streaming(case, found, programs: int, moved: int) -> dict:
    issue = found.instructions * case.config.num_warps * programs / SMS / ISSUE
    floor = moved / COPY
    return {
        "floor": floor,
        "seconds": START + max(floor, issue),
        "limit": "memory" if floor > issue else "instructions",
    }


def loss(case, found, rows: int, model: Model, powers: int, kept: int) -> dict:
    """The head's time. Of each logit: powers, exponentials; kept, bytes that are read with it."""
    p, v = case.config["BLOCK_P"], case.config["BLOCK_V"]
    flops = 2 * p * v * model.width
    product = flops / (PRODUCT / SMS)
    logits = p * v // (32 * case.config.num_warps)  # a thread's
    epilogue = (found.instructions - OUTSIDE) * case.config.num_warps / ISSUE
    epilogue = max(epilogue, powers * p * v / POWERS) + FILL
    cache = 2 * (p + v) / (2 * p * v) + kept / (2 * model.width)  # bytes per FLOP
    shared = (64 + v) / (
        64 * v
    )  # a warp group's step: 64 rows and v columns of 2 bytes, 2 FLOP for each pair
    slow = max(1, cache * PRODUCT / CACHE, shared * PRODUCT / SHARED)
    split = case.config["SPLIT_V"]
    programs = cdiv(rows, p) * cdiv(model.vocab, split)
    waves = programs / (SMS * programs_at_once(case, found))
    tile = product * slow + epilogue
    seconds = START + math.ceil(waves) * split // v * tile
    # the kernel after it: diagonals of 64 x 64, and a few numbers for each split
    seconds += START + rows * (64 * 2 * model.width / PRODUCT + 8 * cdiv(model.vocab, split) / COPY)
    limit = "product" if slow == 1 else "L2" if cache / CACHE > shared / SHARED else "shared memory"
    return {
        "floor": 2 * rows * model.width * model.vocab / PRODUCT,
        "seconds": seconds,
        "limit": f"{limit}; epilogue {epilogue / tile:.0%}, "
        f"{(found.instructions - OUTSIDE) / logits:.0f} a logit",
        "waves": waves,
        "cache": cache,
        "shared": shared,
    }


def trees(case, found, rows: int, trunk: int, choices: int, length: int, model: Model) -> dict:
    branch = torch.cat(
        [torch.zeros(trunk), torch.arange(1, choices + 1).repeat_interleave(length)]
    ).long()
    position = torch.cat([torch.arange(trunk), torch.arange(trunk, trunk + length).repeat(choices)])
    size = len(branch)
    starts = torch.arange(0, rows * size + 1, size)
    plan = attention.plan_tree(
        starts,
        branch.repeat(rows),
        position.repeat(rows),
        head_dim=model.head,
        dtype=torch.bfloat16,
        device="cpu",
        config=case.config,
    )
    m, n = case.config["BLOCK_M"], case.config["BLOCK_N"]
    steps = int(plan.lists[-1]) * model.heads
    product = 4 * m * n * model.head / (PRODUCT / SMS)
    # a quarter of the code is one step of the inner loop: there are two, a beginning and an end
    issue = max(found.instructions / 4 * case.config.num_warps / ISSUE, m * n / POWERS)
    # one half of the warps works on scores while the other's products run, but for about half of
    # the time
    step = max(product, issue) + 0.5 * min(product, issue)
    programs = plan.num_tiles * model.heads
    waves = programs / (SMS * programs_at_once(case, found))
    pairs = rows * (
        trunk * (trunk + 1) // 2 + choices * (length * trunk + length * (length + 1) // 2)
    )
    seconds = START + steps * step / SMS + programs / SMS / programs_at_once(case, found) * FILL
    floor = max(
        4 * model.heads * model.head * pairs / PRODUCT,
        2 * rows * size * (model.heads + model.kv_heads) * model.head * 2 / COPY,
    )
    seen = pairs / (int(plan.lists[-1]) * m * n)
    moved = 2 * n * model.head * 2 / (4 * m * n * model.head)
    limit = "scores" if issue > product else "product"
    return {
        "floor": floor,
        "seconds": seconds,
        "limit": f"{limit}; {seen:.0%} of what is visited is seen",
        "waves": waves,
        "cache": moved,
        "shared": moved * m / 64,
    }


def kernel_rows() -> list[dict[str, Any]]:
    tokens, model = 8192, LLAMA
    pairs = tokens * (model.heads + model.kv_heads)
    both = compiled("add_rms_norm", "bf16 D=4096"), compiled("gated_mlp", "bf16 silu")
    turn = [compiled("rotary", f"bf16 Dh=128{norm}") for norm in ("", " norm")]
    nll, divergence = compiled("linear_nll", "bf16"), compiled("linear_kl", "bf16")
    attend = compiled("tree_attention", "bf16 Dh=128")
    rows = [
        (
            "add_rms_norm",
            "8,192 x 4,096",
            both[0],
            streaming(*both[0], tokens, 8 * tokens * model.width),
        ),
        (
            "gated_mlp",
            "8,192 x 14,336",
            both[1],
            streaming(*both[1], tokens * 14, 6 * tokens * model.inner),
        ),
        *(
            (name, "8,192 tokens", found, streaming(*found, pairs // 16, 4 * pairs * model.head))
            for name, found in zip(("rotary", "rotary, q/k norm"), turn)
        ),
        ("linear_nll", "32,768 positions", nll, loss(*nll, 32768, model, 1, 0)),
        ("linear_nll", "512 positions", nll, loss(*nll, 512, model, 1, 0)),
        ("linear_kl", "32,768 positions", divergence, loss(*divergence, 32768, model, 2, 4)),
        ("tree_attention", "128 x (100 + 4 x 20)", attend, trees(*attend, 128, 100, 4, 20, model)),
        ("tree_attention", "4 x 2,048", attend, trees(*attend, 4, 2048, 0, 0, model)),
    ]
    lines = []
    for name, shape, (case, found), t in rows:
        kernel = name.split(",")[0]
        lines.append(
            {
                "kernel": name,
                "shape": shape,
                "registers": found.registers,
                "shared_kb": found.shared / 1024,
                "programs": programs_at_once(case, found),
                **{key: t.get(key) for key in ("waves", "cache", "shared")},
                "ms": 1e3 * t["seconds"],
                "of_floor": t["floor"] / t["seconds"],
                "limit": t["limit"],
                "host_us": CHECKS[kernel] + TRITON * (2 if kernel.startswith("linear") else 1),
            }
        )
    return lines


# -- one block -------------------------------------------------------------------------------------


def product(rows: int, outputs: int, inputs: int) -> float:
    """Seconds of cuBLAS's product: tiles of 128 x 256 in whole waves, smaller ones where they do
    not fill one."""
    tiles = cdiv(rows, 128) * cdiv(outputs, 256)
    whole = max(tiles, SMS) if tiles < SMS else cdiv(tiles, SMS) * SMS
    spread = (
        max(tiles / SMS, rows * outputs / (128 * 256) / SMS, 0.25) if tiles < SMS else whole / SMS
    )
    return START + max(
        spread * 2 * 128 * 256 * inputs / (PRODUCT / SMS), 2 * inputs * outputs / COPY
    )


def block(
    model: Model, tokens: int, attend: float, packed: bool = False
) -> dict[str, tuple[float, float]]:
    """Device seconds and host microseconds of each step. attend: seconds of attention."""
    w, s = model.width, 2 * tokens
    kv = model.kv_heads * model.head
    copied = lambda elements: START + s * elements / COPY  # noqa: E731 (short beside its use)
    apart = product(tokens, model.heads * model.head, w) + 2 * product(tokens, kv, w)
    triton = {name: checks + TRITON for name, checks in CHECKS.items()}
    return {
        "norm before attention": (copied(2 * w), triton["add_rms_norm"]),
        "q, k, v": (product(tokens, model.qkv, w), TORCH) if packed else (apart, 4 * TORCH),
        "rotary": (copied(2 * (model.heads + model.kv_heads) * model.head), triton["rotary"]),
        "attention": (attend, triton["tree_attention"]),
        "output projection": (product(tokens, w, model.heads * model.head), TORCH),
        "sum and norm": (copied(4 * w), triton["add_rms_norm"] + TORCH),
        "gate and up": (2 * product(tokens, model.inner, w), 3 * TORCH),
        "activation": (copied(3 * model.inner), triton["gated_mlp"]),
        "down projection": (product(tokens, w, model.inner), TORCH),
    }


def block_flops(model: Model, tokens: int, pairs: int) -> int:
    projections = 2 * model.width * (model.qkv + model.heads * model.head + 3 * model.inner)
    return tokens * projections + 4 * model.heads * model.head * pairs


def totals(steps: dict[str, tuple[float, float]]) -> tuple[float, float]:
    return sum(t for t, _ in steps.values()), 1e-6 * sum(host for _, host in steps.values())


# -- a search --------------------------------------------------------------------------------------


def beam_rounds(units: int, remove: int, width: int) -> list[np.ndarray]:
    """The masks that a beam search asks for, round by round, where losses are drawn."""
    weight = np.random.default_rng(0).random(units)
    beam, rounds = [frozenset()], []
    for _ in range(remove):
        asked = sorted(
            {removed | {unit} for removed in beam for unit in set(range(units)) - removed},
            key=sorted,
        )
        masks = np.ones((len(asked), units), dtype=bool)
        for mask, removed in zip(masks, asked):
            mask[list(removed)] = False
        rounds.append(masks)
        beam = sorted(asked, key=lambda removed: weight[list(removed)].sum())[:width]
    return rounds


def unit_runs(rounds: list[np.ndarray], kept: bool) -> tuple[int, int]:
    """Masks, and runs of units. kept: states of earlier rounds are still there."""
    masks = sum(map(len, rounds))
    if not kept:
        return masks, sum(make_trie(kept_units(asked)).unit_runs for asked in rounds)
    prefixes = {
        tuple(units[: i + 1])
        for asked in rounds
        for units in kept_units(asked)
        for i in range(len(units))
    }
    return masks, len(prefixes)


def search_rows() -> list[dict[str, Any]]:
    case, found = compiled("tree_attention", "bf16 Dh=128")
    small_case, small_found = compiled("tree_attention", "bf16 Dh=64")
    items, shape = 128, (100, 4, 6)
    lines = []
    for model, attending in ((LLAMA, (case, found)), (SMALL, (small_case, small_found))):
        rounds = beam_rounds(model.blocks, 7, 5)
        for chunk in (64, 8):  # questions
            tokens = chunk * (shape[0] + shape[1] * shape[2])
            attend = trees(*attending, chunk, *shape, model)["seconds"]
            device, host = totals(block(model, tokens, attend))
            positions = chunk * (1 + shape[1] * (shape[2] - 1))
            head = positions * model.width * model.vocab * 2 / PRODUCT / 0.85 + 2 * START
            trunk, choices, length = shape
            pairs = chunk * (
                trunk * (trunk + 1) // 2 + choices * (length * trunk + length * (length + 1) // 2)
            )
            head_flops = 2 * positions * model.width * model.vocab
            for kept in (False, True):
                masks, runs = unit_runs(rounds, kept)
                once = runs * max(device, host) + masks * max(
                    head, 1e-6 * (CHECKS["linear_nll"] + 6 * TRITON)
                )
                seconds = items // chunk * once
                flops = (
                    items // chunk * (runs * block_flops(model, tokens, pairs) + masks * head_flops)
                )
                lines.append(
                    {
                        "model": model.name,
                        "questions": chunk,
                        "kept": "of all rounds" if kept else "of a round",
                        "masks": masks,
                        "unit_runs": runs,
                        "block_ms": 1e3 * device,
                        "host_ms": 1e3 * host,
                        "seconds": seconds,
                        "of_rate": flops / seconds / PRODUCT,
                    }
                )
    return lines


def block_rows() -> list[dict[str, Any]]:
    lines = []
    for model, tokens in ((LLAMA, 8192), (LLAMA, 1024), (SMALL, 8192), (SMALL, 1024)):
        length = min(tokens, 2048)
        pairs = tokens // length * length * (length + 1) // 2
        attend = START + 4 * model.heads * model.head * pairs / (
            0.55 * PRODUCT
        )  # torch's, on plain rows
        for packed in (False, True):
            device, host = totals(block(model, tokens, attend, packed))
            rate = block_flops(model, tokens, pairs) / max(device, host) / PRODUCT
            lines.append(
                {
                    "model": model.name,
                    "tokens": tokens,
                    "qkv": "packed" if packed else "three products",
                    "device_ms": 1e3 * device,
                    "host_ms": 1e3 * host,
                    "of_rate": rate,
                }
            )
    return lines


def step_rows() -> list[dict[str, Any]]:
    attend = START + 4 * 32 * 128 * 4 * 2048 * 2049 // 2 / (0.55 * PRODUCT)
    steps = block(LLAMA, 8192, attend)
    device, host = totals(steps)
    lines = [
        {"step": name, "ms": 1e3 * t, "share": t / device, "host_us": us}
        for name, (t, us) in steps.items()
    ]
    return [*lines, {"step": "all of it", "ms": 1e3 * device, "share": None, "host_us": 1e6 * host}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    tables = {
        "kernels": kernel_rows(),
        "steps": step_rows(),
        "blocks": block_rows(),
        "searches": search_rows(),
    }
    print(json.dumps(tables, indent=1))
    save(given.out, tables)


if __name__ == "__main__":
    main()
