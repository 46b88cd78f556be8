"""A model that is changed after it was opened: scores are those of its own forward pass, on the
fused path and on the generic one, and whatever was stored or cached before."""

from __future__ import annotations

import copy
import types
import warnings

import numpy as np
import pytest
import torch
from families import build, layers_of, random_rows, reference_loss

import fastprune as fp
from fastprune.models import fused

REMOVED = [(), (1,), (0, 3)]
LENGTHS = [24, 19]


def half_from_16_on(states: torch.Tensor) -> torch.Tensor:
    late = torch.arange(states.shape[1]) >= 16
    return torch.where(late[None, :, None], states * 0.5, states)


def attention_of(layer):
    return getattr(layer, "self_attn", None) or layer.attention


def exchange_submodule(hf, patch):
    layer = layers_of(hf)[2]
    other = copy.deepcopy(layer.mlp)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    patch.setitem(layer._modules, "mlp", other)


def exchange_layer(hf, patch):
    layers = layers_of(hf)
    other = copy.deepcopy(layers[4])
    if hasattr(attention_of(other), "layer_idx"):
        attention_of(other).layer_idx = 2
    patch.setitem(layers._modules, "2", other)


def replace_forward(hf, patch):
    layer = layers_of(hf)[2]
    forward = layer.mlp.forward
    patch.setitem(vars(layer.mlp), "forward", lambda states: 1.5 * forward(states))


def replace_forward_from_16_on(hf, patch):
    attention = attention_of(layers_of(hf)[2])
    forward = attention.forward

    def late(self, *args, **kwargs):
        output, *rest = forward(*args, **kwargs)
        return (half_from_16_on(output), *rest)

    patch.setitem(vars(attention), "forward", types.MethodType(late, attention))


def add_hook(hf, patch):
    hook = layers_of(hf)[2].mlp.register_forward_hook(
        lambda module, inputs, output: half_from_16_on(output)
    )
    hooks = dict(layers_of(hf)[2].mlp._forward_hooks)
    hook.remove()
    for number, function in hooks.items():
        patch.setitem(layers_of(hf)[2].mlp._forward_hooks, number, function)


def edit_weight(hf, patch):
    weight = next(layers_of(hf)[2].mlp.parameters())
    with torch.no_grad():
        weight[1, 1] += 3


def patch_class(hf, patch):
    kind = type(attention_of(layers_of(hf)[2]))
    forward = kind.forward

    def late(self, *args, **kwargs):
        output, *rest = forward(self, *args, **kwargs)
        return (half_from_16_on(output), *rest)

    patch.setattr(kind, "forward", late)


CHANGES = [
    exchange_submodule,
    exchange_layer,
    replace_forward,
    replace_forward_from_16_on,
    add_hook,
    edit_weight,
    patch_class,
]


def patch_function(hf, patch):
    module = __import__(type(layers_of(hf)[0]).__module__, fromlist=["_"])
    rotate = module.apply_rotary_pos_emb

    def late(q, k, *args, **kwargs):
        q, k = rotate(q, k, *args, **kwargs)
        scale = torch.where(torch.arange(q.shape[2]) >= 16, 0.5, 1.0)[:, None]
        return q * scale, k

    patch.setattr(module, "apply_rotary_pos_emb", late)


def patch_registry(hf, patch):
    registry = __import__(type(layers_of(hf)[0]).__module__, fromlist=["_"]).ALL_ATTENTION_FUNCTIONS
    attend = registry["sdpa"]

    def late(*args, **kwargs):
        output, weights = attend(*args, **kwargs)
        rows = torch.arange(output.shape[1]) >= 16
        return torch.where(rows[None, :, None, None], output * 0.5, output), weights

    patch.setitem(registry._local_mapping, "sdpa", late)


@pytest.fixture(params=["llama", "gpt-neox"])
def family(request, monkeypatch):
    """A family that "auto" runs on fused operators, and one that it does not."""
    monkeypatch.setattr(fused, "fast_operators", lambda device, dtype: "torch")
    return request.param


def own_losses(hf, rows) -> list[float]:
    """The losses of the model's own forward pass, with these blocks taken from its list."""
    layers, losses = layers_of(hf), []
    held = dict(layers._modules)
    for removed in REMOVED:
        kept = [layer for number, layer in enumerate(held.values()) if number not in removed]
        layers._modules.clear()
        layers._modules.update({str(place): layer for place, layer in enumerate(kept)})
        hf.config.num_hidden_layers = len(kept)
        losses.append(reference_loss(hf, rows))
    layers._modules.clear()
    layers._modules.update(held)
    hf.config.num_hidden_layers = len(held)
    return losses


