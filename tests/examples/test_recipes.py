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


@torch.no_grad()
@pytest.mark.parametrize("perplexity", [False, True])
def test_finercut_counts_every_position_and_the_front_comes_late(setting, perplexity):
    recipes, shared, hf, rows = setting
    halves, exclude = 2 * len(hf.model.layers), 0.1
    enough, front = int(halves * exclude), 2 * (int(halves * exclude / 2) + 1)

    def logits():
        return [hf(row[None], use_cache=False).logits[0].log_softmax(-1) for row in rows]

    dense, removed = logits(), []
    for _ in range(enough + 2):
        distances = {}
        for half in range(0 if len(removed) > enough else front, halves):
            if half in removed:
                continue
            with shared.without_halves(hf, [*removed, half]):
                pruned = logits()
            if perplexity:
                each = [-q[:-1].gather(-1, row[1:, None]) for q, row in zip(pruned, rows)]
                distances[half] = np.mean([loss.mean().exp().item() for loss in each])
            else:
                each = [(p.exp() * (p - q)).sum(-1) for p, q in zip(dense, pruned)]
                distances[half] = torch.cat(each).mean().item()
        removed.append(min(distances, key=distances.get))
    assert recipes.finercut(hf, rows, enough + 2, exclude, perplexity) == removed


def test_rys_runs_each_window_twice(setting):
    recipes, shared, hf, rows = setting
    losses = recipes.rys(hf, rows)
    layers, blocks = hf.model.layers, len(hf.model.layers)
    assert len(losses) == 1 + blocks * (blocks + 1) // 2
    try:
        for i, j in ((0, 0), (0, 1), (1, 3), (blocks - 2, blocks)):
            order = [*range(j), *range(i, blocks)]
            hf.model.layers = torch.nn.ModuleList(layers[block] for block in order)
            hf.config.num_hidden_layers = len(order)
            assert losses[i, j] == pytest.approx(shared.loss(hf, rows), rel=1e-5)
    finally:
        hf.model.layers, hf.config.num_hidden_layers = layers, blocks
