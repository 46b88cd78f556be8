"""Stores, study folders and pairs of algorithm and objective that cannot be are refused before a
model is opened."""

from __future__ import annotations

import json
import os
import sqlite3

import pytest

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
            "study": {"--num-remove": "1,2", "--objective": f"perplexity={text_file}"},
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
    study = ("--objective", f"margin={questions}", "--seq-len", 32, "--out", tmp_path / "study")
    assert "--num-samples says how many" in refused("study", *study)
    sets = ("--calibration", f"q=tasks:{questions}", "--objective", "margin", "--seq-len", 32)
    sets += ("--out", tmp_path / "study")
    assert "--seq-len is of text" in refused("study", *sets)


def test_sizes_of_text_stand_beside_held_out_questions(run, tmp_path):
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"prompt": "w1", "choices": [" w2", " w3"], "answer": 0}\n')
    study = (
        "study",
        "nowhere/model",
        "--num-remove",
        "1",
        "--out",
        tmp_path / "study",
        "--seq-len",
        32,
    )
    text = tmp_path / "text.txt"
    text.write_text("w1 w2 w3")
    for more in (("--objective", f"perplexity={text}"), ("--calibration", f"a=text:{text}")):
        _, _, err = run(*study, *more, "--held-out", f"margin={questions}")
        assert "nowhere/model" in err  # as far as the model, which is not there


def test_sizes_of_a_set_are_named(refused, text_file, tmp_path):
    out = ("--out", tmp_path / "study")
    wrong = refused("study", "--calibration", f"a=text:{text_file},sample=8", *out)
    assert "seed=, each a number, not sample=8" in wrong
    assert "not 'beam_width=2'" in refused("study", "--option", "beam_width=2", *out)


def test_a_refused_run_leaves_no_store(refused, tmp_path):
    refused("search", "--store", tmp_path / "new.db", "--algorithm", "beem")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("objective", ["kl", "accuracy"])
def test_gradients(refused, text_file, questions, tmp_path, objective):
    file = text_file if objective == "kl" else questions
    found = refused("search", "--algorithm", "cbo", "--objective", objective, "--calibration", file)
    assert f"cbo needs gradients, which the objective '{objective}' has not" in found
    found = refused(
        "study",
        "--algorithms",
        "beam,cbo",
        "--objective",
        f"x:{objective}={file}",
        "--out",
        tmp_path / "s",
    )
    assert "which the objective 'x' has not" in found
    assert not (tmp_path / "s").exists()


def test_study_folders(refused, tmp_path):
    out = tmp_path / "s"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    assert "is not empty and holds no study" in refused("study", "--out", out)
    for text in ("{", "[]", "\udcff"):
        (out / "inputs.json").write_text(text, errors="surrogateescape")
        assert "is not what a study has written" in refused("study", "--out", out)
    assert (out / "notes.txt").read_text() == "mine"


@pytest.fixture(scope="module")
def inputs():
    """What a study keeps of itself, as far as it is known without models."""
    return {
        "algorithms": {"beam": {"beam_width": 5}},
        "budgets": [1, 2],
        "seed": 0,
        "granularity": "block",
    }


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (("--num-remove", "1"), "budgets"),
        (("--seed", "1"), "seed"),
        (("--granularity", "sublayer"), "granularity"),
        (("--algorithms", "beam,greedy"), "algorithms"),
        (("--option", "beam.beam_width=6"), "algorithms"),
        (("--num-remove", "3", "--seed", "2"), "budgets, seed"),
    ],
)
def test_another_study_is_refused(refused, tmp_path, inputs, more, named):
    (tmp_path / "inputs.json").write_text(json.dumps(inputs))
    beam = () if "--algorithms" in more else ("--algorithms", "beam")
    assert f"holds a study with other {named};" in refused("study", "--out", tmp_path, *more, *beam)


def test_a_broken_store_of_a_study_is_named(refused, tmp_path, inputs):
    (tmp_path / "inputs.json").write_text(json.dumps(inputs))
    (tmp_path / "scores.db").write_text("no database, and longer than the header of one " * 10)
    assert "scores.db: not a store" in refused("study", "--out", tmp_path, "--algorithms", "beam")


def test_a_study_continues(run, checkpoint, text_file, tmp_path):
    objective = ("--objective", f"perplexity={text_file}", "--num-samples", 2, "--seq-len", 16)
    arguments = (
        "study",
        checkpoint,
        *objective,
        "--algorithms",
        "one_shot",
        "--num-remove",
        1,
        "--out",
        tmp_path / "s",
    )
    for _ in range(2):
        status, out, err = run(*arguments)
        assert status == 0, err
        assert "one_shot" in out


@pytest.mark.parametrize(
    ("command", "twice"),
    [
        ("search", ("--num-remove", "2", "--num-remove", "2")),
        ("search", ("--seed", "1", "--seed=1")),
        ("score", ("--dtype", "float32", "--dtype", "bfloat16")),
        ("study", ("--out", "a", "--out", "b")),
        ("search", ("--option", "beam_width=2", "--option", "beam_width=3")),
        ("study", ("--option", "beam.beam_width=2", "--option", "beam.beam-width=3", "--out", "a")),
    ],
)
def test_options_that_are_given_twice(refused, command, twice):
    assert "is given twice" in refused(command, *twice)


def test_workers(refused, tmp_path):
    for command in ("score", "search", "study", "eval"):
        more = ("--out", tmp_path / "s") if command == "study" else ()
        assert "0 is not in the range 1<=x<=1024" in refused(command, "--workers", 0, *more)
        assert "give one of them" in refused(command, "--workers", 2, "--ray", "local", *more)


def test_races_of_a_study(refused, tmp_path):
    study = ("--out", tmp_path / "study")
    assert "--racing: racing must be between 0 and 1" in refused("study", *study, "--racing", 99)
    alone = refused("study", *study, "--racing", 0.9, "--algorithms", "shortgpt")
    assert (
        "--racing: shortgpt needs every loss it asks for and does not race; these do: one_shot"
        in alone
    )
    assert not (tmp_path / "study").exists()