@pytest.mark.parametrize("change", [*CHANGES, patch_function, patch_registry])
def test_a_changed_model_has_the_scores_of_its_own_forward_pass(
    family, change, tmp_path, monkeypatch
):
    hf = build(family)
    rows = random_rows(hf.config.vocab_size, LENGTHS)
    text = fp.Perplexity(fp.TokenBatch.from_ids(rows))
    masks = fp.from_removed(REMOVED, 5)
    store = tmp_path / "sums.db"
    open_one = fp.Evaluator(hf, text, store=store)
    before = open_one.score(masks)
    change(hf, monkeypatch)
    expected = own_losses(hf, rows)
    assert np.abs(before - expected).max() > 1e-3
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of the fused path
        ways = [open_one, fp.Evaluator(hf, text, store=store), fp.Evaluator(hf, text)]
        for ev in ways:
            assert np.allclose(ev.score(masks), expected, rtol=1e-5, atol=0)
            assert np.allclose(ev.dense_loss, expected[0], rtol=1e-5, atol=0)


def in_itself(values):
    values.append(values)


def in_a_dict_of_itself(values):
    values.append({"held": (values,)})


def in_another(values):
    values.append([7, values])


def in_an_object_of_its_own(values):
    values.append(types.SimpleNamespace(values=values))


def twice(values):
    part = [7]
    values += [part, part]


@pytest.mark.parametrize("kind", [float, torch.tensor])
@pytest.mark.parametrize(
    "close", [in_itself, in_a_dict_of_itself, in_another, in_an_object_of_its_own, twice]
)
def test_a_container_may_hold_itself(close, kind):
    """Its other values still count."""

    def make() -> fp.Model:
        hf = build("llama")
        layers_of(hf)[2].held = ["", kind(1.0)]
        close(layers_of(hf)[2].held)
        return fp.Model(hf)

    model = make()
    held = layers_of(model.hf)[2].held
    before, version, digest = held[1], model.version, model.digest
    assert make().digest == digest
    held[1] = kind(3.0)
    assert model.version != version
    assert model.digest != digest
    held[1] = before
    assert (model.version, model.digest) == (version, digest)


def in_place(values):
    values.tensor.mul_(2)


def another_tensor(values):
    values.tensor = torch.full((4,), 3.0)


def in_a_list(values):
    values.listed[1].add_(1)


def another_object(values):
    values.object = types.SimpleNamespace(factor=1.7, tensor=torch.ones(1))


def in_an_object(values):
    values.object.factor = 1.7


def a_tensor_in_an_object(values):
    values.object.tensor.mul_(2)


def in_a_tuple(values):
    values.pair = (1.0, 1.5)


def in_a_nested_list(values):
    values.nested[0][0] = 1.3


def behind_a_gap(values):
    values.gap.weight.data[1:] *= 1.5


@pytest.mark.parametrize(
    "change",
    [
        in_place,
        another_tensor,
        in_a_list,
        another_object,
        in_an_object,
        a_tensor_in_an_object,
        in_a_tuple,
        in_a_nested_list,
        behind_a_gap,
    ],
)
def test_every_kind_of_attribute_counts(change, tmp_path):
    """Values that forward passes may read: plain ones, tensors, objects, and what these hold."""
    hf = build("llama")
    layer = layers_of(hf)[2]
    layer.tensor, layer.listed, layer.pair = torch.ones(4), ["", torch.ones(1)], (1.0, 1.0)
    layer.object, layer.nested = types.SimpleNamespace(factor=1.0, tensor=torch.ones(1)), [[1.0]]
    layer.gap = layer.mlp.up_proj
    weight = layer.gap.weight.detach()
    wider = torch.cat([weight, weight], dim=1)
    layer.gap.weight = torch.nn.Parameter(wider[:, : weight.shape[1]])

    def scaled(module, args, output):
        factor = module.tensor.mean() * module.listed[1] * module.pair[1]
        return output * factor * module.object.factor * module.object.tensor * module.nested[0][0]

    layer.register_forward_hook(scaled)
    rows = random_rows(hf.config.vocab_size, LENGTHS)
    text, masks = fp.Perplexity(fp.TokenBatch.from_ids(rows)), fp.from_removed(REMOVED, 5)
    store = tmp_path / "sums.db"
    ev = fp.Evaluator(hf, text, store=store)
    before = ev.score(masks)
    change(layer)
    expected = own_losses(hf, rows)
    assert np.abs(before - expected).max() > 1e-3
    np.testing.assert_allclose(ev.score(masks), expected, rtol=1e-5)
    again = fp.Evaluator(hf, text, store=store)
    np.testing.assert_allclose(again.score(masks), expected, rtol=1e-5)


@pytest.mark.parametrize("change", [c for c in CHANGES if c is not edit_weight])
def test_what_is_put_back_runs_nothing_again(family, change):
    hf = build(family)
    text = fp.Perplexity(fp.TokenBatch.from_ids(random_rows(hf.config.vocab_size, LENGTHS)))
    masks = fp.from_removed(REMOVED, 5)
    ev = fp.Evaluator(hf, text)
    before = ev.score(masks)

    def units_of_a_call() -> float:
        runs = ev.stats.unit_runs
        assert (ev.score(masks) == before).all()
        return ev.stats.unit_runs - runs

    again = units_of_a_call()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        for _ in range(2):
            with pytest.MonkeyPatch.context() as patch:
                change(hf, patch)
                assert (ev.score(masks) != before).any()
            assert units_of_a_call() == again


