"""Folders that are damaged, incomplete, foreign or not safe to open are refused by one line that
names the culprit."""

import json
import os
import shutil

import huggingface_hub
import pytest
import torch
import transformers as tf
from families import build, some_masks
from helpers import refuses, t5
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file

import fastprune as fp


def save(hf, folder, **options):
    hf.save_pretrained(folder, **options)
    return folder


@pytest.fixture
def folder(hf, tmp_path):
    return save(hf, tmp_path / "model")


@pytest.fixture
def sharded(hf, tmp_path):
    folder = save(hf, tmp_path / "sharded", max_shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def test_load_model_arguments(hf, tmp_path):
    refuses("device and dtype", fp.load_model, hf, dtype="bfloat16")
    refuses("device and dtype", fp.load_model, hf, device="cpu")
    refuses("trust_remote_code", fp.load_model, hf, trust_remote_code=True)
    refuses("device and dtype", fp.load_model, fp.Model(hf), device="cpu")
    refuses("weights_bytes", fp.load_model, fp.Model(hf), weights_bytes=1000)
    refuses("tokenizer .* with its own", fp.load_model, fp.Model(hf), tokenizer=object())
    refuses("no such model folder", fp.load_model, tmp_path / "nowhere")
    refuses("no such model folder", fp.load_model, "./nowhere/at/all")
    (tmp_path / "file.safetensors").write_bytes(b"")
    refuses("file.safetensors: a model is a folder", fp.load_model, tmp_path / "file.safetensors")
    save(hf, tmp_path / "model")
    refuses(
        "dtype must be auto or one of .* not 'int8'",
        fp.load_model,
        tmp_path / "model",
        dtype="int8",
    )
    refuses("device 'abacus' cannot be used", fp.load_model, tmp_path / "model", device="abacus")


def test_whole_folders_are_loaded(hf, ev, batch, folder, sharded):
    masks = some_masks(5, 20, seed=0)
    for path in (folder, sharded):
        found = fp.Evaluator(fp.load_model(str(path), device="cpu"), fp.Perplexity(batch)).score(
            masks
        )
        assert found.tobytes() == ev.score(masks).tobytes()


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated_shards(folder, sharded, keep):
    for path in (folder / "model.safetensors", sorted(sharded.glob("*.safetensors"))[1]):
        content = path.read_bytes()
        path.write_bytes(content[:keep])
        refuses(f"{path.name}: truncated", fp.load_model, path.parent)
        path.write_bytes(content + b"\0")
        refuses(f"{path.name}: truncated or damaged", fp.load_model, path.parent)


@pytest.mark.parametrize("header", [b"not json", b"[1]", b'{"a": 1}', b'{"a": {"dtype": "F32"}}'])
def test_damaged_headers(folder, header):
    path = folder / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    refuses("model.safetensors: not a safetensors file", fp.load_model, folder)


def test_missing_shards_and_tensors(sharded):
    index_path = sharded / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    shards = sorted(sharded.glob("*.safetensors"))
    renamed = dict(index["weight_map"], **{"model.layers.9.mlp.up_proj.weight": shards[0].name})
    index_path.write_text(json.dumps({**index, "weight_map": renamed}))
    refuses(r"model\.layers\.9\.mlp\.up_proj\.weight is missing", fp.load_model, sharded)
    index_path.write_text(json.dumps(index))
    shards[1].unlink()
    refuses(f"{shards[1].name}: this shard is missing", fp.load_model, sharded)
    for damaged in ("", "{}", "[]", '{"weight_map": 3}'):
        index_path.write_text(damaged)
        refuses("index.json: not a readable shard index", fp.load_model, sharded)


def test_a_folder_without_all_tensors(hf, tmp_path):
    """Whole files that do not hold what the config describes: transformers would fill in random
    numbers."""
    folder = save(hf, tmp_path / "deeper")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 6}))
    refuses("does not fit its config.*layers.5", fp.load_model, folder)
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 48}))
    refuses("deeper", fp.load_model, folder)


