"""Questions with very many choices, and long rows with a window: the same losses, and no mask of
all by all."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import make_tasks, smallest_budget
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

import fastprune as fp
from fastprune.models import FusedRunner, fused, native, open_runner
from fastprune.models.operators import operators_named
from fastprune.models.operators.rows import Rows
from fastprune.models.tree import seen_by, seen_runs, segments, tree_mask

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "initializer_range": 0.2,
}
MASKS = np.array([[1, 1, 1, 1], [1, 0, 1, 1], [0, 1, 1, 0]], dtype=bool)


def llama() -> fp.Model:
    torch.manual_seed(0)
    return fp.Model(LlamaForCausalLM(LlamaConfig(**SIZES)).eval())


def mistral(window: int) -> fp.Model:
    torch.manual_seed(0)
    return fp.Model(MistralForCausalLM(MistralConfig(**SIZES, sliding_window=window)).eval())


SETS = [
    "torch",
    pytest.param("native", marks=pytest.mark.skipif(not native.available(), reason="not built")),
]


@pytest.fixture(params=SETS)
def operators(request, monkeypatch):
    """Makes the fused path take this set of operators."""
    monkeypatch.setattr(fused, "fast_operators", lambda device, dtype: request.param)


def losses(model: fp.Model, objective: fp.TaskMargin | fp.Perplexity, backend: str) -> np.ndarray:
    return fp.Evaluator(model, objective, backend).score_samples(MASKS)


@pytest.mark.parametrize(
    "shape", [(9, [3] * 400), (700, [5, 40, 1]), (3, [600, 2, 300]), (1, [1] * 1100)], ids=str
)
@pytest.mark.parametrize("window", [None, 50, 300])
def test_long_trees_equal_the_models_own_attention(operators, shape, window):
    model = llama() if window is None else mistral(window)
    objective = fp.TaskMargin(make_tasks(97, [shape, (5, [2, 2])]))
    np.testing.assert_allclose(
        losses(model, objective, "fused"), losses(model, objective, "generic"), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("window", [20, 300, 1000])
def test_long_rows_with_a_window_equal_the_models_own_attention(operators, window):
    ids = np.random.default_rng(0).integers(0, 97, (3, 1100))
    objective = fp.Perplexity(fp.TokenBatch.from_ids(ids))
    np.testing.assert_allclose(
        losses(mistral(window), objective, "fused"),
        losses(mistral(window), objective, "generic"),
        rtol=1e-4,
    )


def tree_of(lengths: list[int], padding: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions and branch, int64[T] each, of a row of a trunk and branches of these lengths,
    padded as chunks are."""
    positions = [
        *range(lengths[0]),
        *(lengths[0] + i for n in lengths[1:] for i in range(n)),
        *[0] * padding,
    ]
    branch = np.repeat([*range(len(lengths)), -1], [*lengths, padding])
    return torch.tensor(positions), torch.from_numpy(branch)


def random_lengths() -> list[int]:
    return np.random.default_rng(1).integers(1, 120, 12).tolist()


@pytest.mark.parametrize("window", [None, 7, 300])
def test_segments_are_the_mask(window):
    """Every query stands in one segment, and its keys there are all that the mask lets it see;
    padding has a branch."""
    positions, branch = tree_of(random_lengths(), padding=9)
    found = torch.zeros(len(branch), len(branch), dtype=torch.bool)
    queries_seen = []
    for queries, keys in segments(positions, branch, window):
        found[queries[:, None], keys] = seen_by(
            queries, keys, positions[None], branch[None], window
        )[0]
        queries_seen += queries.tolist()
    assert queries_seen == list(range(len(branch)))
    assert torch.equal(found, tree_mask(positions[None], branch[None], window)[0, 0])


@pytest.mark.parametrize("window", [None, 1, 7, 300])
def test_runs_are_the_mask(window):
    """For all tokens but padding, of which none looks at what padding sees: at least itself, and
    nothing behind it."""
    trees = [random_lengths(), [3], [0, 5, 1, 9], [40, 1, 1, 1], [1]]
    longest = max(map(sum, trees)) + 2
    rows = [tree_of(lengths, longest - sum(lengths)) for lengths in trees]
    positions, branch = (torch.stack(parts) for parts in zip(*rows, strict=True))
    runs = seen_runs(positions, branch, window)
    key = torch.arange(longest)
    begin, end, own, own_end = runs[..., None].unbind(dim=2)
    assert bool((end <= own).all())
    found = (begin <= key) & (key < end) | (own <= key) & (key < own_end)
    real = branch >= 0
    assert torch.equal(found[real], tree_mask(positions, branch, window)[:, 0][real])
    assert bool(found.diagonal(dim1=1, dim2=2).all())
    assert not bool(found.triu(1).any())


