"""Weights that do not fit: memory as the kernel reports it, time beside the run in memory, bits, blocks read.

    python bench/streaming.py [--quick]     # writes bench/results/streaming.json, prints a table

A model of 30 blocks whose weights are 4 times the limit, scored under 200 masks. Every run is a process of its own;
resident and streamed ones take turns. CPU seconds are those of all threads, reading included; on a shared machine they
say more than the clock does.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
CONSTANT = 64 << 20  # beside limit, activations and what a process has before the model is opened
BLOCKS, MASKS = 30, 200


def make_model(folder: Path, hidden: int) -> None:
    """A random Llama of 30 blocks."""
    import torch
    import transformers as tf

    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=1009, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=BLOCKS,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64, max_position_embeddings=512,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    tf.LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="100MB")


def status(field: str) -> int:
    """Bytes that the kernel reports of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))


def measure(folder: str, limit: int, rows: int, length: int) -> dict:
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
    masks = np.array([rng.permutation(BLOCKS) >= 7 for _ in range(MASKS)])
    opened = 0 if model.weights is None else model.weights.loads
    wall, cpu = time.perf_counter(), time.process_time()
    losses = ev.score(masks)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {
        "limit": limit,
        "before": before,
        "peak": status("VmHWM"),
        "activations": ev.stats.peak_activation_bytes,
        "wall_seconds": wall,
        "cpu_seconds": cpu,
        "layer_runs": ev.stats.layer_runs,
        "loads_to_open": opened,
        "loads": ev.stats.weight_loads,
        "read_bytes": ev.stats.weight_bytes,
        "waited_seconds": 0.0 if model.weights is None else model.weights.waited,
        "bands": list(map(len, model.bands)),
        "backend": ev.backend,
        "losses": [loss.hex() for loss in losses.tolist()],
    }


def run(folder: Path, limit: int, rows: int, length: int) -> dict:
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
    arguments = [str(HERE / "streaming.py"), "--measure", str(folder), str(limit), str(rows), str(length)]
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    quick = "--quick" in sys.argv
    hidden, rows, length, repeats = (128, 1, 16, 1) if quick else (512, 2, 32, 1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder, hidden)
        weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        runs = [(run(folder, 0, rows, length), run(folder, weights // 4, rows, length)) for _ in range(repeats)]
    resident, streamed = (min(of, key=lambda found: found["cpu_seconds"]) for of in zip(*runs))
    same = all(found["losses"] == runs[0][0]["losses"] for pair in runs for found in pair)
    allowed = streamed["limit"] + streamed["activations"] + streamed["before"] + CONSTANT
    result = {
        "model": f"Llama, {BLOCKS} blocks, hidden size {hidden}, float32, {weights} bytes",
        "data": f"{rows} rows of {length} tokens, {MASKS} masks without 7 blocks",
        "same_bits": same,
        "peak_bytes": max(streamed["peak"] for _, streamed in runs),
        "allowed_bytes": allowed,
        "constant_bytes": CONSTANT,
        "cpu_ratio": streamed["cpu_seconds"] / resident["cpu_seconds"],
        "wall_ratio": min(s["wall_seconds"] for _, s in runs) / min(r["wall_seconds"] for r, _ in runs),
        "resident": {key: value for key, value in resident.items() if key != "losses"},
        "streamed": {key: value for key, value in streamed.items() if key != "losses"},
    }
    if not quick:
        (HERE / "results").mkdir(exist_ok=True)
        (HERE / "results" / "streaming.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    if "--measure" in sys.argv:
        folder, *numbers = sys.argv[2:]
        print(json.dumps(measure(folder, *map(int, numbers))))
    else:
        main()
