"""Sublayers of layers whose parts have other names: a half is every module that the layer adds to
its states before, or after, the state in between."""

import copy
import pickle

import numpy as np
import pytest
import torch
import transformers as tf
from helpers import refuses
from transformers.models.llama import modeling_llama as llama

import fastprune as fp

COMMON = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 3, "initializer_range": 0.2}
ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
STATE_SPACE = {"mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1}
# a family, and the modules of each half in each of its layers
FAMILIES = {
    "lfm2": (
        lambda: tf.Lfm2Config(
            **COMMON, **ATTENTION, full_attn_idxs=[1], block_auto_adjust_ff_dim=False
        ),
        [("conv",), ("self_attn",), ("conv",)],
        ("feed_forward",),
    ),
    "falcon-h1": (
        lambda: tf.FalconH1Config(
            **COMMON, **ATTENTION, **STATE_SPACE, mamba_d_ssm=64, mamba_chunk_size=8
        ),
        [("self_attn", "mamba")] * 3,
        ("feed_forward",),
    ),
    "recurrent-gemma": (
        lambda: tf.RecurrentGemmaConfig(
            **COMMON,
            **ATTENTION,
            lru_width=32,
            attention_window_size=8,
            block_types=["recurrent", "attention", "recurrent"],
        ),
        [("temporal_block",)] * 3,
        ("mlp_block",),
    ),
}
ROWS = [list(range(5, 18)), list(range(40, 49))]


def make(config):
    torch.manual_seed(0)
    hf = tf.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for weights in hf.parameters():
            weights += 0.05 * torch.randn(weights.shape)
    return hf


def zeros(module, inputs, output):
    if isinstance(output, tuple):
        return torch.zeros_like(output[0]), *output[1:]
    return torch.zeros_like(output)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_removed_half_adds_nothing(family):
    config, first_halves, second_half = FAMILIES[family]
    hf = make(config())
    ev = fp.Evaluator(hf, fp.Perplexity(fp.TokenBatch.from_ids(ROWS)), granularity="sublayer")
    assert ev.num_units == 6
    for removed in ((0,), (3,), (1, 4), (0, 2, 5)):
        hooks = []
        for unit in removed:
            names = second_half if unit % 2 else first_halves[unit // 2]
            layer = hf.base_model.layers[unit // 2]
            hooks += [getattr(layer, name).register_forward_hook(zeros) for name in names]
        losses = []
        for row in ROWS:
            with torch.no_grad():
                logits = hf(input_ids=torch.tensor([row]), use_cache=False).logits[0].double()
            losses.append(-logits.log_softmax(-1)[range(len(row) - 1), row[1:]].numpy())
        for hook in hooks:
            hook.remove()
        score = ev.score(fp.from_removed([removed], 6))[0]
        assert score == pytest.approx(np.concatenate(losses).mean(), rel=1e-5)


def test_layers_of_one_part_have_no_halves():
    hf = make(tf.MambaConfig(**COMMON, state_size=8, time_step_rank=4))
    batch = fp.TokenBatch.from_ids(ROWS)
    refuses(
        "block 0 is not the sum of two sublayers; use granularity='block'",
        fp.Evaluator,
        hf,
        fp.Perplexity(batch),
        granularity="sublayer",
    )


class ByKind(llama.LlamaDecoderLayer):
    """A layer that runs its mlp according to its class, as layers with and without experts do."""

    def forward(self, *args, **kwargs):
        if not isinstance(self.mlp, llama.LlamaMLP):
            raise TypeError(f"no way to run {type(self.mlp).__name__}")
        return super().forward(*args, **kwargs)


class ByVeryKind(llama.LlamaDecoderLayer):
    """A layer that runs with one class of mlp alone, whatever else passes for it."""

    def forward(self, *args, **kwargs):
        if type(self.mlp) is not llama.LlamaMLP:
            raise TypeError(f"no way to run {type(self.mlp).__name__}")
        return super().forward(*args, **kwargs)


def of_layers(kind):
    hf = make(tf.LlamaConfig(**COMMON, **ATTENTION))
    for layer in hf.model.layers:
        layer.__class__ = kind
    return hf


def test_layers_that_ask_for_the_class_of_their_parts_have_halves():
    masks = fp.from_removed([(), (0,), (3,), (1, 4)], 6)
    losses = [
        fp.Evaluator(
            of_layers(kind),
            fp.Perplexity(fp.TokenBatch.from_ids(ROWS)),
            "generic",
            granularity="sublayer",
        ).score(masks)
        for kind in (llama.LlamaDecoderLayer, ByKind)
    ]
    assert losses[0].tolist() == losses[1].tolist()


def test_layers_that_run_with_their_own_parts_alone_have_blocks():
    hf, batch = of_layers(ByVeryKind), fp.TokenBatch.from_ids(ROWS)
    assert np.isfinite(fp.Evaluator(hf, fp.Perplexity(batch), "generic").dense_loss)
    refuses(
        "block 0 is not the sum of two sublayers; use granularity='block'",
        fp.Evaluator,
        hf,
        fp.Perplexity(batch),
        granularity="sublayer",
    )


def test_a_masked_model_is_copied_and_pickled():
    ids = torch.tensor([ROWS[0]])
    with fp.masked(fp.load_model(of_layers(ByKind)), (1, 2), granularity="sublayer") as hf:
        logits = [
            each(input_ids=ids, use_cache=False).logits
            for each in (hf, copy.deepcopy(hf), pickle.loads(pickle.dumps(hf)))
        ]
    assert all(torch.equal(logits[0], other) for other in logits[1:])
