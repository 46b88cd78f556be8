"""fp.masked runs a library's sequences: any code, as on a model whose modules were exchanged."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from families import (
    build,
    layers_of,
    num_blocks,
    random_rows,
    reference_loss,
    reference_losses,
)

import fastprune as fp


class Scaled(torch.nn.Module):
    """A block without attention, which takes no other argument than its states."""

    def __init__(self, width: int):
        super().__init__()
        self.inner = torch.nn.Linear(width, width, bias=False)
        with torch.no_grad():
            self.inner.weight.copy_(0.1 * torch.eye(width))

    def forward(self, hidden_states):
        return hidden_states + self.inner(hidden_states)


def generated(hf, **options) -> torch.Tensor:
    ids = torch.tensor(random_rows(hf.config.vocab_size, [9, 9]))
    tokens = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    return hf.generate(ids, **tokens, **options)


def exchanged(hf, modules: dict[int, torch.nn.Module]):
    hf = copy.deepcopy(hf)
    for block, module in modules.items():
        layers_of(hf)[block] = copy.deepcopy(module)
        for inner in layers_of(hf)[block].modules():
            if hasattr(inner, "layer_idx"):
                inner.layer_idx = block
    return hf


@pytest.mark.parametrize("family", ["llama", "gemma2-sdpa", "gpt2", "gpt-neox"])
def test_modules_run_in_their_blocks_places(family):
    hf, other = build(family), build(family, seed=7)
    library = fp.Library(hf)
    modules = {block: layers_of(other)[block] for block in (0, 2)}
    units = {block: library.add(block, module, name="other") for block, module in modules.items()}
    sequence = [units.get(block, block) for block in range(num_blocks(hf))]
    rows = random_rows(hf.config.vocab_size, [9, 13])
    expected, before = exchanged(hf, modules), list(layers_of(hf))
    with fp.masked(library, sequence=sequence) as inside:
        assert inside is hf
        ids = torch.tensor(rows[:1])
        with torch.no_grad():
            assert torch.equal(inside(input_ids=ids).logits, expected(input_ids=ids).logits)
        assert torch.equal(generated(inside), generated(expected))
        assert torch.equal(generated(inside), generated(inside, use_cache=False))
        loss = reference_loss(inside, rows)
    assert list(layers_of(hf)) == before
    ev = fp.Evaluator(library, fp.Perplexity(fp.TokenBatch.from_ids(rows)))
    np.testing.assert_allclose(loss, ev.score(sequences=[sequence])[0], rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt-neox"])
def test_halves_run_beside_whole_blocks(family):
    hf = build(family)
    library = fp.Library(hf)
    no_attention, no_mlp = library.add(0, "no attention"), library.add(2, "no mlp")
    rows = random_rows(hf.config.vocab_size, [9, 13])
    count, indices = num_blocks(hf), [vars(m).get("layer_idx") for m in hf.modules()]
    mask = np.ones(2 * count, dtype=bool)
    mask[[0, 5]] = False
    expected = reference_losses(hf, mask[None], rows, "sublayer")[0]
    sequence = [no_attention, 1, no_mlp, *range(3, count)]
    with fp.masked(library, sequence=sequence) as inside:
        np.testing.assert_allclose(reference_loss(inside, rows), expected, rtol=1e-5)
        assert torch.equal(generated(inside), generated(inside, use_cache=False))
    assert [vars(m).get("layer_idx") for m in hf.modules()] == indices
    whole_and_half = [0, no_attention, 0, 1, 2, no_mlp]  # one block in several ways
    ev = fp.Evaluator(library, fp.Perplexity(fp.TokenBatch.from_ids(rows)))
    with fp.masked(library, sequence=whole_and_half) as inside:
        loss = reference_loss(inside, rows)
    np.testing.assert_allclose(loss, ev.score(sequences=[whole_and_half])[0], rtol=1e-5)
    assert [vars(m).get("layer_idx") for m in hf.modules()] == indices


def test_a_module_without_keys_still_counts_tokens():
    """Models take the number of earlier tokens from the cache of their first layer."""
    hf = build("llama")
    library = fp.Library(hf)
    unit = library.add(0, Scaled(hf.config.hidden_size))
    weights = library.variants[0].module.inner.weight
    with fp.masked(library, sequence=(unit, unit, 1, 2, 4)) as inside:
        assert inside.config.num_hidden_layers == 5
        assert torch.equal(generated(inside), generated(inside, use_cache=False))
        ids = torch.tensor(random_rows(hf.config.vocab_size, [9]))
        inside(input_ids=ids).logits.sum().backward()
    assert weights.grad is not None
    assert layers_of(hf)[1].mlp.up_proj.weight.grad is not None
    assert layers_of(hf)[0].mlp.up_proj.weight.grad is None  # it did not run


def test_units_that_a_library_does_not_have():
    library = fp.Library(build("llama"))
    library.add(1, "no mlp")
    message = "6 is no unit; the model's units are 0 to 5"
    with pytest.raises(fp.InputError, match=message), fp.masked(library, sequence=(0, 6)):
        pass
    with (
        pytest.raises(fp.InputError, match="5 is no unit"),
        fp.masked(library.given, sequence=(0, 5)),
    ):
        pass
