"""one_shot, greedy and beam against plain computations of what they are defined to do."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import fastprune as fp
from fastprune.testing import SyntheticEvaluator


def loss_of(evaluator, removed) -> float:
    return float(evaluator.score(fp.from_removed([removed], evaluator.num_units))[0])


@pytest.mark.parametrize("seed", range(4))
def test_one_shot_removes_the_lowest_singles(seed):
    evaluator = SyntheticEvaluator(8, seed)
    singles = [loss_of(evaluator, (unit,)) for unit in range(8)]
    expected = tuple(sorted(np.argsort(singles, kind="stable")[:3].tolist()))
    assert fp.run_search(evaluator, "one_shot", 3).removed == expected


@pytest.mark.parametrize("seed", range(4))
def test_greedy_takes_the_best_next_unit_and_equals_beam_of_width_1(seed):
    evaluator = SyntheticEvaluator(8, seed)
    removed: tuple[int, ...] = ()
    for _ in range(4):
        choices = [tuple(sorted((*removed, unit))) for unit in range(8) if unit not in removed]
        removed = min(choices, key=lambda choice: (loss_of(evaluator, choice), choice))
    greedy = fp.run_search(evaluator, "greedy", 4)
    beam = fp.run_search(evaluator, "beam", 4, beam_width=1)
    assert greedy.removed == beam.removed == removed
    assert greedy.history == beam.history
    assert greedy.evaluations == 8 + 7 + 6 + 5


def test_beam_wide_enough_is_exhaustive():
    evaluator = SyntheticEvaluator(8, seed=5)
    best = min(
        itertools.combinations(range(8), 3), key=lambda subset: (loss_of(evaluator, subset), subset)
    )
    assert fp.run_search(evaluator, "beam", 3, beam_width=56).removed == best


def test_beam_keeps_the_lowest_and_merges_equal_subsets():
    evaluator = SyntheticEvaluator(7, seed=6)
    result = fp.run_search(evaluator, "beam", 3, beam_width=3)
    kept = [()]
    for _ in range(3):
        extended = {tuple(sorted({*s, u})) for s in kept for u in range(7) if u not in s}
        kept = sorted(extended, key=lambda subset: (loss_of(evaluator, subset), subset))[:3]
    assert result.removed == kept[0]


def test_ties_go_to_the_lowest_index():
    evaluator = SyntheticEvaluator(6)
    evaluator.linear[:], evaluator.pairs[:] = 1.0, 0.0
    for name in ("one_shot", "greedy", "beam"):
        assert fp.run_search(evaluator, name, 2).removed == (0, 1)


def test_each_round_is_one_call():
    evaluator = SyntheticEvaluator(9)
    fp.run_search(evaluator, "beam", 4)
    assert len(evaluator.calls) == 4


def test_options_are_typed():
    evaluator = SyntheticEvaluator(5)
    assert fp.run_search(evaluator, "beam", 2, beam_width="3").options == {"beam_width": 3}
    for wrong in ("three", "2.5", 2.5, True, None):
        with pytest.raises(fp.InputError, match="beam_width of beam takes int"):
            fp.run_search(evaluator, "beam", 2, beam_width=wrong)
    with pytest.raises(fp.InputError, match="at least 1"):
        fp.run_search(evaluator, "beam", 2, beam_width=0)


@pytest.mark.parametrize(("preset", "first", "last"), [("sleb", 1, 1), ("shortened-llama", 4, 2)])
def test_presets_protect_the_blocks_that_a_method_never_removes(preset, first, last):
    for granularity, halves in (("block", 1), ("sublayer", 2)):
        evaluator = SyntheticEvaluator(10 * halves, seed=3)
        evaluator.granularity = granularity
        middle = range(first * halves, (10 - last) * halves)
        result = fp.run_search(evaluator, "one_shot", 3, protect=preset)
        assert {unit for removed, _ in result.history for unit in removed} == {*middle}
        others = [unit for unit in range(evaluator.num_units) if unit not in middle]
        assert result.history == fp.run_search(evaluator, "one_shot", 3, protect=others).history


def test_presets_that_are_unknown_or_leave_too_little_are_refused():
    with pytest.raises(
        fp.InputError, match="one of sleb, shortened-llama, not 'slep'; did you mean 'sleb'"
    ):
        fp.run_search(SyntheticEvaluator(5), "one_shot", 1, protect="slep")
    with pytest.raises(fp.InputError, match="num_remove is 1, but only 0 units are not protected"):
        fp.run_search(SyntheticEvaluator(5), "one_shot", 1, protect="shortened-llama")
