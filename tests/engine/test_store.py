"""Scores on disk: the same bits, nothing computed twice, nothing lost, nothing mixed up."""

from __future__ import annotations

import functools
import os
import sqlite3
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from helpers import make_tasks, refuses
from torture.harness import forked
from transformers import LlamaConfig, LlamaForCausalLM

import fastprune as fp
from fastprune.engine.store import SumStore


def make_model(seed: int = 0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


def make_batch(seed: int = 1, rows: int = 5) -> fp.TokenBatch:
    return fp.TokenBatch.from_ids(np.random.default_rng(seed).integers(0, 97, (rows, 13)))


MASKS = np.random.default_rng(2).random((20, 5)) < 0.6


def test_second_run_computes_nothing_and_gives_the_same_bits(tmp_path):
    path = tmp_path / "scores.db"
    plain = fp.Evaluator(make_model(), fp.Perplexity(make_batch())).score(MASKS)
    first = fp.Evaluator(make_model(), fp.Perplexity(make_batch()), store=path)
    second = fp.Evaluator(make_model(), fp.Perplexity(make_batch()), store=path)
    assert (first.score(MASKS) == plain).all()
    assert (second.score(MASKS[::-1]) == plain[::-1]).all()
    assert second.stats.unit_runs == second.stats.head_runs == 0
    assert second.stats.store_hits == second.stats.masks == len(MASKS)
    assert second.stats.naive_unit_runs == first.stats.naive_unit_runs == MASKS.sum()


def test_only_what_is_missing_is_computed(tmp_path):
    ev = fp.Evaluator(make_model(), fp.Perplexity(make_batch()), store=tmp_path / "s.db")
    plain = fp.Evaluator(make_model(), fp.Perplexity(make_batch())).score(MASKS)
    ev.score(MASKS[:8])
    known = {mask.tobytes() for mask in MASKS[:8]}
    before = ev.stats.head_runs
    assert (ev.score(MASKS) == plain).all()
    assert ev.stats.head_runs - before == len({mask.tobytes() for mask in MASKS} - known)


@pytest.mark.parametrize(
    "change", ["weights", "data", "objective", "dtype", "granularity", "chunks"]
)
def test_nothing_is_mixed_up(tmp_path, change):
    """An evaluator that differs in anything that determines a score finds nothing of another's."""
    path = tmp_path / "s.db"
    tasks = fp.KLDivergence if change == "objective" else fp.Perplexity
    fp.Evaluator(make_model(), fp.Perplexity(make_batch(rows=9)), store=path).score(MASKS)
    model = make_model(seed=1 if change == "weights" else 0)
    if change == "dtype":
        model = model.to(torch.bfloat16)
    batch = make_batch(seed=3 if change == "data" else 1, rows=9)
    options = {"granularity": "sublayer"} if change == "granularity" else {}
    if change == "chunks":
        options = {"memory_bytes": 400_000}
    other = fp.Evaluator(model, tasks(batch), store=path, **options)
    other.score(np.repeat(MASKS, 2, axis=1) if change == "granularity" else MASKS)
    assert other.stats.store_hits == 0


def test_not_finite_losses_are_kept(tmp_path):
    model = make_model()
    model.model.layers[2].mlp.down_proj.weight.data[:] = torch.nan
    for hits in (0, 2):
        ev = fp.Evaluator(model, fp.Perplexity(make_batch()), store=tmp_path / "s.db")
        losses = ev.score(fp.from_removed([(), (2,)], 5))
        assert np.isnan(losses[0])
        assert np.isfinite(losses[1])
        assert ev.stats.store_hits == hits


def test_a_killed_run_keeps_what_it_had_finished(tmp_path):
    def begin() -> fp.Evaluator:
        ev = fp.Evaluator(make_model(), fp.Perplexity(make_batch()), store=tmp_path / "s.db")
        ev.score(MASKS[:6])
        return ev

    assert forked(lambda: begin() and os.kill(os.getpid(), 9)).status == -9
    assert forked(lambda: print(begin().stats.store_hits)).out == "6\n"


def in_chunks(**options) -> fp.Evaluator:
    """An evaluator whose budget cuts its rows into several chunks."""
    return fp.Evaluator(
        make_model(), fp.Perplexity(make_batch(rows=60)), memory_bytes=400_000, **options
    )


def test_a_run_that_is_killed_within_a_call_repeats_no_finished_chunk(tmp_path):
    def die(event: fp.ProgressEvent) -> None:
        if event.done >= event.total * 0.7:
            os.kill(os.getpid(), 9)

    def ask(**options) -> None:
        ev = in_chunks(**options)
        print(ev.score(MASKS).tobytes().hex(), ev.stats.unit_runs)

    store = tmp_path / "s.db"
    assert forked(lambda: ask(store=store, progress=die)).status == -9
    (expected, whole), (found, again) = (
        forked(lambda o=o: ask(**o)).out.split() for o in ({}, {"store": store})
    )
    assert found == expected
    assert 0 < float(again) < 0.7 * float(whole)


def test_one_run_serves_every_objective_on_the_same_tokens(tmp_path):
    tasks = make_tasks(97, [(9, [1, 4]), (7, [2, 2, 3])] * 3)
    objectives = [
        fp.TaskMargin(tasks),
        fp.TaskMargin(tasks, normalization="sum"),
        fp.TaskAccuracy(tasks),
        fp.TaskAccuracy(tasks, normalization="characters"),
    ]
    runs = []
    for objective in objectives:
        ev = fp.Evaluator(make_model(), objective, store=tmp_path / "s.db")
        alone = fp.Evaluator(make_model(), objective)
        assert ev.score(MASKS).tobytes() == alone.score(MASKS).tobytes()
        assert ev.score_samples(MASKS).tobytes() == alone.score_samples(MASKS).tobytes()
        runs.append(ev.stats.unit_runs)
    assert runs[0] > 0
    assert runs[1:] == [0] * 3


def test_some_samples_then_all_runs_each_chunk_once(tmp_path):
    plain = in_chunks()
    expected = plain.score(MASKS)
    ev = in_chunks(store=tmp_path / "s.db")
    ev.score_samples(MASKS, samples=[0, 1])
    assert 0 < ev.stats.unit_runs < plain.stats.unit_runs
    assert ev.score(MASKS).tobytes() == expected.tobytes()
    assert ev.stats.unit_runs == plain.stats.unit_runs


def test_no_damaged_sum_is_served(tmp_path):
    """Single bits of the file flipped, all over it: the scores are right, or the file is named as
    damaged."""
    path, damaged = tmp_path / "s.db", tmp_path / "damaged.db"
    expected = fp.Evaluator(make_model(), fp.Perplexity(make_batch())).score(MASKS)
    fp.Evaluator(make_model(), fp.Perplexity(make_batch()), store=path).score(MASKS)
    model = fp.Model(make_model())
    content = path.read_bytes()
    rng = np.random.default_rng(3)
    named = 0
    for place in rng.integers(0, len(content), 150):
        flipped = bytearray(content)
        flipped[place] ^= 1 << int(rng.integers(8))
        damaged.write_bytes(flipped)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # going on without the store
            try:
                ev = fp.Evaluator(model, fp.Perplexity(make_batch()), store=damaged)
            except fp.InputError as error:
                named += str(damaged) in str(error)
                continue
            assert ev.score(MASKS).tobytes() == expected.tobytes()
        for rest in tmp_path.glob("damaged.db-*"):
            rest.unlink()
    assert named > 0


def test_a_store_that_fails_later_does_not_end_the_work(tmp_path):
    expected = fp.Evaluator(make_model(), fp.Perplexity(make_batch())).score(MASKS)
    store = SumStore(tmp_path / "s.db")
    ev = fp.Evaluator(make_model(), fp.Perplexity(make_batch()), store=store)
    ev.score(MASKS[:3])
    store.close()  # as if the disk were gone
    with pytest.warns(RuntimeWarning, match="going on without the store") as said:
        found = [ev.score(MASKS) for _ in range(2)]
    assert len(said) == 1
    assert all(losses.tobytes() == expected.tobytes() for losses in found)


@pytest.mark.parametrize("shared", ["evaluator", "model", "transformers model"])
def test_threads_take_turns(tmp_path, shared):
    hf = make_model()
    hf.train()
    model = fp.Model(hf)
    expected = fp.Evaluator(model, fp.Perplexity(make_batch())).score(MASKS)
    one = fp.Evaluator(model, fp.Perplexity(make_batch()), store=tmp_path / "s.db")

    def work(number: int) -> bool:
        ev = (
            one
            if shared == "evaluator"
            else fp.Evaluator(model if shared == "model" else hf, one.objective)
        )
        rows = np.random.default_rng(number).permutation(len(MASKS))[:7]
        return all(ev.score(MASKS[rows]).tobytes() == expected[rows].tobytes() for _ in range(5))

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(work, range(24)))
    assert hf.training


