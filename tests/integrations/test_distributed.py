"""Workers on Ray: one process's bits, also when one of them is killed; addresses that cannot be."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
from collections import deque
from types import SimpleNamespace

import numpy as np
import pytest
from families import build, random_rows, some_masks
from workers_for_tests import set_trap

import fastprune as fp
from fastprune.workers import ray as distributed
from fastprune.workers.messages import Word
from fastprune.workers.ray import RayWorkers, check_address, choose_count

has_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")


@pytest.fixture(scope="module")
def sprung(tmp_path_factory):
    return set_trap(tmp_path_factory.mktemp("trap"))


@pytest.fixture(scope="module")
def workers(sprung):
    """Two, on a Ray of this machine that takes it for one with the cores they need: to Ray cores
    are numbers only. They start in a folder whose files must not run."""
    import torch

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(sprung.parent)
        patch.setattr(os, "sched_getaffinity", lambda pid: set(range(2 * torch.get_num_threads())))
        found = RayWorkers("local", count=2)
    yield found
    found.close()


@has_ray
@pytest.mark.nightly
def test_the_bits_of_one_process_also_when_an_actor_is_killed(
    workers, sprung, checkpoint, monkeypatch
):
    hf = build("llama")
    batch = fp.TokenBatch.from_ids(random_rows(hf.config.vocab_size, [23, 9, 17, 23] * 20))
    one, many = (
        fp.Evaluator(hf, fp.Perplexity(batch)),
        fp.Evaluator(hf, fp.Perplexity(batch), workers=workers),
    )
    masks = some_masks(one.num_units, 20, seed=1)
    assert many.score(masks).tobytes() == one.score(masks).tobytes()
    assert many.stats.unit_runs == one.stats.unit_runs

    batch = fp.TokenBatch.from_ids(random_rows(61, [64] * 300))
    model = fp.load_model(checkpoint)
    one, many = (
        fp.Evaluator(model, fp.KLDivergence(batch)),
        fp.Evaluator(model, fp.KLDivergence(batch), workers=workers),
    )
    receive, told = workers.receive, []

    def killing():
        word = receive()
        if word[0] == 1 and not told:
            told.append(os.kill(workers.pids[1], signal.SIGKILL))
        return word

    monkeypatch.setattr(workers, "receive", killing)
    masks = some_masks(one.num_units, 40, seed=2)
    with pytest.warns(RuntimeWarning, match="worker 1 died, its share is run again") as said:
        found = many.score(masks)
    assert found.tobytes() == one.score(masks).tobytes()
    assert len(said) == 1
    assert not sprung.exists()
    ids = np.random.default_rng(0).integers(0, 61, (30, 9))
    questions = fp.Evaluator(model, fp.Perplexity(fp.TokenBatch.from_ids(ids)), workers=workers)
    alone = fp.Evaluator(model, questions.objective)
    assert (
        questions.race(masks, keep=2).losses.tobytes() == alone.race(masks, keep=2).losses.tobytes()
    )

    monkeypatch.setattr(distributed, "GIVEN_BACK_WITHIN", 0)
    with pytest.raises(
        fp.InputError, match=r"room for 0 workers .* \(2 when nobody else uses it\), not for 1"
    ):
        RayWorkers("local")


def test_workers_fit_into_what_is_free_each_on_one_machine():
    total = [{"CPU": 5.0, "GPU": 2.0}, {"CPU": 3.0}, {"memory": 1.0}]
    assert choose_count(None, total, total, gpus=0, cores=2) == 3  # not 8 // 2
    assert choose_count(2, total, total, gpus=1, cores=1) == 2
    free = [{"CPU": 1.0, "GPU": 2.0}, {"CPU": 3.0}]
    with pytest.warns(
        RuntimeWarning,
        match=r"room for 1 worker of 2 cores each \(3 when nobody else uses it\): going",
    ):
        assert choose_count(None, free, total, gpus=0, cores=2) == 1
    with pytest.raises(
        fp.InputError, match=r"room for 1 worker of 2 cores each \(3 when .*\), not for 2"
    ):
        choose_count(2, free, total, gpus=0, cores=2)
    with pytest.raises(fp.InputError, match="room for 2 workers of a GPU each, not for 3"):
        choose_count(3, total, total, gpus=1, cores=1)


@has_ray
@pytest.mark.parametrize("address", ["", "here", "host:", "host:99999", "ray://host:1", "a b:1"])
def test_addresses_that_are_none(address):
    with pytest.raises(fp.InputError, match="a Ray address is local, auto or HOST:PORT"):
        check_address(address)


@has_ray
def test_an_address_that_nobody_answers(run, checkpoint, text_file):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        status, _, err = run(
            "score",
            checkpoint,
            "--removed",
            "1",
            "--calibration",
            text_file,
            "--ray",
            f"127.0.0.1:{port}",
        )
    assert status == 2
    assert f"--ray: nobody answers at 127.0.0.1:{port}: Connection refused" in err
    assert err.count("\n") == 1


def test_a_ray_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        fp.InputError, match=r"ray is needed for this.*: pip install 'fastprune\[ray\]'"
    ):
        check_address("local")


def test_an_actor_that_is_killed_for_want_of_memory():
    """While it starts, and in a call; with a Ray of which only the answers are there."""

    class RayError(Exception):
        pass

    class OutOfMemoryError(RayError):
        pass

    class RayActorError(RayError):
        pass

    class GetTimeoutError(RayError):
        pass

    errors = (RayError, OutOfMemoryError, RayActorError, GetTimeoutError)
    answers = [OutOfMemoryError("killed"), RayActorError("died"), (7, "here")]

    def get(*_, **__):
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    ray = SimpleNamespace(
        exceptions=SimpleNamespace(**{error.__name__: error for error in errors}),
        get=get,
        wait=lambda references, num_returns: (references, []),
    )
    actor = SimpleNamespace(place=SimpleNamespace(remote=lambda: None))
    workers = object.__new__(RayWorkers)
    workers._ray, workers._actor_class = ray, SimpleNamespace(remote=lambda: actor)
    workers._actors, workers.pids, workers._machines = [actor], [0], [""]
    workers._expect_ready(0)
    assert (workers.pids, answers) == ([7], [])
    answers += [OutOfMemoryError("killed")] * 3
    with pytest.raises(RuntimeError, match="worker 0 could not start: killed"):
        workers._expect_ready(0)
    answers += [RayActorError("error raised in its creation task"), None]
    with pytest.raises(RuntimeError, match="worker 0 could not start: error raised"):
        workers._expect_ready(0)
    answers[:] = [OutOfMemoryError("killed\nadvice")]
    workers._words, workers._listening = deque(), {"reference": 0}
    assert workers._receive() == (0, Word("lost", "process 7: killed"))
