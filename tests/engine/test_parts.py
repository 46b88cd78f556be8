"""Some of the samples, and rows cut after a token: losses by hand, bits, counts, wrong input."""

from __future__ import annotations

import sqlite3

import numpy as np
import pytest
from families import build, random_rows, some_masks
from helpers import make_tasks
from workers_for_tests import InThisProcess

import fastprune as fp
from fastprune.engine.sums import ENTRY_BYTES, SumMemory
from fastprune.plan.layout import Layout

LENGTHS = [100, 90, 20, 21, 22, 110]
CHUNKS = (0,), (1,), (2, 3, 4), (5,)


@pytest.fixture(scope="module")
def hf():
    return build("llama")


@pytest.fixture(scope="module")
def rows(hf):
    return random_rows(hf.config.vocab_size, LENGTHS)


OBJECTIVES = [fp.Perplexity, fp.KLDivergence]


def evaluator(model, objective, *args, **options) -> fp.Evaluator:
    """Long rows run alone, the three short ones together."""
    layout = Layout(CHUNKS, 64, objective.batch.content_hash)
    return fp.Evaluator(model, objective, *args, layout=layout, **options)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_loss_of_some_samples_is_weighted_by_their_targets(hf, rows, objective):
    ev = evaluator(hf, objective(fp.TokenBatch.from_ids(rows)))
    masks = some_masks(ev.num_units, 20, seed=0)
    losses = ev.score(masks, samples=[4, 1])
    each, targets = ev.score_samples(masks, samples=[1, 4]), np.array([89, 21])
    np.testing.assert_allclose(losses, each @ targets / targets.sum(), rtol=1e-12)
    assert ev.score(masks, samples=[1, 4]).tobytes() == losses.tobytes()
    every = np.random.default_rng(0).permutation(len(rows))
    assert ev.score(masks, samples=every).tobytes() == ev.score(masks).tobytes()


