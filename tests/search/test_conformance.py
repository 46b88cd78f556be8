"""What every registered search algorithm must do."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys

import pytest
from synthetic import SyntheticEvaluator

import fastprune as fp
from fastprune.search import ALGORITHMS


@pytest.fixture(params=sorted(ALGORITHMS))
def name(request) -> str:
    return request.param


@pytest.mark.parametrize("num_units", [2, 3, 7])
def test_removes_the_right_number_for_every_budget(name, num_units):
    for k in range(num_units):
        result = fp.run_search(SyntheticEvaluator(num_units), name, k, seed=1)
        assert len(result.removed) == k
        assert result.removed == fp.to_removed(result.mask)
        assert result.removed == tuple(sorted(set(result.removed)))


def test_result_is_the_best_it_scored(name):
    evaluator = SyntheticEvaluator(9, seed=3)
    result = fp.run_search(evaluator, name, 4)
    complete = {removed: loss for removed, loss in result.history if len(removed) == 4}
    assert result.loss == min(complete.values()) == complete[result.removed]
    assert result.loss == evaluator.score(result.mask[None])[0]


def test_history_holds_every_mask_once(name):
    evaluator = SyntheticEvaluator(9, seed=4)
    result = fp.run_search(evaluator, name, 3)
    assert len(result.history) == len(dict(result.history)) == result.evaluations == sum(evaluator.calls)
    for removed, loss in result.history:
        assert loss == evaluator.score(fp.from_removed([removed], 9))[0]


def test_protected_units_stay(name):
    protect = (0, 2, 5)
    result = fp.run_search(SyntheticEvaluator(9, seed=5), name, 4, protect=protect)
    assert len(result.removed) == 4
    assert not set(result.removed) & set(protect)
    with pytest.raises(fp.InputError, match="6 units are not protected"):
        fp.run_search(SyntheticEvaluator(9), name, 7, protect=protect)


def test_losses_that_are_not_finite_never_win(name):
    result = fp.run_search(SyntheticEvaluator(8, seed=6, broken=(1, 4)), name, 3)
    assert math.isfinite(result.loss)
    assert not set(result.removed) & {1, 4}
    with pytest.raises(ArithmeticError, match="finite"):
        fp.run_search(SyntheticEvaluator(4, broken=(0, 1, 2, 3)), name, 2)


def test_gap_to_the_optimum_is_known(name, record_property):
    evaluator = SyntheticEvaluator(10, seed=7)
    every = list(itertools.combinations(range(10), 4))
    optimum = evaluator.score(fp.from_removed(every, 10)).min()
    gap = fp.run_search(evaluator, name, 4).loss - optimum
    assert gap >= 0
    record_property("gap", gap)


def test_deterministic_across_processes(name):
    program = (
        "import json, fastprune as fp\n"
        "from synthetic import SyntheticEvaluator\n"
        f"r = fp.run_search(SyntheticEvaluator(9, seed=8), {name!r}, 4, seed=11)\n"
        "print(json.dumps([r.removed, r.loss.hex(), [[s, l.hex()] for s, l in r.history]]))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", program]
    outputs = {
        subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout for _ in range(2)
    }
    assert len(outputs) == 1
    assert len(json.loads(outputs.pop())[0]) == 4


def test_unknown_options_and_names_are_refused(name):
    with pytest.raises(fp.InputError, match=f"{name} has no option 'nonsense'"):
        fp.run_search(SyntheticEvaluator(4), name, 1, nonsense=1)
    with pytest.raises(fp.InputError, match=f"did you mean {name!r}"):
        fp.run_search(SyntheticEvaluator(4), name + "x", 1)
    for k in (-1, 4, 1.0, True):
        with pytest.raises(fp.InputError, match="num_remove"):
            fp.run_search(SyntheticEvaluator(4), name, k)