def test_folders_that_hold_no_safetensors(hf, folder, tmp_path):
    (folder / "model.safetensors").unlink()
    refuses("holds no model.safetensors", fp.load_model, folder)
    torch.save(hf.state_dict(), folder / "pytorch_model.bin")
    refuses("pickled weights only", fp.load_model, folder)
    (folder / "config.json").unlink()
    refuses("holds no config.json", fp.load_model, folder)
    (tmp_path / "empty").mkdir()
    refuses("empty: holds no config.json", fp.load_model, tmp_path / "empty")


@pytest.mark.parametrize(
    ("content", "culprit"),
    [
        ("", "config.json: not valid JSON"),
        ("{", "config.json: not valid JSON"),
        ("[]", "config.json: a model's config is a JSON object, not list"),
        ('{"model_type": "no-such-family"}', "model: "),
        ('{"hidden_size": 3}', "model: "),
    ],
)
def test_unreadable_configs(folder, content, culprit):
    (folder / "config.json").write_text(content)
    refuses(culprit, fp.load_model, folder)


@pytest.fixture
def build_nothing(monkeypatch):
    """Making a model fails the test: the fault is to be seen before."""

    def fail(*args, **options):
        pytest.fail("a model was made")

    monkeypatch.setattr(tf.AutoModelForCausalLM, "from_pretrained", fail)


@pytest.mark.parametrize(
    ("key", "value", "culprit"),
    [
        (
            "num_hidden_layers",
            10**9,
            "num_hidden_layers is 1000000000, but the weights hold only [0-9]+ tensors",
        ),
        ("num_hidden_layers", -1, "num_hidden_layers must be an integer of at least 1, not -1"),
        ("num_hidden_layers", 0, "num_hidden_layers must be .* not 0"),
        ("num_hidden_layers", "five", "num_hidden_layers must be .* not 'five'"),
        ("num_hidden_layers", 5.0, "num_hidden_layers must be .* not 5.0"),
        ("num_hidden_layers", "5" * 999, "num_hidden_layers must be .* not '55"),
        ("num_hidden_layers", True, "num_hidden_layers must be .* not True"),
        ("vocab_size", 10**12, "vocab_size is 1000000000000, but the weights hold only 97 rows"),
        ("vocab_size", -5, "vocab_size must be"),
        (
            "hidden_size",
            10**9,
            "hidden_size is 1000000000, but the weights hold only [0-9]+ numbers",
        ),
        ("num_attention_heads", 0, "num_attention_heads must be"),
        ("intermediate_size", [44, "44"], "intermediate_size must be .* not '44'"),
        ("intermediate_size", [44, 10**9], "intermediate_size is .* but the weights hold only"),
        ("num_hidden_layers", [5], r"num_hidden_layers must be .* not \[5\]"),
        ("max_position_embeddings", -3, "max_position_embeddings must be"),
    ],
)
def test_wrong_sizes_in_configs(folder, build_nothing, key, value, culprit):
    config = json.loads((folder / "config.json").read_text())
    assert key in config
    for wrong in ({**config, key: value}, {**config, "text_config": {key: value}}):
        (folder / "config.json").write_text(json.dumps(wrong))
        refuses(f"config.json: {culprit}", fp.load_model, folder)


def test_sizes_that_some_families_write(folder):
    """No experts, and sizes by layer: whether the family takes them is for its own code to say."""
    config = json.loads((folder / "config.json").read_text())
    extra = {"num_local_experts": 0, "n_inner": [44] * 5, "n_embd": None}
    (folder / "config.json").write_text(json.dumps({**config, **extra}))
    assert fp.load_model(folder, device="cpu").num_blocks == 5


def test_quantized_weights(folder, build_nothing):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "gptq"}})
    )
    refuses("config.json: the weights are quantized", fp.load_model, folder)


@pytest.mark.parametrize(
    ("content", "culprit"),
    [
        (b"[" * 10**6, "nested too deeply"),
        (b'{"a": ' * 10**5, "nested too deeply"),
        (b'{"num_hidden_layers": ' + b"9" * 5000 + b"}", "too many digits"),
        (b"\0", "not valid JSON"),
        (b'{"model_type": "llama\0"}', "not valid JSON"),
        (b"\xff\xff", "not valid JSON"),
        (b'{"model_type": "\\ud800"}', "half a surrogate pair"),
        (b'{"model_type": "llama", "model_type": "gpt2"}', "'model_type' is given twice"),
    ],
    ids=lambda value: repr(value[:40]),
)
def test_configs_that_are_no_json(folder, build_nothing, content, culprit):
    (folder / "config.json").write_bytes(content)
    refuses(f"config.json: .*{culprit}", fp.load_model, folder)


