"""Checkpoints in other forms: quantized weights, adapters, names behind a prefix, GGUF files. Each
gives the losses of the weights that it holds, written out as a plain checkpoint."""

import importlib.util
import json

import numpy as np
import pytest
import torch
import transformers as tf
from families import physically_removed, reference_loss
from helpers import edit_config, edit_tensors, refuses, run_python
from safetensors.torch import load_file, save_file

import fastprune as fp

REMOVED = (1, 3)


def loss_of(model, batch):
    ev = fp.Evaluator(model, fp.Perplexity(batch))
    return ev.score(fp.from_removed([REMOVED], ev.num_units))[0]


def expected_loss(hf, batch):
    rows = np.split(batch.ids, batch.row_starts[1:-1])
    return reference_loss(physically_removed(hf, REMOVED), rows)


# -- quantized weights -----------------------------------------------------------------------------


def save_fp8(hf, folder):
    """Write a checkpoint whose linear maps are FP8 in blocks of 8 x 8 with a scale each, and give
    the weights of these numbers to the model itself."""
    hf.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [n for n in tensors if n.endswith("_proj.weight")]:
        weight = tensors[name]
        rows, columns = weight.shape
        blocks = weight.view(rows // 8, 8, columns // 8, 8)
        scale = blocks.abs().amax(dim=(1, 3), keepdim=True) / 448
        numbers = (blocks / scale).to(torch.float8_e4m3fn)
        tensors[name] = numbers.view(rows, columns)
        tensors[f"{name}_scale_inv"] = scale[:, 0, :, 0].contiguous()
        with torch.no_grad():
            hf.get_parameter(name).copy_((numbers.float() * scale).view(rows, columns))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return {"quant_method": "fp8", "weight_block_size": [8, 8], "activation_scheme": "dynamic"}


@pytest.fixture
def aligned():
    config = tf.LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.2,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    return tf.AutoModelForCausalLM.from_config(config).eval()


def test_fp8_weights_are_dequantized(aligned, batch, tmp_path):
    pytest.importorskip("accelerate")
    quantization = save_fp8(aligned, tmp_path / "fp8")
    edit_config(tmp_path / "fp8", quantization_config=quantization)
    model = fp.load_model(tmp_path / "fp8", device="cpu", dtype="float32")
    assert loss_of(model, batch) == pytest.approx(expected_loss(aligned, batch), rel=1e-5)
    code = f"import fastprune as fp; print(fp.load_model({str(tmp_path / 'fp8')!r}).num_blocks)"
    assert run_python(code).split()[-1] == "5"  # where transformers is imported without accelerate
    fp.export(model, tmp_path / "pruned", removed=REMOVED)
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", dtype="float32")
    rows = np.split(batch.ids, batch.row_starts[1:-1])
    assert reference_loss(again, rows) == pytest.approx(expected_loss(aligned, batch), rel=1e-5)


# the 16 numbers of 4 bits, by their code
FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
FP4 = torch.cat([FP4, -FP4])


def save_mxfp4(hf, folder):
    """Write a checkpoint whose experts are MXFP4: rows of 32 numbers of 4 bits, two in a byte, the
    first in its low half, with a power of two each, whose exponent is stored plus 127. The model
    itself gets the weights of these numbers."""
    hf.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [n for n in tensors if n.endswith(("gate_up_proj", "down_proj"))]:
        rows = tensors.pop(name).transpose(1, 2)  # [experts, outputs, inputs]
        groups = rows.unflatten(-1, (-1, 32))
        exponents = (groups.abs().amax(-1, keepdim=True) / 6).log2().ceil()
        codes = (groups[..., None] / exponents[..., None].exp2() - FP4).abs().argmin(-1)
        tensors[f"{name}_blocks"] = (codes[..., 0::2] + 16 * codes[..., 1::2]).to(torch.uint8)
        tensors[f"{name}_scales"] = (exponents[..., 0] + 127).to(torch.uint8)
        with torch.no_grad():
            restored = (FP4[codes] * exponents.exp2()).flatten(-2)
            hf.get_parameter(name).copy_(restored.transpose(1, 2))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"]
    return {"quant_method": "mxfp4", "modules_to_not_convert": kept}


def test_mxfp4_weights_are_dequantized(batch, tmp_path):
    config = tf.GptOssConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=8,
        initializer_range=0.2,
        layer_types=["full_attention", "sliding_attention"] * 2 + ["full_attention"],
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    hf = tf.AutoModelForCausalLM.from_config(config).eval()
    quantization = save_mxfp4(hf, tmp_path / "mxfp4")
    edit_config(tmp_path / "mxfp4", quantization_config=quantization)
    model = fp.load_model(tmp_path / "mxfp4", device="cpu", dtype="float32")
    experts = model.layers[1].mlp.experts
    assert torch.equal(experts.down_proj, hf.model.layers[1].mlp.experts.down_proj)
    assert torch.equal(experts.gate_up_proj, hf.model.layers[1].mlp.experts.gate_up_proj)
    assert loss_of(model, batch) == pytest.approx(expected_loss(hf, batch), rel=1e-6)
    fp.export(model, tmp_path / "pruned", removed=REMOVED)
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", dtype="float32")
    rows = np.split(batch.ids, batch.row_starts[1:-1])
    assert reference_loss(again, rows) == pytest.approx(expected_loss(hf, batch), rel=1e-6)


@pytest.mark.parametrize("method", ["gptq", "awq", "compressed-tensors", "new"])
def test_other_methods_name_the_way(hf, tmp_path, method):
    hf.save_pretrained(tmp_path / method)
    edit_config(tmp_path / method, quantization_config={"quant_method": method})
    way = "open the checkpoint that it was quantized from"
    refuses(f"quantized by {method}.*{way}", fp.load_model, tmp_path / method)
    # of a model with towers, the config of its text may hold it
    edit_config(
        tmp_path / method,
        quantization_config=None,
        text_config={"quantization_config": {"quant_method": method}},
    )
    refuses(f"quantized by {method}", fp.load_model, tmp_path / method)


@pytest.mark.parametrize(
    ("method", "packages"), [("fp8", "accelerate"), ("bitsandbytes", "accelerate bitsandbytes")]
)
def test_methods_whose_packages_are_missing(hf, tmp_path, monkeypatch, method, packages):
    hf.save_pretrained(tmp_path)
    edit_config(tmp_path, quantization_config={"quant_method": method})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refuses(
        f"quantized by {method} .*to dequantize them, pip install {packages}",
        fp.load_model,
        tmp_path,
    )


@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes_weights_are_dequantized(aligned, batch, tmp_path, bits):
    pytest.importorskip("accelerate")
    bitsandbytes = pytest.importorskip("bitsandbytes")
    aligned.save_pretrained(tmp_path / "plain")
    quantization = tf.BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    quantized = tf.AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=quantization, device_map="cpu", dtype="float32"
    )
    quantized.save_pretrained(tmp_path / "quantized")
    for name, module in quantized.named_modules():
        if bits == 4 and isinstance(module, bitsandbytes.nn.Linear4bit):
            weight = module.weight
            values = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
        elif bits == 8 and isinstance(module, bitsandbytes.nn.Linear8bitLt):
            values = module.weight.CB.float() * module.weight.SCB[:, None] / 127
        else:
            continue
        with torch.no_grad():
            aligned.get_submodule(name).weight.copy_(values)
    model = fp.load_model(tmp_path / "quantized", device="cpu", dtype="float32")
    assert loss_of(model, batch) == pytest.approx(expected_loss(aligned, batch), rel=1e-5)
    fp.export(model, tmp_path / "pruned", removed=REMOVED)
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", dtype="float32")
    rows = np.split(batch.ids, batch.row_starts[1:-1])
    assert reference_loss(again, rows) == pytest.approx(expected_loss(aligned, batch), rel=1e-5)


