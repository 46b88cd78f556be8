"""The registry's description of every algorithm, and the checks of options."""

from __future__ import annotations

import json
import sys
import typing
from pathlib import Path

import pytest

import fastprune as fp
from fastprune.search import ALGORITHMS, check_algorithm, describe_algorithms
from fastprune.search.run import AlgorithmName
from fastprune.testing import SyntheticEvaluator


def test_every_algorithm_describes_itself():
    rows = describe_algorithms()
    assert [row["name"] for row in rows] == list(ALGORITHMS)
    assert json.loads(json.dumps(rows)) == rows
    for row in rows:
        assert row["summary"].endswith(".")
        assert row["source"]
        assert row["cost"]
        assert not row["cost"].endswith(".")
        for option in row["options"]:
            assert option["meaning"], f"{row['name']}: {option['name']} has no line under Options:"
            assert type(option["default"]).__name__ == option["type"]


def test_descriptions_are_read_from_docstrings():
    (row,) = (row for row in describe_algorithms() if row["name"] == "beam")
    assert row["source"] == "Kim et al. (arXiv 2604.24938)"
    (option,) = row["options"]
    assert option == {
        "name": "beam_width",
        "type": "int",
        "allowed": "at least 1",
        "default": 5,
        "meaning": "subsets kept after each round",
    }
    assert not row["method"].startswith(row["summary"])


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("genetic", "population", 0),
        ("genetic", "elitism", 1.5),
        ("genetic", "mutation", float("nan")),
        ("bayesian", "trials", 0),
        ("cbo", "num_states", 0),
        ("evopress", "offspring", 0),
        ("evopress", "generations", -1),
        ("beam", "beam_width", 0),
        ("exhaustive", "max_masks", 0),
        ("fast_block_select", "pool", 0),
        ("lorp", "clusters", -1),
        ("shortgpt", "variant", "code"),
        ("streamline", "variant", ""),
        ("streamline", "variant", "angular"),
        ("random", "num_masks", 0),
        ("shapley", "networks", 0),
        ("shapley", "share", 1.5),
        ("surrogate", "initial", 1),
        ("surrogate", "patience", 0),
    ],
)
def test_options_out_of_range_are_refused_before_anything_is_scored(name, option, value):
    evaluator = SyntheticEvaluator(5)
    with pytest.raises(fp.InputError, match=f"option {option} of {name} must be"):
        fp.run_search(evaluator, name, 2, **{option: value})
    assert not evaluator.calls
    with pytest.raises(fp.InputError, match=f"option {option} of {name} must be"):
        check_algorithm(name, {option: str(value)})  # as from a command line, without a model


@pytest.mark.parametrize("name", ["cbo", "surrogate"])
def test_more_units_than_can_be_solved_for_are_refused_before_anything_is_scored(name):
    evaluator = SyntheticEvaluator(130)
    with pytest.raises(fp.InputError, match=r"at most 128 units.*130 may be removed: protect 2"):
        fp.run_search(evaluator, name, 2)
    assert not evaluator.calls
    assert fp.run_search(SyntheticEvaluator(130), "cbo", 2, protect=(0, 129)).removed


def test_a_field_too_large_to_enumerate_is_refused_before_anything_is_scored():
    evaluator = SyntheticEvaluator(9)
    with pytest.raises(
        fp.InputError, match=r"C\(9, 4\) = 126 subsets, above its option max_masks=125"
    ):
        fp.run_search(evaluator, "exhaustive", 4, max_masks=125)
    assert not evaluator.calls


def test_algorithms_that_need_gradients_say_so():
    assert [name for name, known in ALGORITHMS.items() if known.needs_gradients] == [
        "taylor",
        "cbo",
    ]


@pytest.mark.parametrize("name", [name for name in ALGORITHMS if name != "repeat"])
def test_stepwise_algorithms_are_those_whose_result_has_a_path(name):
    path = fp.run_search(SyntheticEvaluator(6), name, 2).path
    assert bool(path) == ALGORITHMS[name].stepwise


def test_protected_units_are_named_in_errors():
    wrong = {3: "protected units are given as a collection", (9,): "protected unit 9 is out of"}
    for protect, message in {
        **wrong,
        "0,1": r"protect must be indices such as \(0, 1\), or one of .* not '0,1'",
    }.items():
        with pytest.raises(fp.InputError, match=message):
            fp.run_search(SyntheticEvaluator(5), "greedy", 1, protect=protect)


def test_what_is_no_evaluator_and_no_seed():
    with pytest.raises(fp.InputError, match="a search takes an Evaluator, not str"):
        fp.run_search("demo", "greedy", 1)
    for seed in (-1, 1.5, True, None):
        with pytest.raises(fp.InputError, match="seed must be an integer of at least 0"):
            fp.run_search(SyntheticEvaluator(5), "greedy", 1, seed=seed)


@pytest.mark.parametrize("name", ["bayesian", "lorp", "surrogate"])
def test_a_missing_library_is_named_before_anything_is_scored(name, monkeypatch):
    for module in [
        m for m in sys.modules if m.startswith(("sklearn.", "fastprune.search.gaussian"))
    ]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    evaluator = SyntheticEvaluator(8)
    with pytest.raises(fp.InputError, match=r"pip install 'fastprune\[search\]'"):
        fp.run_search(evaluator, name, 2)
    assert not evaluator.calls
    with pytest.raises(fp.InputError, match=r"pip install 'fastprune\[search\]'"):
        check_algorithm(name, {})


def test_the_documentation_lists_every_algorithm_and_option_with_its_default():
    page = Path(__file__, "../../../docs/algorithms.md").resolve().read_text(encoding="utf-8")
    lines = {line.split("`")[1]: line for line in page.splitlines() if line.startswith("| `")}
    assert sorted(lines) == sorted(ALGORITHMS)
    for row in describe_algorithms():
        for option in row["options"]:
            default = str(option["default"]).lower()
            assert f"`{option['name']}={default}`" in lines[row["name"]]


def test_editors_complete_the_names_of_all_algorithms():
    assert typing.get_args(AlgorithmName) == tuple(ALGORITHMS)
