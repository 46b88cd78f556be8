"""Chosen masks are compared with paired errors, and data that searches saw is not called unseen."""

import json

import numpy as np
import pytest
from documents import text_study, write_document
from families import build

import fastprune as fp
from fastprune.masks import Candidate
from fastprune.study import Control, run_study
from fastprune.study.judging import Judged, compare_candidates, shared_rows
from fastprune.study.tables import answers, best_cells, comparison_lines


def batch_of(*rows) -> fp.TokenBatch:
    return fp.TokenBatch.from_ids([np.asarray(row) for row in rows])


def judged(removed) -> Judged:
    return Judged(Candidate(removed=removed), len(removed))


def test_masks_are_compared_with_the_best_of_their_size_and_with_the_whole_model():
    objective = fp.Perplexity(batch_of([1, 2, 3], [4, 5, 6], [7, 8, 9]))
    removed = [(1,), (2,), (0, 1), ()]
    losses = np.array([[3.0, 4.0, 5.0], [2.0, 3.0, 5.0], [6.0, 6.0, 7.0], [1.0, 1.0, 2.0]])
    entries = compare_candidates(objective, [judged(units) for units in removed], losses)
    assert [entry["removed"] for entry in entries] == [[1], [2], [0, 1], []]
    assert [entry["loss"] for entry in entries] == objective.mean(losses).tolist()
    errors = objective.standard_error(losses)
    assert [entry["standard_error"] for entry in entries] == errors.tolist()
    for entry, row, best in zip(entries, losses, (1, 1, 2, 3), strict=True):
        for name, reference in (("to_best", losses[best]), ("to_whole", losses[3])):
            difference = objective.compare(row, reference)
            assert entry[name] == vars(difference)
    assert entries[1]["to_best"]["value"] == 0.0


def test_a_loss_that_is_not_finite_is_never_the_best():
    objective = fp.Perplexity(batch_of([1, 2], [3, 4]))
    losses = np.array([[np.nan, 1.0], [3.0, 3.0], [1.0, 1.0]])
    entries = compare_candidates(objective, [judged(units) for units in ((0,), (1,), ())], losses)
    assert entries[1]["to_best"]["value"] == 0.0


@pytest.mark.parametrize("shift", [0, 1, 17])
def test_windows_of_other_lengths_and_places_are_found(shift):
    stream = np.random.default_rng(0).integers(0, 1000, 400)
    seen = batch_of(*stream[:160].reshape(2, 80))
    overlapping = stream[shift : shift + 40]
    judge = batch_of(overlapping, stream[200:240], stream[300:330])
    assert shared_rows(judge, [seen]) == 1
    assert shared_rows(judge, [batch_of(stream[360:]), seen]) == 1
    assert shared_rows(judge, []) == 0
    assert shared_rows(judge, [judge]) == 3


@pytest.mark.parametrize("judge", [fp.TaskAccuracy, fp.TaskLikelihood])
@pytest.mark.parametrize("searched", [fp.TaskMargin, fp.TaskLikelihood, fp.KLDivergence])
def test_a_question_is_seen_whatever_choices_run_behind_it(judge, searched):
    def tasks(*prompts):
        rows = [[([*p, 90], len(p)), ([*p, 91, 92], len(p))] for p in prompts]
        question = np.repeat(np.arange(len(rows)), 2)
        answers = np.arange(len(rows)) * 2 + 1  # the second choice
        lengths = np.ones(len(question), dtype=np.int64)
        batch = fp.TokenBatch.from_continuations(rows)
        return fp.Tasks(batch, question, answers, lengths, lengths)

    seen, new = [1, 2, 3], [1, 2, 4, 5]
    calibration = [searched(tasks(seen, [7, 8])).batch]
    assert shared_rows(judge(tasks(new, seen)).batch, calibration, questions=True) == 1
    assert shared_rows(judge(tasks(new)).batch, calibration, questions=True) == 0


def test_windows_do_not_cross_rows():
    stream = np.random.default_rng(1).integers(0, 1000, 64)
    judge = batch_of(stream[16:48])
    assert shared_rows(judge, [batch_of(stream)]) == 1
    assert shared_rows(judge, [batch_of(stream[:32], stream[32:])]) == 0


def test_ties_are_named(tmp_path):
    """Blocks that add nothing to the states: without any of them, the model is the same."""
    hf = build("llama")
    for layer in hf.model.layers[1:4]:
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.down_proj.weight.data.zero_()
    batch = batch_of([5, 6, 7, 8], [9, 10, 11])
    controls = [Control(name=str(unit), removed=(unit,)) for unit in (0, 2, 3)]
    makers = {"one": lambda model: fp.Perplexity(batch)}
    model = fp.Model(hf, name="tiny")
    study = run_study(
        [model], makers, ["greedy"], [1], tmp_path / "s", controls=controls, protect=[0, 4]
    )
    (line,) = comparison_lines(study)
    start, others = line.split("; others: ")
    assert start.startswith(
        "one, 1 removed: best 1, tied with 2 (control); 3 (control) (perplexity"
    )
    assert others.startswith("0 (control) ")
    assert answers(study)[0].startswith("Remove 1: perplexity")
    (cell,) = study["cells"]
    worse, _, same = (
        cell
        | {"algorithm": control["name"]}
        | {name: control[name] for name in ("removed", "judged")}
        for control in study["controls"]
    )
    cells = [cell, same, worse | {"loss": cell["loss"] + 1}]
    for ordered in (cells, cells[::-1]):
        best = best_cells(study | {"cells": ordered})
        assert {tuple(entry["removed"]): entry["algorithms"] for entry in best} == {
            (1,): ["greedy"],
            (3,): ["3"],
        }
    (line,) = answers(study | {"cells": cells})
    assert line.startswith("Remove 1 (tied with 3 under one): perplexity")


def test_a_study_says_what_it_cannot_tell_apart_and_what_it_has_seen(
    run, checkpoint, text_file, tmp_path
):
    sets = {"kind": "text", "file": text_file, "num_samples": 4, "seq_len": 16}
    tables = text_study(
        checkpoint,
        text_file,
        calibration=[{"name": "a", **sets}, {"name": "b", **sets, "seed": 3}],
        held_out=[{"name": "seen", "objective": "perplexity", "file": text_file} | {"seq_len": 16}],
        search_algorithms=["one_shot", "shortgpt"],
    )
    path = write_document(tmp_path / "study.toml", **tables)
    status, out, err = run("study", path, "--out", tmp_path / "s")
    assert status == 0, err
    study = json.loads((tmp_path / "s" / "study.json").read_text())
    described = study["held_out"]["seen"]
    assert 4 <= described["shared_rows"] < described["num_samples"]
    flat = " ".join(out.split())
    assert f"seen: {described['shared_rows']} of its" in flat
    assert "which no search has seen" not in flat
    assert "which no search has seen" not in (tmp_path / "s" / "report.html").read_text()
    lines = comparison_lines(study)
    distinct = {tuple(cell["removed"]) for cell in study["cells"]}
    assert len(lines) == (len(distinct) > 1)
    assert all(line.startswith("seen, 1 removed: best ") for line in lines)
    assert all(" ".join(line.split()) in flat for line in lines)
