"""Whole calls under chunks of different sizes, in one process and on one thread.

    OMP_NUM_THREADS=1 python bench/cut.py [--out bench/results/cut.json]

Scores the model without each of its blocks, on 2,048 tokens in rows of 32 and of 128 tokens, under
chunks of one row and of 128 to 4,096 tokens. The layouts take turns. The table has the median CPU
seconds of a call, and the median of its ratios to chunks of 1,024 tokens in the same round.
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
from fastprune.plan.layout import Layout

TOKENS, ROW_TOKENS, REFERENCE = 2048, (32, 128), 1024
CHUNK_TOKENS = (1, 128, 256, 384, 512, 1024, 4096)
SHAPES = {  # hidden size: intermediate size, heads, key and value heads; of SmolLM2 135M and 360M
    576: (1536, 9, 3),
    960: (2560, 15, 5),
}
BLOCKS, VOCABULARY = 4, 8192  # a head has a third of the blocks' weights, as in SmolLM2


def load(hidden: int) -> fp.Model:
    if hidden == 128:
        return fp.load_model("demo")
    intermediate, heads, key_value_heads = SHAPES[hidden]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=BLOCKS,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
    )
    return fp.Model(LlamaForCausalLM(config).eval())


def measure(hidden: int, row_tokens: int, rounds: int) -> list[dict[str, object]]:
    """CPU seconds of a call under each size of chunk."""
    model = load(hidden)
    ids = np.random.default_rng(0).integers(0, 512, (TOKENS // row_tokens, row_tokens))
    objective = fp.Perplexity(fp.TokenBatch.from_ids(ids))
    tile = fp.Evaluator(model, objective, cache_bytes=0).layout.tile
    seconds: dict[int, list[float]] = {size: [] for size in CHUNK_TOKENS}
    evaluators = {}
    for size in CHUNK_TOKENS:
        rows = max(1, size // row_tokens)
        parts = np.array_split(np.arange(len(ids)), -(-len(ids) // rows))
        chunks = tuple(tuple(part.tolist()) for part in parts)
        layout = Layout(chunks, tile, objective.batch.content_hash)
        evaluators[size] = fp.Evaluator(model, objective, cache_bytes=0, layout=layout)
    masks = fp.from_removed([(unit,) for unit in range(model.num_blocks)], model.num_blocks)
    for _ in range(rounds):
        for size, ev in evaluators.items():
            started = time.process_time()
            ev.score(masks)
            seconds[size].append(time.process_time() - started)
    return [
        {
            "hidden": hidden,
            "row_tokens": row_tokens,
            "chunk_tokens": max(size, row_tokens),
            "seconds": round(statistics.median(spent), 4),
            "ratio": round(statistics.median(a / b for a, b in zip(spent, seconds[REFERENCE])), 3),
        }
        for size, spent in seconds.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = []
    for hidden in (128, *SHAPES):
        for row_tokens in ROW_TOKENS:
            for row in measure(hidden, row_tokens, options.rounds):
                rows.append(row)
                print(json.dumps(row), flush=True)
    save(options.out, {"rows": rows})


if __name__ == "__main__":
    main()
