"""Models inside of wrappers: unwrapped where that is exact, else refused; folders whose config asks
for attention that takes no masks."""

import json
from contextlib import suppress

import numpy as np
import pytest
import torch
import transformers as tf
from families import (
    build,
    physically_removed,
    random_rows,
    reference_loss,
    reference_losses,
    some_masks,
)
from helpers import make_tasks, refuses
from torch import nn
from torch.nn.attention.flex_attention import flex_attention
from transformers.masking_utils import AttentionMaskInterface

import fastprune as fp


@pytest.fixture(scope="module")
def hf():
    return build("llama")


@pytest.fixture(scope="module")
def target(hf):
    return fp.Perplexity(fp.TokenBatch.from_ids(random_rows(hf.config.vocab_size, [23, 9])))


@pytest.fixture(scope="module")
def expected(hf, target):
    return fp.Evaluator(hf, target).score(some_masks(5, 20, seed=0))


@pytest.mark.parametrize(
    "wrap", [nn.DataParallel, torch.compile, lambda hf: torch.compile(nn.DataParallel(hf))]
)
def test_a_wrapper_that_computes_the_same_is_taken_off(hf, target, expected, wrap):
    masks = some_masks(5, 20, seed=0)
    for model in (wrap(hf), fp.load_model(wrap(hf))):
        assert fp.Evaluator(model, target).score(masks).tobytes() == expected.tobytes()


class WithAdapter(nn.Module):
    """As peft's models are: the base model inside, with what acts on it."""

    def __init__(self, hf, kind, **config):
        super().__init__()
        self.base_model = hf
        self.peft_config = {"default": type("Config", (), {"peft_type": kind, **config})()}

    def get_base_model(self):
        return self.base_model


def test_an_adapter_inside_of_the_layers_is_scored(hf, target, expected):
    found = fp.Evaluator(WithAdapter(hf, "LORA"), target).score(some_masks(5, 20, seed=0))
    assert found.tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    ("kind", "config"),
    [("PROMPT_TUNING", {}), ("PREFIX_TUNING", {}), ("LORA", {"alora_invocation_tokens": [1]})],
)
def test_an_adapter_that_acts_on_inputs_is_refused(hf, target, kind, config):
    model = WithAdapter(hf, kind, **config)
    refuses(f"model is a WithAdapter whose adapter .{kind}. acts on", fp.Evaluator, model, target)
    refuses(f"model is a WithAdapter whose adapter .{kind}. acts on", fp.load_model, model)


def test_a_model_of_peft(target):
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(build("llama"), peft.LoraConfig(target_modules=["q_proj"]))
    for name, weight in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.1)
    mask = np.ones((1, 5), dtype=bool)
    found = fp.Evaluator(wrapped.eval(), target).score(mask)
    merged = fp.Evaluator(wrapped.merge_and_unload(), target).score(mask)
    np.testing.assert_allclose(found, merged, rtol=1e-5)


def test_an_export_holds_the_adapters_merged(tmp_path):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(target_modules=["q_proj", "down_proj"])
    wrapped = peft.get_peft_model(build("llama"), lora).eval()
    for name, weight in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.1)
    before = {name: weight.clone() for name, weight in wrapped.state_dict().items()}
    exported = [
        fp.load_model(fp.export(given, tmp_path / str(place), removed=(1,))).hf
        for place, given in enumerate((wrapped, fp.load_model(wrapped)))
    ]
    after = wrapped.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], weight) for name, weight in after.items())
    rows = random_rows(97, [23])
    expected = reference_loss(physically_removed(wrapped.merge_and_unload(), (1,)), rows)
    for hf in exported:
        assert reference_loss(hf, rows) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("backend", ["auto", "generic"])
def test_attention_of_ones_own_is_never_given_a_mask(backend, monkeypatch):
    """Text is scored; questions, whose trees need a mask, are refused in one line."""
    shapes = []

    def causal(module, query, key, value, attention_mask, scaling=None, **_):
        shapes.append(None if attention_mask is None else tuple(attention_mask.shape))
        groups = query.shape[1] // key.shape[1]
        key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
        out = nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling
        )
        return out.transpose(1, 2).contiguous(), None

    tf.AttentionInterface.register("no_masks", causal)
    AttentionMaskInterface.register("no_masks", lambda *_, attention_mask=None, **__: None)
    hf = build("llama")
    rows, masks = random_rows(97, [23, 9]), some_masks(5, 12, seed=0)
    expected = reference_losses(hf, masks, rows)
    hf.set_attn_implementation("no_masks")
    text = fp.Perplexity(fp.TokenBatch.from_ids(rows))
    losses = fp.Evaluator(hf, text, backend=backend).score(masks)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    questions = fp.TaskMargin(make_tasks(97, [(7, [3, 2])]))
    with suppress(fp.InputError):
        fp.Evaluator(hf, questions, backend=backend).score(masks)
    assert set(shapes) == {None}


def test_weights_that_are_no_plain_tensors_are_refused(target):
    from torch.testing._internal.two_tensor import TwoTensor

    model = build("llama")
    weight = model.model.norm.weight.detach()
    model.model.norm.weight = nn.Parameter(TwoTensor(weight, weight.clone()), requires_grad=False)
    refuses("its weight model.norm.weight is a TwoTensor", fp.Evaluator, model, target)


@pytest.mark.parametrize(
    "said",
    [
        {"attn_implementation": "flex_attention"},
        {"_attn_implementation": "flash_attention_2"},
        {"attn_implementation": "somebody/kernels"},
        {"attn_implementation": {"": "flex_attention"}},
    ],
)
def test_a_config_that_asks_for_other_attention_opens_with_sdpa(
    hf, target, expected, tmp_path, said
):
    hf.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **said}))
    model = fp.load_model(tmp_path)
    assert model.config._attn_implementation == "sdpa"
    found = fp.Evaluator(model, target).score(some_masks(5, 20, seed=0))
    assert found.tobytes() == expected.tobytes()


def flexible(module, query, key, value, attention_mask=None, scaling=None, **others):
    """Causal attention by an operator that torch compiles."""

    def causal(score, batch, head, position, other):
        return torch.where(position >= other, score, -float("inf"))

    result = flex_attention(query, key, value, score_mod=causal, scale=scaling, enable_gqa=True)
    return result.transpose(1, 2).contiguous(), None


@pytest.mark.filterwarnings("ignore")  # of torch, that it is not compiled here
def test_attention_that_torch_compiles_is_refused(target):
    tf.AttentionInterface.register("flexible", flexible)
    AttentionMaskInterface.register("flexible", lambda *args, attention_mask=None, **_: None)
    model = build("llama")
    model.config._attn_implementation = "flexible"
    refuses("open it with attn_implementation='sdpa'", fp.Evaluator, model, target, "generic")
