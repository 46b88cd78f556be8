"""Stores, study folders and pairs of algorithm and objective that cannot be are refused before a
model is opened."""

from __future__ import annotations

import json
import os
import sqlite3

import pytest
from documents import text_study, write_document

import fastprune as fp
from fastprune.engine.store import SumStore


@pytest.fixture
def refused(run, monkeypatch, text_file):
    """refused(command, *more arguments) -> the one line on stderr."""

    def opened(*_, **__):
        raise AssertionError("the model was opened")

    monkeypatch.setattr("fastprune.models.load_model", opened)

    def refused(command, *more) -> str:
        needed = {
            "score": {"--removed": "1", "--calibration": text_file},
            "search": {"--num-remove": "1", "--calibration": text_file},
            "eval": {"--removed": "1", "--tasks": "arc_easy"},
        }[command]
        arguments = [
            part for flag, value in needed.items() if flag not in more for part in (flag, value)
        ]
        status, _, err = run(command, "nowhere/model", *arguments, *more)
        assert status == 2, err
        assert err.count("\n") == 1
        return err

    return refused


@pytest.fixture
def refused_study(run, monkeypatch, text_file, tmp_path):
    """refused_study(out, *arguments, **changes of the document) -> the one line on stderr."""

    def opened(*_, **__):
        raise AssertionError("the model was opened")

    monkeypatch.setattr("fastprune.models.load_model", opened)

    def refused(out, *arguments, **changes) -> str:
        tables = text_study("nowhere/model", text_file, **{"search_num_remove": [1, 2], **changes})
        document = write_document(tmp_path / "document.toml", **tables)
        status, _, err = run("study", document, "--out", out, *arguments)
        assert status == 2, err
        assert err.count("\n") == 1
        return err

    return refused


@pytest.mark.parametrize("command", ["score", "search"])
def test_stores(refused, tmp_path, monkeypatch, command):
    assert "is not a file" in refused(command, "--store", tmp_path)
    assert "its folder does not exist" in refused(command, "--store", tmp_path / "no" / "s.db")
    (tmp_path / "text.db").write_text("no database, and longer than the header of one " * 10)
    assert "text.db: not a store" in refused(command, "--store", tmp_path / "text.db")
    assert (tmp_path / "text.db").read_text().startswith("no database")
    other = sqlite3.connect(tmp_path / "other.db")
    other.execute("CREATE TABLE songs (title TEXT)")
    other.commit()
    other.close()
    assert "a database of something else" in refused(command, "--store", tmp_path / "other.db")
    os.mkfifo(tmp_path / "pipe.db")
    assert "is not a file" in refused(command, "--store", tmp_path / "pipe.db")
    monkeypatch.setattr(os, "access", lambda place, mode: os.fspath(place) != os.fspath(tmp_path))
    assert "cannot be written to" in refused(command, "--store", tmp_path / "new.db")
    SumStore(tmp_path / "mine.db").close()
    monkeypatch.setattr(os, "access", lambda place, mode: not os.fspath(place).endswith("mine.db"))
    assert "cannot be written to" in refused(command, "--store", tmp_path / "mine.db")


def test_sizes_of_text_are_refused_for_questions(refused, tmp_path):
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"prompt": "w1", "choices": [" w2", " w3"], "answer": 0}\n')
    margin = ("--objective", "margin", "--calibration", questions)
    assert "--seq-len is of text" in refused("score", *margin, "--seq-len", 32)
    assert "--sample-seed is of text" in refused("search", *margin, "--sample-seed", 1)


def test_a_refused_run_leaves_no_store(refused, tmp_path):
    refused("search", "--store", tmp_path / "new.db", "--algorithm", "beem")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("objective", ["kl", "accuracy"])
def test_gradients(refused, text_file, questions, tmp_path, objective):
    file = text_file if objective == "kl" else questions
    found = refused("search", "--algorithm", "cbo", "--objective", objective, "--calibration", file)
    assert f"cbo needs gradients, which the objective '{objective}' has not" in found


@pytest.mark.parametrize("objective", ["kl", "accuracy"])
def test_gradients_of_a_study(refused_study, text_file, questions, tmp_path, objective):
    kind, file = ("text", text_file) if objective == "kl" else ("tasks", questions)
    line = refused_study(
        tmp_path / "s",
        calibration=[{"name": "x", "kind": kind, "file": file}],
        objective=[{"name": objective}],
        search_algorithms=["beam", "cbo"],
    )
    assert f"cbo needs gradients, which the objective '{objective}-x' has not" in line
    assert not (tmp_path / "s").exists()


def test_study_folders(refused_study, tmp_path):
    out = tmp_path / "s"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    assert "is not empty and holds no study" in refused_study(out)
    for text in ("{", "[]", "\udcff", '{"machines": 3}'):
        (out / "inputs.json").write_text(text, errors="surrogateescape")
        assert "is not what a study has written" in refused_study(out)
    assert (out / "notes.txt").read_text() == "mine"


