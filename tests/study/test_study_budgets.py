"""Budgets on the pruned model in a study: the number of units that they are."""

from __future__ import annotations

import numpy as np
import pytest
from documents import text_study, write_document
from families import build

import fastprune as fp
from fastprune.study import read_document, run_study


def text(model):
    ids = np.random.default_rng(1).integers(0, 97, (3, 9))
    return fp.Perplexity(fp.TokenBatch.from_ids(ids))


def test_a_budget_of_equal_units_is_a_number_of_units(tmp_path):
    model = fp.Model(build("llama"), name="tiny")
    study = run_study([model], {"one": text}, ["one_shot"], [1, "params=60%"], tmp_path / "s")
    assert study["inputs"]["budgets"] == [1, "params=60%"]
    evaluator = fp.Evaluator(model, text(model))
    result = fp.run_search(evaluator, "one_shot", budget=fp.Budget(params="60%"))
    _, cell = study["cells"]
    assert tuple(cell["removed"]) == result.removed
    assert (cell["num_remove"], cell["loss"]) == (len(result.removed), result.loss)
    again = run_study([model], {"one": text}, ["one_shot"], [1, "params=60%"], tmp_path / "s")
    assert again["cells"] == study["cells"]


@pytest.mark.parametrize(
    ("budget", "granularity", "message"),
    [
        ("params=60%", "sublayer", "a study takes budgets of units that all save the same"),
        ("kv_bytes=60%", "sublayer", "a study takes budgets of units that all save the same"),
        ("latency_ms=1", "block", "not of times"),
        ("params=1", "block", "params=1 cannot be met"),
    ],
)
def test_budgets_that_are_no_number_of_units(budget, granularity, message, tmp_path):
    model = fp.Model(build("llama"), name="tiny")
    arguments = [model], {"one": text}, ["one_shot"], [budget], tmp_path / "s"
    with pytest.raises(fp.InputError, match=message):
        run_study(*arguments, granularity=granularity)
    assert not (tmp_path / "s").exists()


def test_budgets_in_a_document(text_file, tmp_path):
    tables = text_study("demo", text_file, search_num_remove=[], search_budget=["params=75%"])
    config = read_document(write_document(tmp_path / "s.toml", **tables)).config
    assert config.search.budget == ("params=75%",)
    for budget, message in (
        ("75%", "search.budget: budget takes KIND=AMOUNT"),
        ("params=101%", "search.budget: params must be a number of at least 0 or a share"),
    ):
        tables = text_study("demo", text_file, search_budget=[budget])
        with pytest.raises(fp.InputError, match=message):
            read_document(write_document(tmp_path / "t.toml", **tables))
