"""Weights that do not fit: memory as the kernel reports it, time beside the run in memory, bits,
blocks read.

    python bench/streaming.py [--rows 8] [--length 64] [--masks 200] [--repeats 3] [--hidden 512]
    [--out FILE] python bench/streaming.py --quick       # a tiny model, one run of each kind

A model of 30 blocks whose weights are 4 times the limit, scored under random masks without 7
blocks. Every run is a process of its own; resident and streamed ones take turns, each pair in the
other order, and of each kind the run with the median of CPU seconds is reported, the seconds of all
beside it. A first mask warms up. CPU seconds are those of all threads, reading included; on a
shared machine (`load` before and after) they say more than the clock. Files are in the page cache.
More rows than fit into one chunk (1,024 tokens) show how chunks share the reading.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
CONSTANT = 64 << 20  # beside limit, activations and what a process has before the model is opened
BLOCKS = 30


def make_model(folder: Path, hidden: int) -> None:
    """A random Llama of 30 blocks."""
    import torch
    import transformers as tf

    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=1009,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=BLOCKS,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
    )
    tf.LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="100MB")


def status(field: str) -> int:
    """Bytes that the kernel reports of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))


def measure(folder: str, limit: int, rows: int, length: int, masks: int) -> dict:
    """Open the model, score, and say what that took; limit 0: in memory."""
    import numpy as np
    import torch

    import fastprune as fp

    torch.set_num_threads(1)
    fp.load_model("demo")  # what libraries load when they are first used
    before = status("VmHWM")
    model = fp.load_model(folder, weights_bytes=limit or None)
    rng = np.random.default_rng(0)
    batch = fp.TokenBatch.from_ids(rng.integers(3, 1009, (rows, length)))
    ev = fp.Evaluator(model, fp.Perplexity(batch), memory_bytes=512 << 20, cache_bytes=0)
    asked = np.array([rng.permutation(BLOCKS) >= 7 for _ in range(masks)])
    opened = model.weights.loads
    ev.score(asked[:1])  # what a process pays once
    runs, loads, read = ev.stats.unit_runs, ev.stats.weight_loads, ev.stats.weight_bytes
    waited = model.weights.waited
    wall, cpu = time.perf_counter(), time.process_time()
    losses = ev.score(asked)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {
        "limit": limit,
        "before": before,
        "peak": status("VmHWM"),
        "activations": ev.stats.peak_activation_bytes,
        "wall_seconds": wall,
        "cpu_seconds": cpu,
        "unit_runs": ev.stats.unit_runs - runs,
        "loads_to_open": opened,
        "loads": ev.stats.weight_loads - loads,
        "read_bytes": ev.stats.weight_bytes - read,
        "waited_seconds": model.weights.waited - waited,
        "bands": list(map(len, model.weights.bands)),
        "backend": ev.backend,
        "chunks": len(ev.layout.chunks),
        "losses": [loss.hex() for loss in losses.tolist()],
    }


def run(folder: Path, limit: int, *sizes: int) -> dict:
    environment = {
        **os.environ,
        "MALLOC_MMAP_THRESHOLD_": "131072",
        "MALLOC_TRIM_THRESHOLD_": "131072",
    }
    arguments = [str(HERE / "streaming.py"), "--measure", str(folder), *map(str, (limit, *sizes))]
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=False, env=environment
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (
        ("rows", 8),
        ("length", 64),
        ("masks", 200),
        ("repeats", 3),
        ("hidden", 512),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "streaming.json")
    given = parser.parse_args()
    if given.quick:
        given.hidden, given.rows, given.length, given.masks, given.repeats = 128, 1, 16, 20, 1
    from record import machine, save

    load, runs = os.getloadavg()[0], {"resident": [], "streamed": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder, given.hidden)
        weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        limits = {"resident": 0, "streamed": weights // 4}
        for number in range(given.repeats):
            for kind in list(runs)[:: -1 if number % 2 else 1]:
                runs[kind].append(run(folder, limits[kind], given.rows, given.length, given.masks))
    seconds = {
        kind: {clock: [found[f"{clock}_seconds"] for found in of] for clock in ("cpu", "wall")}
        for kind, of in runs.items()
    }
    ratio = {
        clock: statistics.median(seconds["streamed"][clock])
        / statistics.median(seconds["resident"][clock])
        for clock in ("cpu", "wall")
    }
    middle = {
        kind: sorted(of, key=lambda found: found["cpu_seconds"])[(len(of) - 1) // 2]
        for kind, of in runs.items()
    }
    streamed = middle["streamed"]
    losses = [found["losses"] for of in runs.values() for found in of]
    result = {
        "machine": {**machine(), "threads": 1, "load": [load, os.getloadavg()[0]]},
        "model": f"Llama, {BLOCKS} blocks, hidden size {given.hidden}, float32, {weights} bytes",
        "data": f"{given.rows} rows of {given.length} tokens, {given.masks} masks without 7 blocks",
        "same_bits": all(found == losses[0] for found in losses),
        "peak_bytes": max(found["peak"] for found in runs["streamed"]),
        "allowed_bytes": streamed["limit"]
        + streamed["activations"]
        + streamed["before"]
        + CONSTANT,
        "constant_bytes": CONSTANT,
        "cpu_ratio": ratio["cpu"],
        "wall_ratio": ratio["wall"],
        "seconds": seconds,
        **{
            kind: {key: value for key, value in of.items() if key != "losses"}
            for kind, of in middle.items()
        },
    }
    if not given.quick:
        save(given.out, result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    if "--measure" in sys.argv:
        folder, *numbers = sys.argv[2:]
        print(json.dumps(measure(folder, *map(int, numbers))))
    else:
        main()