@pytest.mark.parametrize(
    "wrong",
    [
        {"hidden_act": "no-such-function"},
        {"hidden_act": 3},
        {"rope_parameters": {"rope_type": "no-such-kind"}},
        {"rope_parameters": "yes"},
        {"rms_norm_eps": "small"},
        {"num_attention_heads": 5},
        {"head_dim": 11},
        {"dtype": "float33"},
        {"pad_token_id": "a"},
        {"model_type": ["llama"]},
        {"model_type": "x" * 5000},
        {"architectures": 3},
        {"auto_map": {"AutoModelForCausalLM": "x.Y"}, "model_type": "z"},
    ],
    ids=str,
)
def test_wrong_values_in_configs(folder, wrong):
    """One line names the folder, whatever transformers says of the value."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **wrong}))
    with pytest.raises(fp.InputError) as caught:
        fp.load_model(folder, device="cpu")
    assert str(folder) in str(caught.value)
    assert len(str(caught.value)) <= 400
    assert "\n" not in str(caught.value)


def test_folders_that_cannot_be_named():
    for name in ("x" * 5000, "a/" * 3000, "/" + "x" * 300, "\0", "a\nb", ""):
        with pytest.raises(fp.InputError) as caught:
            fp.load_model(name)
        assert len(str(caught.value)) <= 400
        assert "\n" not in str(caught.value)


def test_a_damaged_tokenizer(folder):
    for content in ("", "[]", '{"model": 3}'):
        (folder / "tokenizer.json").write_text(content)
        refuses("tokenizer.json: cannot be read as a tokenizer", fp.load_model, folder)


def test_a_tokenizer_without_a_longest_input(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_max_length": ""}))
    refuses(
        "tokenizer_config.json: model_max_length must be a number, not ''", fp.load_model, folder
    )


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2", "mixtral"])
def test_more_layers_than_the_config_has(family, tmp_path):
    """Without the last layer it is another model."""
    folder = save(build(family), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    key = "n_layer" if family == "gpt2" else "num_hidden_layers"
    (folder / "config.json").write_text(json.dumps({**config, key: config[key] - 1}))
    refuses(rf"no place for the tensor .*\.{config[key] - 1}\.", fp.load_model, folder)


def add_tensors(folder, **tensors) -> None:
    """Put tensors, by their names, into a folder's model.safetensors."""
    path = folder / "model.safetensors"
    save_file({**load_file(path), **tensors}, path, metadata={"format": "pt"})


def test_buffers_of_earlier_releases_are_no_surplus(folder, hf, ev, batch, tmp_path):
    add_tensors(
        folder,
        **{f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(5) for i in range(5)},
    )
    assert (
        fp.Evaluator(fp.load_model(folder, device="cpu"), fp.Perplexity(batch)).dense_loss
        == ev.dense_loss
    )
    tied = save(build("llama-tied"), tmp_path / "tied")
    add_tensors(
        tied,
        **{
            "lm_head.weight": load_file(tied / "model.safetensors")[
                "model.embed_tokens.weight"
            ].clone()
        },
    )
    assert fp.load_model(tied, device="cpu").num_blocks == 5
    gpt2 = save(build("gpt2"), tmp_path / "gpt2")
    causal = torch.ones(1, 1, 128, 128).tril()
    for dtype in (torch.float32, torch.uint8, torch.bool):
        add_tensors(gpt2, **{"transformer.h.0.attn.bias": causal.to(dtype)})
        add_tensors(gpt2, **{"transformer.h.0.attn.masked_bias": torch.tensor(-1e4)})
        assert fp.load_model(gpt2, device="cpu").num_blocks == 6
    add_tensors(folder, **{"model.layers.1.self_attn.q_proj.bias": torch.ones(30)})
    refuses(
        r"no place for the tensor model\.layers\.1\.self_attn\.q_proj\.bias", fp.load_model, folder
    )


