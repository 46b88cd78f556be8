"""The fused path against the generic one for every family that it runs: CPU seconds of the same
call, in one process, on one thread, in turn; medians of 5.

    OMP_NUM_THREADS=1 python bench/families.py [--out bench/results/families.json] [family ...]

Random models of 8 blocks, 384 columns wide, with 6 heads of 64 columns (2 of keys) and 1,024
columns in the mlp, or 8 experts of 256 columns of which 2 run; 3 masks on 4 rows of 256 tokens,
nothing kept between calls. Scores are compared before anything is timed. The file is written after
every family, and families in it are kept.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from pathlib import Path

import numpy as np
import torch
import transformers as tf
from record import read, save

import fastprune as fp
from fastprune.models.blocks import FAMILIES

ROUNDS, BLOCKS, ROWS, LENGTH = 5, 8, 4, 256
SIZES = {
    "vocab_size": 2048,
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "sliding_window": 128,
}
EXPERTS = {
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 256,
}
# families with experts, with the names that only they read
OWN = {
    "dots1": {"n_shared_experts": 1, "first_k_dense_replace": 1},
    "ernie4_5_moe": {"num_experts_per_tok": 0, "moe_num_experts": 8, "moe_k": 2},
    "flex_olmo": {},
    "glm4_moe": {"first_k_dense_replace": 1},
    "gpt_oss": {},
    "granitemoe": {},
    "hunyuan_v1_moe": {"num_experts_per_tok": 0, "moe_topk": 2},
    "minimax_m2": {},
    "mixtral": {},
    "olmoe": {},
    "phimoe": {},
    "qwen2_moe": {"shared_expert_intermediate_size": 256},
    "qwen3_moe": {},
}
# families in which a layer type says where the window counts
MIXED = ["sliding_attention", "full_attention"] * (BLOCKS // 2)
WINDOWED = (
    "ministral",
    "cohere2",
    "exaone4",
    "gemma2",
    "gemma3_text",
    "gpt_oss",
    "granite_swa",
    "olmo3",
)
EAGER = ("gemma2", "gpt_oss", "granite_swa")  # for the cap of scores; for sinks


def build(family: str) -> torch.nn.Module:
    kind = tf.CONFIG_MAPPING[family]
    sizes = dict(SIZES)
    if family in OWN:
        sizes |= EXPERTS | {"intermediate_size": 256} | OWN[family]
    if family == "helium":
        sizes["num_key_value_heads"] = 6
    if family in WINDOWED:
        sizes["layer_types"] = MIXED
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        attention = "eager" if family in EAGER else "sdpa"
        return tf.AutoModelForCausalLM.from_config(
            kind(**sizes), attn_implementation=attention
        ).eval()


def measure(family: str) -> dict:
    rows = np.random.default_rng(0).integers(3, SIZES["vocab_size"], (ROWS, LENGTH))
    objective = fp.Perplexity(fp.TokenBatch.from_ids(rows))
    model = build(family)
    paths = {
        path: fp.Evaluator(model, objective, path, cache_bytes=0) for path in ("generic", "fused")
    }
    masks = np.ones((3, BLOCKS), dtype=bool)
    masks[1, 2] = masks[2, 5] = False
    np.testing.assert_allclose(*(ev.score(masks) for ev in paths.values()), rtol=1e-5)
    seconds: dict[str, list[float]] = {path: [] for path in paths}
    for _ in range(ROUNDS):
        for path, ev in paths.items():
            started = time.process_time()
            ev.score(masks)
            seconds[path].append(time.process_time() - started)
    generic, fused = (statistics.median(seconds[path]) for path in paths)
    return {
        "path": paths["fused"].backend,
        "generic_s": round(generic, 4),
        "fused_s": round(fused, 4),
        "ratio": round(generic / fused, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", default=list(FAMILIES))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    known = read(options.out)
    results = known.get("families", {})
    for family in options.families:
        results[family] = measure(family)
        print(f"{family:18}", *results[family].values(), flush=True)
        save(options.out, {"families": results}, goes_on=known)
    print("median", statistics.median(result["ratio"] for result in results.values()))


if __name__ == "__main__":
    main()
