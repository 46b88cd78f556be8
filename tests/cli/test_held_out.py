"""`search --held-out` judges the result on data that the search has not read; commands follow."""

from __future__ import annotations

import json
import shlex

import numpy as np
import pytest

import fastprune as fp


@pytest.fixture(scope="module")
def unseen(tmp_path_factory):
    """Text of the same words as the calibration text, in another order."""
    path = tmp_path_factory.mktemp("unseen") / "unseen.txt"
    words = np.random.default_rng(7).integers(0, 60, 400)
    path.write_text(" ".join(f"w{word}" for word in words))
    return path


@pytest.fixture
def data(text_file):
    return ("--calibration", text_file, "--num-samples", 4, "--seq-len", 16)


@pytest.fixture
def search(run, checkpoint, data):
    """search(*arguments) -> (the document, the printed lines)"""

    def search(*arguments):
        call = ("search", checkpoint, *data, "--algorithm", "greedy", *arguments)
        status, out, err = run(*call, "--json")
        assert status == 0, err
        status, printed, err = run(*call)
        assert status == 0, err
        return json.loads(out), printed.splitlines()

    return search


def follow(run, command: str) -> str:
    """Run a command that a search names."""
    program, *arguments = shlex.split(command)
    assert program == "fastprune"
    status, out, err = run(*arguments)
    assert status == 0, err
    return out


def test_the_result_is_judged_beside_the_whole_model(search, checkpoint, unseen):
    document, lines = search("--num-remove", 2, "--held-out", unseen, "--held-out-samples", 6)
    judged = document["held_out"]
    model = fp.load_model(checkpoint)
    objective = fp.Perplexity(fp.load_text(unseen, model.tokenizer, 6, 16))
    ev = fp.Evaluator(model, objective)
    masks = fp.from_removed([tuple(document["removed"]), ()], ev.num_units)
    losses = ev.score_samples(masks)
    difference = objective.compare(*losses)
    assert [judged["loss"], judged["dense_loss"]] == ev.score(masks).tolist()
    assert judged["perplexity"] == objective.metric(judged["loss"])
    assert judged["difference"]["value"] == difference.value
    assert judged["difference"]["error"] == difference.error
    assert (judged["num_samples"], judged["shared_rows"]) == (6, 0)
    (line,) = (line for line in lines if line.startswith("held out"))
    said = objective.format(judged["loss"], judged["standard_error"])
    assert line.startswith(f"held out (unseen.txt, 6 samples): {said} (lower is better), ")
    assert line.endswith(f"; difference {objective.format_difference(difference)}")


def test_another_objective_may_judge(search, unseen, questions):
    document, lines = search(
        *("--num-remove", 1, "--held-out", questions, "--held-out-objective", "accuracy"),
        *("--delimiter", " ", "--normalization", "characters"),
    )
    assert document["held_out"]["objective"] == "accuracy"
    assert document["objective"] == "perplexity"
    assert any(line.startswith("held out (") and "accuracy" in line for line in lines)
    judge = document["next"]["judge"]
    assert "--objective accuracy" in judge
    assert "--normalization characters" in judge
    assert "--seq-len" not in judge  # of text


def test_samples_that_the_search_has_read_are_marked(search, text_file, tmp_path):
    copy = tmp_path / "copy.txt"
    copy.write_text(text_file.read_text())
    document, lines = search("--num-remove", 1, "--held-out", copy, "--held-out-samples", 4)
    assert document["held_out"]["shared_rows"] == 4
    assert any("held out: 4 of its 4 samples share" in line for line in lines)
    assert any("it is not unseen" in line for line in lines)