@pytest.mark.parametrize(
    ("dtype", "said"),
    [
        (torch.int8, "I8"),
        (torch.int64, "I64"),
        (torch.uint8, "U8"),
        (torch.bool, "BOOL"),
        (torch.float8_e4m3fn, "F8_E4M3"),
        (torch.float8_e5m2, "F8_E5M2"),
    ],
)
def test_weights_that_are_not_floating(folder, hf, build_nothing, dtype, said):
    name = "model.layers.1.mlp.up_proj.weight"
    add_tensors(folder, **{name: hf.state_dict()[name].to(dtype)})
    refuses(
        f"the tensor {name} is {said}; weights are scored in F64, F32, F16, BF16",
        fp.load_model,
        folder,
    )


@pytest.mark.parametrize("dtype", [torch.int64, torch.float8_e4m3fn])
def test_biases_that_are_not_floating(tmp_path, dtype):
    hf = build("llama-tied")
    folder = save(hf, tmp_path / "model")
    name = "model.layers.1.mlp.up_proj.bias"
    add_tensors(folder, **{name: hf.state_dict()[name].to(dtype)})
    refuses("model: ", fp.load_model, folder)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_weights_of_every_floating_dtype(tmp_path, dtype):
    folder = save(build("llama", dtype), tmp_path / "model")
    assert fp.load_model(folder, device="cpu", dtype="auto").dtype == dtype


def test_an_unsupported_family_on_disk(tmp_path):
    refuses("'?t5", fp.load_model, save(t5(), tmp_path / "t5"))


def test_pickles_beside_safetensors_are_not_opened(hf, ev, folder, batch):
    (folder / "pytorch_model.bin").write_bytes(b"not a pickle")
    assert (
        fp.Evaluator(fp.load_model(folder, device="cpu"), fp.Perplexity(batch)).dense_loss
        == ev.dense_loss
    )
    shutil.rmtree(folder)


@pytest.fixture
def no_pickles(monkeypatch):
    """Opening a pickle fails the test."""

    def fail(*args, **options):
        pytest.fail("a pickle was opened")

    monkeypatch.setattr(torch, "load", fail)
    monkeypatch.setattr(torch.serialization, "load", fail)


def rename_shard(folder, name: str) -> None:
    """In a folder of shards, the index names the last shard otherwise."""
    index_path = folder / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    last = max(index["weight_map"].values())
    renamed = {
        tensor: name if file == last else file for tensor, file in index["weight_map"].items()
    }
    index_path.write_text(json.dumps({**index, "weight_map": renamed}))


def test_an_index_names_safetensors_files_of_its_folder_only(hf, sharded, no_pickles):
    last = max(sharded.glob("*.safetensors"))
    elsewhere = sharded.parent / "x.safetensors"
    shutil.copy(last, elsewhere)
    shutil.copy(last, sharded / "renamed.bin")  # a whole safetensors file by another name
    torch.save(hf.state_dict(), sharded / "pytorch_model.bin")
    content = (sharded / "model.safetensors.index.json").read_bytes()
    names = [
        "pytorch_model.bin",
        "renamed.bin",
        "../x.safetensors",
        str(elsewhere),
        "a/../../x.safetensors",
        3,
        None,
    ]
    for name in [
        *names,
        "..\\x.safetensors",
        "x\0.safetensors",
        "x.safetensors\n",
        "C:x.safetensors",
    ]:
        rename_shard(sharded, name)
        refuses(
            "index.json: the tensor .* only .safetensors files in the model's folder",
            fp.load_model,
            sharded,
        )
        (sharded / "model.safetensors.index.json").write_bytes(content)


def test_files_that_are_pickles_too(hf, sharded, no_pickles):
    """A zip behind the tensors is refused; one in the place of a shard is no safetensors file."""
    shard = max(sharded.glob("*.safetensors"))
    torch.save(hf.state_dict(), sharded / "pickle")
    whole, pickle = shard.read_bytes(), (sharded / "pickle").read_bytes()
    for content, why in [
        (whole + pickle, "truncated or damaged"),
        (pickle + whole, shard.name),
        (pickle, shard.name),
    ]:
        shard.write_bytes(content)
        refuses(why, fp.load_model, sharded)
    shard.write_bytes(whole + pickle)
    shard.rename(sharded / "both.bin")
    rename_shard(sharded, "both.bin")
    refuses("only .safetensors files", fp.load_model, sharded)


