"""Wrong input is refused at the door by one line that names the culprit; losses that are not finite
are returned."""

import numpy as np
import pytest
import torch
import transformers as tf
from families import build, layers_of, random_rows, some_masks
from helpers import make_tasks, refuses, t5

import fastprune as fp
from fastprune.models import surgery

# -- masks and arguments ---------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["score", "score_samples"])
def test_masks(ev, method):
    call = getattr(ev, method)
    before = ev.stats.unit_runs
    refuses("4 entries.* 5 units", call, np.ones((2, 4)))
    refuses("value 2 at unit 1", call, [[1, 2, 1, 1, 1]])
    refuses("value nan at unit 0", call, [[np.nan, 1, 1, 1, 1]])
    refuses("rows differ", call, [[1, 1, 1, 1, 1], [1]])
    refuses("shape", call, np.ones((1, 1, 5)))
    refuses("bool or 0/1", call, [["a"] * 5])
    assert ev.stats.unit_runs == before  # nothing was run


def test_a_mask_that_keeps_nothing(hf, batch, monkeypatch):
    model = fp.Model(hf)
    ev = fp.Evaluator(model, fp.Perplexity(batch))
    monkeypatch.setattr(surgery, "runs_without_blocks", lambda model: False)
    masks = np.array([[1, 0, 0, 0, 0], [0, 0, 0, 0, 0]])
    refuses("keeps nothing.*'llama'", ev.score, masks)
    assert np.isfinite(ev.score(masks[:1])).all()


def test_samples_that_do_not_exist(ev):
    mask = np.ones((1, 5), dtype=bool)
    refuses("sample 2 is out of range.* 0 to 1", ev.score_samples, mask, samples=[0, 2])
    refuses("sample -1 is out of range", ev.score_samples, mask, samples=[-1])
    refuses("samples must be", ev.score_samples, mask, samples=[])


def test_evaluator_arguments(hf, batch, tmp_path):
    objective = fp.Perplexity(batch)
    refuses("objective must be.* not TokenBatch", fp.Evaluator, hf, batch)
    refuses("objective must be.* not str", fp.Evaluator, hf, "perplexity")
    refuses(
        "not str; load_model opens folders, hub ids and 'demo'", fp.Evaluator, "demo", objective
    )
    refuses("progress must be a function .* not True", fp.Evaluator, hf, objective, progress=True)
    refuses("backend must be.* not 'cuda'", fp.Evaluator, hf, objective, backend="cuda")
    refuses("granularity must be.* not 'head'", fp.Evaluator, hf, objective, granularity="head")
    for value in (0, -1, 1.5, True):
        refuses(
            f"memory_bytes must be a number of bytes, at least 1, not {value}",
            fp.Evaluator,
            hf,
            objective,
            memory_bytes=value,
        )
    refuses(
        "memory_bytes is too small: one row .* takes [0-9]+ bytes",
        fp.Evaluator,
        hf,
        objective,
        memory_bytes=1000,
    )
    for value in ("4e9", float("nan"), float("inf")):
        refuses("memory_bytes must be", fp.Evaluator, hf, objective, memory_bytes=value)
        refuses("cache_bytes must be", fp.Evaluator, hf, objective, cache_bytes=value)
    refuses(
        "cache_bytes must be a number of bytes, at least 0, not -1",
        fp.Evaluator,
        hf,
        objective,
        cache_bytes=-1,
    )
    file = tmp_path / "file"
    file.touch()
    refuses(f"{file} is a file, not a folder", fp.Evaluator, hf, objective, cache_dir=file)


# -- calibration against the model -----------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["block", "sublayer"])
def test_token_ids_outside_the_vocabulary(hf, granularity):
    for wrong in (-1, 97, 2**40):
        for ids in ([[1, 2, wrong], [1, 2, 3]], [[wrong, 2, 3]], [[1, wrong, 3]]):
            objective = fp.Perplexity(fp.TokenBatch.from_ids(ids))
            refuses(
                f"id {wrong} is outside.*0 to 96",
                fp.Evaluator,
                hf,
                objective,
                granularity=granularity,
            )
    edge = fp.Perplexity(fp.TokenBatch.from_ids([[0, 96, 96]]))
    assert np.isfinite(fp.Evaluator(hf, edge).dense_loss)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_sequences_longer_than_the_positions(family):
    hf = build(family)
    rows = random_rows(hf.config.vocab_size, [128, 129])
    assert np.isfinite(fp.Evaluator(hf, fp.Perplexity(fp.TokenBatch.from_ids(rows[:1]))).dense_loss)
    refuses(
        "129 tokens.* 128 positions", fp.Evaluator, hf, fp.Perplexity(fp.TokenBatch.from_ids(rows))
    )
    # a tree may be longer than that as a whole: what counts are its sequences
    tasks = make_tasks(hf.config.vocab_size, [(101, [27, 27, 20])])
    assert tasks.batch.num_tokens > 150
    assert np.isfinite(fp.Evaluator(hf, fp.TaskMargin(tasks)).dense_loss)