@pytest.mark.parametrize("change", ["buffer", "attribute", "hook", "switch"])
def test_what_is_not_saved_with_the_weights_is_in_the_key(tmp_path, change):
    fp.Evaluator(make_model(), fp.Perplexity(make_batch()), store=tmp_path / "s.db").score(MASKS)
    hf = make_model()
    precision = torch.get_float32_matmul_precision()
    try:
        if change == "buffer":
            hf.model.rotary_emb.inv_freq.mul_(1.01)
        elif change == "attribute":
            hf.model.norm.variance_epsilon *= 2
        elif change == "hook":
            hf.model.layers[1].register_forward_hook(lambda module, inputs, output: output)
        else:
            torch.set_float32_matmul_precision("medium")
        ev = fp.Evaluator(hf, fp.Perplexity(make_batch()), store=tmp_path / "s.db")
        ev.score(MASKS)
    finally:
        torch.set_float32_matmul_precision(precision)
    assert ev.stats.store_hits == 0


def test_the_dense_model_is_run_again_when_the_model_has_changed():
    hf = make_model()
    ev = fp.Evaluator(hf, fp.KLDivergence(make_batch()))
    assert ev.dense_loss == 0
    with torch.no_grad():
        hf.model.layers[2].mlp.down_proj.weight *= 3
    fresh = fp.Evaluator(hf, fp.KLDivergence(make_batch()))
    assert ev.score(MASKS).tobytes() == fresh.score(MASKS).tobytes()
    assert ev.dense_loss == 0