def test_adapters_are_refused_and_pickles_left_alone(hf, ev, folder, batch, no_pickles):
    for name in ("pytorch_model.bin", "adapter_model.bin", "training_args.bin"):
        torch.save(hf.state_dict(), folder / name)
    assert (
        fp.Evaluator(fp.load_model(folder, device="cpu"), fp.Perplexity(batch)).dense_loss
        == ev.dense_loss
    )
    (folder / "adapter_config.json").write_text("{}")
    refuses("merge it into the weights first", fp.load_model, folder)


def test_a_config_that_names_its_own_weights(folder, no_pickles):
    config = json.loads((folder / "config.json").read_text())
    for name in ("adapter_model.bin", "../x.safetensors"):
        (folder / "config.json").write_text(json.dumps({**config, "transformers_weights": name}))
        refuses("config.json: transformers_weights", fp.load_model, folder)


def test_the_folder_that_transformers_reads_is_the_one_that_was_checked(hf, ev, sharded, batch):
    """model.safetensors goes before an index; a damaged one is not passed over for the index beside
    it."""
    save(hf, sharded / "whole")
    (sharded / "whole" / "model.safetensors").rename(sharded / "model.safetensors")
    rename_shard(sharded, "gone.safetensors")
    assert (
        fp.Evaluator(fp.load_model(sharded, device="cpu"), fp.Perplexity(batch)).dense_loss
        == ev.dense_loss
    )
    (sharded / "model.safetensors").write_bytes(b"")
    refuses("model.safetensors: truncated", fp.load_model, sharded)


def test_links_into_a_cache_are_followed(ev, sharded, batch, monkeypatch):
    """As the hub's cache lays a repository out; a hub id is checked like a folder."""
    snapshot = sharded.parent / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(sharded.iterdir())):
        path.rename(sharded.parent / f"blob{number}")
        (snapshot / path.name).symlink_to(f"../../blob{number}")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **options: str(snapshot))
    for source in (snapshot, "someone/some-model"):
        found = fp.load_model(source, device="cpu")
        assert fp.Evaluator(found, fp.Perplexity(batch)).dense_loss == ev.dense_loss
    rename_shard(snapshot, "pytorch_model.bin")
    refuses("only .safetensors files", fp.load_model, "someone/some-model")


def write_shard(path, header: dict, size: int) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(size))


@pytest.mark.parametrize(
    ("tensors", "why"),
    [
        ({"a": ("F32", [2], 0, 8), "b": ("F32", [2], 4, 12)}, "tensor b.* overlaps"),
        ({"a": ("F32", [2], 0, 8), "b": ("F32", [1], 12, 16)}, "tensor b.* gap"),
        ({"a": ("F32", [3], 0, 8)}, "tensor a.* do not fit its dtype and shape"),
        ({"a": ("F32", [2], 8, 0)}, "tensor a.* do not fit"),
        ({"a": ("F32", [-2], 0, 8)}, "tensor a.* at least 0"),
        ({"a": ("F32", [2.0], 0, 8)}, "tensor a.* must be integers"),
        ({"a": ("F32", [2**62, 2**62], 0, 8)}, "tensor a.* do not fit"),
        ({"a": ("F31", [2], 0, 8)}, "tensor a.* no such dtype as 'F31'"),
        ({"a": (["F32"], [2], 0, 8)}, "tensor a.* no such dtype"),
        ({"a": ("F32", None, 0, 8)}, "tensor a.* must be integers"),
    ],
)
def test_headers_that_do_not_describe_their_file(folder, tensors, why):
    header = {
        n: {"dtype": d, "shape": s, "data_offsets": [begin, end]}
        for n, (d, s, begin, end) in tensors.items()
    }
    write_shard(folder / "model.safetensors", header, max(max(o[2:]) for o in tensors.values()))
    refuses(f"model.safetensors: not a safetensors file .*{why}", fp.load_model, folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_labels", 10**9),
        ("num_labels", -1),
        ("text_config", {"num_labels": 10**6}),
        ("rotary_dim", 10**9),
        ("n_positions", 10**6),
        ("num_decoder_layers", 10**6),
        ("some_size", 10**12),
        ("part_config", {"vocab_size": 10**12}),
    ],
)
def test_numbers_that_the_weights_do_not_bear_out(folder, build_nothing, key, value):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    name = next(iter(value)) if isinstance(value, dict) else key
    refuses(f"config.json: {name} ", fp.load_model, folder)


