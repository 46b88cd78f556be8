"""Families, paths, objectives and shapes against the loop: no cell should be slower than it.

    OMP_NUM_THREADS=1 python bench/bench_grid.py [--cells TEXT ...]

Random models of 8 blocks of width 256 with a vocabulary of 16,384; masks lack two blocks each. Not
the full product: three cells for each family and path, one for each objective, so that each pair
of family, objective, length of rows and number of masks is somewhere. A cell has the CPU seconds of
fastprune and of the loop (`cells.py`), which take turns, the median of their ratios, what the
matrix products promise (FLOP ratio, heads included), and the most bytes that tensors of a first
call hold, the dense reference included. Each cell is saved as soon as it is known.
"""

from __future__ import annotations

import argparse
import itertools
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as tf
from cells import Loop, Row, compare, run_cells
from torch.utils.flop_counter import FlopCounterMode

import fastprune as fp
from fastprune.engine.memory import peak_bytes

BLOCKS, VOCABULARY, CHOICES = 8, 16384, 4
TOKENS = {"few": 1024, "many": 256}  # of all rows
MASKS = {"few": 2, "many": 12}
LENGTH = {"short": 32, "long": 256}
WIDTH = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
PLAIN = {**WIDTH, "intermediate_size": 704, "num_key_value_heads": 2, "head_dim": 64}
EXPERTS = {**PLAIN, "num_experts_per_tok": 2}
GPT2 = {"n_embd": 256, "n_layer": BLOCKS, "n_head": 4, "n_positions": 512}
GPT2 |= {name: WIDTH[name] for name in ("vocab_size", "bos_token_id", "eos_token_id")}
# Mamba 2's own chunks of 256 tokens take 5 CPU seconds a pass of 4 rows without its kernels
MAMBA = {"num_heads": 8, "head_dim": 64, "state_size": 64, "n_groups": 1, "chunk_size": 32}
HYBRID = ["conv", "full_attention"] * (BLOCKS // 2)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", PLAIN),
    "qwen3": ("qwen3", PLAIN),
    "gemma3": ("gemma3_text", {**PLAIN, "query_pre_attn_scalar": 64, "sliding_window": 128}),
    "gpt2": ("gpt2", GPT2),
    "gpt_neox": ("gpt_neox", {**WIDTH, "intermediate_size": 1024}),
    "olmo2": ("olmo2", PLAIN),
    "mixtral": ("mixtral", {**EXPERTS, "num_local_experts": 4}),
    "qwen3_moe": ("qwen3_moe", {**EXPERTS, "num_experts": 8, "moe_intermediate_size": 256}),
    "lfm2": ("lfm2", {**PLAIN, "layer_types": HYBRID}),
    "mamba2": ("mamba2", {**WIDTH, **MAMBA}),
}
FUSED = ("llama", "qwen3")
NO_TREES = ("lfm2", "mamba2")  # no questions
SHAPES = [("short", "few"), ("long", "many"), ("short", "many"), ("long", "few")]


