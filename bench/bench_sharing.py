"""Scoring fields of masks against one transformers forward pass per mask, side by side in one run.

16 blocks, d = 512, vocabulary 8,192, 2 x 256 tokens (8 x 256, and more random masks, with
BENCH=full). The loop runs each mask as users do: the model with the blocks physically removed, one
forward pass of the whole batch with its loss, in inference mode. Every mask of a field costs the
loop the same, so it is timed on a sample of the field's masks, half of them before and half after
fastprune scores the whole field, and its median pass is multiplied by the number of masks. The
scores are compared before anything is timed.
"""

from __future__ import annotations

import itertools
import os
import statistics
import time

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fastprune as fp
from fastprune.models.surgery import without
from fastprune.plan.trie import kept_units, make_trie

FULL = os.environ.get("BENCH") == "full"
BLOCKS, WIDTH, FFN, HEADS, VOCABULARY = 16, 512, 1408, 8, 8192
SEQUENCES, LENGTH = 8 if FULL else 2, 256
SAMPLED = 8  # passes of the loop that are timed, per field

FIELDS = {
    "singles": [(i,) for i in range(BLOCKS)],
    "pairs": list(itertools.combinations(range(BLOCKS), 2)),
    "random k=4": [
        tuple(np.random.default_rng(i).choice(BLOCKS, 4, replace=False))
        for i in range(200 if FULL else 40)
    ],
}


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def setup(request):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=FFN,
        num_hidden_layers=BLOCKS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS // 2,
        max_position_embeddings=LENGTH,
    )
    model = LlamaForCausalLM(config).to(getattr(torch, request.param)).eval()
    ids = torch.randint(0, VOCABULARY, (SEQUENCES, LENGTH))
    evaluator = fp.Evaluator(model, fp.Perplexity(fp.TokenBatch.from_ids(ids)), cache_bytes=0)
    return request.param, model, ids, evaluator


@torch.inference_mode()
def transformers_pass(pruned, ids) -> float:
    return pruned(input_ids=ids, labels=ids, use_cache=False).loss.item()


@pytest.mark.parametrize("field", FIELDS)
def test_score(benchmark, report, setup, field):
    dtype, _, ids, evaluator = setup
    masks = fp.from_removed(FIELDS[field], BLOCKS)
    sampled = [FIELDS[field][i] for i in np.linspace(0, len(masks) - 1, SAMPLED).astype(int)]
    pruned = [without(evaluator.model, removed) for removed in sampled]
    expected = [transformers_pass(p, ids) for p in pruned]
    found = evaluator.score(fp.from_removed(sampled, BLOCKS))
    np.testing.assert_allclose(found, expected, rtol=1e-5 if dtype == "float32" else 1e-3)

    passes: list[float] = []
    for p in pruned[::2]:
        passes.append(_timed(lambda p=p: transformers_pass(p, ids)))
    benchmark.pedantic(
        evaluator.score, args=(masks,), rounds=3 if field == "singles" else 1, iterations=1
    )
    for p in pruned[1::2]:
        passes.append(_timed(lambda p=p: transformers_pass(p, ids)))

    loop = statistics.median(passes) * len(masks)
    seconds = benchmark.stats.stats.median
    ratio = flop_ratio(masks)
    report(
        dtype=dtype,
        field=field,
        masks=len(masks),
        loop_s=loop,
        fastprune_s=seconds,
        speedup=loop / seconds,
        flop_ratio=ratio,
        beyond_sharing=loop / seconds / ratio,
    )


def flop_ratio(masks: np.ndarray) -> float:
    """FLOPs of one pass per mask over FLOPs with shared prefixes, blocks and head."""
    head_dim = WIDTH // HEADS
    projections = 2 * WIDTH * (2 * WIDTH + 2 * HEADS // 2 * head_dim)
    attention = 2 * 2 * WIDTH * LENGTH / 2  # scores and values, the causal half
    block = projections + attention + 2 * 3 * WIDTH * FFN
    head = 2 * WIDTH * VOCABULARY
    plan = make_trie(kept_units(masks))
    naive = plan.naive_unit_runs * block + len(masks) * head
    return naive / (plan.unit_runs * block + len(plan.sequences) * head)


def _timed(work) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
