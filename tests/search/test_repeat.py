"""Repeated windows: the best of all of them, several at once, their counts, and their refusals."""

from __future__ import annotations

import itertools

import families
import numpy as np
import pytest

import fastprune as fp
from fastprune import demo
from fastprune.masks import repeated
from fastprune.testing import SyntheticEvaluator


def all_windows(num_units: int) -> list[tuple[int, int]]:
    return list(itertools.combinations(range(num_units + 1), 2))


def test_the_best_of_all_windows_wins():
    evaluator = SyntheticEvaluator(8, seed=2)
    result = fp.run_search(evaluator, "repeat")
    whole = list(range(8))
    sequences = [tuple(whole[:stop] + whole[first:]) for first, stop in all_windows(8)]
    losses = evaluator.score(sequences=sequences)
    assert (result.sequence, result.loss) == (sequences[losses.argmin()], losses.min())
    assert dict(result.history) == dict(zip(sequences, losses.tolist()))
    assert result.removed is None
    assert result.mask is None
    record = result.to_dict()
    assert record["sequence"] == list(result.sequence)
    assert "removed" not in record
    assert record["history"][0]["sequence"] == list(result.history[0][0])


def test_lengths_and_times():
    evaluator = SyntheticEvaluator(6, seed=3)
    result = fp.run_search(evaluator, "repeat", lengths="2,4-5", times=3)
    windows = [(first, stop) for first, stop in all_windows(6) if stop - first in (2, 4, 5)]
    assert {units for units, _ in result.history} == {
        repeated(6, [window], 3) for window in windows
    }
    assert repeated(6, [(1, 3)], 3) == (0, 1, 2, 1, 2, 1, 2, 3, 4, 5)


def test_two_windows_are_found_as_by_trying_all_pairs():
    """With a beam as wide as the field, the second round tries every pair."""
    evaluator = SyntheticEvaluator(5, seed=4)
    result = fp.run_search(evaluator, "repeat", num_windows=2, beam_width=100)
    apart = [pair for pair in itertools.combinations(all_windows(5), 2) if pair[0][1] <= pair[1][0]]
    singles = [repeated(5, [window]) for window in all_windows(5)]
    pairs = [repeated(5, pair) for pair in apart]
    assert {units for units, _ in result.history} == {*singles, *pairs}
    assert result.loss == evaluator.score(sequences=[*singles, *pairs]).min()


def test_one_window_more_is_never_worse():
    losses = [
        fp.run_search(SyntheticEvaluator(7, seed=5), "repeat", num_windows=count).loss
        for count in (1, 2, 3, 20)
    ]
    assert losses == sorted(losses, reverse=True)


def test_a_race_finds_the_same():
    evaluator = SyntheticEvaluator(9, seed=6, num_samples=64)
    result = fp.run_search(evaluator, "repeat", num_windows=2, racing=0.99)
    assert result.loss == evaluator.score(sequences=[result.sequence])[0]
    assert evaluator.races[0] == (45, 5)
    assert evaluator.races[1][1] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lengths": ""}, "option lengths of repeat must be all, or lengths from 1 to 5"),
        ({"lengths": "0-2"}, "from 1 to 5 such as 1-3, not '0-2'"),
        ({"lengths": "6"}, "from 1 to 5 such as 1-3, not '6'"),
        ({"lengths": "long"}, "from 1 to 5 such as 1-3, not 'long'"),
        ({"lengths": 3}, "option lengths of repeat takes str, not 3"),
        ({"times": 1}, "option times of repeat must be from 2 to 16, not 1"),
        ({"num_windows": 0}, "option num_windows of repeat must be at least 1"),
        ({"lengths": "3", "protect": (2,)}, "no such window is without a protected unit"),
        ({"protect": range(5)}, "repeat runs windows of units without a protected one; all are"),
        ({"num_remove": 0}, "num_remove has no meaning for repeat, which removes nothing"),
    ],
)
def test_refusals(options, message):
    evaluator = SyntheticEvaluator(5)
    with pytest.raises(fp.InputError, match=message):
        fp.run_search(evaluator, "repeat", **options)
    assert not evaluator.calls


def test_a_search_for_masks_needs_num_remove():
    with pytest.raises(fp.InputError, match="num_remove is missing: how many units greedy removes"):
        fp.run_search(SyntheticEvaluator(5), "greedy")


def test_all_windows_cost_the_nodes_of_their_trie_and_are_exact(tmp_path):
    """A window (i, j) leaves the whole model's path behind unit j, and runs units i to the end."""
    hf = families.build("llama")
    rows = families.random_rows(hf.config.vocab_size, [11, 9])
    batch = fp.TokenBatch.from_ids(rows)
    ev = fp.Evaluator(hf, fp.Perplexity(batch), store=tmp_path / "s.db")
    result = fp.run_search(ev, "repeat")
    units = ev.num_units
    nodes = units + sum((units - first) ** 2 for first in range(units))
    # the window that ends the model shares its first pass with the whole model
    assert result.cost.unit_runs == nodes
    naive = sum(units + stop - first for first, stop in all_windows(units))
    assert result.cost.naive_unit_runs == naive
    physical = families.physically_ordered(hf, result.sequence)
    np.testing.assert_allclose(result.loss, families.reference_loss(physical, rows), rtol=1e-5)
    again = fp.run_search(fp.Evaluator(hf, fp.Perplexity(batch), store=tmp_path / "s.db"), "repeat")
    assert again.history == result.history
    assert again.cost.unit_runs == 0


def test_counts_for_30_blocks():
    """All 465 windows of 30 blocks: half of the unit runs of one pass each."""
    from fastprune.plan.trie import make_trie

    trie = make_trie([repeated(30, [window]) for window in all_windows(30)])
    assert len(trie.sequences) == 465
    assert (trie.unit_runs, trie.naive_unit_runs) == (9485, 18910)


@pytest.mark.slow
def test_a_race_to_the_best_five_takes_a_third_of_one_pass_each():
    """A count of unit runs, not a time; the losses of the trained demo model decide it."""
    model = fp.load_model("demo")
    batch = fp.load_text(demo.TEXT, model.tokenizer, 64, 64, bos=False)
    ev = fp.Evaluator(model, fp.Perplexity(batch))
    sequences = [repeated(ev.num_units, [window]) for window in all_windows(ev.num_units)]
    race = ev.race(sequences=sequences, keep=5, confidence=0.99)
    assert 3 * race.cost.unit_runs < sum(map(len, sequences))
    best = [sequences[i] for i in race.indices]
    again = fp.Evaluator(model, fp.Perplexity(batch)).score(sequences=best)
    assert race.losses.tolist() == again.tolist()