def test_threads_share_a_store(tmp_path):
    store = SumStore(tmp_path / "s.db")
    context = store.context({"of": "threads"})

    def work(number: int) -> dict[bytes, np.ndarray]:
        keys = [bytes([number, i]) for i in range(50)]
        for key in keys:
            store.put(context, b"chunk", {key: np.array([float(number), -0.0])})
        return store.get(context, b"chunk", keys)

    with ThreadPoolExecutor(8) as threads:
        for number, known in enumerate(threads.map(work, range(8))):
            assert len(known) == 50
            assert all(
                sums.tobytes() == np.array([number, -0.0]).tobytes() for sums in known.values()
            )


def test_wrong_files_are_refused(tmp_path):
    (tmp_path / "text.db").write_text("not a database, and long enough to be looked at " * 40)
    with sqlite3.connect(tmp_path / "earlier.db") as db:
        db.execute("CREATE TABLE contexts (context TEXT)")
        db.execute("CREATE TABLE scores (context TEXT)")
    with sqlite3.connect(tmp_path / "foreign.db") as db:
        db.execute("CREATE TABLE sums (a)")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for path in (*before, tmp_path / "no" / "folder.db"):
        with pytest.raises(fp.InputError, match=path.name):
            fp.Evaluator(make_model(), fp.Perplexity(make_batch()), store=path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    "statement",
    [
        "CREATE VIEW more AS SELECT * FROM sums",
        "CREATE TRIGGER t AFTER INSERT ON contexts BEGIN DELETE FROM sums; END",
        "CREATE INDEX more ON sums (checksum)",
        "CREATE TABLE more (id INTEGER)",
    ],
)
def test_a_store_with_statements_of_others_is_refused(tmp_path, statement):
    path = tmp_path / "store.db"
    SumStore(path).close()
    database = sqlite3.connect(path)
    database.execute(statement)
    database.commit()
    database.close()
    refuses("a damaged store, its tables are not those of a store", SumStore, path)


def test_sums_that_are_a_view_are_refused(tmp_path):
    path = tmp_path / "store.db"
    SumStore(path).close()
    database = sqlite3.connect(path)
    columns = "1 AS context, 2 AS chunk, 3 AS units, 4 AS sums, 5 AS checksum"
    database.executescript(f"DROP TABLE sums; CREATE VIEW sums AS SELECT {columns}")
    database.close()
    refuses("a damaged store, its tables are not those of a store", SumStore, path)


@pytest.mark.parametrize("suffix", ["", "-wal", "-shm", "-journal"])
@pytest.mark.parametrize("exists", [False, True])
def test_a_fifo_for_a_store_or_beside_it_is_not_waited_for(tmp_path, suffix, exists):
    path = tmp_path / "store.db"
    if exists and suffix:
        SumStore(path).close()
    os.mkfifo(f"{path}{suffix}")
    refuses(f"store.db{suffix}: is ", SumStore, path)


def test_a_store_that_was_given_up_is_not_asked_again(tmp_path, monkeypatch):
    """Each time, SQLite would wait a minute for another program's lock."""
    asked: list[str] = []
    locked = False

    class Lockable(sqlite3.Connection):
        def execute(self, query, *values):
            if not locked:
                return super().execute(query, *values)
            asked.append(query)
            raise sqlite3.OperationalError("database is locked")

    connect = functools.partial(sqlite3.connect, factory=Lockable)
    monkeypatch.setattr(sqlite3, "connect", connect)
    store = SumStore(tmp_path / "store.db")
    locked = True
    with pytest.warns(RuntimeWarning, match="going on without the store: database is locked"):
        assert store.context({"a": 1}) == -1
    assert store.context({"a": 1}) == -1
    assert store.get(-1, b"", [b""]) == {}
    store.put(-1, b"", {b"": np.zeros(1)})
    assert len(asked) == 1
