"""Every registered search algorithm: the public checks, and any objective on a real
evaluator."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import families
import numpy as np
import pytest

import fastprune as fp
from fastprune import testing
from fastprune.search import ALGORITHMS

OPTIONS = {"bayesian": {"trials": 30}}  # a Gaussian process is fitted for each trial
BLIND = (
    "lorp",
    "shortgpt",
    "streamline",
    "taylor",
)  # score nothing but the subset that they choose
OVER_SEQUENCES = ("repeat",)
ALL_AT_ONCE = """
import json
from fastprune.search import ALGORITHMS
from fastprune.testing import outcome
print(json.dumps({name: outcome(name, **OPTIONS.get(name, {})) for name in ALGORITHMS}))
"""


def run(evaluator, name, k, **arguments) -> fp.SearchResult:
    k = None if name in OVER_SEQUENCES else k
    return fp.run_search(evaluator, name, k, **OPTIONS.get(name, {}), **arguments)


@pytest.fixture(params=sorted(ALGORITHMS))
def name(request) -> str:
    return request.param


@pytest.mark.parametrize("check", testing.CHECKS, ids=lambda check: check.__name__)
def test_checks(name, check, record_property):
    if check is testing.check_another_process and name != "beam":
        return  # one new process runs them all, below
    gap = check(name, **OPTIONS.get(name, {}))
    if check is testing.check_gap:
        record_property("gap", gap)
        assert gap == 0 or name not in ("exhaustive", "surrogate", "repeat")


def test_the_only_subset_of_finite_loss_is_found(name):
    evaluator = testing.SyntheticEvaluator(7, seed=6, broken=(0, 1, 2, 6))
    if name in OVER_SEQUENCES:
        assert set(run(evaluator, name, 3).sequence) == set(range(7))
        return
    try:
        assert run(evaluator, name, 3).removed == (3, 4, 5)
    except ArithmeticError:
        # sliding_window_merge ends where its threshold says, whatever else was scored
        assert name in (*BLIND, "sliding_window_merge")


def test_deterministic_across_processes():
    """One new process runs them all."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": "1"}
    command = [sys.executable, "-c", f"OPTIONS = {OPTIONS}\n{ALL_AT_ONCE}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    there = json.loads(done.stdout)
    assert there.keys() == ALGORITHMS.keys()
    for name, found in there.items():
        assert testing.outcome(name, **OPTIONS.get(name, {})) == found, name


def test_unknown_names_are_refused(name):
    with pytest.raises(fp.InputError, match=f"did you mean {name!r}"):
        fp.run_search(testing.SyntheticEvaluator(4), name + "x", 1)


def _questions(count: int) -> fp.Tasks:
    """Random questions of three choices."""
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(count):
        prompt = rng.integers(0, 97, 5)
        rows.append(
            [(np.concatenate([prompt, rng.integers(0, 97, length)]), 5) for length in (2, 3, 2)]
        )
    return fp.Tasks(
        batch=fp.TokenBatch.from_continuations(rows),
        question=np.repeat(np.arange(count), 3),
        answer=3 * np.arange(count) + 1,
        choice_characters=np.full(3 * count, 4),
        choice_bytes=np.full(3 * count, 4),
    )


@pytest.fixture(
    scope="module", params=["perplexity-block", "margin-sublayer", "accuracy-block", "kl-sublayer"]
)
def evaluator(request) -> fp.Evaluator:
    objective, granularity = request.param.split("-")
    text, tasks = fp.TokenBatch.from_ids(families.random_rows(97, [9] * 4)), _questions(6)
    made = {
        "perplexity": lambda: fp.Perplexity(text),
        "margin": lambda: fp.TaskMargin(tasks),
        "accuracy": lambda: fp.TaskAccuracy(tasks),
        "kl": lambda: fp.KLDivergence(text),
    }[objective]()
    return fp.Evaluator(families.build("llama"), made, granularity=granularity)


@pytest.mark.slow
def test_any_objective_and_granularity(name, evaluator):
    if name in ("cbo", "taylor") and evaluator.objective.name in ("accuracy", "kl"):
        with pytest.raises(fp.InputError, match="use"):
            run(evaluator, name, 2)
        return
    result = run(evaluator, name, 2, protect=(1,))
    assert result.loss == evaluator.score(sequences=[result.sequence])[0]
    if name in OVER_SEQUENCES:
        assert result.removed is None
    else:
        assert len(result.removed) == 2
    assert (result.objective, result.granularity) == (
        evaluator.objective.name,
        evaluator.granularity,
    )
