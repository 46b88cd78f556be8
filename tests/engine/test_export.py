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
    folder = fp.export_sequence(hf, sequence, tmp_path / "grown")
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
    written = loaded(fp.export_sequence(hf, (0, 1, 1), tmp_path / "grown"), hf)
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
        fp.export(hf, (1, 3), tmp_path / "a"),
        fp.export_sequence(hf, (0, 2, 4), tmp_path / "b"),
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
        fp.export_sequence(build("llama"), sequence, tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_wrong_card(tmp_path):
    hf = build("llama")
    for options in (
        {"base_model": "no hub id"},
        {"base_model": "a/b\nc"},
        {"losses": {"perplexity": 3}},
    ):
        with pytest.raises(fp.InputError, match=next(iter(options))):
            fp.export(hf, (1,), tmp_path / "x", **options)
    with pytest.raises(fp.InputError, match="half a block"):
        fp.export(evaluator(hf, granularity="sublayer")[0], (1,), tmp_path / "x")
    assert not list(tmp_path.iterdir())


# -- the same for other tools, each read as the tool reads it --------------------------------------


@pytest.mark.parametrize(
    "sequence", [(0, 1, 3, 4), (0, 2, 4), (0, 1, 1, 2), (1, 0, 0, 0, 4, 3), (0, 1, 2, 3, 4)]
)
def test_mergekit_makes_the_same_model(sequence, tmp_path):
    yaml = pytest.importorskip("yaml")
    hf = build("qwen3")
    folder = fp.export_sequence(hf, sequence, tmp_path / "x", base_model="org/base")
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


def test_drop_lists(tmp_path):
    folder = fp.export(build("llama"), (3, 1), tmp_path / "x") / "recipes"
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
        folder = fp.export_sequence(build("llama"), sequence, tmp_path / name) / "recipes"
        assert [path.name for path in folder.iterdir()] == ["mergekit.yaml"]


@pytest.mark.parametrize(
    ("family", "names"), [("gemma3", "layer_types"), ("qwen2", None), ("llama", None)]
)
def test_llama_cpp_is_warned_of_layers_that_differ(family, names, tmp_path):
    folder = fp.export(build(family), (1,), tmp_path / "x")
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
        fp.export(ev, (1, 3), tmp_path / "a", base_model="org/base") / "README.md"
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
    card = ModelCard.load(fp.export_sequence(named, (0, 1, 1), tmp_path / "b") / "README.md")
    assert "base_model" not in card.data.to_dict()  # no hub id is known
    assert "The blocks of local, counted from 0, in this order: 0, 1, 1." in card.text
    assert not [path for path in (tmp_path / "b").rglob("*.*") if b"secret" in path.read_bytes()]


def test_the_folder_goes_to_a_hub_as_it_is(checkpoint, tmp_path, monkeypatch):
    """Nothing is sent: what the hub's client was about to send is looked at."""
    import huggingface_hub

    sent = []

    def create_commit(self, repo_id, operations, **kwargs):
        sent.append((repo_id, {operation.path_in_repo for operation in operations}))

    folder = fp.export(fp.load_model(checkpoint), (1,), tmp_path / "pruned")
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
