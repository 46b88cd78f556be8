"""One mask at a time on a warm evaluator: what a call costs beside its unit runs and its head.

    OMP_NUM_THREADS=1 python bench/one_mask.py [--out bench/results/one_mask.json]

A random llama of 32 narrow blocks, 16 rows of 128 tokens, and 100 masks, each one swap from the
mask before. The overhead is the CPU time of a call less that of its units and heads, which a spy
around them measures, and less the spy's own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from record import save
from transformers import LlamaConfig, LlamaForCausalLM

import fastprune as fp
from fastprune.engine.calls import Calls
from fastprune.engine.executor import Executor
from fastprune.models import FusedRunner

BLOCKS, WIDTH, ROWS, TOKENS, CALLS = 32, 64, 16, 128, 100


class Spent:
    """Seconds inside functions that it wraps."""

    def __init__(self) -> None:
        self.seconds, self.calls = 0.0, 0

    def wrap(self, owner: type, name: str) -> None:
        own = getattr(owner, name)

        def timed(*args, **kwargs):
            started = time.thread_time()
            try:
                return own(*args, **kwargs)
            finally:
                self.seconds += time.thread_time() - started
                self.calls += 1

        setattr(owner, name, timed)


class Nothing:
    def run(self) -> None: ...


def own_seconds() -> float:
    """A spy's own time for a call, outside of the time that it measures."""
    spent, nothing, count = Spent(), Nothing(), 10_000
    started = time.thread_time()
    for _ in range(count):
        nothing.run()
    alone = time.thread_time() - started
    spent.wrap(Nothing, "run")
    started = time.thread_time()
    for _ in range(count):
        nothing.run()
    return (time.thread_time() - started - alone - spent.seconds) / count


def make_masks(rng: np.random.Generator) -> np.ndarray:
    masks = [np.arange(BLOCKS) % 4 != 1]
    for _ in range(CALLS + 20):
        mask = masks[-1].copy()
        mask[rng.choice(np.flatnonzero(mask))] = False
        mask[rng.choice(np.flatnonzero(~mask))] = True
        masks.append(mask)
    return np.array(masks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    rng = np.random.default_rng(0)
    batch = fp.TokenBatch.from_ids(rng.integers(0, 512, (ROWS, TOKENS)))
    ev = fp.Evaluator(fp.Model(LlamaForCausalLM(config).eval()), fp.Perplexity(batch), "fused")
    masks, spent, overheads, units = make_masks(rng), Spent(), [], []
    own = own_seconds()
    spent.wrap(FusedRunner, "run")
    spent.wrap(Executor, "values")
    version = Spent()
    version.wrap(Calls, "_refresh")
    for number, mask in enumerate(masks):
        spent.seconds, spent.calls, version.seconds = 0.0, 0, 0.0
        before, started = ev.stats.unit_runs, time.thread_time()
        ev.score(mask[None])
        if number >= 20:
            total = time.thread_time() - started
            spied = spent.seconds + (spent.calls + 1) * own
            overheads.append((total - spied, version.seconds))
            units.append(ev.stats.unit_runs - before)
    row = {
        "milliseconds": round(1e3 * statistics.median(total for total, _ in overheads), 2),
        "of_them_model_and_numerics": round(1e3 * statistics.median(v for _, v in overheads), 2),
        "spy_microseconds_a_call": round(1e6 * own, 2),
        "unit_runs": statistics.mean(units),
        "chunks": len(ev.layout.chunks),
    }
    print(json.dumps(row))
    save(options.out, row)


if __name__ == "__main__":
    main()