@pytest.mark.parametrize("backend", ["generic", "fused"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_cut_sample_is_the_row_that_holds_its_first_tokens(hf, rows, objective, backend):
    ev = evaluator(hf, objective(fp.TokenBatch.from_ids(rows)), backend)
    masks = some_masks(ev.num_units, 20, seed=1)
    found = ev.score(masks, samples=[5, 3, 0], tokens=110 + 21 + 40)
    other = fp.Evaluator(
        hf, objective(fp.TokenBatch.from_ids([rows[5], rows[3], rows[0][:40]])), backend
    )
    np.testing.assert_allclose(found, other.score(masks), rtol=1e-6, atol=1e-9)
    alone = ev.score(masks, samples=[0], tokens=40)
    short = fp.Evaluator(hf, objective(fp.TokenBatch.from_ids([rows[0][:40]])), backend)
    np.testing.assert_allclose(alone, short.score(masks), rtol=1e-6, atol=1e-9)


def test_a_cut_sample_costs_its_tokens_and_a_sample_its_row(hf, rows):
    batch = fp.TokenBatch.from_ids(rows)
    ev = evaluator(hf, fp.Perplexity(batch), cache_bytes=0)
    mask = np.ones((1, ev.num_units), dtype=bool)

    def cost(**part):
        before = ev.stats.unit_runs
        ev.score(mask, **part)
        return (ev.stats.unit_runs - before) * batch.num_tokens / ev.num_units

    assert cost(samples=[1]) == pytest.approx(90)
    assert cost(samples=[1, 0], tokens=90 + 77) == pytest.approx(90 + 77)
    assert cost(samples=[1, 0], tokens=90 + 100) == pytest.approx(90 + 100)
    assert cost(samples=[1, 0], tokens=90 + 1) == pytest.approx(90)  # one token predicts nothing
    assert cost(samples=[2]) == pytest.approx(20 + 21 + 22)  # short rows run together


def test_rows_alone_cost_their_tokens_and_have_the_same_losses(hf, rows):
    objective = fp.Perplexity(fp.TokenBatch.from_ids(rows))
    ev = fp.Evaluator(hf, objective, layout="rows", cache_bytes=0)
    assert sorted(ev.layout.chunks) == [(row,) for row in range(len(rows))]
    masks = some_masks(ev.num_units, 20, seed=0)
    ev.score(masks[:1], samples=[2])
    tokens = ev.stats.unit_runs * objective.batch.num_tokens
    assert tokens == pytest.approx(len(rows[2]) * masks[0].sum())
    together = fp.Evaluator(hf, objective)
    np.testing.assert_allclose(ev.score(masks), together.score(masks), rtol=1e-6, atol=1e-9)


def test_a_part_has_its_bits_in_company_and_from_the_store(hf, rows, tmp_path):
    objective = fp.KLDivergence(fp.TokenBatch.from_ids(rows))
    ev = evaluator(hf, objective, store=tmp_path / "s.db")
    masks, part = some_masks(ev.num_units, 20, seed=2), {"samples": [1, 0], "tokens": 140}
    whole = ev.score(masks)
    found = ev.score(masks, **part)
    assert ev.score(masks).tobytes() == whole.tobytes()
    for mask, loss in zip(masks, found, strict=True):
        assert evaluator(hf, objective).score(mask, **part)[0] == loss
    again = evaluator(hf, objective, store=tmp_path / "s.db")
    assert again.score(masks, **part).tobytes() == found.tobytes()
    assert again.stats.unit_runs == 0
    assert again.score(masks, samples=[1, 0], tokens=141).tobytes() != found.tobytes()
    assert again.stats.unit_runs > 0


def test_nothing_of_a_cut_sample_stays(hf, rows):
    ev = evaluator(hf, fp.KLDivergence(fp.TokenBatch.from_ids(rows)), cache_bytes=0)
    mask = np.ones(ev.num_units)
    mask[2] = 0
    ev.score(mask, samples=[0], tokens=90)
    peak = ev.stats.peak_activation_bytes
    for tokens in range(89, 80, -1):
        ev.score(mask, samples=[0], tokens=tokens)
    assert ev.stats.peak_activation_bytes == peak


def test_workers_give_a_part_the_same_bits(hf, rows):
    for objective in (kind(fp.TokenBatch.from_ids(rows)) for kind in OBJECTIVES):
        one = evaluator(hf, objective)
        masks, part = some_masks(one.num_units, 20, seed=3), {"samples": [4, 0], "tokens": 72}
        many = evaluator(hf, objective, workers=InThisProcess(3))
        assert many.score(masks, **part).tobytes() == one.score(masks, **part).tobytes()
        assert many.score(masks).tobytes() == one.score(masks).tobytes()


def test_where_the_last_token_predicts_so_does_that_of_a_part(hf, rows):
    """Rows all of whose tokens predict one, the last one, too."""
    row = np.asarray(rows[0])
    whole = fp.TokenBatch.from_predictions([[(row[:-1], row[1:])], [(row[:50], row[1:51])]])
    ev = fp.Evaluator(hf, fp.Perplexity(whole))
    masks = some_masks(ev.num_units, 20, seed=4)
    expected = fp.Evaluator(
        hf, fp.Perplexity(fp.TokenBatch.from_predictions([[(row[:40], row[1:41])]]))
    ).score(masks)
    np.testing.assert_allclose(ev.score(masks, samples=[0], tokens=40), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"samples": [1, 6]}, "sample 6 is out of range"),
        ({"samples": [1, 1]}, "sample 1 is given twice"),
        ({"samples": []}, "not empty"),
        ({"samples": [0, 1], "tokens": 100}, "tokens must be an integer from 101 to 190"),
        ({"samples": [0, 1], "tokens": 191}, "tokens must be an integer from 101 to 190"),
        ({"samples": [0], "tokens": 2.5}, "tokens must be an integer"),
        ({"samples": [0], "tokens": 1}, "no target"),
    ],
)
def test_wrong_parts_are_refused(hf, rows, part, message):
    ev = evaluator(hf, fp.Perplexity(fp.TokenBatch.from_ids(rows)))
    with pytest.raises(fp.InputError, match=message):
        ev.score(np.ones(ev.num_units), **part)


def test_questions_are_not_cut(hf):
    tasks = make_tasks(hf.config.vocab_size, [(11, [5, 9]), (7, [3, 3, 4]), (4, [1, 1])])
    for objective in (fp.TaskMargin(tasks), fp.TaskLikelihood(tasks), fp.KLDivergence(tasks)):
        ev = fp.Evaluator(hf, objective)
        mask = np.ones(ev.num_units)
        assert np.isfinite(ev.score(mask, samples=[1])).all()
        with pytest.raises(fp.InputError, match="read whole"):
            ev.score(mask, samples=[1], tokens=3)


