"""The recipes for other tools' scripts choose as those scripts' loops do, written out here."""

import importlib
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def setting():
    sys.path.insert(0, str(EXAMPLES))
    try:
        recipes, shared = (importlib.import_module(name) for name in ("recipes", "shared"))
        hf, tokenizer = shared.open_model("demo")
        rows = shared.read_rows(tokenizer, shared.demo.TEXT, rows=3, length=12)
        yield recipes, shared, hf, rows
    finally:
        sys.path.remove(str(EXAMPLES))


def test_sleb_leaves_the_barriers_alone(setting):
    recipes, shared, hf, rows = setting
    alive, removed = list(range(len(hf.model.layers))), []
    for _ in range(2):
        losses = {}
        for block in alive[2:-1]:
            with shared.without(hf, [*removed, block]):
                losses[block] = shared.loss(hf, rows)
        removed.append(min(losses, key=losses.get))
        alive.remove(removed[-1])
    assert recipes.sleb(hf, rows, 2, early_barrier=2) == removed


def test_block_pruner_removes_the_half_of_least_loss(setting):
    recipes, shared, hf, rows = setting
    losses = []
    for half in range(2 * len(hf.model.layers)):
        with shared.without_halves(hf, [half]):
            losses.append(shared.loss(hf, rows))
    block, is_mlp = divmod(int(np.argmin(losses)), 2)
    assert recipes.block_pruner(hf, rows, 1) == [("mlp" if is_mlp else "mha", block)]


def test_shortened_llama_gives_the_perplexity_without_each_block(setting):
    recipes, shared, hf, rows = setting
    found = recipes.shortened_llama(hf, rows)
    for block in (0, 3):
        with shared.without(hf, [block]):
            assert found[block] == pytest.approx(np.exp(shared.loss(hf, rows)), rel=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("entire", [True, False])
def test_evopress_selects_by_the_divergence_on_as_many_tokens(setting, entire):
    recipes, shared, hf, rows = setting
    data, blocks = [row[None] for row in rows], len(hf.model.layers)
    candidates = []
    for seed in range(4):
        attn, mlp = np.random.default_rng(seed).random((2, blocks)) < 0.25
        candidates.append({"attn": attn.tolist(), "mlp": (attn if entire else mlp).tolist()})
    selection = recipes.evopress(hf, data, entire)
    random.seed(1)
    kept, fitnesses = selection(candidates, num_survive=2, num_tokens=18, fitness_fn="kl")
    random.seed(1)
    first = random.randint(0, 2)
    second = next(i for i in iter(lambda: random.randint(0, 2), None) if i != first)
    expected = []
    for candidate in candidates:
        halves = [half for pair in zip(candidate["attn"], candidate["mlp"]) for half in pair]
        total = count = 0
        for ids in (data[first], data[second][:, :6]):
            dense = hf(ids, use_cache=False).logits[0, :-1].log_softmax(-1)
            with shared.without_halves(hf, np.flatnonzero(halves).tolist()):
                pruned = hf(ids, use_cache=False).logits[0, :-1].log_softmax(-1)
            total += (dense.exp() * (dense - pruned)).sum().item()
            count += len(dense)
        expected.append(total / count)
    order = np.argsort(expected)[:2]
    assert kept == [candidates[i] for i in order]
    assert fitnesses == pytest.approx([expected[i] for i in order], rel=1e-4, abs=1e-6)
