"""Exported checkpoints: stock transformers loads them, and they give what was scored; other tools'
formats."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as tf
from families import FAMILIES, build, num_blocks, physically_ordered, random_rows, reference_loss

import fastprune as fp

LENGTHS = [19, 13]


def evaluator(hf, **options) -> tuple[fp.Evaluator, list[list[int]]]:
    rows = random_rows(hf.config.vocab_size, LENGTHS)
    return fp.Evaluator(hf, fp.Perplexity(fp.TokenBatch.from_ids(rows)), **options), rows


def loaded(folder: Path, hf):
    return tf.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation=hf.config._attn_implementation
    ).eval()


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_sequence_gives_its_score_and_generates(family, tmp_path):
    hf = build(family)
    sequence = (0, 2, 1, 1, 2, num_blocks(hf) - 1, 1)
    ev, rows = evaluator(hf)
    folder = fp.export(hf, tmp_path / "grown", sequence=sequence)
    written = loaded(folder, hf)
    assert num_blocks(written) == written.config.num_hidden_layers == len(sequence)
    expected = ev.score(sequences=[sequence])[0]
    np.testing.assert_allclose(reference_loss(written, rows), expected, rtol=1e-5)
    np.testing.assert_allclose(evaluator(written)[0].dense_loss, expected, rtol=1e-5)
    ids = torch.tensor([rows[0]])
    tokens = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(
        written.generate(ids, **tokens), written.generate(ids, **tokens, use_cache=False)
    )


def test_repeated_blocks_have_weights_of_their_own(tmp_path):
    hf = build("llama-tied")
    written = loaded(fp.export(hf, tmp_path / "grown", sequence=(0, 1, 1)), hf)
    first, second = (
        written.model.layers[1].mlp.up_proj.weight,
        written.model.layers[2].mlp.up_proj.weight,
    )
    assert torch.equal(first, second)
    assert first.data_ptr() != second.data_ptr()
    assert torch.equal(hf.model.layers[1].mlp.up_proj.weight, first)


def test_an_ascending_sequence_is_the_export_of_a_mask(tmp_path):
    hf = build("gemma3")
    one, other = (
        fp.export(hf, tmp_path / "a", removed=(1, 3)),
        fp.export(hf, tmp_path / "b", sequence=(0, 2, 4)),
    )
    files = sorted(path.relative_to(one) for path in one.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(other) for path in other.rglob("*") if path.is_file())
    assert all((one / file).read_bytes() == (other / file).read_bytes() for file in files)


@pytest.mark.parametrize(
    ("sequence", "message"),
    [
        ((), "a sequence without blocks leaves nothing to export"),
        ((0, 5), "5 is no unit"),
        ((0, True), "True is no unit"),
        (3, "must be a list"),
    ],
)
def test_wrong_sequences(sequence, message, tmp_path):
    with pytest.raises(fp.InputError, match=message):
        fp.export(build("llama"), tmp_path / "x", sequence=sequence)
    assert not list(tmp_path.iterdir())


def test_wrong_card(tmp_path):
    hf = build("llama")
    for options in (
        {"base_model": "no hub id"},
        {"base_model": "a/b\nc"},
        {"losses": {"perplexity": 3}},
    ):
        with pytest.raises(fp.InputError, match=next(iter(options))):
            fp.export(hf, tmp_path / "x", removed=(1,), **options)
    with pytest.raises(fp.InputError, match="half a block"):
        fp.export(evaluator(hf, granularity="sublayer")[0], tmp_path / "x", removed=(1,))
    assert not list(tmp_path.iterdir())


# -- the same for other tools, each read as the tool reads it --------------------------------------


@pytest.mark.parametrize(
    "sequence", [(0, 1, 3, 4), (0, 2, 4), (0, 1, 1, 2), (1, 0, 0, 0, 4, 3), (0, 1, 2, 3, 4)]
)
def test_mergekit_makes_the_same_model(sequence, tmp_path):
    yaml = pytest.importorskip("yaml")
    hf = build("qwen3")
    folder = fp.export(hf, tmp_path / "x", sequence=sequence, base_model="org/base")
    config = yaml.safe_load((folder / "recipes" / "mergekit.yaml").read_text())
    assert config["merge_method"] == "passthrough"
    assert config["dtype"] == "float32"
    blocks = []
    for piece in config["slices"]:
        (source,) = piece["sources"]
        assert source["model"] == "org/base"
        blocks += range(*source["layer_range"])
    assert tuple(blocks) == sequence
    row = [list(range(9))]
    assert reference_loss(physically_ordered(hf, blocks), row) == reference_loss(
        loaded(folder, hf), row
    )


def test_mergekit_finds_the_base_model_from_any_folder(tmp_path, monkeypatch):
    yaml = pytest.importorskip("yaml")
    build("qwen3").save_pretrained(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    folder = fp.export(fp.load_model("base"), "x", removed=(1,))
    config = yaml.safe_load((folder / "recipes" / "mergekit.yaml").read_text())
    assert {piece["sources"][0]["model"] for piece in config["slices"]} == {str(tmp_path / "base")}


def test_drop_lists(tmp_path):
    folder = fp.export(build("llama"), tmp_path / "x", removed=(3, 1)) / "recipes"
    assert (folder / "llama.cpp.txt").read_text() == "--prune-layers 1,3\n"
    assert (folder / "evopress.txt").read_text().splitlines() == [
        "none",
        "attn+mlp",
        "none",
        "attn+mlp",
        "none",
    ]
    assert json.loads((folder / "llm-drop.json").read_text()) == {
        "drop_attn_list": [1, 3],
        "drop_mlp_list": [1, 3],
    }
    for name, sequence in (
        ("grown", (0, 1, 1, 2, 3, 4)),
        ("reordered", (1, 0, 2, 3, 4)),
        ("whole", range(5)),
    ):
        folder = fp.export(build("llama"), tmp_path / name, sequence=sequence) / "recipes"
        assert [path.name for path in folder.iterdir()] == ["mergekit.yaml"]


@pytest.mark.parametrize(
    ("family", "names"), [("gemma3", "layer_types"), ("qwen2", None), ("llama", None)]
)
def test_llama_cpp_is_warned_of_layers_that_differ(family, names, tmp_path):
    folder = fp.export(build(family), tmp_path / "x", removed=(1,))
    *comments, option = (folder / "recipes" / "llama.cpp.txt").read_text().splitlines()
    assert option == "--prune-layers 1"
    assert [names in line and line.startswith("# ") for line in comments] == [True] * bool(names)
    assert ("llama.cpp:" in (folder / "README.md").read_text()) == bool(names)


# -- the hub ---------------------------------------------------------------------------------------


def test_model_card(tmp_path):
    from huggingface_hub import ModelCard

    hf = build("llama")
    ev, _ = evaluator(hf)
    card = ModelCard.load(
        fp.export(ev, tmp_path / "a", removed=(1, 3), base_model="org/base") / "README.md"
    )
    metadata = card.data.to_dict()
    assert metadata["base_model"] == "org/base"
    assert metadata["library_name"] == "transformers"
    assert "without the blocks 1, 3" in card.text
    tokens = int(ev.sample_tokens.sum())
    assert (
        f"| perplexity (lower is better), {ev.num_samples} samples, {tokens} tokens "
        f"| {np.exp(ev.dense_loss):.3f} ± " in card.text
    )
    assert f"| {np.exp(ev.score(fp.from_removed([(1, 3)], 5))[0]):.3f} ± " in card.text
    assert "peft" in card.text
    named = fp.Model(hf, name=str(tmp_path / "secret" / "local"))
    card = ModelCard.load(fp.export(named, tmp_path / "b", sequence=(0, 1, 1)) / "README.md")
    assert "base_model" not in card.data.to_dict()  # no hub id is known
    assert "The blocks of local, counted from 0, in this order: 0, 1, 1." in card.text
    assert not [path for path in (tmp_path / "b").rglob("*.*") if b"secret" in path.read_bytes()]


def test_the_folder_goes_to_a_hub_as_it_is(checkpoint, tmp_path, monkeypatch):
    """Nothing is sent: what the hub's client was about to send is looked at."""
    import huggingface_hub

    sent = []

    def create_commit(self, repo_id, operations, **kwargs):
        sent.append((repo_id, {operation.path_in_repo for operation in operations}))

    folder = fp.export(fp.load_model(checkpoint), tmp_path / "pruned", removed=(1,))
    card = huggingface_hub.ModelCard.load(folder / "README.md")
    address = huggingface_hub.RepoUrl("https://huggingface.co/me/pruned")
    monkeypatch.setattr(
        huggingface_hub.HfApi, "create_repo", lambda self, repo_id, **kwargs: address
    )
    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", create_commit)
    monkeypatch.setattr(
        "transformers.utils.hub.create_and_tag_model_card", lambda *args, **kwargs: card
    )
    tf.AutoModelForCausalLM.from_pretrained(folder).push_to_hub("me/pruned", token="none")
    tf.AutoTokenizer.from_pretrained(folder).push_to_hub("me/pruned", token="none")
    here = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    for repo, files in sent:
        assert repo == "me/pruned"
        assert files <= here  # uploading the folder itself sends no less
    assert {"README.md", "config.json", "generation_config.json", "model.safetensors"} <= sent[0][1]
    assert "tokenizer.json" in sent[1][1]


