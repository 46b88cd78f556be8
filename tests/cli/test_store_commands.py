"""store info, export and prune: what lies in a file of sums, without a model."""

import json
import sqlite3

import numpy as np
import pytest
from families import build, random_rows, some_masks

import fastprune as fp
from fastprune.engine.store import SumStore

MASKS = some_masks(5, 20, seed=2)


def evaluator(objective=fp.Perplexity, **options) -> fp.Evaluator:
    hf = build("llama")
    batch = fp.TokenBatch.from_ids(random_rows(hf.config.vocab_size, [13] * 5))
    return fp.Evaluator(hf, objective(batch), **options)


@pytest.fixture
def store(tmp_path):
    path = tmp_path / "sums.db"
    for objective in (fp.Perplexity, fp.KLDivergence):
        evaluator(objective, store=path).score(MASKS)
    return path


def damage(path) -> None:
    with sqlite3.connect(path) as db:
        db.execute(
            "UPDATE sums SET sums = zeroblob(length(sums)) WHERE units = (SELECT min(units) FROM "
            "sums)"
        )
    db.close()


def test_info_shows_contexts_and_damage(run, store):
    status, out, _ = run("store", "info", store)
    assert status == 0
    assert "nll" in out
    assert "kl" in out
    assert "0 damaged rows" in out
    damage(store)
    assert "2 damaged rows" in run("store", "info", store)[1]


def test_export_writes_every_row_with_its_bits(run, store, tmp_path):
    target = tmp_path / "rows.jsonl"
    assert run("store", "export", store, "--out", target)[0] == 0
    rows = [json.loads(line) for line in target.read_text().splitlines()]
    losses = evaluator().score(MASKS)
    targets = 5 * 12
    for mask, loss in zip(MASKS, losses):
        kept = np.flatnonzero(mask).tolist()
        found = [
            row["sums"]
            for row in rows
            if row["units"] == kept and row["context"]["measure"] == "nll"
        ]
        assert sum(map(sum, found)) / targets == pytest.approx(loss, rel=1e-12)
    assert run("store", "export", store, "--out", target)[0] == 2


def test_prune_removes_a_context_or_what_is_damaged(run, store):
    distinct = len({mask.tobytes() for mask in MASKS})
    status, out, _ = run("store", "prune", store, "--context", 1)
    assert status == 0
    assert f"removed: {distinct} rows" in out
    assert list(SumStore(store).contexts()) == [2]
    damage(store)
    assert "removed: 1 rows" in run("store", "prune", store, "--damaged")[1]
    ev = evaluator(fp.KLDivergence, store=store)
    ev.score(MASKS)
    assert ev.stats.store_hits > 0


def test_a_search_says_how_many_scores_a_store_had(run, checkpoint, text_file, tmp_path):
    data = ("--calibration", text_file, "--num-samples", 2, "--seq-len", 16)
    search = ("search", checkpoint, "--num-remove", 1, *data, "--store", tmp_path / "s.db")
    status, out, err = run(*search)
    assert status == 0, err
    assert "in the store" not in out
    assert "5 of the scores were in the store already" in run(*search)[1]  # one for each unit


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("info", "nowhere.db"), "nowhere.db: no such file"),
        (("prune", "STORE"), "say what to remove"),
        (("prune", "STORE", "--context", "7"), "has no context 7"),
        (("info", __file__), "not a store"),
    ],
)
def test_wrong_arguments(run, store, arguments, message):
    status, _, err = run(
        "store", *(store if argument == "STORE" else argument for argument in arguments)
    )
    assert status == 2
    assert message in err
    assert len(err.splitlines()) == 1
