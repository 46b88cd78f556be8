"""Budgets on the pruned model in a study: numbers of units where they are that, else themselves."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from documents import text_study, write_document
from families import build

import fastprune as fp
from fastprune.study import read_document, run_study, write_report


def text(model):
    ids = np.random.default_rng(1).integers(0, 97, (3, 9))
    return fp.Perplexity(fp.TokenBatch.from_ids(ids))


@pytest.fixture
def model():
    return fp.Model(build("llama"), name="tiny")


def test_a_budget_of_equal_units_is_a_number_of_units(model, tmp_path):
    study = run_study([model], {"one": text}, ["one_shot"], [1, "params=60%"], tmp_path / "s")
    assert study["inputs"]["budgets"] == [1, "params=60%"]
    evaluator = fp.Evaluator(model, text(model))
    result = fp.run_search(evaluator, "one_shot", budget=fp.Budget(params="60%"))
    _, cell = study["cells"]
    assert tuple(cell["removed"]) == result.removed
    assert (cell["num_remove"], cell["loss"]) == (len(result.removed), result.loss)
    assert study["sizes"]["tiny"] == [
        {"size": 1, "asked": 1},
        {"size": cell["num_remove"], "asked": "params=60%"},
    ]
    again = run_study([model], {"one": text}, ["one_shot"], [1, "params=60%"], tmp_path / "s")
    assert again["cells"] == study["cells"]


@pytest.mark.parametrize("budget", ["params=70%", "kv_bytes=60%"])
def test_a_budget_of_unlike_units_is_a_size_of_its_own(budget, model, tmp_path):
    """Attentions and MLPs save unlike amounts, and an MLP no key-value cache."""
    arguments = [model], {"one": text}, ["greedy", "random"], [2, budget], tmp_path / "s"
    study = run_study(*arguments, granularity="sublayer")
    asked = fp.Budget.parse(budget)
    cells = [cell for cell in study["cells"] if cell["num_remove"] == budget]
    assert len(cells) == 2
    for cell in cells:
        evaluator = fp.Evaluator(model, text(model), granularity="sublayer")
        result = fp.run_search(evaluator, cell["algorithm"], budget=asked)
        assert (tuple(cell["removed"]), cell["loss"]) == (result.removed, result.loss)
        assert cell["costs"] == result.costs
        costs = evaluator.unit_costs(asked.kind)
        assert cell["costs"]["after"] == costs.after(result.removed) <= asked.limit(costs.total)
    for entry in study["judgements"]["tiny"]["one"]:
        of = 0 if not entry["removed"] else (2 if entry["size"] == 2 else budget)
        assert entry["size"] == of
    again = run_study(*arguments, granularity="sublayer")
    assert again["cells"] == study["cells"]
    write_report(study, tmp_path / "report.html")
    share = 100 * (1 - cells[0]["costs"]["after"] / cells[0]["costs"]["before"])
    page = (tmp_path / "report.html").read_text()
    assert f"{share:.0f} % fewer" in page
    assert f"within {budget}" in page


def test_measured_times_keep_their_budget(model, tmp_path, monkeypatch):
    """Another run measures other times, so that their number of units would be no key. Here the
    clock ticks when it is read: a unit takes as long as the whole pass."""
    monkeypatch.setattr("time.perf_counter", itertools.count(0.0, 2.0**-9).__next__)
    budget = fp.Budget(latency_ms="90%", batch_size=2, seq_len=16)
    arguments = [model], {"one": text}, ["greedy", "shapley"], [budget], tmp_path / "s"
    study = run_study(*arguments)
    assert study["inputs"]["budgets"] == ["latency_ms=90%,batch_size=2,seq_len=16"]
    assert fp.Budget.parse(study["inputs"]["budgets"][0]) == budget
    for cell in study["cells"]:
        assert cell["num_remove"] == str(budget)
        assert cell["costs"]["kind"] == "latency_ms"
        assert cell["costs"]["after"] <= 0.9 * cell["costs"]["before"]
    assert run_study(*arguments)["cells"] == study["cells"]


@pytest.mark.parametrize(
    ("algorithm", "budget", "more", "message"),
    [
        ("shapley", "params=60%", {}, "shapley removes a number of units and cannot keep a budget"),
        ("beam", "params=60%", {"racing": 0.9}, "beam cannot race under a budget of units "),
        ("greedy", "params=1", {}, "params=1 cannot be met"),
        ("greedy", "latency_ms=5,rows=4", {}, "takes batch_size=ROWS and seq_len=TOKENS behind"),
    ],
)
def test_budgets_that_an_algorithm_cannot_keep(algorithm, budget, more, message, model, tmp_path):
    arguments = [model], {"one": text}, [algorithm], [budget], tmp_path / "s"
    with pytest.raises(fp.InputError, match=message):
        run_study(*arguments, granularity="sublayer", **more)
    assert not (tmp_path / "s").exists()


def test_budgets_in_a_document(text_file, tmp_path):
    tables = text_study("demo", text_file, search_num_remove=[], search_budget=["params=75%"])
    config = read_document(write_document(tmp_path / "s.toml", **tables)).config
    assert config.search.budget == ("params=75%",)
    spaced = text_study("demo", text_file, search_num_remove=[], search_budget=["params = 75 %"])
    settings = read_document(write_document(tmp_path / "t.toml", **spaced)).config.settings
    assert settings["budgets"] == ["params=75%"]  # as the study's folder names it
    for budget, message in (
        ("75%", "search.budget: budget takes KIND=AMOUNT"),
        ("params=101%", "search.budget: params must be a number of at least 0 or a share"),
    ):
        tables = text_study("demo", text_file, search_budget=[budget])
        with pytest.raises(fp.InputError, match=message):
            read_document(write_document(tmp_path / "t.toml", **tables))


def test_the_table_of_a_document_that_has_the_wrong_size_is_named(text_file, tmp_path):
    for algorithm, numbers, budgets, message in (
        ("greedy", [1, 1], [], "search.num_remove: 1 is given twice"),
        ("greedy", [1], ["params=75%"] * 2, "search.budget: 'params=75%' is given twice"),
        ("repeat", [1], [], "search.num_remove: num_remove has no meaning"),
        ("repeat", [], ["params=75%"], "search.budget: budget has no meaning"),
        ("greedy", [], [], "search.num_remove: greedy removes units"),
    ):
        tables = text_study("demo", text_file, search_num_remove=numbers, search_budget=budgets)
        tables["search"]["algorithms"] = [algorithm]
        with pytest.raises(fp.InputError) as error:
            read_document(write_document(tmp_path / "s.toml", **tables))
        assert message in str(error.value)


def test_the_terminal_shows_the_budget_and_the_share(run, checkpoint, text_file, tmp_path):
    tables = text_study(checkpoint, text_file, search_num_remove=[], search_budget=["params=80%"])
    tables["search"] |= {"granularity": "sublayer", "algorithms": ["greedy"]}
    document = write_document(tmp_path / "s.toml", **tables)
    status, out, err = run("study", document, "--out", tmp_path / "s")
    assert status == 0, err
    (cell,) = json.loads((tmp_path / "s" / "study.json").read_text())["cells"]
    assert "within params=80%" in out
    share = 100 * (1 - cell["costs"]["after"] / cell["costs"]["before"])
    assert f"{share:.0f} % fewer parameters" in out
