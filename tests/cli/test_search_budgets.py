"""Budgets, gates and tables of `fastprune search`."""

from __future__ import annotations

import json

import numpy as np
import pytest

import fastprune as fp
from fastprune import demo
from fastprune.study import figures

DATA = ("--num-samples", "2", "--seq-len", "16", "--quiet")


def test_a_budget_with_its_table_gate_and_record(run, tmp_path):
    search = ("search", "demo", *DATA, "--algorithm", "greedy", "--budget", "params=75%")
    status, out, err = run(*search, "--table", "--measure-speed", "--out", tmp_path)
    assert status == 0, err
    record = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    before, after = record["size"]["params"]
    assert after <= 0.75 * before < after + (before - after) / len(record["removed"])
    assert record["size"]["bytes"] == [4 * before, 4 * after]
    assert min(record["size"]["tokens_per_second"]) > 0
    assert record["budget"] == record["arguments"]["budget"] == "params=75%"
    assert [step["cost"] for step in record["path"]][-1] == after
    assert f"parameters: {before:,.0f} before, {after:,.0f} after" in out
    assert "tokens per second" in out
    assert f"{after:,.0f}" in out.split("of the whole")[1]
    status, _, err = run(*search, "--measure-speed", "--out", tmp_path, "--max-loss", "0.001")
    assert status == 1
    assert "exists already, of the same arguments" in err
    assert "--max-loss: the loss is " in err.splitlines()[-1]
    assert run(*search, "--max-loss", "+100000%")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--num-remove is missing: how many units"),
        (("--num-remove", 2, "--budget", "params=75%"), "--num-remove and --budget are two sizes"),
        (("--budget", "75%"), "--budget: budget takes KIND=AMOUNT, such as params=75%"),
        (("--budget", "params=101%"), "--budget: params must be a number of at least 0 or a share"),
        (("--budget", "params=-1"), "--budget: params must be a number of at least 0 or a share"),
        (("--budget", "watts=1"), "--budget: budget must be one of params, bytes"),
        (
            ("--budget", "params=1K"),
            "--budget params=1000 cannot be met: without all removable units",
        ),
        (("--num-remove", 1, "--max-loss", "5%"), "--max-loss must be an increase"),
        (("--num-remove", 1, "--max-loss", "nan"), "--max-loss must be an increase"),
        (("--num-remove", 1, "--table", "--algorithm", "random"), "--table is of an algorithm"),
    ],
)
def test_wrong_arguments(run, arguments, message):
    status, _, err = run("search", "demo", *DATA, *arguments)
    assert status == 2, err
    assert message in err


def test_a_figure_of_loss_against_cost(run, tmp_path):
    search = ("search", "demo", *DATA, "--algorithm", "greedy", "--num-remove", "3")
    search += ("--out", tmp_path / "r", "--table")
    status, out, err = run(*search, "--figure", tmp_path / "f.svg")
    assert status == 0, err
    assert f"written: {tmp_path / 'f.svg'}" in err
    record = json.loads((tmp_path / "r" / "result.json").read_text())
    model = fp.load_model("demo")
    batch = fp.load_text(demo.TEXT, model.tokenizer, 2, 16, bos=False)
    ev = fp.Evaluator(model, fp.Perplexity(batch))
    masks = fp.from_removed([step["removed"] for step in record["path"]], ev.num_units)
    errors = ev.objective.standard_error(ev.score_samples(masks)).tolist()
    assert [step["standard_error"] for step in record["path"]] == errors
    assert len(errors) == 3
    last = fp.Perplexity.format(record["loss"], errors[-1], named=False)
    assert last in out.split("of the whole")[1]  # the table
    figure = (tmp_path / "f.svg").read_text()
    assert figure.startswith("<?xml")
    for text in ("perplexity", "parameters", "units removed"):
        assert text in figure
    status, _, err = run(*search, "--figure", tmp_path / "f.png")  # of the kept result
    assert status == 0
    assert "nothing was computed" in err
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")


def test_points_of_the_figure_are_metrics_with_their_errors():
    points = [(0, 100.0, 0.0, 0.1), (1, 75.0, 1.0, 0.2), (2, 50.0, float("inf"), 0.1)]
    figure = figures.path_figure(points, fp.Perplexity, "parameters", "a $model, greedy")
    (axes,) = figure.axes
    (line, _, (bars,)) = axes.containers[0]
    assert line.get_xdata().tolist() == [100.0, 75.0]
    np.testing.assert_allclose(line.get_ydata(), [1.0, np.e])
    lengths = [np.ptp(segment[:, 1]) for segment in bars.get_segments()]
    np.testing.assert_allclose(lengths, [2 * 0.1, 2 * 0.2 * np.e])
    assert [text.get_text() for text in axes.texts] == ["0", "1"]
    figures.as_svg(figure)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--figure", "f.pdf"), "--figure must be a .png or .svg file, not 'f.pdf'"),
        (("--figure", "f.png", "--algorithm", "random"), "--figure is of an algorithm that"),
    ],
)
def test_figures_that_cannot_be(run, arguments, message):
    status, _, err = run("search", "demo", *DATA, "--num-remove", 1, *arguments)
    assert status == 2, err
    assert message in err
