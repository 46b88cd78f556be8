"""The cost of workers: two processes of one thread against one process of two threads, and of one,
on the same calls.

    python bench/workers.py [--blocks 12] [--masks 40] [--rounds 5] [--out
    bench/results/workers_overhead.json]

Seconds on the clock and of all cores (this process and its workers), of the calls alone: starting
is reported by itself, and a first call of each mode warms it up. Modes take turns, each round
beginning with the next of them, and of each the median round counts; where others use the cores
(`load` before and after), seconds of cores say more.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from record import machine, save
from transformers import LlamaConfig, LlamaForCausalLM

import fastprune as fp
from fastprune.workers.processes import Processes

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
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    load = os.getloadavg()[0]
    torch.manual_seed(0)
    hf = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            intermediate_size=FFN,
            num_hidden_layers=given.blocks,
            num_attention_heads=HEADS,
            num_key_value_heads=HEADS,
            max_position_embeddings=LENGTH,
        )
    ).eval()
    target = fp.Perplexity(fp.TokenBatch.from_ids(torch.randint(0, VOCABULARY, (ROWS, LENGTH))))
    masks = np.random.default_rng(0).random((given.masks, given.blocks)) < 0.7
    masks[:, 0] = True
    torch.set_num_threads(1)
    started, used = time.perf_counter(), time.process_time()
    workers = Processes(2)
    evaluators = {
        "2 workers of 1 thread": (
            1,
            fp.Evaluator(hf, target, cache_bytes=0, workers=workers),
            workers.pids,
        )
    }
    start = {"seconds": time.perf_counter() - started, "cores": cores(workers.pids) - used}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        name = f"1 process of {threads} thread{'s' * (threads > 1)}"
        evaluators[name] = threads, fp.Evaluator(hf, target, cache_bytes=0), []
    scores, rounds = {}, {name: {"seconds": [], "cores": []} for name in evaluators}
    names = list(evaluators)
    for number in range(given.rounds + 1):  # the first is not counted
        for name in names[number % len(names) :] + names[: number % len(names)]:
            threads, ev, pids = evaluators[name]
            torch.set_num_threads(threads)
            before, started = cores(pids), time.perf_counter()
            scores[name] = ev.score(masks)
            if number:
                rounds[name]["seconds"].append(time.perf_counter() - started)
                rounds[name]["cores"].append(cores(pids) - before)
    found: dict[str, dict] = {
        "machine": {**machine(), "threads": [1, 2], "load": [load, os.getloadavg()[0]]},
        "settings": {
            "blocks": given.blocks,
            "masks": given.masks,
            "rounds": given.rounds,
            "width": WIDTH,
        }
        | {"rows": ROWS, "tokens of a row": LENGTH, "backend": ev.backend},
        "starting 2 workers": start,
    }
    for name, took in rounds.items():
        found[name] = {kind: statistics.median(values) for kind, values in took.items()} | {
            "rounds": took
        }
    same = scores["2 workers of 1 thread"].tobytes() == scores["1 process of 1 thread"].tobytes()
    found["bits"] = {
        "as one process of one thread": same,
        "as one of two": scores["1 process of 2 threads"].tobytes()
        == scores["1 process of 1 thread"].tobytes(),
    }
    print(json.dumps(found, indent=1))
    save(given.out, found)


if __name__ == "__main__":
    main()
