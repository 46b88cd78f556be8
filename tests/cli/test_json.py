"""--json prints one document and nothing else; a search goes on from its result; units as people
type them."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from documents import text_study, write_document

import fastprune as fp


@pytest.fixture
def data(text_file):
    return ("--calibration", text_file, "--num-samples", 4, "--seq-len", 16)


@pytest.fixture
def document(run):
    """document(*arguments) -> the JSON document on stdout."""

    def document(*arguments):
        status, out, err = run(*arguments, "--json")
        assert status == 0, err
        return json.loads(out)

    return document


def test_info(document, checkpoint):
    values = document("info", checkpoint)
    assert values["blocks"] == 5
    assert values["family"] == "llama"
    assert isinstance(values["parameters"], int)


def test_score(document, checkpoint, data, tmp_path):
    values = document("score", checkpoint, *data, "--removed", "1,2", "--removed", "-")
    model = fp.load_model(checkpoint)
    text = fp.load_text(data[1], model.tokenizer, 4, 16)
    ev = fp.Evaluator(model, fp.Perplexity(text))
    losses = ev.score(fp.from_removed([(1, 2), ()], 5)).tolist()
    assert [row["removed"] for row in values["masks"]] == [[1, 2], []]
    assert [row["loss"] for row in values["masks"]] == losses
    assert values["whole_model"]["loss"] == losses[1]
    assert values["masks"][1]["difference"]["value"] == 0
    assert values["masks"][0]["standard_error"] > 0
    again = document(
        "score",
        checkpoint,
        *data,
        "--removed",
        "1,2",
        "--removed",
        "-",
        "--out",
        tmp_path / "s.jsonl",
    )
    assert again["masks"] == values["masks"]
    assert len((tmp_path / "s.jsonl").read_text().splitlines()) == 2


def test_search_prints_what_it_writes(document, checkpoint, data, tmp_path):
    values = document("search", checkpoint, *data, "--num-remove", 2, "--out", tmp_path)
    assert {*values.pop("next")} == {"export", "judge"}  # which depend on the files of the moment
    assert values == json.loads((tmp_path / "result.json").read_text())


def test_study(document, checkpoint, text_file, tmp_path):
    path = write_document(tmp_path / "study.toml", **text_study(checkpoint, text_file))
    values = document("study", path, "--out", tmp_path / "s", "--quiet")
    assert values == json.loads((tmp_path / "s" / "study.json").read_text())


def test_env(document, run):
    values = document("env")
    assert values["fastprune"] == fp.__version__
    assert {
        "python",
        "torch",
        "transformers",
        "triton",
        "numpy",
        "processor",
        "threads",
        "gpu",
    } <= {*values}
    assert values["path"].startswith(("fused", "generic"))
    status, out, _ = run("env")
    assert status == 0
    assert f"torch {' ' * 0}" in out
    assert values["torch"] in out
    assert "Loading" not in out


def test_runs_as_a_module():
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "fastprune", "--version"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert fp.__version__ in done.stdout


def test_a_search_of_the_same_arguments_prints_its_result_again(
    run, checkpoint, data, tmp_path, monkeypatch
):
    wanted = ("--num-remove", 2, "--algorithm", "beam", "--out", tmp_path / "r")
    search = ("search", checkpoint, *data, *wanted)
    status, first, _ = run(*search)
    assert status == 0

    def opened(*_, **__):
        raise AssertionError("the model was opened")

    monkeypatch.setattr("fastprune.models.load_model", opened)
    status, again, err = run(*search, "--quiet", "--memory-gb", 1)
    assert status == 0
    assert "exists already, of the same arguments; nothing was computed" in " ".join(err.split())
    assert again.splitlines() == [line for line in first.splitlines() if "written" not in line]
    status, out, _ = run(*search, "--json")
    values = json.loads(out)
    del values["next"]
    assert values == json.loads((tmp_path / "r" / "result.json").read_text())


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (("--seed", 1), "--seed 0, now 1"),
        (("--option", "beam_width=2"), "--option beam_width=5, now 2"),
        (("--protect", "0"), "--protect not given, now 0"),
        (("--racing", 0.9), "--racing not given, now 0.9"),
        (("--no-bos", "--measure-speed"), "--bos not given, now as --no-bos; --measure-speed not"),
        (("--algorithm", "greedy"), "--algorithm beam, now greedy"),
    ],
)
def test_a_result_of_other_arguments_is_refused(run, checkpoint, data, tmp_path, other, said):
    wanted = ("--num-remove", 1, "--out", tmp_path / "r")
    assert run("search", checkpoint, *data, *wanted, "--algorithm", "beam")[0] == 0
    beam = () if "--algorithm" in other else ("--algorithm", "beam")
    status, _, err = run("search", checkpoint, *data, *wanted, *beam, *other)
    assert status == 2
    assert "exists already and is not overwritten" in err
    assert f"it is the result of other arguments ({said}" in err


def test_a_result_on_a_file_that_has_changed_is_refused(run, checkpoint, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{i}" for i in range(60)) * 4)
    search = ("search", checkpoint, "--num-remove", 1, "--out", tmp_path / "r")
    search += ("--calibration", text, "--num-samples", 2, "--seq-len", 16)
    assert run(*search)[0] == 0
    text.write_text("w1 w2 " * 100)
    status, _, err = run(*search)
    assert status == 2
    assert f"(the files of {text} have changed)" in err


def test_a_damaged_result_is_refused(run, checkpoint, data, tmp_path):
    (tmp_path / "result.json").write_text("{")
    status, _, err = run("search", checkpoint, *data, "--num-remove", 1, "--out", tmp_path)
    assert status == 2
    assert "exists already" in err


def test_a_share_of_the_units_can_be_removed(document, checkpoint, data):
    values = document("search", checkpoint, *data, "--num-remove", "50%")
    assert len(values["removed"]) == 2  # of 5
    halves = ("--granularity", "sublayer", "--algorithm", "one_shot")
    assert (
        len(document("search", checkpoint, *data, *halves, "--num-remove", "50%")["removed"]) == 5
    )


@pytest.mark.parametrize("share", ["0%", "100%", "%", "-5%", "25 percent%", "1e1%", "25%%"])
def test_shares_that_are_none(run, checkpoint, data, share):
    status, _, err = run("search", checkpoint, *data, "--num-remove", share)
    assert status == 2
    assert '--num-remove must be an integer or a share such as "25%"' in err


def test_all_is_every_unit(document, run, checkpoint, data, tmp_path):
    values = document("score", checkpoint, *data, "--removed", "all", "--removed", "1-2")
    assert [row["removed"] for row in values["masks"]] == [[0, 1, 2, 3, 4], [1, 2]]
    status, _, err = run("search", checkpoint, *data, "--num-remove", 1, "--protect", "all")
    assert status == 2
    assert "with all units protected, none can go" in err
    status, _, err = run("export", checkpoint, "--removed", "all", "--out", tmp_path / "x")
    assert status == 2
    assert "nothing to export" in err
