"""Controls of a study: masks and sequences that no search chose, judged beside those that were."""

from __future__ import annotations

import json

import numpy as np
import pytest
from documents import text_study, write_document
from families import build, num_blocks

import fastprune as fp
from fastprune.masks import Candidate
from fastprune.search.sizes import UnitCount
from fastprune.study import Control, read_document, run_study, write_report
from fastprune.study.controls import place_controls
from fastprune.study.tables import comparison_lines

CONTROLS = [
    Control(name="outer", removed=(0, 3)),
    Control(name="twice", sequence="0-2,1-4"),
    Control(name="any", random=3),
    Control(name="worst", worst_of="one_shot"),
    Control(name="backwards", backwards=True),
]


def text(seed: int):
    ids = np.random.default_rng(seed).integers(0, 97, (3, 11))
    return lambda model: fp.Perplexity(fp.TokenBatch.from_ids(ids))


OBJECTIVES = {"one": text(1), "other": text(2)}


@pytest.fixture(scope="module")
def model():
    return fp.Model(build("llama"), name="tiny")


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("studies") / "s"
    arguments = [model], OBJECTIVES, ["one_shot", "greedy"], [1, 2], out
    first = run_study(*arguments)
    said: list[str] = []
    held_out = {"new": text(3)}
    return (
        first,
        said,
        run_study(*arguments, controls=CONTROLS, held_out=held_out, notify=said.append),
    )


def test_controls_are_added_to_a_finished_study(finished):
    first, said, study = finished
    assert said[-2:] == [  # no search ran
        "8 of 8 cells were finished before",
        "scoring every chosen mask under every objective",
    ]
    strip = ("losses", "metrics")
    plain = [{k: v for k, v in cell.items() if k not in strip} for cell in study["cells"]]
    assert plain == [{k: v for k, v in cell.items() if k not in strip} for cell in first["cells"]]
    assert first["controls"] == []
    assert study["inputs"] == first["inputs"]


def test_each_control_is_what_it_says(finished, model):
    _, _, study = finished
    by_name: dict[str, list[dict]] = {}
    for control in study["controls"]:
        by_name.setdefault(control["name"], []).append(control)
    units = num_blocks(model.given)
    (outer,), (twice,), (backwards,) = by_name["outer"], by_name["twice"], by_name["backwards"]
    assert (outer["removed"], outer["num_remove"]) == ([0, 3], 2)
    assert (twice["sequence"], twice["num_remove"]) == ([0, 1, 2, 1, 2, 3, 4], None)
    assert backwards["sequence"] == list(reversed(range(units)))
    drawn = [(entry["num_remove"], tuple(entry["removed"])) for entry in by_name["any"]]
    assert len(set(drawn)) == len(drawn) == 6
    assert all(len(removed) == size for size, removed in drawn)
    assert len(by_name["worst"]) == len(OBJECTIVES) * 2
    for entry in by_name["worst"]:
        evaluator = fp.Evaluator(model, OBJECTIVES[entry["under"]](model))
        singles = evaluator.score(fp.from_removed([(unit,) for unit in range(units)], units))
        worst = singles.argsort()[::-1][: entry["num_remove"]]
        assert entry["removed"] == sorted(worst.tolist())


def test_a_unit_that_the_model_cannot_do_without_is_the_worst():
    singles = {0: 1.0, 1: np.nan, 2: 3.0, 3: np.inf}
    for size, expected in ((2, (1, 3)), (3, (1, 2, 3))):
        placed = place_controls(
            [Control(name="worst", worst_of="one_shot")],
            num_units=4,
            sizes={size: (UnitCount(size), [*singles])},
            labels=["one"],
            singles=lambda label: singles,
            seed=0,
        )
        assert [of.candidate.removed for of in placed] == [expected]


def test_controls_are_judged_under_every_objective(finished, model):
    _, _, study = finished
    for label, make in {**OBJECTIVES, "new": text(3)}.items():
        evaluator = fp.Evaluator(model, make(model))
        for control in study["controls"]:
            sequence = control.get("sequence") or [
                unit for unit in range(evaluator.num_units) if unit not in control["removed"]
            ]
            assert control["losses"][label] == evaluator.score(sequences=[sequence])[0]
            assert control["metrics"][label]["perplexity"] == pytest.approx(
                np.exp(control["losses"][label])
            )
        entries = study["judgements"]["tiny"][label]
        for judged in (*study["cells"], *study["controls"]):
            entry = entries[judged["judged"]]
            assert Candidate.of(entry) == Candidate.of(judged)
            assert entry["size"] == judged["num_remove"]
            assert entry["loss"] == judged["losses"][label]
        for entry in entries:  # the reference is one that a search chose
            if entry["size"] in (1, 2) and not entry["is_control"]:
                assert entry["to_best"]["value"] >= 0
        chosen = {tuple(cell["removed"]) for cell in study["cells"]}
        assert chosen == {
            tuple(e["removed"]) for e in entries if not e["is_control"] and e["removed"]
        }


