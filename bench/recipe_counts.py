"""Unit runs x tokens, and heads x tokens, of EvoPress's script with its recipe. No model runs.

    python bench/recipe_counts.py CLONES [--blocks 30] [--rows 16] [--length 128]
        [--out bench/results/recipe_counts.json]

The authors' script runs as in `other_tools.py`, on random losses. Its own passes are counted, and
those of fastprune under chunks of several sizes and prefix caches of several capacities, in states.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from other_tools import run_evopress
from record import save
from transformers import LlamaConfig, LlamaForCausalLM

import fastprune as fp
from fastprune.plan.layout import make_layout
from fastprune.plan.retention import Prefixes
from fastprune.plan.schedule import plan_call
from fastprune.plan.trie import kept_units
from fastprune.testing import SyntheticEvaluator

UNBOUNDED = 1_000_000
CHUNK_TOKENS, CAPACITIES = (512, 256, 128), (0, 150, UNBOUNDED)
Call = tuple[list[tuple[int, ...]], list[int], int]  # sequences, samples, tokens


class Recorder(SyntheticEvaluator):
    """Notes the sequences, samples and tokens of every call."""

    calls: list[Call]

    def score(self, masks, *, samples=None, tokens=None):
        self.calls.append((kept_units(np.asarray(masks)), list(samples), tokens))
        return super().score(masks, samples=samples)


def count(calls: list[Call], chunks: list[set[int]], capacity: int, blocks: int, length: int):
    """Unit runs x tokens and heads x tokens, with the whole model's run on each chunk."""
    whole = tuple(range(blocks))
    held = [plan_call([whole], Prefixes(), capacity).held for _ in chunks]
    units, heads = blocks * length * sum(map(len, chunks)), 0
    for sequences, samples, tokens in calls:
        asked, rest = sorted(set(sequences)), tokens - length * (len(samples) - 1)
        entire = set(samples if rest == length else samples[:-1])
        for number, chunk in enumerate(chunks):
            if chunk & entire:
                schedule = plan_call(asked, held[number], capacity)
                held[number] = schedule.held
                units += schedule.unit_runs * len(chunk) * length
                heads += len(asked) * len(chunk) * length
        if rest < length:  # a row cut by `tokens` runs alone, below the whole model, too
            units += (plan_call(asked, Prefixes(), 0).unit_runs + blocks) * rest
            heads += len(asked) * rest
    return units, heads


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("clones", type=Path, help="the folder that holds the clones")
    parser.add_argument("--blocks", type=int, default=30)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    blocks, length = options.blocks, options.length
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=blocks,
        num_attention_heads=1,
        num_key_value_heads=1,
    )
    rows = torch.zeros((options.rows, length), dtype=torch.int64)
    recorder = Recorder(blocks, num_samples=options.rows, tokens=length)
    recorder.calls = []
    random.seed(0)
    with mock.patch.object(fp, "Evaluator", return_value=recorder):
        model = LlamaForCausalLM(config).eval()
        run_evopress(options.clones / "EvoPress", model, rows, True, True)
    calls = recorder.calls
    units = rows.numel() * blocks + sum(t * sum(map(len, masks)) for masks, _, t in calls)
    heads = sum(t * len(masks) for masks, _, t in calls)
    found = []
    print(f"the script: {units} units x tokens, {heads} heads x tokens")
    batch = fp.TokenBatch.from_ids(rows.numpy())
    for most in CHUNK_TOKENS:
        chunks = list(map(set, make_layout(batch, most, tile=512).chunks))
        for capacity in CAPACITIES:
            own, own_heads = count(calls, chunks, capacity, blocks, length)
            row = {"chunk_tokens": most, "states": None if capacity == UNBOUNDED else capacity}
            row |= {"units": own, "heads": own_heads}
            row |= {"fewer_units": units / own, "fewer_heads": heads / own_heads}
            found.append(row)
            print(row, flush=True)
    theirs = {"unit_tokens": units, "head_tokens": heads}
    save(options.out, {"blocks": blocks, "script": theirs, "recipe": found})


if __name__ == "__main__":
    main()
