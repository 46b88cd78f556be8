"""The fused path against the generic one, on the same masks: every single block of a Llama-like
model removed.

Both evaluators score the field in turn, several times; the medians are compared. Scores are
compared before anything is timed.
"""

from __future__ import annotations

import statistics
import time

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

import fastprune as fp

ROUNDS, BLOCKS, LENGTH = 5, 4, 256
DEMO = {
    "vocab_size": 832,
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
WIDE = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
}
MODELS = {
    "demo, d=128": (LlamaForCausalLM, LlamaConfig, DEMO),
    "Llama, d=512": (LlamaForCausalLM, LlamaConfig, WIDE),
    "Qwen3, d=512": (Qwen3ForCausalLM, Qwen3Config, WIDE),
}


def calibration(kind: str, vocab_size: int):
    """Plain text, 8 x 256 tokens, or 40 questions of 40 tokens with 4 choices of 5."""
    rng = np.random.default_rng(0)
    if kind == "text":
        return fp.Perplexity(fp.TokenBatch.from_ids(rng.integers(0, vocab_size, (8, LENGTH))))
    prompts = [rng.integers(0, vocab_size, 40) for _ in range(40)]
    rows = [
        [(np.concatenate([p, rng.integers(0, vocab_size, 5)]), 40) for _ in range(4)]
        for p in prompts
    ]
    return fp.TaskMargin(
        fp.Tasks(
            batch=fp.TokenBatch.from_continuations(rows),
            question=np.repeat(np.arange(40), 4),
            answer=np.arange(40) * 4,
            choice_characters=np.ones(160, dtype=int),
            choice_bytes=np.ones(160, dtype=int),
        )
    )


@pytest.mark.parametrize("kind", ["text", "questions"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_paths(benchmark, report, name, dtype, kind):
    model_class, config_class, sizes = MODELS[name]
    torch.manual_seed(0)
    config = config_class(**sizes, num_hidden_layers=BLOCKS, max_position_embeddings=LENGTH)
    model = model_class(config).to(getattr(torch, dtype)).eval()
    objective = calibration(kind, config.vocab_size)
    paths = {
        backend: fp.Evaluator(model, objective, backend, cache_bytes=0)
        for backend in ("generic", "fused")
    }
    masks = ~np.eye(BLOCKS, dtype=bool)
    scores = [evaluator.score(masks) for evaluator in paths.values()]
    np.testing.assert_allclose(
        *scores,
        rtol=1e-5 if dtype == "float32" else 1e-2,
        atol=1e-5 if dtype == "float32" else 1e-2,
    )

    seconds: dict[str, list[float]] = {backend: [] for backend in paths}

    def all_in_turn():
        for backend, evaluator in paths.items():
            started = time.perf_counter()
            evaluator.score(masks)
            seconds[backend].append(time.perf_counter() - started)

    benchmark.pedantic(all_in_turn, rounds=ROUNDS, iterations=1)
    generic, fused = (statistics.median(seconds[backend]) for backend in ("generic", "fused"))
    report(
        model=name,
        dtype=dtype,
        data=kind,
        path=paths["fused"].backend,
        generic_s=generic,
        fused_s=fused,
        ratio=generic / fused,
    )
