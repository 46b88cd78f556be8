"""Models inside of wrappers: unwrapped where that is exact, else refused; folders whose config asks
for attention that takes no masks."""

import json

import numpy as np
import pytest
import torch
from families import build, random_rows, some_masks
from helpers import refuses
from torch import nn

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
