"""fp.masked: any code runs on the model without some blocks, as on the exported checkpoint, and all
is put back."""

import copy
import threading

import numpy as np
import pytest
import torch
import transformers as tf
from families import FAMILIES, build, layers_of, num_blocks, random_rows, reference_loss

import fastprune as fp


def snapshot(hf) -> tuple:
    """The objects and values of a model that must be the same afterwards."""
    modules = [
        (name, id(module), module.training, vars(module).get("layer_idx"))
        for name, module in hf.named_modules()
    ]
    tensors = [
        (name, tensor.data_ptr(), tensor._version) for name, tensor in hf.state_dict().items()
    ]
    configs = [
        id(module.config) for module in hf.modules() if getattr(module, "config", None) is not None
    ]
    return modules, tensors, configs, hf.config.to_dict()


def ids_of(hf, rows: int = 2, length: int = 9) -> torch.Tensor:
    return torch.tensor(random_rows(hf.config.vocab_size, [length] * rows))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_generation_are_the_exported_checkpoints(family, tmp_path):
    hf = build(family)
    removed = (1, num_blocks(hf) - 1)
    fp.export(hf, tmp_path / "pruned", removed=removed)
    implementation = hf.config._attn_implementation
    written = tf.AutoModelForCausalLM.from_pretrained(
        tmp_path / "pruned", attn_implementation=implementation
    ).eval()
    ids, before = ids_of(hf), snapshot(hf)
    tokens = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    with fp.masked(hf, removed) as inside:
        assert inside is hf
        assert len(layers_of(hf)) == hf.config.num_hidden_layers == num_blocks(written)
        with torch.no_grad():
            assert torch.equal(hf(input_ids=ids).logits, written(input_ids=ids).logits)
        cached = hf.generate(ids, **tokens)
        assert torch.equal(cached, written.generate(ids, **tokens))
        assert torch.equal(cached, hf.generate(ids, **tokens, use_cache=False))
    assert snapshot(hf) == before


def test_put_back_after_an_exception_and_from_nested_masks():
    hf = build("gemma3")
    whole, before = copy.deepcopy(hf), snapshot(hf)
    rows = random_rows(hf.config.vocab_size, [9, 9])
    inside = []

    def fails():
        with fp.masked(hf, (3,)), fp.masked(hf, (0,)):  # the second counts what is left
            assert hf.config.layer_types == [whole.config.layer_types[i] for i in (1, 2, 4)]
            inside.append(reference_loss(hf, rows))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert snapshot(hf) == before
    with fp.masked(fp.Model(hf), (0, 3)):
        assert reference_loss(hf, rows) == inside[0]
    assert reference_loss(hf, rows) == reference_loss(whole, rows)


def test_evaluators_serve_where_they_were_opened():
    hf = build("llama")
    batch = fp.TokenBatch.from_ids(random_rows(hf.config.vocab_size, [9, 9]))
    outside = fp.Evaluator(hf, fp.Perplexity(batch))
    whole = np.ones((1, 5), dtype=bool)
    before = outside.score(fp.from_removed([(2,)], 5))
    with fp.masked(outside.model, (2,)):
        inside = fp.Evaluator(hf, fp.Perplexity(batch))
        assert inside.num_units == 4
        np.testing.assert_allclose(inside.score(whole[:, :4]), before, rtol=1e-6)
        with pytest.raises(fp.InputError, match=r"opened outside of fp\.masked serves outside"):
            outside.score(whole)
    with pytest.raises(fp.InputError, match="opened inside serves inside"):
        inside.score(whole[:, :4])
    assert outside.score(fp.from_removed([(2,)], 5)) == before


def test_other_threads_wait_for_their_turn():
    hf = build("llama")
    ev = fp.Evaluator(
        hf, fp.Perplexity(fp.TokenBatch.from_ids(random_rows(hf.config.vocab_size, [9])))
    )
    expected, found = ev.score(np.ones(5)), []
    threads = [
        threading.Thread(target=lambda: found.append(ev.score(np.ones(5)))) for _ in range(2)
    ]
    threads.append(threading.Thread(target=lambda: found.append([fp.Model(hf).num_blocks])))
    with fp.masked(hf, (0, 1)):
        for thread in threads:
            thread.start()
        hf(input_ids=ids_of(hf))
        assert not found
    for thread in threads:
        thread.join()
    assert sorted(x[0] for x in found) == sorted([expected[0], expected[0], 5])


def test_training_inside_reaches_the_kept_weights_only():
    hf = build("qwen2")
    with fp.masked(hf, (1,)):
        hf(input_ids=ids_of(hf), labels=ids_of(hf)).loss.backward()
    gradients = [layer.mlp.down_proj.weight.grad is not None for layer in layers_of(hf)]
    assert gradients == [True, False, True, True, True]


@pytest.mark.parametrize(
    ("removed", "message"),
    [
        ((9,), "removed unit 9 is out of range"),
        ((1, 1), "given twice"),
        (3, "given as a collection"),
        (("1",), "is not an integer"),
    ],
)
def test_wrong_blocks(removed, message):
    hf = build("llama")
    before = snapshot(hf)
    with pytest.raises(fp.InputError, match=message), fp.masked(hf, removed):
        pass
    assert snapshot(hf) == before


def test_not_a_model():
    with (
        pytest.raises(fp.InputError, match="expected a transformers causal language model"),
        fp.masked("demo", (1,)),
    ):
        pass


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt-neox"])
def test_halves_of_blocks_are_left_out(family):
    hf = build(family)
    rows, before = random_rows(hf.config.vocab_size, [9, 9]), snapshot(hf)
    units = 2 * num_blocks(hf)
    removed = (0, 3, 4, 5)  # an attention first, an mlp, both halves of a block
    ev = fp.Evaluator(hf, fp.Perplexity(fp.TokenBatch.from_ids(rows)), granularity="sublayer")
    expected = ev.score(fp.from_removed([removed], units))[0]
    ids = ids_of(hf)
    tokens = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    with fp.masked(hf, removed, granularity="sublayer") as inside:
        assert num_blocks(inside) == num_blocks(hf) == units // 2 - 1
        np.testing.assert_allclose(reference_loss(inside, rows), expected, rtol=1e-5)
        cached = inside.generate(ids, **tokens)
        assert torch.equal(cached, inside.generate(ids, **tokens, use_cache=False))
    assert snapshot(hf) == before


def test_a_sequence_repeats_blocks_and_shares_their_weights(tmp_path):
    hf = build("gemma3")
    before, ids, sequence = snapshot(hf), ids_of(hf), (0, 1, 1, 3, 2)
    folder = fp.export(hf, tmp_path / "out", sequence=sequence)
    written = tf.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokens = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    with fp.masked(hf, sequence=sequence) as inside:
        layers = layers_of(inside)
        assert layers[1].mlp.up_proj.weight is layers[2].mlp.up_proj.weight
        with torch.no_grad():
            assert torch.equal(inside(input_ids=ids).logits, written(input_ids=ids).logits)
        assert torch.equal(inside.generate(ids, **tokens), written.generate(ids, **tokens))
    assert snapshot(hf) == before
