"""Searches over sequences in a study: cells of no size, judged and shown beside masks."""

from __future__ import annotations

import json

import numpy as np
import pytest
from documents import text_study, write_document
from families import build, num_blocks, physically_ordered, reference_loss

import fastprune as fp
from fastprune.study import Control, read_document, run_study, write_report
from fastprune.study.tables import answers, comparison_lines, format_record, units_header


def rows(seed: int):
    return [list(row) for row in np.random.default_rng(seed).integers(0, 97, (3, 11))]


def text(seed: int):
    return lambda model: fp.Perplexity(fp.TokenBatch.from_ids(rows(seed)))


OBJECTIVES = {"one": text(1), "other": text(2)}


@pytest.fixture(scope="module")
def model():
    return fp.Model(build("llama"), name="tiny")


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("studies") / "s"
    arguments = [model], OBJECTIVES, ["greedy", "repeat"], [1, 2], out
    options = {"options": {"repeat": {"lengths": "1-2"}}, "held_out": {"new": text(3)}}
    options["controls"] = [Control(name="backwards", backwards=True)]  # a second sequence
    return arguments, options, run_study(*arguments, **options)


def test_a_sequence_search_is_one_cell_for_each_objective(finished, model):
    _, _, study = finished
    cells = [cell for cell in study["cells"] if cell["algorithm"] == "repeat"]
    assert [cell["objective"] for cell in cells] == ["one", "other"]
    for cell in cells:
        evaluator = fp.Evaluator(model, OBJECTIVES[cell["objective"]](model))
        result = fp.run_search(evaluator, "repeat", lengths="1-2")
        assert (tuple(cell["sequence"]), cell["loss"]) == (result.sequence, result.loss)
        assert (cell["removed"], cell["num_remove"]) == (None, None)
        changed = physically_ordered(model.given, cell["sequence"])
        assert cell["losses"]["new"] == pytest.approx(reference_loss(changed, rows(3)), rel=1e-5)
    masks = [cell for cell in study["cells"] if cell["algorithm"] == "greedy"]
    assert all(cell["sequence"] is None and cell["removed"] for cell in masks)


def test_it_is_judged_and_shown_as_a_sequence(finished, model, tmp_path):
    _, _, study = finished
    first, _ = (cell for cell in study["cells"] if cell["algorithm"] == "repeat")
    entries = [e for e in study["judgements"]["tiny"]["new"] if "sequence" in e]
    assert tuple(entries[0]["sequence"]) == first["sequence"]
    assert entries[0]["size"] is None
    differences = fp.Evaluator(model, text(3)(model)).score_samples(
        sequences=[first["sequence"], range(num_blocks(model.given))]
    )
    expected = text(3)(model).compare(*differences)
    assert entries[0]["to_whole"] == vars(expected)
    assert any("sequences: best" in line for line in comparison_lines(study))
    assert any(line.startswith("Run ") and "units in place of" in line for line in answers(study))
    assert all(entry["num_remove"] is not None for entry in study["jaccard"])
    assert {entry["overlap"]["sets"] for entry in study["calibration"]
            if entry["num_remove"] is None} == {None}  # fmt: skip
    write_report(study, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert format_record(first) in page
    assert page.count("<svg") == page.count("</svg>")


def test_it_continues_from_its_cell(finished, model):
    arguments, options, study = finished
    said: list[str] = []
    again = run_study(*arguments, **options, notify=said.append)
    assert again["cells"] == study["cells"]
    number = len(study["cells"])
    assert said[-2:] == [
        f"{number} of {number} cells were finished before",
        "scoring every chosen mask under every objective",
    ]


def test_a_study_of_sequences_alone_has_no_sizes(model, tmp_path):
    study = run_study([model], {"one": text(1)}, ["repeat"], [], tmp_path / "s")
    (cell,) = study["cells"]
    assert cell["sequence"]
    assert units_header(study["cells"]) == "sequence"
    assert study["jaccard"] == []
    write_report(study, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "What is removed" not in page
    assert ">removed, or sequence<" not in page
    assert "Do searches agree" not in page


def test_sizes_and_lengths_that_cannot_be_are_refused_at_the_door(model, tmp_path):
    def refused(message, algorithms, budgets, **more):
        with pytest.raises(fp.InputError, match=message):
            run_study([model], {"one": text(1)}, algorithms, budgets, tmp_path / "s", **more)
        assert not (tmp_path / "s").exists()

    refused("num_remove has no meaning for repeat", ["repeat"], [1])
    refused("budgets: greedy removes units, and no size is named", ["repeat", "greedy"], [])
    refused("lengths from 1 to 5", ["repeat"], [], options={"repeat": {"lengths": "9"}})
    pairs = {"repeat": {"lengths": "2"}}
    refused("no such window is without a prot", ["repeat"], [], options=pairs, protect=[1, 3])


def test_sequences_in_a_document(run, checkpoint, text_file, tmp_path):
    tables = text_study(checkpoint, text_file, search_algorithms=["repeat", "one_shot"])
    tables["search"]["options"] = {"repeat": {"lengths": "1"}}
    document = write_document(tmp_path / "s.toml", **tables)
    status, out, err = run("study", document, "--out", tmp_path / "s")
    assert status == 0, err
    study = json.loads((tmp_path / "s" / "study.json").read_text())
    cell = next(cell for cell in study["cells"] if cell["algorithm"] == "repeat")
    assert format_record(cell).removeprefix("sequence ") in out
    assert "sequences (whole model" in out
    tables["search"]["algorithms"] = ["repeat"]
    with pytest.raises(fp.InputError, match=r"search\.num_remove: num_remove has no meaning"):
        read_document(write_document(tmp_path / "t.toml", **tables))
