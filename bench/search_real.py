"""The cost of a whole search on a real model, against one transformers pass for each mask that it
asks for.

    python bench/search_real.py MODEL --text FILE [--algorithm greedy] [--num-remove 5] [--samples
        16] [--seq-len 256] [--racing 0.99] [--cache-bytes N] [--cache-dir FOLDER] [--sampled 4]
        [--out FILE.json]

The loop is timed on a sample of the search's masks, before and after the search, blocks physically
removed, and the median is taken times the number of masks. Seconds are the CPU's of this process,
with one thread, so that other work on the machine counts little. The FLOP ratio is what the counts
of unit and head runs promise. `peak_bytes` is the most memory that the process held, the loop's
passes included.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from pathlib import Path

import numpy as np
import record
import torch

import fastprune as fp
from fastprune.models.surgery import without


def flops_of(model: fp.Model, length: int) -> tuple[float, float]:
    """FLOPs a token of one block, attention over half the row included, and of the head."""
    block = sum(parameter.numel() for parameter in model.layers[0].parameters())
    return 2 * block + 2 * length * model.hidden_size, 2 * model.vocab_size * model.hidden_size


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--text", required=True)
    parser.add_argument("--algorithm", default="greedy")
    parser.add_argument("--beam-width", type=int)
    parser.add_argument("--num-remove", type=int, default=5)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--racing", type=float)
    parser.add_argument(
        "--cache-bytes", type=int, help="of the prefix cache, as the Evaluator's; it has a default"
    )
    parser.add_argument("--cache-dir", help="a folder for states that do not fit")
    parser.add_argument("--sampled", type=int, default=4)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    model = fp.load_model(given.model, dtype="float32")
    batch = fp.load_text(given.text, model.tokenizer, given.samples, given.seq_len)
    ids = torch.from_numpy(batch.ids.reshape(given.samples, given.seq_len))
    chunk = max(1, 1024 // given.seq_len)  # rows of a pass of the loop, together

    def one_pass(removed) -> tuple[float, float]:
        """CPU seconds and the loss of one mask by transformers."""
        pruned, started = without(model, removed), time.process_time()
        with torch.inference_mode():
            losses = [
                pruned(input_ids=part, labels=part, use_cache=False).loss.item()
                for part in ids.split(chunk)
            ]
        return time.process_time() - started, float(np.mean(losses))

    units = model.num_blocks
    rng = np.random.default_rng(0)
    masks = [
        tuple(sorted(rng.choice(units, n, replace=False).tolist()))
        for n in (1, given.num_remove) * given.sampled
    ]
    one_pass(masks[0])  # warms up
    passes = [one_pass(removed) for removed in masks[: given.sampled]]
    ev = fp.Evaluator(
        model, fp.Perplexity(batch), cache_bytes=given.cache_bytes, cache_dir=given.cache_dir
    )
    options = {"beam_width": given.beam_width} if given.beam_width else {}
    started, wall = time.process_time(), time.perf_counter()
    result = fp.run_search(ev, given.algorithm, given.num_remove, racing=given.racing, **options)
    seconds, wall = time.process_time() - started, time.perf_counter() - wall
    stats = ev.stats
    passes += [one_pass(removed) for removed in masks[given.sampled :]]
    losses = fp.Evaluator(model, fp.Perplexity(batch)).score(fp.from_removed(masks, units))
    block, head = flops_of(model, given.seq_len)
    loop = statistics.median(second for second, _ in passes) * stats.masks
    naive = stats.naive_unit_runs * block + stats.masks * head
    made = stats.unit_runs * block + stats.head_runs * head
    found = {
        "model": f"{units} blocks, hidden size {model.hidden_size}, vocabulary {model.vocab_size}",
        "text": f"{given.samples} x {given.seq_len} tokens",
        "search": {
            "algorithm": given.algorithm,
            "num_remove": given.num_remove,
            "racing": given.racing,
            **options,
        },
        "removed": list(result.removed),
        "loss": result.loss,
        "masks": stats.masks,
        "unit_runs": {
            "loop": stats.naive_unit_runs,
            "within calls": stats.asked_unit_runs,
            "made": stats.unit_runs,
        },
        "head_runs": stats.head_runs,
        "decided_early": result.decided_early,
        "cpu_s": seconds,
        "wall_s": wall,
        "loop_cpu_s": loop,
        "loop_sample_cpu_s": [second for second, _ in passes],
        "speedup": loop / seconds,
        "flop_ratio": naive / made,
        "cache_budget": "default" if given.cache_bytes is None else given.cache_bytes,
        "cache_on_disk": bool(given.cache_dir),
        "cache_bytes": stats.cache_bytes,
        "cache_hits": stats.cache_hits,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "greatest_difference": float(np.max(np.abs(losses / [loss for _, loss in passes] - 1))),
    }
    print(json.dumps(found, indent=1))
    if given.out:
        known = json.loads(given.out.read_text()) if given.out.exists() else []
        record.write(given.out, [*known, record.origin() | found])


if __name__ == "__main__":
    main()