@pytest.mark.parametrize(
    ("branch", "positions", "window"),
    [
        ([0, 1, 0, 1], [0, 1, 1, 2], None),  # a trunk in two pieces
        ([0, 1, 2, 1], [0, 1, 1, 2], None),  # a branch in two pieces
        ([1, 1, 0, 0], [0, 1, 0, 1], None),  # the trunk not first
        ([0, 0, 0, 1], [0, 2, 3, 4], 2),  # positions that skip some
    ],
)
@pytest.mark.skipif(not native.available(), reason="the extension is not built")
def test_rows_whose_branches_are_not_in_one_piece_go_to_torch(branch, positions, window):
    branch, positions = torch.tensor([branch]), torch.tensor([positions])
    assert seen_runs(positions, branch, window) is None
    rows = Rows(1, 4, positions, branch, torch.device("cpu"), torch.float32)
    qkv = torch.randn(4, 3 * 16, generator=torch.Generator().manual_seed(0))
    found, expected = (
        ops.attention(qkv, ops.plan_attention(rows, 16, False, window), 1, 1, 0.25)
        for ops in map(operators_named, ("native", "torch"))
    )
    assert torch.equal(found, expected)


def test_a_tree_of_thousands_of_choices_holds_no_mask_of_all_by_all(operators):
    """Bytes of a chunk's footprint grow with its tokens, not with their square."""
    model = llama()
    budgets = []
    for choices in (1000, 4000):
        with pytest.raises(fp.InputError, match="memory_bytes is too small") as caught:
            fp.Evaluator(
                model,
                fp.TaskMargin(make_tasks(97, [(9, [3] * choices)])),
                "fused",
                memory_bytes=1000,
            )
        budgets.append(caught.value.least)
    assert budgets[1] < 6 * budgets[0]


def test_what_the_models_own_code_needs_a_mask_for_is_in_the_budget():
    """On the generic path a row's mask is made for every layer's attention: [T, T] is in the least
    budget."""
    model = llama()
    tasks = make_tasks(97, [(9, [3] * 1000)])
    tokens = tasks.batch.num_tokens
    with pytest.raises(fp.InputError, match="memory_bytes is too small") as caught:
        fp.Evaluator(model, fp.TaskMargin(tasks), "generic", memory_bytes=1000)
    assert caught.value.least > tokens * tokens


def test_a_fused_model_embeds_without_masks():
    model = llama()
    fused = FusedRunner(model, "torch")
    ids = torch.arange(600)[None] % 97
    state, _ = fused.open(ids, torch.arange(600)[None], torch.zeros(1, 600, dtype=torch.int64))
    assert torch.equal(state, open_runner(model, "generic").open(ids)[0])


@pytest.mark.parametrize("backend", ["generic", "fused"])
@pytest.mark.parametrize(
    "case", ["text", "kl", "tasks", "many choices", "large vocabulary", "sublayer"]
)
def test_the_least_budget_is_named_at_once(backend, case):
    """The number in the first refusal works, and one byte less does not."""
    torch.manual_seed(0)
    sizes = {**SIZES, "vocab_size": 20_000 if case == "large vocabulary" else 97}
    model = fp.Model(LlamaForCausalLM(LlamaConfig(**sizes)).eval())
    text = fp.TokenBatch.from_ids(np.random.default_rng(0).integers(0, 97, (5, 30)))
    objective = {
        "kl": lambda: fp.KLDivergence(text),
        "tasks": lambda: fp.TaskMargin(make_tasks(97, [(9, [3, 5]), (20, [1, 1, 40])])),
        "many choices": lambda: fp.TaskMargin(make_tasks(97, [(9, [3] * 300), (5, [2, 2])])),
    }.get(case, lambda: fp.Perplexity(text))()
    granularity = "sublayer" if case == "sublayer" else "block"

    def make(budget: int) -> fp.Evaluator:
        return fp.Evaluator(model, objective, backend, memory_bytes=budget, granularity=granularity)

    least = smallest_budget(make)
    masks = MASKS if granularity == "block" else np.repeat(MASKS, 2, axis=1)
    assert np.isfinite(make(least).score(masks)).all()
    with pytest.raises(fp.InputError, match=f"takes {least} bytes, not {least - 1}"):
        make(least - 1)