def test_tensors_without_numbers_allow_no_sizes(folder, build_nothing):
    tensors = load_file(folder / "model.safetensors")
    tensors |= {f"model.layers.{i}.none": torch.empty(0, 10**12) for i in range(5, 90)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    for key, value in (("vocab_size", 10**12), ("num_hidden_layers", 90)):
        (folder / "config.json").write_text(json.dumps({**config, key: value}))
        refuses(f"config.json: {key} ", fp.load_model, folder)


def test_a_tensor_of_very_many_dimensions(folder):
    """The product of so many numbers alone takes minutes."""
    entry = {"dtype": "F32", "shape": [2**62] * 50_000, "data_offsets": [0, 4]}
    header = json.dumps({"a": entry}).encode()
    path = folder / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    refuses("its shape has 50000 dimensions, at most 64 fit", fp.load_model, folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json", "x/chat.jinja"])
def test_a_fifo_in_a_folder_is_not_waited_for(folder, name):
    path = folder / name.replace("x/", "additional_chat_templates/")
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    refuses(f"{path.name}: is a FIFO, a socket or a device", fp.load_model, folder)


@pytest.mark.parametrize("content", [None, "[" * 30_000, "{" + " " * (1 << 20) + "}", "[1]"])
def test_a_file_of_hashes_that_is_none_of_ours(folder, content):
    path = folder / ".fastprune-hashes.json"
    expected = fp.load_model(folder, weights_bytes=1 << 20).digest
    path.unlink()
    for _ in range(2):
        model = fp.load_model(folder, weights_bytes=1 << 20)
        if content is not None:
            path.write_text(content)
        elif not path.exists():
            os.mkfifo(path)
        assert model.digest == expected


def test_a_tokenizer_that_makes_its_library_panic(checkpoint, tmp_path, capfd):
    """The library's panics are no Exception, and it prints lines of its own about them."""
    shutil.copytree(checkpoint, tmp_path / "model")
    path = tmp_path / "model" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = {"a": 0, "b": 1, "ab": 2}
    merges = {"merges": ["a b"], "continuing_subword_prefix": "##"}
    tokenizer["model"] = {"type": "BPE", "vocab": vocabulary, **merges}
    path.write_text(json.dumps(tokenizer))
    refuses("tokenizer.json: the tokenizers library cannot use it", fp.load_model, path.parent)
    assert "panicked" not in capfd.readouterr().err


def test_a_tokenizer_that_panics_over_a_text(text_file, questions):
    class PanicException(BaseException):
        """As pyo3's: no Exception."""

    def tokenizer(*_, **__):
        raise PanicException("index out of bounds")

    said = "the tokenizers library cannot use it: index out of bounds"
    refuses(f"text.txt: {said}", fp.load_text, text_file, tokenizer)
    refuses(f"questions.jsonl:1: {said}", fp.load_tasks, questions, tokenizer)


def test_shards_of_any_name_that_the_index_lists(ev, sharded, batch, monkeypatch):
    """Those of Qwen3.5 are called model.safetensors-00001-of-0000N.safetensors. The hub gives what
    is asked for."""
    index_path = sharded / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    renamed = {}
    for number, shard in enumerate(sorted(sharded.glob("model-*.safetensors"))):
        renamed[shard.name] = f"[a]-{number}.safetensors" if number else "model.safetensors-1-of-9"
        renamed[shard.name] += ".safetensors" * (not number)
        shard.rename(sharded / renamed[shard.name])
    index["weight_map"] = {key: renamed[shard] for key, shard in index["weight_map"].items()}
    index_path.write_text(json.dumps(index))
    asked = []

    def download(name, allow_patterns, ignore_patterns=()):
        asked.extend(
            filter_repo_objects(
                sorted(f.name for f in sharded.iterdir()),
                allow_patterns=allow_patterns,
                ignore_patterns=ignore_patterns,
            )
        )
        return str(sharded)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    found = fp.Evaluator(fp.load_model("org/tiny"), fp.Perplexity(batch))
    masks = some_masks(5, 20, seed=0)
    assert found.score(masks).tobytes() == ev.score(masks).tobytes()
    assert set(renamed.values()) <= set(asked)