def grid() -> dict[str, tuple[str, str, str, str, str]]:
    """Family, path, objective, length of rows and number of masks of each cell, by its name."""
    paths = [(family, "fused") for family in FUSED] + [(family, "generic") for family in FAMILIES]
    cells = []
    for number, (family, path) in enumerate(paths):
        questions = ("margin", "accuracy")[number // 2 % 2]
        if family in NO_TREES:
            questions = "perplexity"
        for i, objective in enumerate(("perplexity", "kl", questions)):
            cells.append((family, path, objective, *SHAPES[(number + i) % 4]))
    # the fourth shape of some
    cells += [(*path, "perplexity", *SHAPES[(paths.index(path) + 3) % 4]) for path in paths[::3]]
    return {" ".join(cell): cell for cell in cells}


def random_model(family: str) -> Any:
    kind, options = FAMILIES[family]
    torch.manual_seed(0)
    return tf.AutoModelForCausalLM.from_config(tf.AutoConfig.for_model(kind, **options)).eval()


def calibration(objective: str, length: int, tokens: int) -> tuple[fp.Objective, list[Row]]:
    """The objective, and the loop's row of each continuation."""
    rng = np.random.default_rng(0)
    if objective in ("perplexity", "kl"):
        ids = rng.integers(3, VOCABULARY, (tokens // length, length))
        kind = fp.KLDivergence if objective == "kl" else fp.Perplexity
        return kind(fp.TokenBatch.from_ids(ids)), [(row, 1) for row in ids]
    # the choices are a quarter of a row of `length`
    stem, choice = length * 3 // 4, length // 4
    count = max(1, tokens // (CHOICES * length))
    questions = []
    for _ in range(count):
        prompt = rng.integers(3, VOCABULARY, stem)
        choices = [rng.integers(3, VOCABULARY, choice) for _ in range(CHOICES)]
        questions.append([(np.concatenate([prompt, end]), stem) for end in choices])
    lengths = np.ones(count * CHOICES, dtype=int)
    tasks = fp.Tasks(
        batch=fp.TokenBatch.from_continuations(questions),
        question=np.repeat(np.arange(count), CHOICES),
        answer=np.arange(count) * CHOICES,
        choice_characters=lengths,
        choice_bytes=lengths,
    )
    rows = [row for question in questions for row in question]
    return (fp.TaskAccuracy if objective == "accuracy" else fp.TaskMargin)(tasks), rows


def flops_per_token(family: str, length: int) -> tuple[list[float], float]:
    """FLOPs of the matrix products that a token takes: of each block, and of the head."""
    hf = random_model(family)
    if hasattr(hf, "set_experts_implementation"):
        hf.set_experts_implementation("eager")  # grouped products are not counted
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        hf(input_ids=torch.ones(1, length, dtype=torch.int64), use_cache=False)
    name = next(n for n, m in hf.named_modules() if getattr(m, "__len__", int)() == BLOCKS)
    counts = counter.get_flop_counts()
    of = [sum(counts[f"{type(hf).__name__}.{name}.{i}"].values()) for i in range(BLOCKS)]
    return [flops / length for flops in of], (counter.get_total_flops() - sum(of)) / length


def flop_ratio(family: str, masks: np.ndarray, batch: fp.TokenBatch, rows: list[Row]) -> float:
    """FLOPs of the loop over those of shared prefixes, shared prompts, and heads of targets."""
    blocks, head = flops_per_token(family, len(rows[0][0]))
    kept = [tuple(np.flatnonzero(mask)) for mask in masks]
    prefixes = {units[:n] for units in kept for n in range(1, len(units) + 1)}
    tokens = sum(len(ids) for ids, _ in rows)
    loop = tokens * sum(sum(blocks[i] for i in units) + head for units in kept)
    own = batch.num_tokens * sum(blocks[prefix[-1]] for prefix in prefixes)
    return loop / (own + len(np.unique(batch.target_source)) * len(kept) * head)


def run(
    family: str, path: str, kind: str, length: str, number: str, repeats: int
) -> dict[str, Any]:
    hf = random_model(family)
    objective, rows = calibration(kind, LENGTH[length], TOKENS[number])
    pairs = list(itertools.combinations(range(BLOCKS), 2))
    chosen = np.random.default_rng(1).choice(len(pairs), MASKS[number], replace=False)
    masks = fp.from_removed([pairs[i] for i in sorted(chosen)], BLOCKS)
    ev = fp.Evaluator(hf, objective, backend=path, cache_bytes=0)
    _, own_bytes = peak_bytes(lambda: ev.score(masks[:1]))
    loop, loop_bytes = peak_bytes(lambda: Loop(hf, rows, objective, masks))
    _, pass_bytes = peak_bytes(lambda: loop.score(masks[:1]))
    held = sum(part.nbytes for part in loop.log_p)
    ways = {"fastprune": lambda: ev.score(masks), "loop": lambda: loop.score(masks)}
    return {
        **compare(ways, repeats),
        "flop_ratio": round(flop_ratio(family, masks, objective.batch, rows), 3),
        "fastprune_peak_mb": round(own_bytes / 1e6, 1),
        "loop_peak_mb": round(max(loop_bytes, held + pass_bytes) / 1e6, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", nargs="+", metavar="TEXT", help="only cells with one of these")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--again", action="store_true", help="also cells that the file has")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/grid.json")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    texts = options.cells or [""]
    chosen = {
        name: partial(run, *cell, options.repeats)
        for name, cell in grid().items()
        if any(text in name for text in texts)
    }
    cells = run_cells(chosen, options.out, options.again)
    worst = min(cells, key=lambda cell: cell["times_faster"])
    slower = [c for c in cells if c["times_faster"] + 2 * (c["standard_error"] or 0) < 1]
    print(f"worst of {len(cells)} cells: {worst['times_faster']}, {worst['cell']}")
    print(f"slower than the loop by more than two standard errors: {len(slower)}")


if __name__ == "__main__":
    main()
