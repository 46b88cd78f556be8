"""Tiny random models of transformers' causal families: each is scored exactly, or refused in one
line. Twelve unlike ones in every run, all of them at length."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest
import torch
import transformers as tf
from families import random_rows
from harness import EFFORT
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import fastprune as fp

SAMPLE = (
    "bloom",
    "cohere2",
    "ernie4_5",
    "falcon",
    "glm4",
    "gpt_neo",
    "granitemoe",
    "mamba2",
    "olmoe",
    "opt",
    "recurrent_gemma",
    "stablelm",
)
FAMILIES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) if EFFORT > 1 else SAMPLE
DEPTH, VOCABULARY, LENGTHS = 4, 90, (21, 13)
SMALL = {
    **dict.fromkeys(("vocab_size",), VOCABULARY),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "lru_width"), 32),
    **dict.fromkeys(("intermediate_size", "n_inner", "d_ff", "ffn_dim"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), DEPTH),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("num_key_value_heads",), 2),
    **dict.fromkeys(("head_dim", "state_size", "mamba_d_state", "rotary_dim"), 8),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "n_group", "n_groups", "topk_group"), 2),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("sliding_window", "attention_window_size", "window_size"), 6),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 64),
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "chunk_size": 8},
    **{"attention_types": [[["global", "local"], DEPTH // 2]], "initializer_range": 0.2},
    **{"block_types": ["recurrent", "attention"], "multi_query": True, "logits_soft_cap": 8.0},
}
FAMILY = {"mamba2": {"num_heads": 8, "expand": 2}, "recurrent_gemma": {"num_key_value_heads": 1}}


def make(family: str) -> nn.Module:
    """A random model, or a skipped test for a family that these sizes do not fit."""
    config_class = tf.AutoConfig.for_model(family).__class__
    known = vars(config_class())
    changes = {name: value for name, value in SMALL.items() if name in known}
    torch.manual_seed(0)
    try:
        config = config_class(**{**changes, **FAMILY.get(family, {})})
        with torch.device("meta"):
            size = sum(w.numel() for w in tf.AutoModelForCausalLM.from_config(config).parameters())
        assert size < 3_000_000
        hf = tf.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            hf.eval()(input_ids=torch.tensor([[3, 4, 5]]), use_cache=False)
    except Exception as error:
        pytest.skip(f"not made at these sizes: {type(error).__name__}")
    return hf.float()


def without(hf: nn.Module, path: list[str], gone: tuple[int, ...]) -> nn.Module:
    """A deep copy whose list of layers, and every per-layer list of its config, has lost some."""
    hf = copy.deepcopy(hf)
    kept = [block for block in range(DEPTH) if block not in gone]
    layers = hf.get_submodule(".".join(path))
    setattr(hf.get_submodule(".".join(path[:-1])), path[-1], nn.ModuleList(layers[i] for i in kept))
    configs = {id(c): c for m in hf.modules() if (c := getattr(m, "config", None)) is not None}
    for config in configs.values():
        for name, value in list(vars(config).items()):
            if isinstance(value, list) and len(value) == DEPTH and name != "block_types":
                setattr(config, name, [value[i] for i in kept])
        config.num_hidden_layers = len(kept)
    return hf


def loss(hf: nn.Module, rows: list[list[int]]) -> float:
    losses = []
    with torch.no_grad():
        for row in map(torch.tensor, rows):
            log_p = torch.log_softmax(
                hf(input_ids=row[None], use_cache=False).logits[0].double(), -1
            )
            losses.append(-log_p[:-1].gather(1, row[1:, None]))
    return float(torch.cat(losses).mean())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_exact_or_refused(family):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hf = make(family)
        rows = random_rows(VOCABULARY, LENGTHS)
        text, refusal, ev = fp.Perplexity(fp.TokenBatch.from_ids(rows)), "", None
        try:
            ev = fp.Evaluator(hf, text)
        except fp.InputError as error:
            refusal = str(error)
        assert "\n" not in refusal
        if ev is None:
            assert family not in SAMPLE, refusal
            return
        if ev.num_units != DEPTH:
            pytest.skip("its depth has another name")
        removed = [(), (1,), (0, 2)]
        losses = ev.score(fp.from_removed(removed, DEPTH))
        expected = [loss(without(hf, list(ev.model.path), gone), rows) for gone in removed]
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