@pytest.fixture(scope="module")
def inputs():
    """The settings that a study keeps, as far as they are known without models."""
    return {
        "algorithms": {"beam": {"beam_width": 5}},
        "budgets": [1, 2],
        "seed": 0,
        "racing": None,
        "protect": [],
        "granularity": "block",
        "backend": "auto",
    }


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_remove": [1]}, "search.num_remove no longer has 2;"),
        ({"seed": 1}, "search.seed was 0 and is 1;"),
        ({"granularity": "sublayer"}, "search.granularity was 'block' and is 'sublayer';"),
        ({"algorithms": ["greedy"]}, "search.algorithms no longer has 'beam';"),
        ({"options": {"beam": {"beam_width": 6}}}, "search.options.beam.beam_width was 5 and is 6"),
        ({"num_remove": [3], "seed": 2}, "no longer has 1, 2; search.seed was 0 and is 2;"),
        ({"racing": 0.9}, "search.racing was None and is 0.9;"),
        ({"protect": [1]}, "search.protect was [] and is [1];"),
    ],
)
def test_another_study_is_refused(refused_study, tmp_path, inputs, changes, named):
    out = tmp_path / "s"
    out.mkdir()
    (out / "inputs.json").write_text(json.dumps(inputs))
    changes = {"algorithms": ["beam"], **changes}
    line = refused_study(out, **{f"search_{name}": value for name, value in changes.items()})
    assert "holds a study with other settings: " in line
    assert named in line
    assert json.loads((out / "inputs.json").read_text()) == inputs


def test_a_broken_store_of_a_study_is_named(refused_study, tmp_path, inputs):
    out = tmp_path / "s"
    out.mkdir()
    (out / "inputs.json").write_text(json.dumps(inputs))
    (out / "scores.db").write_text("no database, and longer than the header of one " * 10)
    assert "scores.db: not a store" in refused_study(out, search_algorithms=["beam"])


def test_a_study_continues(run, checkpoint, text_file, tmp_path):
    document = write_document(tmp_path / "study.toml", **text_study(checkpoint, text_file))
    for _ in range(2):
        status, out, err = run("study", document, "--out", tmp_path / "s")
        assert status == 0, err
        assert "one_shot" in out


@pytest.mark.parametrize(
    ("command", "twice"),
    [
        ("search", ("--num-remove", "2", "--num-remove", "2")),
        ("search", ("--seed", "1", "--seed=1")),
        ("score", ("--dtype", "float32", "--dtype", "bfloat16")),
        ("search", ("--option", "beam_width=2", "--option", "beam_width=3")),
    ],
)
def test_options_that_are_given_twice(refused, command, twice):
    assert "is given twice" in refused(command, *twice)


def test_the_folder_of_a_study_is_given_twice(refused_study):
    assert "--out is given twice" in refused_study("a", "--out", "b")


def test_workers(refused):
    for command in ("score", "search", "eval"):
        assert "0 is not in the range 1<=x<=1024" in refused(command, "--workers", 0)
        assert "give one of them" in refused(command, "--workers", 2, "--ray", "local")


def test_workers_of_a_study(refused_study, tmp_path):
    assert "0 is not in the range 1<=x<=1024" in refused_study(tmp_path / "s", "--workers", 0)
    both = refused_study(tmp_path / "s", "--workers", 2, "--ray", "local")
    assert "give one of them" in both
    assert not (tmp_path / "s").exists()


@pytest.fixture
def unopened(run, monkeypatch, text_file, tmp_path):
    """unopened(config, *arguments) -> (whether a model was opened, stderr)."""
    opened = []

    def open_model(*_, **__):
        opened.append(True)
        raise fp.InputError("opened")

    monkeypatch.setattr("fastprune.models.load_model", open_model)

    def unopened(config, *arguments):
        opened.clear()
        (tmp_path / "config.json").write_text(json.dumps(config))
        status, _, err = run("search", tmp_path, "--calibration", text_file, *arguments)
        assert status == 2
        return bool(opened), err

    return unopened


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--num-remove", 5), "--num-remove must be an integer from 0 to 4, since the model has 5"),
        (("--num-remove", 10, "--granularity", "sublayer"), "since the model has 10 units"),
        (("--num-remove", 4, "--protect", "0,1"), "--num-remove is 4, but only 3 units are not"),
        (("--num-remove", 1, "--protect", "7"), "--protect: protected unit 7 is out of range"),
    ],
)
@pytest.mark.parametrize("inside", [False, True])
def test_units_that_the_config_does_not_have(unopened, arguments, said, inside):
    config = {"num_hidden_layers": 5}
    opened, err = unopened({"text_config": config} if inside else config, *arguments)
    assert not opened
    assert said in err


@pytest.mark.parametrize(
    "config",
    [
        {},
        [],
        {"n_layer": 5},
        {"num_hidden_layers": "5"},
        {"num_hidden_layers": [5]},
        {"num_hidden_layers": 5, "num_layers": {}},
        {"num_hidden_layers": 5, "num_layers": 9},
        {"num_hidden_layers": 5, "llm_config": {"num_hidden_layers": 9}},
        {"num_hidden_layers": 5, "text_config": {}},
        {"num_hidden_layers": 5, "is_encoder_decoder": True},
    ],
)
def test_a_config_that_does_not_surely_say_is_left_to_the_model(unopened, config):
    assert unopened(config, "--num-remove", 5) == (True, "fastprune: opened\n")
    assert unopened({"num_hidden_layers": 5}, "--num-remove", 5, "--trust-remote-code")[0]
