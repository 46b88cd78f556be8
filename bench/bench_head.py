"""The head of each family at its real vocabulary: `python bench/bench_head.py grid [FAMILY ...]`,
`python bench/bench_head.py singles FOLDER`, or `python bench/bench_head.py one FAMILY`.

CPU seconds of fastprune and of the loop, the median of some runs that take turns. The loop removes
the blocks, runs rows one at a time, and holds full logits; for KL it holds the dense model's
log-probabilities. grid: random models of 12 blocks of width 384, a third of the blocks removed; the
dense reference is warm. singles: every mask that lacks one block. one: one KL mask after another.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import transformers as tf

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


class Loop:
    """Each mask's loss by a forward pass of the model without its blocks."""

    def __init__(self, hf: Any, ids: np.ndarray, measure: str):
        self._model = fp.load_model(hf)  # verified once, not for each mask
        hf, self._ids = self._model.hf, torch.from_numpy(ids)
        self._dense: list[torch.Tensor] = []
        if measure == "kl":
            with torch.no_grad():
                for row in self._ids:
                    logits = hf(input_ids=row[None], use_cache=False).logits[0, :-1]
                    self._dense.append(torch.log_softmax(logits.float(), dim=-1))

    def score(self, masks: np.ndarray) -> np.ndarray:
        losses = []
        for mask in masks:
            with fp.masked(self._model, np.flatnonzero(~mask).tolist()) as pruned, torch.no_grad():
                losses.append(np.mean([self._loss(pruned, row) for row in range(len(self._ids))]))
        return np.array(losses)

    def _loss(self, pruned: Any, row: int) -> float:
        ids = self._ids[row]
        logits = pruned(input_ids=ids[None], use_cache=False).logits[0, :-1].float()
        if not self._dense:
            return float(torch.nn.functional.cross_entropy(logits, ids[1:]))
        log_q = torch.log_softmax(logits, dim=-1)
        divergence = torch.nn.functional.kl_div(
            log_q, self._dense[row], reduction="sum", log_target=True
        )
        return float(divergence) / len(logits)


def compare(name: str, ways: dict[str, Callable[[], np.ndarray]], repeats: int) -> dict:
    """CPU seconds of fastprune and the loop, in turns, and their ratio."""
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    losses = {}
    for _ in range(repeats):
        for way, score in ways.items():
            started = time.process_time()
            losses[way] = score()
            seconds[way].append(time.process_time() - started)
    medians = {f"{way}_s": statistics.median(times) for way, times in seconds.items()}
    found = {
        "cell": name,
        **medians,
        "times_faster": medians["loop_s"] / medians["fastprune_s"],
        "greatest_difference": float(np.abs(losses["loop"] - losses["fastprune"]).max()),
    }
    print(json.dumps(found), flush=True)
    return found


def objective(measure: str, ids: np.ndarray) -> fp.Objective:
    batch = fp.TokenBatch.from_ids(ids)
    return fp.KLDivergence(batch) if measure == "kl" else fp.Perplexity(batch)


def grid(families: Sequence[str], repeats: int) -> None:
    for family in families:
        hf = random_model(family)
        ids = np.random.default_rng(0).integers(3, hf.config.vocab_size, (ROWS, LENGTH))
        rng = np.random.default_rng(1)
        removed = [tuple(sorted(rng.choice(BLOCKS, BLOCKS // 3, replace=False))) for _ in range(2)]
        masks = fp.from_removed(removed, BLOCKS)
        for measure in ("nll", "kl"):
            ev = fp.Evaluator(hf, objective(measure, ids), cache_bytes=0)
            ev.score(masks[:1])  # the dense reference, and torch's own caches
            loop = Loop(hf, ids, measure)
            compare(
                f"{family} {measure}, {ev.backend}",
                {"fastprune": lambda: ev.score(masks), "loop": lambda: loop.score(masks)},  # noqa: B023
                repeats,
            )


def singles(folder: str, repeats: int) -> None:
    model = fp.load_model(folder, dtype="float32")
    ids = np.random.default_rng(0).integers(3, model.vocab_size, (ROWS, LENGTH))
    masks = fp.from_removed([(block,) for block in range(model.num_blocks)], model.num_blocks)
    ev = fp.Evaluator(model, objective("nll", ids), cache_bytes=0)
    ev.score(masks[:1])
    loop = Loop(model, ids, "nll")
    compare(
        f"all singles, {ev.backend}",
        {"fastprune": lambda: ev.score(masks), "loop": lambda: loop.score(masks)},
        repeats,
    )


def one(families: Sequence[str], repeats: int) -> None:
    for family in families:
        hf = random_model(family)
        ids = np.random.default_rng(0).integers(3, hf.config.vocab_size, (ROWS, LENGTH))
        ev = fp.Evaluator(hf, objective("kl", ids), cache_bytes=0)
        loop = Loop(hf, ids, "kl")
        mask = fp.from_removed([(1, 4, 7, 10)], BLOCKS)
        ev.score(mask)
        compare(
            f"{family}, one kl mask, {ev.backend}",
            {"fastprune": lambda: ev.score(mask), "loop": lambda: loop.score(mask)},  # noqa: B023
            repeats,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=["grid", "singles", "one"])
    parser.add_argument("names", nargs="*", help="families, or a folder")
    parser.add_argument("--repeats", type=int, default=3)
    part, names, repeats = vars(parser.parse_args()).values()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if part == "singles":
        singles(names[0], repeats)
    else:
        {"grid": grid, "one": one}[part](names or list(FAMILIES), repeats)


if __name__ == "__main__":
    main()