# -- models in memory ------------------------------------------------------------------------------

TINY = {
    "vocab_size": 60,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}


def rwkv() -> tf.RwkvForCausalLM:
    return tf.RwkvForCausalLM(tf.RwkvConfig(vocab_size=128, hidden_size=16, num_hidden_layers=2))


UNSUPPORTED = {
    "t5": (t5, "'t5' .*encoder-decoder"),
    "bert": (lambda: tf.BertForMaskedLM(tf.BertConfig(**TINY)), "'bert' .*decoder layers"),
    "rwkv": (rwkv, "'rwkv' cannot be run"),
    "llama without a head": (
        lambda: tf.LlamaModel(tf.LlamaConfig(**TINY)),
        "'llama' .*language-model head",
    ),
    "llama without blocks": (
        lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**TINY | {"num_hidden_layers": 0})),
        "'llama' .*no blocks",
    ),
    "classifier": (
        lambda: tf.LlamaForSequenceClassification(tf.LlamaConfig(**TINY, pad_token_id=0)),
        "'llama' .*language-model head",
    ),
    "torch module": (lambda: torch.nn.Linear(3, 3), "not Linear"),
    "nothing": (lambda: None, "not NoneType"),
    "class": (lambda: tf.LlamaForCausalLM, "language model, not type"),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_models(name, batch):
    make, culprit = UNSUPPORTED[name]
    model = make()
    refuses(culprit, fp.load_model, model)
    refuses(culprit, fp.Evaluator, model, fp.Perplexity(batch))


def test_state_space_models_have_no_sublayers():
    config = tf.MambaConfig(vocab_size=60, hidden_size=16, num_hidden_layers=3, state_size=4)
    hf = tf.MambaForCausalLM(config).eval()
    batch = fp.TokenBatch.from_ids(random_rows(60, [9]))
    refuses("'mamba'.* sublayers", fp.Evaluator, hf, fp.Perplexity(batch), granularity="sublayer")


def test_a_model_with_device_map_hooks(batch):
    accelerate = pytest.importorskip("accelerate")
    hf = build("llama")
    accelerate.cpu_offload(hf, execution_device="cpu")
    refuses("one device, without device_map", fp.Evaluator, hf, fp.Perplexity(batch))


def test_a_model_that_carries_a_hook_attribute(batch):
    """accelerate leaves the attribute on a module; it need not be installed here."""
    hf = build("llama")
    layers_of(hf)[1]._hf_hook = object()
    refuses("one device, without device_map", fp.Evaluator, hf, fp.Perplexity(batch))


# -- losses that are not finite --------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["text", "tasks", "accuracy", "kl"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_block_breaks_exactly_the_masks_that_keep_it(value, kind):
    hf = build("llama")
    tasks = make_tasks(hf.config.vocab_size, [(7, [2, 3]), (5, [1, 4, 2])])
    batch = fp.TokenBatch.from_ids(random_rows(hf.config.vocab_size, [13, 9]))
    objective = {
        "text": lambda: fp.Perplexity(batch),
        "tasks": lambda: fp.TaskMargin(tasks),
        "accuracy": lambda: fp.TaskAccuracy(tasks),
        "kl": lambda: fp.KLDivergence(batch),
    }[kind]()
    masks = some_masks(5, 30, seed=1)
    whole = fp.Evaluator(hf, objective).score(masks)
    assert np.isfinite(whole).all()
    with torch.no_grad():
        layers_of(hf)[2].mlp.down_proj.weight[3, 4] = value
    found = fp.Evaluator(hf, objective).score(masks)
    keeps = masks[:, 2]
    assert 5 < keeps.sum() < 25
    if kind == "kl":  # the dense model itself is broken: nothing can be compared with it
        assert not np.isfinite(found).any()
        return
    assert not np.isfinite(found[keeps]).any()
    assert found[~keeps].tobytes() == whole[~keeps].tobytes()