def test_masks_or_sequences(hf, rows):
    ev = evaluator(hf, fp.Perplexity(fp.TokenBatch.from_ids(rows)))
    masks = some_masks(ev.num_units, 20, seed=5)
    sequences = [np.flatnonzero(mask) for mask in masks]
    for method in (ev.score, ev.score_samples, ev.sums):
        assert method(sequences=sequences).tobytes() == method(masks).tobytes()
    raced = ev.race(sequences=[(0, 1, 1, 2), (0, 2, 1), (0, 1, 1, 2)], keep=2)
    losses = ev.score(sequences=[(0, 1, 1, 2), (0, 2, 1)])
    assert raced.losses.tobytes() == np.sort(losses).tobytes()
    for arguments in ({}, {"masks": masks, "sequences": sequences}):
        for method in (ev.score, ev.score_samples, ev.sums, ev.race):
            with pytest.raises(fp.InputError, match="either masks or sequences"):
                method(**arguments)


def test_a_repeated_race_costs_no_unit_runs(hf):
    batch = fp.TokenBatch.from_ids(random_rows(hf.config.vocab_size, [40] * 48))
    ev = fp.Evaluator(hf, fp.Perplexity(batch), cache_bytes=0)
    masks = some_masks(ev.num_units, 20, seed=6)
    first = ev.race(masks, keep=2, confidence=0.9)
    before = ev.stats.unit_runs
    again = ev.race(masks, keep=2, confidence=0.9)
    assert ev.stats.unit_runs == before
    assert again.losses.tobytes() == first.losses.tobytes()
    assert again.indices.tolist() == first.indices.tolist()
    assert ev.score(masks[first.indices]).tobytes() == first.losses.tobytes()
    assert ev.stats.unit_runs == before  # a score of what reached the last look
    surer = ev.race(masks, keep=2, confidence=0.999999)
    alone = fp.Evaluator(hf, fp.Perplexity(batch), cache_bytes=0)
    fresh = alone.race(masks, keep=2, confidence=0.999999)
    assert surer.losses.tobytes() == fresh.losses.tobytes()
    assert surer.cost.unit_runs < fresh.cost.unit_runs


def test_a_race_keeps_nothing_of_another_version_of_the_model():
    hf = build("llama")
    batch = fp.TokenBatch.from_ids(random_rows(hf.config.vocab_size, [40] * 48))
    ev = fp.Evaluator(hf, fp.Perplexity(batch))
    masks = some_masks(ev.num_units, 20, seed=9)
    first = ev.race(masks, keep=2)
    weight = hf.model.layers[0].mlp.down_proj.weight
    weight.data.mul_(2)
    changed, fresh = ev.race(masks, keep=2), fp.Evaluator(hf, fp.Perplexity(batch))
    assert changed.losses.tobytes() == fresh.race(masks, keep=2).losses.tobytes()
    weight.data.div_(2)
    assert ev.race(masks, keep=2).losses.tobytes() == first.losses.tobytes()
    assert changed.losses.tobytes() != first.losses.tobytes()


def test_the_memory_of_races_is_bounded_and_recent_sums_stay():
    size = 8 + 1 + ENTRY_BYTES
    memory = SumMemory(8 * size)  # four entries in each of two generations
    assert not memory
    for number in range(20):
        memory.put(0, b"chunk", {bytes([number]): np.array([[float(number)]])})
        known = memory.get(
            0, b"chunk", [bytes([n]) for n in range(20)] if number == 19 else [b"\0"]
        )
        assert known[b"\0"].tolist() == [0.0]  # read each time, so never dropped
    assert known[bytes([19])].tolist() == [19.0]
    assert len(known) <= 9
    assert memory.get(0, b"other", [b"\0"]) == memory.get(1, b"chunk", [b"\0"]) == {}
    for _ in range(3):  # larger than a generation: it is not kept, and drops no other
        memory.put(0, b"chunk", {b"large": np.zeros((1, 1000))})
    assert list(memory.get(0, b"chunk", [b"\0", b"large"])) == [b"\0"]


def test_a_store_holds_each_chunk_key_once(hf, rows, tmp_path):
    ev = evaluator(hf, fp.Perplexity(fp.TokenBatch.from_ids(rows)), store=tmp_path / "s.db")
    masks = some_masks(ev.num_units, 20, seed=7)
    ev.score(masks)
    distinct = len({mask.tobytes() for mask in masks})
    database = sqlite3.connect(tmp_path / "s.db")
    chunks = len(ev.layout.chunks)
    assert database.execute("SELECT count(*) FROM chunks").fetchone()[0] == chunks
    kinds = database.execute("SELECT typeof(chunk), count(*) FROM sums GROUP BY 1").fetchall()
    assert kinds == [("integer", chunks * distinct)]
