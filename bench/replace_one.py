"""Replace-one: every variant of every block in the whole model, against exchanging modules in a
loop.

`bench/replace_one.py [--blocks 30] [--hidden 192] [--rows 8] [--tokens 128]`. A random Llama with
three variants of each block: without attention, without MLP, and a block of another random model.
The loop exchanges one module of the loaded model at a time and runs transformers on one row at a
time. CPU seconds of one thread; the ratio is of this run.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
import transformers as tf
from record import save

import fastprune as fp


class NoMlp(torch.nn.Module):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(hidden_states)


class NoAttention(torch.nn.Module):
    def forward(self, hidden_states: torch.Tensor, **_: object) -> tuple[torch.Tensor, None]:
        return torch.zeros_like(hidden_states), None  # a layer unpacks states and weights


def make(arguments: argparse.Namespace, seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    config = tf.LlamaConfig(
        vocab_size=4096,
        hidden_size=arguments.hidden,
        intermediate_size=8 * arguments.hidden // 3,
        num_hidden_layers=arguments.blocks,
        num_attention_heads=arguments.hidden // 32,
        num_key_value_heads=arguments.hidden // 32,
        max_position_embeddings=arguments.tokens,
    )
    return tf.AutoModelForCausalLM.from_config(config).eval()


def loss_of(hf: torch.nn.Module, rows: torch.Tensor) -> float:
    with torch.no_grad():
        logits = [hf(input_ids=row[None], use_cache=False).logits[0, :-1] for row in rows]
    losses = [torch.nn.functional.cross_entropy(of, row[1:]) for of, row in zip(logits, rows)]
    return float(torch.stack(losses).mean())


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, default in (("blocks", 30), ("hidden", 192), ("rows", 8), ("tokens", 128)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    hf, other = make(arguments, 0), make(arguments, 1)
    rows = torch.randint(0, 4096, (arguments.rows, arguments.tokens))
    library = fp.Library(hf)
    for block in range(arguments.blocks):
        library.add(block, "no attention")
        library.add(block, "no mlp")
        library.add(block, other.model.layers[block], name="other")
    ev = fp.Evaluator(library, fp.Perplexity(fp.TokenBatch.from_ids(rows)), cache_bytes=0)
    started = time.process_time()
    table = ev.replace_one()
    ours = time.process_time() - started

    layers = hf.model.layers
    expected = np.empty_like(table)
    started = time.process_time()
    for block, layer in enumerate(list(layers)):
        attention, mlp = layer.self_attn, layer.mlp
        layer.self_attn = NoAttention()
        expected[block, 0] = loss_of(hf, rows)
        layer.self_attn, layer.mlp = attention, NoMlp()
        expected[block, 1] = loss_of(hf, rows)
        layer.mlp = mlp
        layers[block] = other.model.layers[block]
        expected[block, 2] = loss_of(hf, rows)
        layers[block] = layer
    loop = time.process_time() - started
    stats = ev.stats
    found = {
        "path": ev.backend,
        "largest_difference": float(np.abs(table / expected - 1).max()),
        "unit_runs": stats.unit_runs,
        "naive_unit_runs": stats.naive_unit_runs,
        "cpu_s": ours,
        "loop_cpu_s": loop,
        "times_faster": loop / ours,
    }
    print(json.dumps(found, indent=1))
    save(arguments.out, found)


if __name__ == "__main__":
    main()
