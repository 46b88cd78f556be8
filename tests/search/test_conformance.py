"""What every registered search algorithm must do."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys

import families
import numpy as np
import pytest
from outcomes import outcomes
from synthetic import SyntheticEvaluator

import fastprune as fp
from fastprune.search import ALGORITHMS

FAST = {"bayesian": {"trials": 30}}  # a Gaussian process is fitted for each trial
BLIND = ("lorp", "shortgpt", "streamline")  # score nothing but the subset that they choose


def run(evaluator, name, k, **arguments) -> fp.SearchResult:
    return fp.run_search(evaluator, name, k, **FAST.get(name, {}), **arguments)


@pytest.fixture(params=sorted(ALGORITHMS))
def name(request) -> str:
    return request.param


@pytest.mark.parametrize("num_units", [2, 3, 7])
def test_removes_the_right_number_for_every_budget(name, num_units):
    for k in range(num_units):
        result = run(SyntheticEvaluator(num_units), name, k, seed=1)
        assert len(result.removed) == k
        assert result.removed == fp.to_removed(result.mask)
        assert result.removed == tuple(sorted(set(result.removed)))


def test_result_is_the_best_it_scored(name):
    evaluator = SyntheticEvaluator(9, seed=3)
    result = run(evaluator, name, 4)
    complete = {removed: loss for removed, loss in result.history if len(removed) == 4}
    assert result.loss == min(complete.values()) == complete[result.removed]
    assert result.loss == evaluator.score(result.mask[None])[0]


def test_history_holds_every_mask_once(name):
    evaluator = SyntheticEvaluator(9, seed=4)
    result = run(evaluator, name, 3)
    assert len(result.history) == len(dict(result.history)) == result.evaluations == sum(evaluator.calls)
    for removed, loss in result.history:
        assert loss == evaluator.score(fp.from_removed([removed], 9))[0]


@pytest.mark.parametrize("protect", [(0, 2, 5), (1, 3, 8), (0, 8)])
def test_protected_units_stay(name, protect):
    for k in range(10 - len(protect)):
        result = run(SyntheticEvaluator(9, seed=5), name, k, protect=protect)
        assert len(result.removed) == k
        assert not any(set(removed) & set(protect) for removed, _ in result.history)
    with pytest.raises(fp.InputError, match="units are not protected"):
        run(SyntheticEvaluator(9), name, 10 - len(protect), protect=protect)


def test_losses_that_are_not_finite_never_win(name):
    try:
        result = run(SyntheticEvaluator(8, seed=6, broken=(1, 4)), name, 3)
        assert math.isfinite(result.loss)
        assert not set(result.removed) & {1, 4}
    except ArithmeticError:
        assert name in BLIND
    with pytest.raises(ArithmeticError, match="finite"):
        run(SyntheticEvaluator(4, broken=(0, 1, 2, 3)), name, 2)


def test_one_finite_subset_among_many_does_not_break_the_arithmetic(name):
    try:
        assert run(SyntheticEvaluator(7, seed=6, broken=(0, 1, 2, 6)), name, 3).removed == (3, 4, 5)
    except ArithmeticError:
        assert name in BLIND


def test_equal_losses_do_not_break_the_arithmetic(name):
    evaluator = SyntheticEvaluator(7)
    evaluator._linear[:] = evaluator._pairs[:] = 0.0
    evaluator._linear[:] = 1.0
    assert len(run(evaluator, name, 3).removed) == 3


def test_gap_to_the_optimum_is_known(name, record_property):
    evaluator = SyntheticEvaluator(10, seed=7)
    every = list(itertools.combinations(range(10), 4))
    optimum = evaluator.score(fp.from_removed(every, 10)).min()
    gap = run(evaluator, name, 4).loss - optimum
    assert gap >= 0
    record_property("gap", gap)
    if name in ("exhaustive", "surrogate"):
        assert gap == 0


@pytest.fixture(scope="module")
def found() -> list[dict]:
    """What every search finds in this process and in a new one."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": "1"}
    command = [sys.executable, outcomes.__code__.co_filename]
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    return [outcomes(), json.loads(output)]


def test_deterministic_across_processes(name, found):
    here, there = found
    assert here[name] == there[name]
    assert len(here[name][0]) == 4


def test_unknown_options_and_names_are_refused(name):
    with pytest.raises(fp.InputError, match=f"{name} has no option 'nonsense'"):
        fp.run_search(SyntheticEvaluator(4), name, 1, nonsense=1)
    with pytest.raises(fp.InputError, match=f"did you mean {name!r}"):
        fp.run_search(SyntheticEvaluator(4), name + "x", 1)
    for k in (-1, 4, 1.0, True):
        with pytest.raises(fp.InputError, match="num_remove"):
            fp.run_search(SyntheticEvaluator(4), name, k)


def _questions(count: int) -> fp.Tasks:
    """Random questions of three choices."""
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(count):
        prompt = rng.integers(0, 97, 5)
        rows.append([(np.concatenate([prompt, rng.integers(0, 97, length)]), 5) for length in (2, 3, 2)])
    return fp.Tasks(
        batch=fp.TokenBatch.from_continuations(rows),
        question=np.repeat(np.arange(count), 3),
        answer=3 * np.arange(count) + 1,
        choice_characters=np.full(3 * count, 4),
        choice_bytes=np.full(3 * count, 4),
    )


@pytest.fixture(scope="module", params=["perplexity-block", "margin-sublayer", "accuracy-block", "kl-sublayer"])
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


def test_any_objective_and_granularity(name, evaluator):
    if name == "cbo" and evaluator.objective.name in ("accuracy", "kl"):
        with pytest.raises(fp.InputError, match="use"):
            run(evaluator, name, 2)
        return
    result = run(evaluator, name, 2, protect=(1,))
    assert len(result.removed) == 2
    assert result.loss == evaluator.score(result.mask[None])[0]
    assert (result.objective, result.granularity) == (evaluator.objective.name, evaluator.granularity)
