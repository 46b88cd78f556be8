"""The fused path, with each set of operators that runs on a CPU: what the generic path promises
holds there too."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from families import (
    FUSED_CONFIGS,
    build,
    layers_of,
    random_rows,
    reference_losses,
    some_masks,
)
from fused_suite import RELATIVE, FusedProperties, Scene
from helpers import bfloat16_errors

import fastprune as fp
from fastprune.models import FusedRunner, GenericRunner, fused, native
from fastprune.models.compare import probe_tree

LLAMA_LIKE = ["llama", "llama-tied", "mistral", "phi3", "qwen2", "qwen2-window", "qwen3"]
OTHERS = ["gemma2-eager", "gemma2-sdpa", "gemma3", "mixtral", "olmo2", "qwen3-moe"]
OTHERS += sorted(FUSED_CONFIGS)
FUSED = LLAMA_LIKE + OTHERS
LENGTHS = [49, 13, 49, 12, 13]
SETS = [
    "torch",
    pytest.param(
        "native",
        marks=pytest.mark.skipif(not native.available(), reason="the extension is not built"),
    ),
]


@pytest.fixture(params=SETS)
def operators(request, monkeypatch):
    """Makes the fused path take this set of operators."""
    chosen = None if request.param == "torch" else request.param
    monkeypatch.setattr(fused, "fast_operators", lambda device, dtype: chosen)
    return request.param


def evaluator(hf, objective, **options) -> fp.Evaluator:
    ev = fp.Evaluator(hf, objective, backend="fused", **options)
    assert ev.backend.startswith("fused")
    return ev


def perplexity(hf, lengths=LENGTHS) -> tuple[fp.Perplexity, list[list[int]]]:
    rows = random_rows(hf.config.vocab_size, lengths)
    return fp.Perplexity(fp.TokenBatch.from_ids(rows)), rows


SCENE = Scene(
    build,
    LENGTHS,
    [(13, [1, 4, 9]), (17, [3] * 6), (5, [2, 8, 5, 1])],
    lambda units: some_masks(units, 40 if units < 8 else 22, seed=1),
    {"backend": "fused"},
)


@pytest.fixture
def scene():
    return SCENE


@pytest.fixture(params=FUSED)
def family(request):
    return request.param


@pytest.fixture(params=["block", "sublayer"])
def granularity(request):
    return request.param


@pytest.mark.pairs
class TestOperatorsOfACpu(FusedProperties):
    pass


@pytest.mark.slow
@pytest.mark.pairs
@pytest.mark.parametrize("family", FUSED)
def test_bfloat16_is_as_near_as_transformers_own(operators, family):
    found, own = bfloat16_errors(
        family, LENGTHS, lambda low, rows: evaluator(low, fp.Perplexity(rows))
    )
    assert found <= 1.5 * own


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scores_keep_their_bits(operators, dtype, granularity):
    """Alone, together, shuffled, and again: and every distinct prefix is run once."""
    hf = build("qwen3", dtype)
    ev = evaluator(hf, perplexity(hf)[0], granularity=granularity)
    masks = some_masks(ev.num_units, 20, seed=5)
    together = ev.score(masks)
    assert ev.stats.unit_runs == len(
        {tuple(np.flatnonzero(m)[: i + 1]) for m in masks for i in range(m.sum())}
    )
    order = np.random.default_rng(0).permutation(len(masks))
    assert np.array_equal(ev.score(masks[order]), together[order])
    assert np.array_equal(np.concatenate([ev.score(mask) for mask in masks]), together)
    assert np.array_equal(
        evaluator(hf, perplexity(hf)[0], granularity=granularity).score(masks), together
    )


@pytest.mark.pairs
@pytest.mark.parametrize("granularity", ["block", "sublayer"])
@pytest.mark.parametrize("family", OTHERS)
def test_scores_of_every_family_keep_their_bits(family, granularity):
    """In bfloat16: alone, together and shuffled, with states from the cache and without."""
    hf = build(family, torch.bfloat16)
    objective = perplexity(hf)[0]
    ev = evaluator(hf, objective, granularity=granularity)
    masks = some_masks(ev.num_units, 20, seed=5)
    together = ev.score(masks)
    order = np.random.default_rng(0).permutation(len(masks))
    assert np.array_equal(ev.score(masks[order]), together[order])
    uncached = evaluator(hf, objective, granularity=granularity, cache_bytes=0)
    assert np.array_equal(np.concatenate([uncached.score(mask) for mask in masks]), together)


def test_norms_may_be_float32_in_a_model_of_float16():
    """transformers opens gpt-oss so: its norms multiply before they round."""
    hf = build("gpt_oss", torch.float16)
    for name, module in hf.named_modules():
        if name.endswith("norm"):
            module.float()
    objective = perplexity(hf)[0]
    masks = some_masks(hf.config.num_hidden_layers, 20, seed=5)
    losses = evaluator(hf, objective).score(masks)
    expected = fp.Evaluator(hf, objective, backend="generic").score(masks)
    np.testing.assert_allclose(losses, expected, rtol=8 * torch.finfo(torch.float16).eps)


@pytest.mark.parametrize("family", ["llama", "cohere", "exaone4", "gemma3", "ministral3", "olmo2"])
def test_the_input_of_a_unit_is_left_as_it_is(operators, family):
    hf = build(family)
    model = fp.Model(hf)
    runner = FusedRunner(model)
    with model.evaluation():
        state, arguments = runner.open(*probe_tree(model))
        before = state.clone()
        for granularity, units in (("block", 1), ("sublayer", 2)):
            for unit in range(units):
                runner.run(unit, state, arguments, granularity)
                assert torch.equal(state, before)


def test_weights_are_shared_and_changes_are_seen(operators):
    hf = build("llama")
    ev = evaluator(hf, perplexity(hf)[0])
    pointers = {name: tensor.data_ptr() for name, tensor in hf.state_dict().items()}
    before = ev.score(np.ones(5, dtype=bool))[0]
    with torch.no_grad():
        layers_of(hf)[2].mlp.down_proj.weight *= 0.5
    after = ev.score(np.ones(5, dtype=bool))[0]
    assert after != before
    assert after == pytest.approx(
        reference_losses(hf, np.ones((1, 5)), perplexity(hf)[1])[0], rel=RELATIVE
    )
    assert pointers == {name: tensor.data_ptr() for name, tensor in hf.state_dict().items()}


# -- which path is taken ---------------------------------------------------------------------------


@pytest.mark.skipif(not native.available(), reason="the extension is not built")
def test_auto_takes_the_fused_path_where_it_can():
    for family, path in [
        ("llama", "fused (native)"),
        ("gpt2", "generic"),
        ("gpt-neox", "generic"),
        *((family, "fused (native)") for family in OTHERS),
    ]:
        hf = build(family)
        assert fp.Evaluator(hf, perplexity(hf)[0]).backend == path
        assert fp.Evaluator(hf, perplexity(hf)[0], backend="generic").backend == "generic"


def test_without_the_extension_the_generic_path_runs_and_it_is_said_once(monkeypatch, recwarn):
    monkeypatch.setattr(native, "extension", None)
    fused.warn_of_missing_extension.cache_clear()
    hf = build("llama")
    for _ in range(2):
        assert fp.Evaluator(hf, perplexity(hf)[0]).backend == "generic"
    assert [str(w.message)[:44] for w in recwarn] == [
        "fastprune was installed without its compiled"
    ]


def with_hook(hf):
    layers_of(hf)[1].mlp.register_forward_hook(lambda *_: None)
    return hf


def with_other_activation(hf):
    layers_of(hf)[2].mlp.act_fn = torch.nn.GELU()
    return hf


def with_wrapped_projection(hf):
    class Wrapped(torch.nn.Linear):
        pass

    layers_of(hf)[0].mlp.up_proj.__class__ = Wrapped
    return hf


@pytest.mark.parametrize(
    ("family", "change", "why"),
    [
        ("gpt2", lambda hf: hf, "family 'gpt2'"),
        ("llama", with_hook, "forward hooks"),
        ("qwen3", with_wrapped_projection, "up_proj' is not transformers' own"),
    ],
)
def test_what_cannot_be_fused_says_why(family, change, why):
    hf = change(build(family))
    with pytest.raises(fp.InputError, match=f"the fused path cannot run this model.*{why}"):
        fp.Evaluator(hf, perplexity(hf)[0], backend="fused")
    assert fp.Evaluator(hf, perplexity(hf)[0]).backend == "generic"


def test_attention_whose_masks_say_nothing_of_windows_is_not_fused():
    hf = build("llama")
    hf.config._attn_implementation = "flash_attention_2"
    assert "'flash_attention_2', neither" in str(fused.why_not_fused(fp.Model(hf)))


def test_norms_in_a_module_for_each_head_are_not_fused():
    hf = build("stablelm", qk_layernorm=True)
    assert "a part was not found" in str(fused.why_not_fused(fp.Model(hf)))
    assert fp.Evaluator(hf, perplexity(hf)[0], backend="generic").backend == "generic"


def test_an_mlp_with_another_activation_runs_as_the_familys_own(operators):
    hf = with_other_activation(build("llama"))
    masks = some_masks(5, 12, seed=1)
    objective, rows = perplexity(hf)
    expected = reference_losses(hf, masks, rows)
    np.testing.assert_allclose(evaluator(hf, objective).score(masks), expected, rtol=RELATIVE)


def with_tied_experts(hf, apart: float):
    """Two of the eight experts are chosen by rounding alone, if `apart` is small, where one of them
    is to be the second: about 1 of 7 tokens."""
    with torch.no_grad():
        for layer in layers_of(hf):
            first, second = layer.mlp.gate.weight[:2]
            second.copy_(first + apart * torch.randn(len(first)))
    return hf


def test_experts_that_rounding_chooses_at_some_positions_do_not_stop_the_fused_path():
    hf = with_tied_experts(build("mixtral", num_local_experts=8), 1e-8)
    long = perplexity(hf, [120] * 4)[0]
    assert evaluator(hf, long).score(np.ones(4, dtype=bool)) == pytest.approx(
        fp.Evaluator(hf, long, backend="generic").dense_loss, rel=0.05
    )


def with_other_scale(monkeypatch):
    change_layers(monkeypatch, lambda layer: replace(layer, scale=2 * layer.scale))


def with_other_epsilon(monkeypatch):
    change_layers(
        monkeypatch,
        lambda layer: replace(layer, mlp_norm=replace(layer.mlp_norm, eps=0.01)),
    )


def with_other_multiplier(monkeypatch):
    change_layers(monkeypatch, lambda layer: replace(layer, multiplier=1.01))


def change_layers(monkeypatch, change):
    layers_of = fused.layers_of
    monkeypatch.setattr(fused, "layers_of", lambda model: [change(x) for x in layers_of(model)])


def with_wider_window(monkeypatch):
    """Positions from 40 on, 9 of 49, see a token too many."""
    windows = GenericRunner.windows
    monkeypatch.setattr(
        GenericRunner,
        "windows",
        lambda self, length: [window and window + 1 for window in windows(self, length)],
    )


def with_late_rotation_off_by_one(monkeypatch):
    """Positions from 40 on turn by the angle of the position before."""
    named = fused.operators_named

    class Operators:
        def __init__(self, name):
            self.own = named(name)

        def __getattr__(self, name):
            return getattr(self.own, name)

        def rotary(self, qkv, cos, sin, position, *args, **options):
            return self.own.rotary(
                qkv, cos, sin, position - (position >= 40).long(), *args, **options
            )

    monkeypatch.setattr(fused, "operators_named", Operators)


@pytest.mark.parametrize(
    "change",
    [
        with_other_scale,
        with_other_epsilon,
        with_other_multiplier,
        with_wider_window,
        with_late_rotation_off_by_one,
    ],
)
@pytest.mark.parametrize(
    "make",
    [
        lambda: build("mistral", sliding_window=40),
        lambda: with_tied_experts(build("mixtral", num_local_experts=8, sliding_window=40), 1e-8),
    ],
    ids=["mistral", "mixtral"],
)
def test_a_block_that_computes_something_else_is_refused(monkeypatch, make, change):
    """The check against the generic path is not idle, even where it is wrong at few positions, and
    rounding chooses experts at others."""
    hf = make()
    objective = perplexity(hf)[0]
    evaluator(hf, objective)
    change(monkeypatch)
    with pytest.raises(fp.InputError, match="block 0 gives something else"):
        evaluator(make(), objective)