# -- names -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "language_model.", "module._orig_mod."]
)
def test_a_prefix_of_all_names_is_left_out(hf, ev, batch, tmp_path, prefix):
    hf.save_pretrained(tmp_path / "model")
    edit_tensors(
        tmp_path / "model",
        lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()},
    )
    with pytest.warns(UserWarning, match=f"begin with '{prefix}', which is left out"):
        model = fp.load_model(tmp_path / "model", device="cpu")
    assert fp.Evaluator(model, fp.Perplexity(batch)).dense_loss == ev.dense_loss


# -- adapters --------------------------------------------------------------------------------------


@pytest.fixture
def adapter(hf, tmp_path):
    peft = pytest.importorskip("peft")
    hf.save_pretrained(tmp_path / "base")
    base = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = peft.LoraConfig(
        r=4, lora_alpha=64, target_modules=["q_proj", "down_proj"], init_lora_weights=False
    )
    torch.manual_seed(1)
    adapted = peft.get_peft_model(base, config)
    adapted.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", adapted.merge_and_unload().eval()


def test_an_adapter_opens_merged_into_its_base(hf, batch, adapter):
    folder, merged = adapter
    model = fp.load_model(folder, device="cpu")
    expected = expected_loss(merged, batch)
    assert loss_of(model, batch) == pytest.approx(expected, rel=1e-5)
    assert abs(expected - expected_loss(hf, batch)) > 1e-3


