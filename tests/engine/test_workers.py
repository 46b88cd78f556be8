"""Several workers give one process's bits, run nothing twice, and lose nothing when one of them
dies.

Most tests run workers in this process, one after the other, so that they can be watched and broken;
a few run them as processes.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from families import build, num_blocks, random_rows, some_masks
from helpers import make_tasks
from workers_for_tests import InThisProcess, set_trap

import fastprune as fp
from fastprune.engine import calls
from fastprune.models import GenericRunner
from fastprune.plan.trie import kept_units, make_trie
from fastprune.study import run_study
from fastprune.workers import processes
from fastprune.workers.processes import Processes


@pytest.fixture(scope="module")
def hf():
    return build("llama")


@pytest.fixture(scope="module")
def batch(hf):
    return fp.TokenBatch.from_ids(
        random_rows(hf.config.vocab_size, [93, 9, 47, 93, 46, 9, 91, 12] * 5)
    )


def objective(kind: str, hf):
    vocabulary = hf.config.vocab_size
    if kind == "tasks":
        return fp.TaskMargin(make_tasks(vocabulary, [(11, [5, 9]), (7, [3, 3, 4])] * 20))
    rows = fp.TokenBatch.from_ids(random_rows(vocabulary, [93, 9, 47, 93, 46, 9, 91, 12] * 5))
    return fp.KLDivergence(rows) if kind == "kl" else fp.Perplexity(rows)


@pytest.mark.parametrize("count", [2, 17])
@pytest.mark.parametrize("kind", ["nll", "kl", "tasks"])
def test_every_number_has_the_bits_of_one_process(hf, kind, count):
    target = objective(kind, hf)
    one, many = fp.Evaluator(hf, target), fp.Evaluator(hf, target, workers=InThisProcess(count))
    masks = some_masks(one.num_units, 20, seed=1)
    assert many.score(masks).tobytes() == one.score(masks).tobytes()
    samples = [1, 5, 3]
    assert (
        many.score_samples(masks, samples).tobytes() == one.score_samples(masks, samples).tobytes()
    )
    assert many.sums(masks[:3]).tobytes() == one.sums(masks[:3]).tobytes()
    sequences = [(0, 1, 1, 2), (2, 0), (0, 1, 2)]
    assert many.score(sequences=sequences).tobytes() == one.score(sequences=sequences).tobytes()
    assert many.dense_loss == one.dense_loss
    found, expected = many.race(masks, keep=2), one.race(masks, keep=2)
    assert found.indices.tolist() == expected.indices.tolist()
    assert found.losses.tobytes() == expected.losses.tobytes()


@pytest.mark.parametrize("granularity", ["block", "sublayer"])
def test_no_prefix_is_run_twice_where_there_is_a_chunk_for_every_worker(hf, batch, granularity):
    options = {"granularity": granularity, "store": None}
    one, many = (
        fp.Evaluator(hf, fp.Perplexity(batch), workers=w, **options)
        for w in (None, InThisProcess(3))
    )
    assert len(one.layout.chunks) >= 3
    rng = np.random.default_rng(0)
    for _ in range(2):
        masks = rng.random((20, one.num_units)) < 0.7
        masks[:, 0] |= ~masks.any(axis=1)
        assert many.score(masks).tobytes() == one.score(masks).tobytes()
    for name in (
        "masks",
        "unit_runs",
        "asked_unit_runs",
        "naive_unit_runs",
        "head_runs",
    ):
        assert getattr(many.stats, name) == getattr(one.stats, name), name
    assert sum(many.stats.cache_hits.values()) == sum(one.stats.cache_hits.values()) > 0
    assert many.stats.cache_bytes == one.stats.cache_bytes > 0
    assert 0 < many.stats.peak_activation_bytes <= one.stats.peak_activation_bytes


def test_a_trie_that_is_cut_runs_little_more(hf):
    target = fp.Perplexity(fp.TokenBatch.from_ids(random_rows(hf.config.vocab_size, [9])))
    many = fp.Evaluator(hf, target, workers=InThisProcess(4), granularity="sublayer", cache_bytes=0)
    masks = np.random.default_rng(0).random((200, many.num_units)) < 0.6
    masks[:, 0] |= ~masks.any(axis=1)
    assert (
        many.score(masks).tobytes()
        == fp.Evaluator(hf, target, granularity="sublayer").score(masks).tobytes()
    )
    trie = make_trie(kept_units(masks))
    assert trie.unit_runs < many.stats.unit_runs < 1.1 * trie.unit_runs
    assert many.stats.head_runs == len(trie.sequences)


def test_a_worker_has_its_chunks_in_every_call(hf, batch):
    """So that what its prefix cache holds is of use."""
    many = fp.Evaluator(hf, fp.Perplexity(batch), workers=InThisProcess(3))
    masks = some_masks(many.num_units, 20, seed=2)
    many.score(masks)
    made = many.stats.unit_runs
    many.score(masks)
    assert many.stats.unit_runs == made


@pytest.mark.parametrize("lose", [(4,), (5, 9), (6, 15)])
def test_a_share_is_done_again_by_a_new_worker(hf, batch, lose):
    workers = InThisProcess(2)
    many = fp.Evaluator(hf, fp.Perplexity(batch), workers=workers)
    masks = some_masks(many.num_units, 40, seed=3)
    expected = fp.Evaluator(hf, fp.Perplexity(batch)).score(masks)
    workers.heard, workers.lose = 0, set(lose)
    with pytest.warns(
        RuntimeWarning, match="died, its share is run again: it was asked to"
    ) as said:
        found = many.score(masks)
    assert found.tobytes() == expected.tobytes()
    assert len(said) == len(lose)
    many.score(masks)
    assert not workers.busy


def test_what_had_come_back_is_not_run_again(hf, batch):
    class DiesBeforeTheLastSums(InThisProcess):
        sums = 0
        dies_after = -1

        def _receive(self):
            worker, word = super()._receive()
            self.sums += word.kind == "sums"
            if self.sums == self.dies_after:
                self.lose.add(self.heard + 1)
                self.dies_after = -1
            return worker, word

    workers = DiesBeforeTheLastSums(1)
    many = fp.Evaluator(hf, fp.Perplexity(batch), workers=workers, cache_bytes=0)
    masks = some_masks(many.num_units, 40, seed=3)
    many.score(masks[:1])
    before = many.stats.unit_runs
    workers.heard = workers.sums = 0
    workers.dies_after = len(many.layout.chunks) - 1
    with pytest.warns(RuntimeWarning, match="died"):
        many.score(masks)
    all_of_it = make_trie(kept_units(masks)).unit_runs
    assert all_of_it <= many.stats.unit_runs - before < 1.5 * all_of_it


def test_a_worker_that_dies_again_and_again(hf, batch):
    workers = InThisProcess(2)
    many = fp.Evaluator(hf, fp.Perplexity(batch), workers=workers)
    masks = some_masks(many.num_units, 20, seed=4)
    workers.heard, workers.lose = 0, set(range(1, 1000, 2))
    warnings.simplefilter("ignore")  # pytest puts the filters back
    with pytest.raises(RuntimeError, match=r"died 3 times in one call|could not open"):
        many.score(masks)
    workers.lose = set()
    assert (
        many.score(masks).tobytes() == fp.Evaluator(hf, fp.Perplexity(batch)).score(masks).tobytes()
    )


def test_the_store_is_filled_as_sums_come_back(hf, batch, tmp_path):
    masks = some_masks(num_blocks(hf), 20, seed=5)
    many = fp.Evaluator(hf, fp.Perplexity(batch), workers=InThisProcess(2), store=tmp_path / "s.db")
    expected = many.score(masks)
    for workers in (None, InThisProcess(3)):
        again = fp.Evaluator(hf, fp.Perplexity(batch), workers=workers, store=tmp_path / "s.db")
        assert again.score(masks).tobytes() == expected.tobytes()
        assert (again.stats.unit_runs, again.stats.store_hits) == (0, len(masks))
    more = some_masks(num_blocks(hf), 30, seed=6)
    assert (
        again.score(more).tobytes() == fp.Evaluator(hf, fp.Perplexity(batch)).score(more).tobytes()
    )


def test_progress_ends_where_all_is_done(hf, batch):
    told = []
    many = fp.Evaluator(
        hf,
        fp.Perplexity(batch),
        workers=InThisProcess(3),
        progress=lambda event: told.append((event.done, event.total)),
    )
    many.score(some_masks(many.num_units, 20, seed=7))
    assert told[-1][0] == told[-1][1] > 0
    assert all(done <= total for done, total in told)


def test_memory_that_runs_out_makes_chunks_smaller_everywhere(hf, monkeypatch):
    target = fp.Perplexity(
        fp.TokenBatch.from_ids(random_rows(hf.config.vocab_size, [19] * 9 + [8] * 3))
    )
    masks = some_masks(num_blocks(hf), 20, seed=8)
    expected = fp.Evaluator(hf, target).score(masks)
    workers = InThisProcess(2)
    many = fp.Evaluator(hf, target, "generic", workers=workers)
    run = GenericRunner.run

    def limited(self, unit, state, *more):
        if len(state) > 2 and self.model is not many.model:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(self, unit, state, *more)

    monkeypatch.setattr(GenericRunner, "run", limited)
    with pytest.warns(RuntimeWarning, match="going on with chunks of"):
        found = many.score(masks)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert max(map(len, many.layout.chunks)) <= 2
    assert (
        many.score(masks).tobytes() == found.tobytes()
    )  # the smaller chunks stay, so that the bits do


def test_weights_that_change_are_handed_over_anew(batch):
    hf = build("llama", seed=3)
    workers = InThisProcess(2)
    many, one = (
        fp.Evaluator(hf, fp.Perplexity(batch), workers=workers),
        fp.Evaluator(hf, fp.Perplexity(batch)),
    )
    masks = some_masks(many.num_units, 20, seed=9)
    before = many.score(masks)
    with torch.no_grad():
        hf.model.layers[1].mlp.down_proj.weight.mul_(1.5)
    found = many.score(masks)
    assert found.tobytes() == one.score(masks).tobytes() != before.tobytes()
    assert [len(models) for models in workers.models] == [1, 1]


def test_weights_that_stay_in_files(checkpoint):
    with pytest.raises(fp.InputError, match="the smallest that works is") as error:
        fp.load_model(checkpoint, weights_bytes=1)
    least = int(str(error.value).split("the smallest that works is ")[1].split(",")[0])
    ids = fp.TokenBatch.from_ids(random_rows(61, [23, 9] * 20))
    many = fp.Evaluator(
        fp.load_model(checkpoint, weights_bytes=least),
        fp.KLDivergence(ids),
        workers=InThisProcess(2),
        cache_bytes=0,
    )
    masks = some_masks(many.num_units, 20, seed=12)
    one = fp.Evaluator(fp.load_model(checkpoint), fp.KLDivergence(ids))
    assert many.score(masks).tobytes() == one.score(masks).tobytes()
    assert many.stats.weight_loads > 0


def test_evaluators_share_workers_and_their_models(hf, batch):
    workers, masks = InThisProcess(2), some_masks(num_blocks(hf), 20, seed=10)
    evaluators = [
        fp.Evaluator(hf, fp.Perplexity(batch), workers=workers),
        fp.Evaluator(hf, objective("tasks", hf), workers=workers),
    ]
    for ev in (*evaluators, *evaluators):
        assert ev.score(masks).tobytes() == fp.Evaluator(hf, ev.objective).score(masks).tobytes()
    assert [len(models) for models in workers.models] == [1, 1]
    assert [len(problems) for problems in workers.problems] == [2, 2]


def test_a_study_on_workers(hf, tmp_path):
    pytest.importorskip("sklearn")
    found = []
    for workers in (None, InThisProcess(2)):
        objectives = {kind: lambda model, kind=kind: objective(kind, hf) for kind in ("nll", "kl")}
        out = tmp_path / f"{len(found)}"
        study = run_study(
            [fp.Model(hf)], objectives, ["one_shot", "greedy"], [2], out, workers=workers
        )
        found.append([{k: v for k, v in cell.items() if k != "seconds"} for cell in study["cells"]])
    assert found[0] == found[1]


def test_bits_that_would_differ_are_refused(hf, batch, monkeypatch):
    workers = InThisProcess(1)
    many = fp.Evaluator(hf, fp.Perplexity(batch), workers=workers)
    numerics = calls.numerics_of
    other = lambda *of: {**numerics(*of), "dtype": "torch.float8"}  # noqa: E731
    monkeypatch.setattr(calls, "numerics_of", other)
    with pytest.raises(
        fp.InputError, match=r"worker 0: its dtype is torch.float32, not torch.float8"
    ):
        many.score(some_masks(many.num_units, 20, seed=11))


def test_a_model_that_cannot_be_handed_over(batch):
    hf = build("llama", seed=4)
    handle = hf.model.layers[0].register_forward_hook(lambda module, inputs, output: output)
    try:
        with pytest.raises(fp.InputError, match="cannot be handed to other processes"):
            fp.Evaluator(hf, fp.Perplexity(batch), workers=InThisProcess(1))
    finally:
        handle.remove()


@pytest.mark.parametrize("count", [0, -1, True, 1.5, "2", 1 << 20])
def test_counts_that_cannot_be(hf, batch, count):
    with pytest.raises(fp.InputError, match=r"workers must be an integer from 1 to 1024, not"):
        fp.Evaluator(hf, fp.Perplexity(batch), workers=count)


def test_the_arithmetic_of_scale(hf):
    """The numbers that docs/scale.md reckons with: runs per mask, and bytes per state."""
    units, tokens = num_blocks(hf), 30 * 16
    ev = fp.Evaluator(
        hf, fp.Perplexity(fp.TokenBatch.from_ids(random_rows(hf.config.vocab_size, [16] * 30)))
    )
    ev.score(~np.eye(units, dtype=bool))
    assert ev.stats.unit_runs == (units - 1) * (units + 2) / 2
    assert ev.stats.naive_unit_runs == units * (units - 1)
    assert ev.stats.cache_bytes == ev.stats.unit_runs * tokens * hf.config.hidden_size * 4


# -- processes -------------------------------------------------------------------------------------


class Killed(Processes):
    """Kills the second worker, as a power cut would, when it says its first word on a call;
    once."""

    told = False

    def receive(self):
        worker, word = super().receive()
        if worker == 1 and word.kind in ("progress", "sums") and not self.told:
            self.told = True
            os.kill(self.pids[1], signal.SIGKILL)
        return worker, word


@pytest.mark.slow
def test_a_process_that_is_killed(checkpoint, hf):
    """Workers of a model from a folder, and of one in memory."""
    workers = Killed(2)
    ids = fp.TokenBatch.from_ids(random_rows(61, [64] * 150))
    model = fp.load_model(checkpoint)
    many, one = (
        fp.Evaluator(model, fp.Perplexity(ids), workers=workers),
        fp.Evaluator(model, fp.Perplexity(ids)),
    )
    masks = some_masks(many.num_units, 30, seed=1)
    with pytest.warns(
        RuntimeWarning, match=r"worker 1 died, its share is run again: process \d+ was killed"
    ) as said:
        found = many.score(masks)
    assert found.tobytes() == one.score(masks).tobytes()
    assert len(said) == 1
    other = fp.Evaluator(hf, objective("nll", hf), workers=workers)
    masks = some_masks(other.num_units, 20, seed=2)
    assert other.score(masks).tobytes() == fp.Evaluator(hf, other.objective).score(masks).tobytes()
    pids = workers.pids
    del many, other
    workers.close()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.fixture
def program(tmp_path, monkeypatch):
    """program(text): what workers run in place of a worker."""

    def program(text: str) -> None:
        (tmp_path / "program.py").write_text(text)
        monkeypatch.setattr(processes, "START", tmp_path / "program.py")

    return program


def test_a_process_that_cannot_start(program):
    program("raise SystemExit('no such library')")
    started = time.monotonic()
    with pytest.raises(
        RuntimeError, match=r"worker 0 could not start: .* ended with status 1: no such library"
    ):
        Processes(2)
    assert time.monotonic() - started < 60


READY = (
    "import sys, time; from multiprocessing.connection import Connection as C; "
    "pipe = C(int(sys.argv[1])); "
)


def test_processes_that_do_not_end_are_ended_together(program, monkeypatch):
    """One after the other, each of many busy ones would be waited for."""
    program(f"{READY} pipe.send('ready'); time.sleep(600)")
    monkeypatch.setattr(processes, "END_WITHIN", 0.05)
    workers = Processes(3)
    pids, waits, wait = workers.pids, [], subprocess.Popen.wait
    monkeypatch.setattr(
        subprocess.Popen,
        "wait",
        lambda of, timeout=None: waits.append(timeout) or wait(of, timeout),
    )
    workers.close()
    first, *others = waits
    assert 0 < first <= 0.05
    assert others == [0, 0, None, None, None]
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_what_many_workers_are_given_is_pickled_once(hf, batch):
    class Counting(InThisProcess):
        kept = 0

        def share(self, value):
            self.kept += 1
            return value

    workers = Counting(3)
    many = fp.Evaluator(hf, fp.Perplexity(batch), workers=workers)
    assert len(many.layout.chunks) >= 3
    many.score(some_masks(many.num_units, 20, seed=13))
    assert [request for _, request in workers.requests] == ["Open"] * 3 + ["Run"] * 3
    assert workers.kept == 2


def test_a_process_that_is_killed_while_it_starts(program, tmp_path):
    """Another one is started in its place, up to twice."""
    starts = tmp_path / "starts"
    kill = "import os; os.kill(os.getpid(), 9)"
    note = f"n = open({str(starts)!r}, 'a'); n.write('.'); n.flush()"
    program(f"{note}\nif n.tell() < 3: {kill}\n{READY} pipe.send('ready'); pipe.recv()")
    Processes(1).close()
    assert starts.read_text() == "..."
    program(f"{note}\n{kill}")
    with pytest.raises(RuntimeError, match=r"worker 0 could not start: .* killed \(SIGKILL\)"):
        Processes(1)
    assert starts.read_text() == "......"


def test_a_worker_does_not_run_files_of_the_working_folder(
    run, tmp_path, checkpoint, text_file, monkeypatch
):
    sprung = set_trap(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    data = ("--calibration", text_file, "--num-samples", 8, "--seq-len", 5, "--quiet")
    status, _, err = run("score", checkpoint, "--removed", "1", *data, "--workers", 2)
    assert status == 0, err
    assert not sprung.exists()


@pytest.mark.parametrize("entry", ["", "../a:b", "kernels"])
def test_a_worker_imports_from_where_its_parent_does(tmp_path, monkeypatch, entry):
    """Also from a folder whose name PYTHONPATH would split, and from the working folder where the
    parent does."""
    (tmp_path / "a:b").mkdir()
    # in the place of torch, which a worker imports and this process has imported
    tell = (
        "import json, sys\njson.dump(sys.path, open('path', 'w'))\nraise SystemExit('no torch')\n"
    )
    (tmp_path / "a:b" / "torch.py").write_text(tell)
    (tmp_path / "c").mkdir()
    monkeypatch.chdir(tmp_path / "c")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "elsewhere"))
    path = [str(tmp_path / "a:b"), *filter(None, sys.path), entry]
    monkeypatch.setattr(sys, "path", path)
    with pytest.raises(RuntimeError, match="could not start"):
        Processes(1)
    *others, last = json.loads(Path("path").read_text())
    assert [others, last] == [path[:-1], os.path.abspath(entry)]


@pytest.mark.slow
def test_the_command_line(run, checkpoint, text_file, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))
    data = ("--calibration", text_file, "--num-samples", 40, "--seq-len", 5, "--quiet")
    for name, more in (("one", ()), ("two", ("--workers", 2))):
        asked = ("--removed", "1", "--removed", "1,2", "--out", tmp_path / f"{name}.jsonl")
        status, _, err = run("score", checkpoint, *asked, *data, *more)
        assert status == 0, err
    assert (tmp_path / "one.jsonl").read_text() == (tmp_path / "two.jsonl").read_text()
