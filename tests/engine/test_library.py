"""Variants of blocks: exact against models whose modules were exchanged, shared once, the same bits
in any company, stored under what they contain, and refused if they cannot take a block's place."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from families import (
    build,
    layers_of,
    num_blocks,
    physically_ordered,
    random_rows,
    reference_loss,
    reference_losses,
)

import fastprune as fp

LENGTHS = [19, 13, 19]


def with_layers(hf, exchanged: dict[int, torch.nn.Module]):
    """A deep copy of the model with other modules in the places of some blocks."""
    hf = copy.deepcopy(hf)
    layers = layers_of(hf)
    for block, module in exchanged.items():
        layers[block] = copy.deepcopy(module)
    return hf


def library_of(family: str, names=("other",)) -> tuple[fp.Library, dict[int, torch.nn.Module]]:
    """A library with a block of a second random model for each block, and the modules by unit."""
    hf, other = build(family), build(family, seed=7)
    library = fp.Library(hf)
    modules = {
        library.add(block, module, name=name): module
        for block, module in enumerate(layers_of(other))
        for name in names
    }
    return library, modules


def evaluator_of(library, objective=fp.Perplexity, **options) -> tuple[fp.Evaluator, list]:
    rows = random_rows(library.config.vocab_size, LENGTHS)
    return fp.Evaluator(library, objective(fp.TokenBatch.from_ids(rows)), **options), rows


@pytest.mark.parametrize("backend", ["generic", "auto"])
@pytest.mark.parametrize("family", ["llama", "gemma2-sdpa", "gpt2", "gpt-neox"])
def test_equal_to_the_model_with_these_modules_in_its_list(family, backend):
    library, modules = library_of(family)
    hf = library.given
    ev, rows = evaluator_of(library, backend=backend)
    count = num_blocks(hf)
    exchanged = [{0: count}, {2: count + 2}, {1: count + 1, 3: count + 3}]
    sequences = [tuple(of.get(block, block) for block in range(count)) for of in exchanged]
    expected = [
        reference_loss(with_layers(hf, {b: modules[u] for b, u in of.items()}), rows)
        for of in exchanged
    ]
    np.testing.assert_allclose(ev.score(sequences=sequences), expected, rtol=1e-5)
    shorter = (0, count + 2, 2)  # blocks left out besides
    changed = physically_ordered(with_layers(hf, {2: modules[count + 2]}), (0, 2))
    layers_of(changed).append(copy.deepcopy(layers_of(hf)[2]))
    changed.config.num_hidden_layers = 3
    if getattr(changed.config, "layer_types", None) is None:
        loss = ev.score(sequences=[shorter])[0]
        np.testing.assert_allclose(loss, reference_loss(changed, rows), rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt-neox"])
def test_halves_are_the_sublayers_masks(family):
    hf = build(family)
    library = fp.Library(hf)
    for block in range(num_blocks(hf)):
        library.add(block, "no attention")
        library.add(block, "no mlp")
    ev, rows = evaluator_of(library)
    table = ev.replace_one()
    assert library.variant_names == ["no attention", "no mlp"]
    count = num_blocks(hf)
    masks = fp.from_removed([(half,) for half in range(2 * count)], 2 * count)
    expected = reference_losses(hf, masks, rows, "sublayer").reshape(count, 2)
    np.testing.assert_allclose(table, expected, rtol=1e-5)


def test_replace_one_shares_and_aligns_its_columns_by_name():
    library, _ = library_of("llama", names=("first", "second"))
    library.add(3, "no mlp")
    ev, _ = evaluator_of(library)
    table = ev.replace_one()
    blocks = 5
    assert table.shape == (blocks, 3)
    assert np.isnan(table[:, 2]).tolist() == [block != 3 for block in range(blocks)]
    assert np.array_equal(table[:, 0], table[:, 1])  # the same modules
    # the whole model's units up to the last, then each variant and all after it
    after = 2 * sum(blocks - block for block in range(blocks)) + (blocks - 3)
    assert ev.stats.unit_runs == blocks - 1 + after
    assert ev.stats.naive_unit_runs == blocks * (2 * blocks + 1)
    for variant in library.variants[::4]:
        (sequence,) = [s for s in library.replacements() if variant.unit in s]
        alone, _ = evaluator_of(library)
        column = library.variant_names.index(variant.name)
        assert alone.score(sequences=[sequence])[0] == table[variant.block, column]


def test_masks_and_the_whole_model_are_the_parents():
    library, _ = library_of("llama")
    hf = library.given
    masks = fp.from_removed([(), (1,), (2, 3)], num_blocks(hf))
    ev, _ = evaluator_of(library, fp.KLDivergence)
    parent, _ = evaluator_of(fp.load_model(hf), fp.KLDivergence)
    assert ev.num_units == parent.num_units
    assert ev.backend == parent.backend
    assert ev.dense_loss == 0.0
    assert ev.score(masks).tobytes() == parent.score(masks).tobytes()
    assert (ev.replace_one() > 0).all()


def test_races_and_stored_under_what_the_library_contains(tmp_path):
    rows = random_rows(97, [9] * 40)
    objective = fp.Perplexity(fp.TokenBatch.from_ids(rows))
    library, modules = library_of("llama")
    ev = fp.Evaluator(library, objective, store=tmp_path / "s.db")
    table = ev.replace_one()
    race = ev.race(sequences=library.replacements(), keep=2)
    assert race.losses.tolist() == np.sort(table[:, 0])[:2].tolist()
    again, _ = library_of("llama")
    stored = fp.Evaluator(again, objective, store=tmp_path / "s.db")
    assert stored.replace_one().tobytes() == table.tobytes()
    assert stored.stats.unit_runs == 0
    changed, modules = library_of("llama")
    with torch.no_grad():
        next(modules[7].parameters()).mul_(1.5)
    other = fp.Evaluator(changed, objective, store=tmp_path / "s.db")
    differs = other.replace_one()[:, 0] != table[:, 0]
    assert differs.tolist() == [False, False, True, False, False]
    assert other.stats.unit_runs > 0


def test_a_variant_changed_or_added_later_is_seen():
    library, modules = library_of("llama")
    ev, _ = evaluator_of(library)
    before = ev.replace_one()
    with torch.no_grad():
        next(modules[6].parameters()).mul_(1.5)
    after = ev.replace_one()
    assert (before != after)[:, 0].tolist() == [False, True, False, False, False]
    unit = library.add(0, "no attention")
    assert ev.score(sequences=[(unit, 1, 2, 3, 4)])[0] == ev.replace_one()[0, 1]


def test_dropout_of_a_variant_is_off_and_its_flags_come_back():
    class Dropping(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.dropout = torch.nn.Dropout(0.5)

        def forward(self, hidden_states):
            return self.dropout(hidden_states)

    library = fp.Library(build("llama"))
    module = Dropping().train()
    unit = library.add(2, module)
    ev, _ = evaluator_of(library)
    skipped = ev.score(fp.from_removed([(2,)], 5))[0]
    np.testing.assert_allclose(ev.score(sequences=[(0, 1, unit, 3, 4)])[0], skipped, rtol=1e-6)
    assert module.training
    assert module.dropout.training


class Mixing(torch.nn.Module):
    """Adds the mean of other tokens: of all, or of earlier ones."""

    def __init__(self, causal: bool):
        super().__init__()
        self.causal = causal

    def forward(self, hidden_states):
        if not self.causal:
            return hidden_states + hidden_states.mean(dim=1, keepdim=True)
        counts = torch.arange(1, hidden_states.shape[1] + 1)[:, None]
        return hidden_states + hidden_states.cumsum(dim=1) / counts


class InPlace(torch.nn.Module):
    def forward(self, hidden_states):
        return hidden_states.add_(1)


@pytest.mark.parametrize(
    ("block", "variant", "more", "message"),
    [
        (5, "no mlp", {}, "block must be an integer from 0 to 4"),
        (-1, "no mlp", {}, "block must be an integer from 0 to 4"),
        (0, "no head", {}, "variant must be a module, or one of no attention, no mlp"),
        (0, None, {}, "variant must be a module"),
        (0, "no mlp", {"cost": float("nan")}, "cost must be a number of at least 0"),
        (0, "no mlp", {"cost": -1}, "cost must be a number of at least 0"),
        (1, torch.nn.Linear(36, 40), {}, r"Linear cannot take .* of block 1: it returns .*40"),
        (1, torch.nn.Linear(30, 36), {}, "Linear cannot take the place of block 1: RuntimeError"),
        (1, Mixing(causal=False), {}, "Mixing cannot take .*: a token sees later ones"),
        (1, InPlace(), {}, "InPlace cannot take .*: it changes its input"),
        (1, torch.nn.LSTM(36, 36), {}, "LSTM cannot take .* of block 1: a row sees the others"),
    ],
)
def test_wrong_variants(block, variant, more, message):
    library = fp.Library(build("llama"))
    with pytest.raises(fp.InputError, match=message):
        library.add(block, variant, **more)
    assert not library.variants


def test_other_refusals(tmp_path):
    library = fp.Library(build("llama"))
    unit = library.add(1, "no mlp")
    with pytest.raises(fp.InputError, match="block 1 has a variant 'no mlp' already"):
        library.add(1, "no mlp")
    ev, _ = evaluator_of(library)
    with pytest.raises(fp.InputError, match="cannot hold variants: 'no mlp' for block 1"):
        fp.export(ev, tmp_path / "x", sequence=(0, unit, 2))
    with pytest.raises(fp.InputError, match="6 is no unit; the model's units are 0 to 5"):
        ev.score(sequences=[(0, 6)])
    with pytest.raises(fp.InputError, match="a library's units are blocks"):
        evaluator_of(library, granularity="sublayer")
    with pytest.raises(fp.InputError, match="without a library's variants; leave workers out"):
        evaluator_of(library, workers=1)
    plain, _ = evaluator_of(library.given and fp.load_model(library.given))
    with pytest.raises(fp.InputError, match="model must be a Library"):
        plain.replace_one()


def test_a_module_that_mixes_branches_scores_text_and_no_questions():
    library = fp.Library(build("llama"))
    unit = library.add(1, Mixing(causal=True))
    ev, rows = evaluator_of(library)
    expected = reference_loss(with_layers(library.given, {1: Loose(Mixing(causal=True))}), rows)
    loss = ev.score(sequences=[(0, unit, 2, 3, 4)])[0]
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    trunk = np.arange(3)
    choices = [(np.concatenate([trunk, np.arange(first, first + 5)]), 3) for first in (3, 4)]
    tasks = fp.Tasks(
        batch=fp.TokenBatch.from_continuations([choices]),
        question=np.zeros(2, dtype=int),
        answer=np.array([0]),
        choice_characters=np.array([4, 4]),
        choice_bytes=np.array([4, 4]),
    )
    with pytest.raises(fp.InputError, match="branches of a token tree see each other"):
        fp.Evaluator(library, fp.TaskMargin(tasks)).replace_one()


class Loose(torch.nn.Module):
    """A module in the place of a layer, which is called with more than it takes."""

    def __init__(self, module: torch.nn.Module):
        super().__init__()
        self.module = module

    def forward(self, hidden_states, *args, **kwargs):
        return self.module(hidden_states)


def test_costs_are_parameters_unless_given():
    library = fp.Library(build("llama"))
    layer = library.layers[0]
    whole, mlp = (sum(w.numel() for w in m.parameters()) for m in (layer, layer.mlp))
    first = library.add(0, "no mlp")
    second = library.add(0, "no mlp", name="again", cost=2.5)
    assert library.cost((0, first)) == 2 * whole - mlp
    assert library.cost((second, 1)) == 2.5 + whole
