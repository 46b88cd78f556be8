"""Times reading a model's version, and a warm call of one mask, on one thread.

    OMP_NUM_THREADS=1 python bench/version.py [--out bench/results/version.json]

Random Llamas of 32 blocks, one as wide as SmolLM2-135M and a tiny one. The call's mask has all of
its units cached, so that its time is that of everything but units. The median and the least of 200
times of the processor are printed, in milliseconds.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import transformers as tf
from record import save

import fastprune as fp

BLOCKS, REPEATS = 32, 200
WIDE = {"hidden_size": 576, "intermediate_size": 1536, "vocab_size": 2000}
TINY = {"hidden_size": 16, "intermediate_size": 24, "vocab_size": 100}


def milliseconds(run: Callable[[], object]) -> dict[str, float]:
    run()
    times = []
    for _ in range(REPEATS):
        started = time.process_time()
        run()
        times.append(1e3 * (time.process_time() - started))
    return {"median": round(float(np.median(times)), 3), "least": round(min(times), 3)}


def llama(sizes: dict[str, int]) -> fp.Model:
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        **sizes, num_hidden_layers=BLOCKS, num_attention_heads=2, num_key_value_heads=1
    )
    return fp.Model(tf.LlamaForCausalLM(config).eval())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    wide, tiny = llama(WIDE), llama(TINY)
    ids = np.random.default_rng(0).integers(0, TINY["vocab_size"], (2, 16))
    ev = fp.Evaluator(tiny, fp.Perplexity(fp.TokenBatch.from_ids(ids)))
    mask = fp.from_removed([(BLOCKS - 1,)], BLOCKS)
    ev.score(mask)
    before = ev.stats.unit_runs
    result = {
        "blocks": BLOCKS,
        "version_ms": {"wide": milliseconds(lambda: wide.version)}
        | {"tiny": milliseconds(lambda: tiny.version)},
        "one_cached_mask_ms": milliseconds(lambda: ev.score(mask)),
        "backend": ev.backend,
        "unit_runs": ev.stats.unit_runs - before,
    }
    save(given.out, result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
