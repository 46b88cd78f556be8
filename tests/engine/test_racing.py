"""Races keep what a full evaluation keeps, give its bits, and run less."""

import collections
import functools

import numpy as np
import pytest
import torch
from families import random_rows
from transformers import LlamaConfig, LlamaForCausalLM

import fastprune as fp
from fastprune.models import Head


def uneven_model() -> LlamaForCausalLM:
    """A model whose blocks matter unequally, so that some masks are beaten early."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    hf = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for scale, layer in zip((0.02, 1, 0.05, 1.5, 0.1, 2), hf.model.layers):
            layer.self_attn.o_proj.weight *= scale
            layer.mlp.down_proj.weight *= scale
    return hf


@functools.cache
def likely_text(rows: int, seed: int) -> fp.TokenBatch:
    """Text that the model itself finds likely, so that removals raise its loss."""
    hf = uneven_model()
    generator = torch.Generator().manual_seed(seed)
    ids = torch.tensor(random_rows(97, [1] * rows, seed))
    with torch.no_grad():
        for _ in range(12):
            likely = torch.softmax(hf(input_ids=ids).logits[:, -1], dim=-1)
            ids = torch.cat([ids, torch.multinomial(likely, 1, generator=generator)], dim=1)
    return fp.TokenBatch.from_ids(ids)


def evaluator(hf, rows: int = 200, seed: int = 0, **options) -> fp.Evaluator:
    return fp.Evaluator(hf, fp.Perplexity(likely_text(rows, seed)), **options)


PAIRS = [(i, j) for i in range(6) for j in range(i + 1, 6)]


@pytest.mark.slow
def test_keeps_what_a_full_evaluation_keeps_with_its_bits_for_less():
    hf = uneven_model()
    masks = fp.from_removed(PAIRS, 6)
    work = {1: [], 3: []}
    for seed in range(6):
        full = evaluator(hf, seed=seed).score(masks)
        for keep, shares in work.items():
            ev = evaluator(hf, seed=seed)
            found = ev.race(masks, keep=keep)
            assert found.indices.tolist() == np.argsort(full, kind="stable")[:keep].tolist()
            assert found.losses.tobytes() == full[found.indices].tobytes()
            assert found.cost.unit_runs == ev.stats.unit_runs
            assert 0 < found.decided_early <= len(masks) - keep
            shares.append(found.share)
    assert all(np.mean(shares) < 0.8 for shares in work.values())


def test_a_store_serves_a_race_and_what_comes_after(tmp_path):
    hf = uneven_model()
    masks = fp.from_removed(PAIRS, 6)
    ev = evaluator(hf, store=tmp_path / "s.db")
    first = ev.race(masks, keep=2)
    again = ev.race(masks, keep=2)
    assert again.cost.unit_runs == 0
    assert again.losses.tobytes() == first.losses.tobytes()
    before = ev.stats.unit_runs
    assert ev.score(masks[first.indices]).tobytes() == first.losses.tobytes()
    assert ev.stats.unit_runs == before


def test_what_a_race_has_scored_no_later_race_or_score_pays_again():
    hf = uneven_model()
    masks = fp.from_removed(PAIRS, 6)
    ev, surer, part = (evaluator(hf) for _ in range(3))
    ev.race(masks, keep=2, confidence=0.7)
    heads = ev.stats.head_runs
    ev.race(masks, keep=2, confidence=0.7)
    assert ev.stats.head_runs == heads
    found, expected = (each.race(masks, keep=2, confidence=0.99) for each in (ev, surer))
    assert found.losses.tobytes() == expected.losses.tobytes()
    assert heads < ev.stats.head_runs == pytest.approx(surer.stats.head_runs)
    part.race(masks[:8], keep=3)  # a search of its own: other candidates, another number to keep
    heads = ev.stats.head_runs
    ev.race(masks[:8], keep=3)
    assert ev.stats.head_runs - heads < part.stats.head_runs
    ev.score(masks)
    assert ev.stats.head_runs == pytest.approx(len(masks))


def test_few_samples_are_scored_whole_and_equal_masks_count_once():
    hf = uneven_model()
    ev = evaluator(hf, rows=31)
    masks = np.repeat(fp.from_removed([(5,), (0,), (2,)], 6), 2, axis=0)
    found = ev.race(masks, keep=3)
    assert sorted(found.indices.tolist()) == [0, 2, 4]
    assert found.decided_early == 0
    assert found.share == 1


def test_a_loss_that_is_not_finite_leaves_first():
    hf = uneven_model()
    ev = evaluator(hf)
    with torch.no_grad():
        hf.model.layers[3].mlp.down_proj.weight[:] = torch.nan
    masks = fp.from_removed([(3,), (3, 0), (0,), ()], 6)
    found = ev.race(masks, keep=2)
    assert set(found.indices.tolist()) == {0, 1}
    assert np.isfinite(found.losses).all()
    assert found.decided_early == 2


def test_copied_blocks_and_sublayers_that_add_nothing_race_as_they_score():
    """Blocks 1 and 3 are equal, blocks 0 and 2 add nothing: near and exact ties among the best."""
    hf = uneven_model()
    hf.model.layers[3].load_state_dict(hf.model.layers[1].state_dict())
    with torch.no_grad():
        for number in (0, 2):
            hf.model.layers[number].self_attn.o_proj.weight.zero_()
            hf.model.layers[number].mlp.down_proj.weight.zero_()
    for granularity in ("block", "sublayer"):
        ev = evaluator(hf, granularity=granularity)
        masks = fp.from_removed([(unit,) for unit in range(ev.num_units)], ev.num_units)
        full = ev.score(masks)
        for keep in (1, 2, 4):
            result = ev.race(masks, keep=keep)
            assert result.losses.tobytes() == np.sort(full)[:keep].tobytes()
            assert result.losses.tobytes() == full[result.indices].tobytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0}, "keep must be an integer from 1 to 2"),
        ({"keep": 3}, "keep must be an integer from 1 to 2"),
        ({"keep": True}, "keep must be"),
        ({"confidence": 1}, "confidence must be between 0 and 1"),
        ({"confidence": 0.0}, "confidence must be between 0 and 1"),
        ({"tolerance": -1}, "tolerance must be"),
        ({"tolerance": float("nan")}, "tolerance must be"),
    ],
)
def test_wrong_races(options, message):
    ev = evaluator(uneven_model(), rows=4)
    with pytest.raises(fp.InputError, match=message):
        ev.race(fp.from_removed([(0,), (1,), (0,)], 6), **options)


@pytest.mark.slow
@pytest.mark.parametrize(
    "algorithm", ["one_shot", "greedy", "beam", "contiguous", "exhaustive", "random"]
)
def test_searches_race_to_the_same_result(algorithm):
    hf = uneven_model()
    for num_remove in (1, 3):
        ev = evaluator(hf)
        plain, raced = (
            fp.run_search(ev, algorithm, num_remove, racing=racing) for racing in (None, 0.99)
        )
        assert raced.removed == plain.removed
        assert raced.loss == plain.loss
        assert raced.cost.unit_runs <= plain.cost.unit_runs
        assert raced.cost.naive_unit_runs == plain.cost.naive_unit_runs
        assert (raced.racing, plain.racing, plain.decided_early) == (0.99, None, 0)


def test_on_few_samples_a_search_that_races_is_the_same_search():
    ev = evaluator(uneven_model(), rows=20)
    plain, raced = (fp.run_search(ev, "genetic", 2, racing=racing) for racing in (None, 0.99))
    assert (ev.num_looks, raced.history, raced.decided_early) == (1, plain.history, 0)
    assert raced.racing is None


def test_the_last_round_of_a_beam_keeps_the_best_alone():
    raced = fp.run_search(evaluator(uneven_model()), "beam", 3, racing=0.99, beam_width=3)
    assert collections.Counter(len(removed) for removed, _ in raced.history) == {1: 3, 2: 3, 3: 1}


@pytest.mark.parametrize("cache_bytes", [0, None])
def test_a_race_in_which_memory_runs_out_begins_again_and_counts_its_masks_once(
    monkeypatch, cache_bytes
):
    masks = fp.from_removed(PAIRS, 6)
    full = evaluator(uneven_model()).score(masks)
    nll, calls = Head.nll, []

    def fails_once(self, states, tile):
        calls.append(1)
        if len(calls) == 20:  # in the second look
            raise torch.OutOfMemoryError("CUDA out of memory")
        return nll(self, states, tile)

    ev = evaluator(uneven_model(), backend="generic", cache_bytes=cache_bytes)
    monkeypatch.setattr(Head, "nll", fails_once)
    with pytest.warns(RuntimeWarning, match="out of memory"):
        found = ev.race(masks, keep=3)
    assert ev.stats.masks == len(masks)
    assert found.indices.tolist() == np.argsort(full, kind="stable")[:3].tolist()
    assert found.losses.tobytes() == ev.score(masks[found.indices]).tobytes()


def test_what_does_not_race_says_so():
    ev = evaluator(uneven_model(), rows=4)
    with pytest.raises(
        fp.InputError, match=r"bayesian needs every loss .* these do: one_shot, greedy, beam"
    ):
        fp.run_search(ev, "bayesian", 2, racing=0.99)
    for racing in (0, 1, True, "0.9"):
        with pytest.raises(fp.InputError, match="racing must be between 0 and 1"):
            fp.run_search(ev, "greedy", 2, racing=racing)