def test_an_adapter_beside_its_base(batch, adapter):
    folder, merged = adapter
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": "../base"})
    )
    assert loss_of(fp.load_model(folder, device="cpu"), batch) == pytest.approx(
        expected_loss(merged, batch), rel=1e-5
    )


def test_adapters_that_cannot_be_merged(adapter):
    folder, _ = adapter
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "base_model_name_or_path": None}))
    refuses("base_model_name_or_path must be a folder or a hub id", fp.load_model, folder)
    path.write_text(json.dumps({**config, "peft_type": "PROMPT_TUNING"}))
    refuses("'PROMPT_TUNING' are not merged", fp.load_model, folder)
    path.write_text(json.dumps(config))
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    refuses("pickles are never opened", fp.load_model, folder)


# -- GGUF ------------------------------------------------------------------------------------------


def test_a_gguf_file_opens_dequantized(aligned, batch, tmp_path):
    gguf = pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    config = aligned.config
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(128)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    tokens = ["<unk>", "<s>", "</s>", *(f"t{i}" for i in range(94))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * 97)
    writer.add_token_types([2, 3, 3] + [1] * 94)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, tensor in aligned.state_dict().items():
        path = name.removesuffix(".weight")
        if path.startswith("model.layers."):
            _, _, block, own = path.split(".", 3)
            target = f"blk.{block}.{names[own]}"
        else:
            target = names[path]
        values = tensor.numpy()
        if (count := heads.get(target.rpartition(".")[2])) is not None:  # llama.cpp's own order
            half = values.shape[0] // count // 2
            values = values.reshape(count, 2, half, -1).swapaxes(1, 2).reshape(values.shape)
        if values.ndim == 2:  # into blocks of 32 numbers with a scale each, and back
            packed = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
            restored = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(f"{target}.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
            if count is not None:
                restored = restored.reshape(count, half, 2, -1).swapaxes(1, 2)
            with torch.no_grad():
                tensor.copy_(torch.tensor(restored.reshape(tensor.shape)))
        else:
            writer.add_tensor(f"{target}.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model = fp.load_model(tmp_path / "tiny.gguf", device="cpu")
    assert model.tokenizer is not None
    assert model.tokenizer.convert_ids_to_tokens(5) == "t2"
    assert loss_of(model, batch) == pytest.approx(expected_loss(aligned, batch), rel=1e-5)
    fp.export(model, tmp_path / "pruned", removed=REMOVED)
    command = (tmp_path / "pruned" / "recipes" / "llama.cpp.txt").read_text()
    assert command == ("llama-quantize --prune-layers 1,3 tiny.gguf tiny-pruned.gguf COPY\n")


def test_files_that_are_no_gguf(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGML....")
    refuses("x.gguf: not a GGUF file", fp.load_model, tmp_path / "x.gguf")
    (tmp_path / "x.bin").write_bytes(b"")
    refuses("a folder, a .gguf file, a hub id or 'demo'", fp.load_model, tmp_path / "x.bin")