def test_controls_are_shown_as_such(finished, tmp_path):
    _, _, study = finished
    lines = comparison_lines(study)
    assert any("(control)" in line for line in lines)
    entries = study["judgements"]["tiny"]["new"]
    for line, size in zip(lines, (1, 2, None), strict=True):
        others = sum(entry["size"] == size for entry in entries) - 1
        assert line.count(" ± ") == 1 + min(others, 3)
        assert line.endswith(f"; and {others - 3} more") == (others > 3)
    write_report(study, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "<h2>Controls</h2>" in page
    for name in ("outer", "twice", "any", "worst, one", "backwards"):
        assert f">{name}</td>" in page


def test_other_controls_do_not_change_what_one_draws(finished, model, tmp_path):
    _, _, study = finished
    arguments = [model], {"one": text(1)}, ["one_shot"], [2], tmp_path / "s"
    alone = run_study(*arguments, controls=[CONTROLS[2]])["controls"]
    before = [c["removed"] for c in study["controls"] if (c["name"], c["num_remove"]) == ("any", 2)]
    assert [control["removed"] for control in alone] == before
    other = run_study(*arguments[:-1], tmp_path / "t", controls=[CONTROLS[2]], seed=1)["controls"]
    assert [control["removed"] for control in other] != before


def test_controls_stay_within_a_budget(model, tmp_path):
    budget = fp.Budget(params="70%")
    arguments = [model], {"one": text(1)}, ["greedy"], [budget], tmp_path / "s"
    controls = [Control(name="any", random=2), Control(name="worst", worst_of="one_shot")]
    study = run_study(*arguments, controls=controls, granularity="sublayer", protect=[0, 1])
    evaluator = fp.Evaluator(model, text(1)(model), granularity="sublayer")
    costs = evaluator.unit_costs("params")
    assert len(study["controls"]) == 3
    for control in study["controls"]:
        removed = control["removed"]
        assert not {0, 1} & set(removed)
        assert costs.after(removed) <= budget.limit(costs.total)
        assert all(
            costs.after([u for u in removed if u != unit]) > budget.limit(costs.total)
            for unit in removed
        )


@pytest.mark.parametrize(
    ("control", "message"),
    [
        (
            {},
            "control.c: a control has one of removed, sequence, random, worst_of, backwards, not",
        ),
        ({"random": 2, "removed": [1]}, "not removed and random"),
        ({"random": 0}, "control.c.random must be an integer from 1 to 1000, not 0"),
        ({"worst_of": "beam"}, "control.c.worst_of: unknown value 'beam'; known: one_shot"),
        ({"backwards": 1}, "control.c.backwards must be true or false, not 1"),
        ({"backwards": False}, "not none"),
        ({"backwards": True, "worst_of": "one_shot"}, "not worst_of and backwards"),
        ({"removed": "5-3"}, "control.c: 5-3 runs backwards"),
        ({"sequence": [-1]}, "control.c.sequence must be an integer from 0"),
        ({"masks": 3}, "control.c.masks is no known key"),
    ],
)
def test_mistakes_in_a_control(control, message, text_file, tmp_path):
    tables = text_study("demo", text_file, control=[{"name": "c", **control}])
    with pytest.raises(fp.InputError) as error:
        read_document(write_document(tmp_path / "s.toml", **tables))
    assert message in str(error.value)


def test_names_are_checked_alike_in_a_document_and_in_python(model, text_file, tmp_path):
    for controls, algorithm, message in (
        ([("c", {"random": 1}), ("c", {"removed": (1,)})], "greedy", "control: 'c' is given twice"),
        ([("greedy", {"random": 1})], "greedy", "control.greedy: an algorithm of the study has"),
        ([("a/b", {"random": 1})], "greedy", "control: a label is made of"),
        ([("c", {"random": 1})], "repeat", "control.c: has masks of each studied size, and the"),
    ):
        budgets = [] if algorithm == "repeat" else [1]
        tables = text_study("demo", text_file, search_num_remove=budgets)
        tables["search"]["algorithms"] = [algorithm]
        tables["control"] = [{"name": name, **values} for name, values in controls]
        with pytest.raises(fp.InputError) as error:
            read_document(write_document(tmp_path / "s.toml", **tables))
        assert message in str(error.value)
        given = [Control(name=name, **values) for name, values in controls]
        with pytest.raises(fp.InputError) as error:
            run_study(
                [model], {"one": text(1)}, [algorithm], budgets, tmp_path / "s", controls=given
            )
        assert str(error.value).startswith(message)
        assert not (tmp_path / "s").exists()


def test_units_that_a_model_does_not_have(model, tmp_path):
    for control, message in (
        (Control(name="c", removed=(5,)), r"control\.c: removed unit 5 is out of range"),
        (Control(name="c", sequence=(0, 7)), r"control\.c: sequence: 7 is no unit"),
        (Control(name="c", random=0), "random must be an integer from 1 to 1000"),
        (Control(name="c", worst_of="beam"), "worst_of must be one of one_shot"),
        (Control(name="c", backwards=1), "backwards must be true or false, not 1"),
    ):
        with pytest.raises(fp.InputError, match=message):
            run_study(
                [model], {"one": text(1)}, ["greedy"], [1], tmp_path / "s", controls=[control]
            )
    assert not (tmp_path / "s").exists()


def test_controls_in_a_document(run, checkpoint, text_file, tmp_path):
    controls = [{"name": "any", "random": 2}, {"name": "back", "backwards": True}]
    tables = text_study(checkpoint, text_file, control=controls)
    document = write_document(tmp_path / "s.toml", **tables)
    status, out, err = run("study", document, "--out", tmp_path / "s")
    assert status == 0, err
    assert "Controls, which no search chose" in out
    study = json.loads((tmp_path / "s" / "study.json").read_text())
    assert [control["name"] for control in study["controls"]] == ["any", "any", "back"]
