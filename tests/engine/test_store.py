"""Scores on disk: the same bits, nothing computed twice, nothing lost, nothing mixed up."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fastprune as fp
from fastprune.store import ScoreStore


def make_model(seed: int = 0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=5, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2,
    )  # fmt: skip
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
    assert second.stats.layer_runs == second.stats.head_runs == 0
    assert second.stats.store_hits == second.stats.masks == len(MASKS)
    assert second.stats.naive_layer_runs == first.stats.naive_layer_runs == MASKS.sum()


def test_only_what_is_missing_is_computed(tmp_path):
    ev = fp.Evaluator(make_model(), fp.Perplexity(make_batch()), store=tmp_path / "s.db")
    plain = fp.Evaluator(make_model(), fp.Perplexity(make_batch())).score(MASKS)
    ev.score(MASKS[:8])
    known = {mask.tobytes() for mask in MASKS[:8]}
    before = ev.stats.head_runs
    assert (ev.score(MASKS) == plain).all()
    assert ev.stats.head_runs - before == len({mask.tobytes() for mask in MASKS} - known)


@pytest.mark.parametrize("change", ["weights", "data", "objective", "dtype", "granularity", "chunks"])
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
        options = {"cache_bytes": 400_000}
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
    program = (
        "import os, sys, fastprune as fp\n"
        "from engine.test_store import *\n"
        f"ev = fp.Evaluator(make_model(), fp.Perplexity(make_batch()), store={str(tmp_path / 's.db')!r})\n"
        "ev.score(MASKS[:6]); os.kill(os.getpid(), 9)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, check=False)
    assert done.returncode == -9
    ev = fp.Evaluator(make_model(), fp.Perplexity(make_batch()), store=tmp_path / "s.db")
    ev.score(MASKS[:6])
    assert ev.stats.store_hits == 6


def test_threads_share_a_store(tmp_path):
    store = ScoreStore(tmp_path / "s.db")
    context = store.context({"of": "threads"})

    def work(number: int) -> dict[bytes, float]:
        keys = [bytes([number, i]) for i in range(50)]
        for key in keys:
            store.put(context, [key], [float(number)])
        return store.get(context, keys)

    with ThreadPoolExecutor(8) as threads:
        for number, known in enumerate(threads.map(work, range(8))):
            assert list(known.values()) == [float(number)] * 50


def test_wrong_files_are_refused(tmp_path):
    (tmp_path / "text.db").write_text("not a database, and long enough to be looked at " * 40)
    for path in (tmp_path / "text.db", tmp_path / "no" / "folder.db"):
        with pytest.raises(fp.InputError, match=path.name):
            fp.Evaluator(make_model(), fp.Perplexity(make_batch()), store=path)
