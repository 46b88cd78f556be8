"""Growth of cost: with masks, units, tokens and vocabulary, with a cold and a warm prefix cache.

Random masks that keep 0.8 of the units of Llama models of random weights, d = 128. Every point is
one call of a fresh evaluator, its median of three, with the unit runs that were made and the peak
of its activations beside it. With BENCH=full the axes are longer, and a figure is drawn
(build/growth.png).
"""

from __future__ import annotations

import os
import statistics
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fastprune as fp
from fastprune.plan.schedule import make_schedule
from fastprune.plan.trie import kept_units, make_trie

FULL = os.environ.get("BENCH") == "full"
BASE = {"masks": 50, "units": 16, "tokens": 512, "vocabulary": 2048}
AXES = {
    "masks": [10, 50, 200] + [500, 1000, 2000] * FULL,
    "units": [8, 16, 32] + [48, 80] * FULL,
    "tokens": [128, 512, 1024] + [2048, 4096] * FULL,
    "vocabulary": [512, 2048, 8192] + [32768, 131072] * FULL,
}
POINTS = [(axis, value) for axis, values in AXES.items() for value in values]
FOUND: dict[str, list[tuple[int, float, float, float]]] = defaultdict(list)


def random_masks(count: int, units: int) -> np.ndarray:
    masks = np.random.default_rng(0).random((count, units)) < 0.8
    masks[:, 0] = True
    return masks


def make_model(units: int, vocabulary: int) -> fp.Model:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=units,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    return fp.Model(LlamaForCausalLM(config).eval())


@pytest.mark.parametrize(("axis", "value"), POINTS, ids=lambda part: str(part))
def test_growth(benchmark, report, axis, value):
    size = {**BASE, axis: value}
    model, masks = (
        make_model(size["units"], size["vocabulary"]),
        random_masks(size["masks"], size["units"]),
    )
    ids = np.random.default_rng(1).integers(0, size["vocabulary"], (size["tokens"] // 128, 128))
    objective = fp.Perplexity(fp.TokenBatch.from_ids(ids))
    fp.Evaluator(model, objective, cache_bytes=0).score(masks[:2])  # warms up
    cold, warm = [], []
    for _ in range(3):
        ev = fp.Evaluator(model, objective, cache_bytes=1 << 30)
        started = time.perf_counter()
        ev.score(masks)
        cold.append(time.perf_counter() - started)
        runs, peak = ev.stats.unit_runs, ev.stats.peak_activation_bytes
        started = time.perf_counter()
        ev.score(masks)
        warm.append(time.perf_counter() - started)
    benchmark.pedantic(fp.Evaluator(model, objective, cache_bytes=0).score, args=(masks,), rounds=1)
    made = ev.stats.unit_runs - runs
    row = statistics.median(cold), statistics.median(warm), peak / 2**20
    FOUND[axis].append((value, *row))
    report(
        axis=axis,
        value=value,
        cold_s=row[0],
        warm_s=row[1],
        unit_runs=runs,
        warm_unit_runs=made,
        peak_MiB=row[2],
    )
    if FULL and (axis, value) == POINTS[-1]:
        draw()


@pytest.mark.parametrize("count", [10, 100, 1_000, 10_000] + [100_000] * FULL)
def test_planning(benchmark, report, count):
    masks = random_masks(count, 32)
    schedule = benchmark.pedantic(
        lambda: make_schedule(make_trie(kept_units(masks))), rounds=3, warmup_rounds=1
    )
    report(
        axis="masks planned, 32 units",
        value=count,
        cold_s=benchmark.stats.stats.median,
        unit_runs=schedule.unit_runs,
    )


def draw() -> None:
    """Seconds cold and warm, and the peak of activations, along each axis."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6), layout="constrained")
    axes = figure.subplots(2, len(FOUND), sharex="col", squeeze=False)
    for (name, points), (upper, lower) in zip(FOUND.items(), axes.T, strict=True):
        values, cold, warm, peak = zip(*points, strict=True)
        upper.loglog(values, cold, "o-", label="cold")
        upper.loglog(values, warm, "s--", label="warm cache")
        lower.loglog(values, peak, "o-", color="tab:gray")
        lower.set_xlabel(name)
    axes[0, 0].set_ylabel("seconds a call")
    axes[1, 0].set_ylabel("peak of activations, MiB")
    axes[0, 0].legend()
    path = Path("build/growth.png")
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=150)
