"""Models that take images or audio beside text: their decoder of text is scored, masked, streamed
and exported, and the rest is kept."""

import json

import numpy as np
import pytest
import torch
import transformers as tf
from families import random_rows
from helpers import edit_tensors, refuses
from safetensors.torch import load_file

import fastprune as fp
from fastprune.cli.support import support_of

TEXT = {
    "vocab_size": 97,
    "hidden_size": 36,
    "intermediate_size": 44,
    "num_hidden_layers": 5,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 12,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
REMOVED = (1, 3)
TOWER = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
TOWER |= {"image_size": 16, "patch_size": 8}


def llava():
    """Its tower has as many layers as its text."""
    tower = tf.CLIPVisionConfig(**TOWER, num_hidden_layers=5)
    text = tf.LlamaConfig(**TEXT)
    return tf.LlavaForConditionalGeneration(
        tf.LlavaConfig(vision_config=tower, text_config=text, image_token_index=3)
    )


def gemma3():
    """A window that repeats irregularly, and a norm with an offset."""
    tower = tf.SiglipVisionConfig(**TOWER, num_hidden_layers=2)
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    text = tf.Gemma3TextConfig(
        **TEXT,
        sliding_window=6,
        query_pre_attn_scalar=12,
        layer_types=[*kinds, "sliding_attention", "full_attention"],
    )
    return tf.Gemma3ForConditionalGeneration(
        tf.Gemma3Config(vision_config=tower, text_config=text, mm_tokens_per_image=4)
    )


def qwen2_audio():
    tower = tf.Qwen2AudioEncoderConfig(
        d_model=16,
        encoder_layers=2,
        encoder_attention_heads=2,
        encoder_ffn_dim=24,
        num_mel_bins=8,
        max_source_positions=8,
    )
    text = tf.Qwen2Config(**{k: v for k, v in TEXT.items() if k != "head_dim"})
    return tf.Qwen2AudioForConditionalGeneration(
        tf.Qwen2AudioConfig(audio_config=tower, text_config=text, audio_token_index=3)
    )


@pytest.fixture(scope="module", params=[llava, gemma3, qwen2_audio])
def hf(request):
    torch.manual_seed(0)
    hf = request.param().eval()
    with torch.no_grad():
        for weights in hf.parameters():
            if weights.dim() == 1:
                weights += 0.2 * torch.randn(weights.shape)
    return hf


ROWS = random_rows(97, [13, 9])


def stored(folder):
    """All tensors of a checkpoint by name."""
    return {n: t for path in folder.glob("*.safetensors") for n, t in load_file(path).items()}


def text_stack(hf):
    return hf.model.language_model


def loss(hf):
    """The loss of full logits, each row alone."""
    losses = []
    for row in ROWS:
        with torch.no_grad():
            logits = hf(input_ids=torch.tensor([row]), use_cache=False).logits[0].double()
        losses.append(-logits.log_softmax(-1)[range(len(row) - 1), row[1:]].numpy())
    return float(np.concatenate(losses).mean())


def loss_without(hf, removed):
    """The loss of the model itself while its list of text layers lacks these, and their kinds."""
    stack = text_stack(hf)
    layers, config = stack.layers, stack.config
    kept = [i for i in range(len(layers)) if i not in removed]
    kinds = getattr(config, "layer_types", None)
    stack.layers, config.num_hidden_layers = torch.nn.ModuleList(layers[i] for i in kept), len(kept)
    if kinds is not None:
        config.layer_types = [kinds[i] for i in kept]
    try:
        return loss(hf)
    finally:
        stack.layers, config.num_hidden_layers = layers, len(layers)
        if kinds is not None:
            config.layer_types = kinds


def scores(model, removed):
    ev = fp.Evaluator(model, fp.Perplexity(fp.TokenBatch.from_ids(ROWS)))
    return ev.score(fp.from_removed(removed, ev.num_units))


def test_masks_in_memory_and_from_a_folder(hf, tmp_path):
    removed = [(), REMOVED, (0, 4), (2,)]
    expected = [loss_without(hf, gone) for gone in removed]
    np.testing.assert_allclose(scores(hf, removed), expected, rtol=1e-5)
    hf.save_pretrained(tmp_path / "model")
    model = fp.load_model(tmp_path / "model", device="cpu")
    assert model.num_blocks == 5
    assert model.hidden_size == 36
    np.testing.assert_array_equal(scores(model, removed), scores(hf, removed))
    size = (tmp_path / "model" / "model.safetensors").stat().st_size
    streamed = fp.load_model(tmp_path / "model", device="cpu", weights_bytes=size)
    np.testing.assert_array_equal(scores(streamed, removed), scores(hf, removed))


def test_exports_cut_the_text_and_keep_the_rest(hf, tmp_path):
    hf.save_pretrained(tmp_path / "model")
    for name in ("preprocessor_config.json", "processor_config.json"):
        (tmp_path / "model" / name).write_text(json.dumps({"of": name}))
    fp.export(fp.load_model(tmp_path / "model", device="cpu"), tmp_path / "out", removed=REMOVED)
    again = type(hf).from_pretrained(tmp_path / "out").eval()
    assert len(text_stack(again).layers) == 3
    assert loss(again) == pytest.approx(loss_without(hf, REMOVED), rel=1e-6)
    fp.export(fp.load_model(hf), tmp_path / "loaded", removed=REMOVED)  # with its towers in memory
    before, after, loaded = (stored(tmp_path / name) for name in ("model", "out", "loaded"))
    assert after.keys() == loaded.keys()
    assert all(torch.equal(after[name], loaded[name]) for name in loaded)
    of_towers = [name for name in before if "tower" in name or "projector" in name]
    assert of_towers
    assert all(torch.equal(before[name], after[name]) for name in of_towers)
    for name in ("preprocessor_config.json", "processor_config.json"):
        assert json.loads((tmp_path / "out" / name).read_text()) == {"of": name}
    assert "by text alone" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("weights_bytes", [None, 1 << 20])
def test_towers_stay_in_the_files(hf, tmp_path, weights_bytes):
    hf.save_pretrained(tmp_path)
    model = fp.load_model(tmp_path, device="cpu", weights_bytes=weights_bytes)
    blocks = {id(tensor) for tensor in text_stack(model.hf).layers.parameters()}
    loaded = sum(
        tensor.numel()
        for tensor in model.hf.parameters()
        if not tensor.is_meta and id(tensor) not in blocks
    )
    stack, head = text_stack(hf), hf.lm_head.weight
    beside = {id(t): t.numel() for t in (*stack.embed_tokens.parameters(), head)}
    expected = sum(beside.values()) + sum(t.numel() for t in stack.norm.parameters())
    assert loaded == expected
    assert "text only, towers not loaded" in support_of(model)["inputs"]
    whole = fp.load_model(tmp_path, device="cpu")
    assert model.digest == whole.digest
    assert "text only, towers never run" in support_of(fp.load_model(hf))["inputs"]


def test_towers_in_files_of_a_model_that_goes_elsewhere(tmp_path):
    """To a library, to a checkpoint, and after an edit to workers."""
    gemma3().save_pretrained(tmp_path)
    model = fp.load_model(tmp_path, device="cpu")
    written = fp.export(fp.Library(model), tmp_path / "out", removed=REMOVED)
    towers = {name for name in load_all(tmp_path) if "vision" in name}
    assert towers
    assert towers <= load_all(written).keys()
    with torch.no_grad():
        model.hf.lm_head.weight.mul_(1.5)
    text = fp.Perplexity(fp.TokenBatch.from_ids(random_rows(97, [9, 7])))
    shared = fp.Evaluator(fp.Library(model), text, workers=1)
    assert shared.dense_loss == fp.Evaluator(model, text).dense_loss


def load_all(folder):
    return {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}


def test_weights_of_towers_decide_nothing(hf, tmp_path):
    hf.save_pretrained(tmp_path)
    before = fp.load_model(tmp_path, device="cpu")
    tensors = stored(tmp_path)
    name = next(name for name in tensors if "tower" in name)
    edit_tensors(tmp_path, lambda tensors: {**tensors, name: tensors[name] + 1})
    after = fp.load_model(tmp_path, device="cpu")
    assert after.digest == before.digest
    # the first model knows that its files are others by now
    refuses(
        "has changed while weights stay in it",
        fp.export,
        before,
        tmp_path / "out",
        removed=REMOVED,
    )
    fp.export(after, tmp_path / "out", removed=REMOVED)
    assert torch.equal(stored(tmp_path / "out")[name], tensors[name] + 1)


def test_a_checkpoint_that_lacks_a_tower(hf, tmp_path):
    hf.save_pretrained(tmp_path)
    name = next(name for name in stored(tmp_path) if "tower" in name)
    edit_tensors(tmp_path, lambda tensors: {**tensors, name: torch.zeros(3, 5)})
    refuses("has the shape", fp.load_model, tmp_path)
    edit_tensors(tmp_path, lambda tensors: {n: t for n, t in tensors.items() if n != name})
    refuses("does not fit its config .missing keys: .*tower", fp.load_model, tmp_path)


def test_masked_in_place(hf):
    dense, expected = loss(hf), loss_without(hf, REMOVED)
    config = hf.config
    with fp.masked(hf, REMOVED) as pruned:
        assert pruned.config.get_text_config(decoder=True).num_hidden_layers == 3
        assert loss(pruned) == pytest.approx(expected, rel=1e-6)
    assert loss(hf) == dense
    assert hf.config is config


def test_families_that_need_an_image_say_so():
    config = tf.Kosmos2Config(
        text_config={"embed_dim": 32, "layers": 2, "ffn_dim": 48, "attention_heads": 4},
        vision_config={**TOWER, "num_hidden_layers": 2},
    )
    refuses(
        "the family 'kosmos-2' cannot be run block by block: it does not run on text alone",
        fp.load_model,
        tf.Kosmos2ForConditionalGeneration(config).eval(),
    )