# -- configs that describe layers by their index ---------------------------------------------------

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
EXPERTS = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "n_group": 1,
    "topk_group": 1,
}
HYBRID = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
}


def indexed(kind: str):
    """A tiny random model whose config has this field, and the field's value without blocks 1 and
    3."""
    if kind == "moe_layers":
        config = tf.Llama4TextConfig(
            **SIZES, head_dim=8, intermediate_size_mlp=48, num_local_experts=2, moe_layers=[1, 2, 4]
        )
        value: object = [1, 2]
    elif kind == "attn_layer_indices":
        config = tf.BambaConfig(**SIZES, **HYBRID, attn_layer_indices=[1, 4])
        value = [2]
    elif kind == "first_k_dense_replace":
        config = tf.Glm4MoeConfig(**SIZES, **EXPERTS, head_dim=8, first_k_dense_replace=2)
        value = 1
    elif kind == "attention_types":
        config = tf.GPTNeoConfig(
            vocab_size=97,
            hidden_size=32,
            num_layers=5,
            num_heads=4,
            window_size=6,
            max_position_embeddings=64,
            attention_types=[[["global"], 1], [["local", "global"], 2]],
        )
        value = [[["global", "global", "global"], 1]]
    else:
        config = tf.MiniCPM3Config(
            **(SIZES | {"num_key_value_heads": 4}),
            q_lora_rank=16,
            kv_lora_rank=16,
            qk_nope_head_dim=8,
            qk_rope_head_dim=8,
            v_head_dim=8,
            scale_depth=1.4,
        )
        value = 1.4 * (3 / 5) ** 0.5
    torch.manual_seed(0)
    return tf.AutoModelForCausalLM.from_config(config).eval(), value