def test_the_commands_that_follow_run_as_they_are(search, run, unseen, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    held_out = ("--held-out", unseen, "--held-out-samples", 6)
    document, lines = search("--num-remove", 2, *held_out)
    steps = document["next"]
    assert lines[-2:] == [f"next: {steps['export']}", f"judge: {steps['judge']}"]
    follow(run, steps["export"])
    judged = json.loads(follow(run, f"{steps['judge']} --json"))["masks"][0]
    np.testing.assert_allclose(judged["loss"], document["held_out"]["loss"], rtol=1e-5)
    again, _ = search("--num-remove", 2, *held_out)
    assert again["next"]["export"] != steps["export"]  # whose folder exists now


def test_a_result_in_a_folder_is_exported_with_its_losses(
    run, checkpoint, data, unseen, tmp_path, monkeypatch
):
    """The commands fit the files of the moment: a kept result's checkpoint gets a free folder."""
    monkeypatch.chdir(tmp_path)
    held_out = ("--held-out", unseen, "--held-out-samples", 6)
    call = ("search", checkpoint, *data, "--num-remove", 1, *held_out, "--out", "r")
    assert run(*call)[0] == 0
    result = json.loads((tmp_path / "r" / "result.json").read_text())
    for folder in ("r/pruned", "r/pruned-2"):
        status, out, err = run(*call, "--json")
        assert (status, "nothing was computed" in err) == (0, True)
        kept = json.loads(out)
        assert kept == {**result, "next": kept["next"]}
        assert f"--result r/result.json --out {folder}" in kept["next"]["export"]
        follow(run, kept["next"]["export"])
        follow(run, kept["next"]["judge"])
        card = (tmp_path / folder / "README.md").read_text()
        assert "6 samples of unseen.txt, held out" in card
        assert fp.Perplexity.format(result["held_out"]["loss"], named=False) in card


def test_a_result_that_is_written_elsewhere_is_exported_from_there(
    run, checkpoint, data, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    search = fp.run_search

    def fill_the_place(*arguments, **options):
        (tmp_path / "r").write_text("a file of another program")
        return search(*arguments, **options)

    monkeypatch.setattr("fastprune.cli.search.run_search", fill_the_place)
    call = ("search", checkpoint, *data, "--num-remove", 1, "--out", "r", "--json")
    status, out, err = run(*call)
    assert status == 1
    assert "the result is in result-" in err
    follow(run, json.loads(out)["next"]["export"])
    assert (tmp_path / "pruned" / "config.json").is_file()


def test_errors_of_a_kept_result_do_not_blame_its_folder(
    run, checkpoint, data, tmp_path, monkeypatch
):
    call = ("search", checkpoint, *data, "--num-remove", 1, "--algorithm", "greedy")
    call += ("--out", tmp_path / "r", "--quiet", "--figure", tmp_path / "f.svg")
    assert run(*call)[0] == 0

    def refuse(*_):
        raise fp.InputError("no such font")

    monkeypatch.setattr("fastprune.cli.budgets.path_figure", refuse)
    status, _, err = run(*call)
    assert status == 2
    assert err.splitlines()[-1] == "fastprune: no such font"


def test_without_held_out_data_the_user_names_some(search, run, unseen):
    document, lines = search("--num-remove", 1)
    assert document["held_out"] is None
    removed = ",".join(map(str, document["removed"]))
    judge = document["next"]["judge"]
    assert f"--removed - --removed {removed} --calibration FILE" in judge
    assert lines[-1] == f"judge: {judge}"
    assert "difference to the whole model" in follow(run, judge.replace("FILE", str(unseen)))


def test_halves_of_blocks_have_no_checkpoint(search, run, unseen):
    document, lines = search("--num-remove", 1, "--granularity", "sublayer")
    assert "export" not in document["next"]
    assert "no checkpoint can be written: half a block cannot be left out" in lines[-2]
    follow(run, document["next"]["judge"].replace("FILE", str(unseen)))


def test_a_sequence_has_its_next_steps(run, checkpoint, data, unseen, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call = ("search", checkpoint, *data, "--algorithm", "repeat", "--option", "lengths=1-1")
    status, out, err = run(*call, "--json")
    assert status == 0, err
    document = json.loads(out)
    follow(run, document["next"]["export"])
    follow(run, document["next"]["judge"].replace("FILE", str(unseen)))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--held-out", "nowhere.txt"), "--held-out: nowhere.txt: no such file"),
        (("--held-out-samples", 3), "--held-out-samples is of held-out data"),
        (("--held-out-objective", "accuracy"), "--held-out-objective is of held-out data"),
        (("--held-out-column", "c"), "--held-out-column is of held-out data"),
        (("--delimiter", "-"), "--delimiter is of questions; perplexity reads text"),
    ],
)
def test_wrong_arguments_are_refused_before_the_model(
    run, data, monkeypatch, tmp_path, arguments, said
):
    def opened(*_, **__):
        raise AssertionError("the model was opened")

    monkeypatch.setattr("fastprune.models.load_model", opened)
    monkeypatch.chdir(tmp_path)
    status, _, err = run("search", "nowhere/model", *data, "--num-remove", 1, *arguments)
    assert status == 2
    assert said in err


def test_the_calibration_data_is_not_unseen(run, data, text_file, questions):
    search = ("search", "nowhere/model", *data, "--num-remove", 1, "--held-out")
    status, _, err = run(*search, text_file)
    assert status == 2
    assert "is the calibration data; name data that the search does not read" in err
    judged = ("--held-out-objective", "accuracy", "--held-out-column", "c")
    status, _, err = run(*search, questions, *judged)
    assert status == 2
    assert "--held-out-column is of text; accuracy reads questions" in err


def test_too_few_held_out_samples_are_refused_before_the_search(run, checkpoint, data, unseen):
    call = ("search", checkpoint, *data, "--num-remove", 1, "--held-out", unseen)
    status, _, err = run(*call, "--held-out-samples", 999)
    assert status == 2
    assert "--held-out: " in err
    assert "what fits: --held-out-samples " in err
