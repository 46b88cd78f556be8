"""What workers cost: two processes of one thread against one process of two threads, and of one, on the same calls.

    python bench/workers.py [--blocks 12] [--out bench/results/workers_overhead.json]

Seconds on the clock and of all cores (this process and its workers), of the calls alone: starting is reported by
itself. Modes take turns, and of each the fastest round counts; where others use the cores, seconds of cores say more.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fastprune as fp
from fastprune.processes import Processes

WIDTH, FFN, HEADS, VOCABULARY, ROWS, LENGTH = 256, 704, 4, 4096, 24, 128
TICKS = os.sysconf("SC_CLK_TCK")


def cores(pids: list[int]) -> float:
    """Seconds of cores that this process and others have used."""
    used = [Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[11:13] for pid in pids]
    return time.process_time() + sum(int(ticks) for both in used for ticks in both) / TICKS


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--masks", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.manual_seed(0)
    hf = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=FFN, num_hidden_layers=given.blocks,
            num_attention_heads=HEADS, num_key_value_heads=HEADS, max_position_embeddings=LENGTH,
        )
    ).eval()  # fmt: skip
    target = fp.Perplexity(fp.TokenBatch.from_ids(torch.randint(0, VOCABULARY, (ROWS, LENGTH))))
    masks = np.random.default_rng(0).random((given.masks, given.blocks)) < 0.7
    masks[:, 0] = True
    torch.set_num_threads(1)
    started, used = time.perf_counter(), time.process_time()
    workers = Processes(2)
    evaluators = {"2 workers of 1 thread": (1, fp.Evaluator(hf, target, cache_bytes=0, workers=workers), workers.pids)}
    start = {"seconds": time.perf_counter() - started, "cores": cores(workers.pids) - used}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        name = f"1 process of {threads} thread{'s' * (threads > 1)}"
        evaluators[name] = threads, fp.Evaluator(hf, target, cache_bytes=0), []
    found: dict[str, dict] = {"starting 2 workers": start}
    scores = {}
    for _ in range(given.rounds):
        for name, (threads, ev, pids) in evaluators.items():
            torch.set_num_threads(threads)
            before, started = cores(pids), time.perf_counter()
            scores[name] = ev.score(masks)
            took = {"seconds": time.perf_counter() - started, "cores": cores(pids) - before}
            best = found.setdefault(name, took)
            found[name] = {key: min(best[key], took[key]) for key in took}
    same = scores["2 workers of 1 thread"].tobytes() == scores["1 process of 1 thread"].tobytes()
    found["bits"] = {
        "as one process of one thread": same,
        "as one of two": scores["1 process of 2 threads"].tobytes() == scores["1 process of 1 thread"].tobytes(),
    }
    print(json.dumps(found, indent=1))
    if given.out:
        given.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