@pytest.mark.parametrize(
    "kind",
    [
        "moe_layers",
        "attn_layer_indices",
        "first_k_dense_replace",
        "attention_types",
        "scale_depth",
    ],
)
def test_fields_that_describe_layers_by_index(kind, tmp_path):
    hf, value = indexed(kind)
    ids = torch.tensor(random_rows(97, [12]))
    folder = fp.export(hf, tmp_path / "out", removed=(1, 3))
    config = json.loads((folder / "config.json").read_text())
    assert config[kind] == (pytest.approx(value) if isinstance(value, float) else value)
    written = loaded(folder, hf)
    with torch.no_grad(), fp.masked(hf, (1, 3)) as inside:
        expected = written(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(inside(input_ids=ids, use_cache=False).logits, expected)
        torch.testing.assert_close(inside(input_ids=ids, use_cache=True).logits, expected)
    ev, rows = evaluator(hf)
    np.testing.assert_allclose(
        reference_loss(written, rows), ev.score(fp.from_removed([(1, 3)], 5))[0], rtol=1e-5
    )


def test_a_block_that_is_listed_twice_is_written_twice(tmp_path):
    hf = build("llama")
    layers = hf.model.layers
    hf.model.layers = torch.nn.ModuleList([layers[0], layers[1], layers[1], layers[2], layers[3]])
    ev, rows = evaluator(hf)
    folder = fp.export(hf, tmp_path / "out", removed=(4,))
    expected = ev.score(fp.from_removed([(4,)], 5))[0]
    np.testing.assert_allclose(reference_loss(loaded(folder, hf), rows), expected, rtol=1e-5)


def test_an_invalid_generation_config_is_kept_with_a_warning(checkpoint, tmp_path):
    model = fp.load_model(checkpoint)
    model.hf.generation_config.temperature = 0.9  # without do_sample
    with pytest.warns(UserWarning, match="the generation config is invalid"):
        folder = fp.export(model, tmp_path / "out", removed=(1,))
    assert json.loads((folder / "generation_config.json").read_text())["temperature"] == 0.9


def test_a_checkpoint_brings_the_files_and_the_dtype_of_its_source(tmp_path):
    from safetensors.torch import load_file

    demo = fp.load_model("demo")
    folder = fp.export(demo, tmp_path / "out", removed=(9, 10))
    tensors = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    again = fp.load_model(folder)
    assert again.dtype == demo.dtype == torch.float32
    source = Path(fp.__file__).parent / "demo" / "model"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (folder / name).read_bytes() == (source / name).read_bytes()


def test_why_a_checkpoint_cannot_be_written_is_known_before(tmp_path):
    from fastprune.exports import can_export

    assert can_export(fp.Model(build("llama"))) is None
    hf, _ = indexed("first_k_dense_replace")
    reason = can_export(fp.Model(hf), (2, 0, 1))  # a dense block behind one with experts
    assert reason is not None
    assert "its blocks depend on their index" in reason
    with pytest.raises(fp.InputError, match="its blocks depend on their index"):
        fp.export(hf, tmp_path / "out", sequence=(2, 0, 1))
    assert not list(tmp_path.iterdir())
