"""Folders that newcomers come with: each is refused in one line that names what is wrong."""

import json
import shutil

import pytest
import torch
import transformers as tf
from helpers import edit_config, edit_tensors, refuses, t5
from safetensors.torch import save_file

import fastprune as fp

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}


def llama():
    return tf.LlamaConfig(**SIZES, num_key_value_heads=2, head_dim=8)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("whole")
    tf.LlamaForCausalLM(llama()).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "model")


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"hidden_size": 40}, r"does not fit its config: .*weight has the shape \[.*\], not \["),
        ({"vocab_size": 90}, r"has the shape \[97, 32\], not \[90, 32\]"),
        ({"num_attention_heads": 5}, "validate_architecture.*hidden size"),
        ({"num_hidden_layers": 2}, "no place for the tensor model.layers.2"),
        ({"num_hidden_layers": 4}, "missing keys: model.layers.3"),
        ({"model_type": "gpt2"}, "missing keys: transformer.*; it holds .* instead"),
        ({"model_type": "fancy"}, "its family is not in transformers .*; a newer release"),
    ],
)
def test_other_configs(folder, values, reason):
    edit_config(folder, **values)
    refuses(reason, fp.load_model, folder, device="cpu")


@pytest.mark.parametrize(
    ("renamed", "reason"),
    [
        ("layers.1.", r"missing keys: model.layers.1.*; it holds _orig_mod.model.layers.1"),
        ("", r"missing keys: lm_head.weight; it holds net.lm_head.weight instead"),
    ],
)
def test_other_names(folder, renamed, reason):
    prefix = "_orig_mod." if renamed else "net."
    edit_tensors(
        folder,
        lambda tensors: {
            prefix + name if renamed in name else name: tensor for name, tensor in tensors.items()
        },
    )
    refuses(reason, fp.load_model, folder, device="cpu")


def test_models_without_a_head(tmp_path):
    tf.LlamaModel(llama()).save_pretrained(tmp_path / "base")
    refuses("missing keys: lm_head.weight", fp.load_model, tmp_path / "base", device="cpu")
    tf.LlamaForSequenceClassification(llama()).save_pretrained(tmp_path / "classes")
    refuses("missing keys: lm_head.weight; it holds score", fp.load_model, tmp_path / "classes")


def test_other_kinds_of_models(tmp_path):
    t5().save_pretrained(tmp_path / "t5")
    refuses("family 't5' has no model .* that continues text", fp.load_model, tmp_path / "t5")
    tf.BertForMaskedLM(tf.BertConfig(**SIZES)).save_pretrained(tmp_path / "bert")
    refuses("the family 'bert' cannot be run block by block", fp.load_model, tmp_path / "bert")
    config = tf.WhisperConfig(
        vocab_size=60,
        d_model=16,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        num_mel_bins=8,
        max_source_positions=8,
        max_target_positions=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    tf.WhisperForConditionalGeneration(config).save_pretrained(tmp_path / "whisper")
    refuses("it is an encoder-decoder's checkpoint", fp.load_model, tmp_path / "whisper")


def test_files_that_are_something_else(folder, tmp_path):
    path = folder / "model.safetensors"
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    refuses("a pointer of Git LFS, not the weights; run git lfs pull", fp.load_model, folder)
    path.unlink()
    refuses("holds no model.safetensors and no shard index", fp.load_model, folder)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_file({"x": torch.zeros(2)}, adapter / "adapter_model.safetensors")
    refuses("an adapter's weights without adapter_config.json", fp.load_model, adapter)
    config = {"peft_type": "LORA", "base_model_name_or_path": "/nowhere/base"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    pytest.importorskip("peft")
    refuses("adapter's base: /nowhere/base: no such model folder", fp.load_model, adapter)