def test_the_version_is_that_of_before_once_weights_are_put_back():
    hf = build("llama")
    model = fp.Model(hf)
    before, weight = model.version, layers_of(hf)[0].mlp.down_proj.weight
    values = weight.data.clone()
    weight.data.mul_(2)  # which torch does not count
    assert model.version != before
    weight.data.copy_(values)
    assert model.version == before
    with torch.no_grad():
        weight[3, 5] += 1
    assert model.version != before


def test_a_submodule_that_trains_is_put_in_later_and_runs_without_dropout(family):
    hf = build(family)
    text = fp.Perplexity(fp.TokenBatch.from_ids(random_rows(hf.config.vocab_size, LENGTHS)))
    masks = fp.from_removed(REMOVED, 5)
    ev = fp.Evaluator(hf, text)
    before, layer = ev.score(masks), layers_of(hf)[2]
    layer.mlp = torch.nn.Sequential(layer.mlp, torch.nn.Dropout(0.5))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of the fused path
        assert np.allclose(ev.score(masks), before, rtol=1e-5, atol=0)
    assert layer.mlp.training
    assert layer.mlp[1].training


def test_a_training_flag_is_no_change():
    hf = build("llama")
    model = fp.Model(hf)
    before = model.version
    hf.train()
    assert model.version == before
    layers_of(hf)[1].mlp.eval()
    assert model.version == before


def test_the_two_versions_share_the_cache(family):
    hf = build(family)
    text = fp.Perplexity(fp.TokenBatch.from_ids(random_rows(hf.config.vocab_size, LENGTHS)))
    masks = fp.from_removed([(a, b) for a in range(5) for b in range(a)], 5)
    free = fp.Evaluator(hf, text)
    free.score(masks)
    limit = free.stats.cache_bytes // 2
    ev = fp.Evaluator(hf, text, cache_bytes=limit)
    for _ in range(3):
        ev.score(masks)
        assert 0 < ev.stats.cache_bytes <= limit
        layers_of(hf)[1].mlp.register_forward_hook(lambda module, inputs, output: output * 0.9)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            ev.score(masks)
        assert 0 < ev.stats.cache_bytes <= limit


@pytest.mark.parametrize("change", [replace_forward_from_16_on, add_hook, patch_class])
def test_the_generic_path_follows_the_fused_one_with_one_warning(change, monkeypatch):
    monkeypatch.setattr(fused, "fast_operators", lambda device, dtype: "torch")
    hf = build("llama")
    text = fp.Perplexity(fp.TokenBatch.from_ids(random_rows(hf.config.vocab_size, LENGTHS)))
    mask = fp.from_removed([(1,)], 5)
    auto, strict = fp.Evaluator(hf, text), fp.Evaluator(hf, text, "fused")
    before = strict.score(mask)
    assert auto.backend == strict.backend == "fused (torch)"
    with pytest.MonkeyPatch.context() as patch:
        change(hf, patch)
        with pytest.warns(RuntimeWarning, match="the fused path cannot run it") as warned:
            losses = [auto.score(mask) for _ in range(2)]
        assert len(warned) == 1
        assert losses[0] == losses[1] != before
        assert auto.backend == "generic"
        with pytest.raises(fp.InputError, match="the fused path cannot run this model"):
            strict.score(mask)
    assert strict.score(mask) == before == auto.score(mask)
    assert auto.backend == "fused (torch)"


def test_auto_runs_where_the_fused_path_gives_something_else(monkeypatch):
    """As with matrix products in TF32."""
    monkeypatch.setattr(fused, "fast_operators", lambda device, dtype: "torch")
    run = fused.FusedRunner.run
    monkeypatch.setattr(fused.FusedRunner, "run", lambda *a, **k: 1.01 * run(*a, **k))
    hf = build("llama")
    text = fp.Perplexity(fp.TokenBatch.from_ids(random_rows(hf.config.vocab_size, LENGTHS)))
    with pytest.warns(RuntimeWarning, match="block 0 gives something else") as warned:
        evs = [fp.Evaluator(model, text) for model in [fp.Model(hf)] * 2]
    assert len(warned) == 1
    assert {ev.backend for ev in evs} == {"generic"}
    with pytest.raises(fp.InputError, match="block 0 gives something else"):
        fp.Evaluator(hf, text, "fused")


def test_a_list_of_another_length_is_refused():
    hf = build("llama")
    text = fp.Perplexity(fp.TokenBatch.from_ids(random_rows(hf.config.vocab_size, LENGTHS)))
    ev = fp.Evaluator(hf, text)
    del layers_of(hf)[4]
    with pytest.raises(fp.InputError, match="its blocks are not those that it was opened with"):
        ev.score(fp.from_removed([(1,)], 5))
