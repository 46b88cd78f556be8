"""The head of each family at its real vocabulary.

    OMP_NUM_THREADS=1 python bench/bench_head.py [--cells TEXT ...] [--folders NAME=FOLDER ...]

CPU seconds of fastprune and of the loop (`cells.py`), in turns, as the median of the ratios. Each
cell is saved as soon as it is known, and one that the file has is not run again. FAMILY nll,
FAMILY kl: random models of 12 blocks of width 384, a third of the blocks removed; the dense
reference is warm. FAMILY one kl mask: one mask after another. NAME singles: every mask of a
checkpoint that lacks one block, on 4 x 128 tokens.
"""

from __future__ import annotations

import argparse
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as tf
from cells import Loop, compare, run_cells

import fastprune as fp

BLOCKS, ROWS, LENGTH = 12, 4, 128
PLAIN = {
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
EXPERTS = {"moe_intermediate_size": 256, "num_experts_per_tok": 2}
FAMILIES: dict[str, tuple[str, dict]] = {
    "llama": ("llama", {**PLAIN, "vocab_size": 128256}),
    "qwen3": ("qwen3", {**PLAIN, "vocab_size": 151936}),
    "gemma3": ("gemma3_text", {**PLAIN, "vocab_size": 262144}),
    "cohere2": ("cohere2", {**PLAIN, "vocab_size": 256000}),
    "glm4": ("glm4", {**PLAIN, "vocab_size": 151552}),
    "qwen3_moe": ("qwen3_moe", {**PLAIN, **EXPERTS, "num_experts": 8, "vocab_size": 151936}),
    "deepseek_v3": (
        "deepseek_v3",
        {
            **PLAIN,
            **EXPERTS,
            "n_routed_experts": 8,
            "n_group": 2,
            "topk_group": 1,
            "q_lora_rank": 96,
            "kv_lora_rank": 64,
            "qk_rope_head_dim": 32,
            "head_dim": 32,  # that of the rotated part
            "qk_nope_head_dim": 32,
            "v_head_dim": 64,
            "num_key_value_heads": 6,
            "first_k_dense_replace": 3,
            "vocab_size": 129280,
        },
    ),
    "olmo2": ("olmo2", {**PLAIN, "vocab_size": 100352}),
    "lfm2": ("lfm2", {**PLAIN, "vocab_size": 65536}),
    "phi": ("phi", {**PLAIN, "num_key_value_heads": 6, "vocab_size": 51200}),
    "gpt_neox": ("gpt_neox", {**PLAIN, "vocab_size": 50432}),
    "opt": (
        "opt",
        {**PLAIN, "ffn_dim": 1536, "word_embed_proj_dim": 384, "vocab_size": 50272},
    ),
    "mixtral": (
        "mixtral",
        {**PLAIN, "num_local_experts": 8, "num_experts_per_tok": 2, "vocab_size": 32000},
    ),
}


def random_model(family: str) -> Any:
    """A model of a family, of its real vocabulary."""
    kind, options = FAMILIES[family]
    torch.manual_seed(0)
    return tf.AutoModelForCausalLM.from_config(tf.AutoConfig.for_model(kind, **options)).eval()


def against_loop(
    model: Any, ids: np.ndarray, masks: np.ndarray, measure: str, repeats: int
) -> dict:
    """One cell: the masks' scores, the evaluator and the loop warm."""
    batch = fp.TokenBatch.from_ids(ids)
    objective = fp.KLDivergence(batch) if measure == "kl" else fp.Perplexity(batch)
    ev = fp.Evaluator(model, objective, cache_bytes=0)
    ev.score(masks[:1])  # the dense reference, and torch's own caches
    loop = Loop(model, [(row, 1) for row in ids], objective, masks)
    ways = {"fastprune": lambda: ev.score(masks), "loop": lambda: loop.score(masks)}
    return {"path": ev.backend, "masks": len(masks), **compare(ways, repeats)}


def of_family(family: str, removed: list, measure: str, repeats: int) -> dict:
    hf = random_model(family)
    ids = np.random.default_rng(0).integers(3, hf.config.vocab_size, (ROWS, LENGTH))
    return against_loop(hf, ids, fp.from_removed(removed, BLOCKS), measure, repeats)


def singles(folder: str, repeats: int) -> dict:
    model = fp.load_model(folder, dtype="float32")
    ids = np.random.default_rng(0).integers(3, model.vocab_size, (ROWS, LENGTH))
    masks = fp.from_removed([(block,) for block in range(model.num_blocks)], model.num_blocks)
    return against_loop(model, ids, masks, "nll", repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", nargs="+", metavar="TEXT", help="only cells with one of these")
    parser.add_argument("--folders", nargs="+", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--again", action="store_true", help="also cells that the file has")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/head.json")
    options = parser.parse_args()
    rng, removed = np.random.default_rng(1), []
    for _ in range(2):
        removed.append(tuple(sorted(rng.choice(BLOCKS, BLOCKS // 3, replace=False).tolist())))
    cells = {
        f"{family} {measure}": partial(of_family, family, removed, measure, options.repeats)
        for family in FAMILIES
        for measure in ("nll", "kl")
    }
    for family in ("llama", "qwen3"):
        name = f"{family} one kl mask"
        cells[name] = partial(of_family, family, [(1, 4, 7, 10)], "kl", options.repeats)
    for folder in options.folders:
        name, path = folder.split("=", 1)
        cells[f"{name} singles"] = partial(singles, path, options.repeats)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    texts = options.cells or [""]
    chosen = {name: run for name, run in cells.items() if any(text in name for text in texts)}
    run_cells(chosen, options.out, options.again)


if __name__ == "__main__":
    main()
