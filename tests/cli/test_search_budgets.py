"""Budgets, gates and tables of `fastprune search`."""

from __future__ import annotations

import json

import pytest

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
    assert "holds the result of the same arguments" in err
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
        (("--budget", "params=1K"), "--budget params=1000 cannot be met: without all units"),
        (("--num-remove", 1, "--max-loss", "5%"), "--max-loss must be an increase"),
        (("--num-remove", 1, "--max-loss", "nan"), "--max-loss must be an increase"),
        (("--num-remove", 1, "--table", "--algorithm", "random"), "--table is of an algorithm"),
    ],
)
def test_wrong_arguments(run, arguments, message):
    status, _, err = run("search", "demo", *DATA, *arguments)
    assert status == 2, err
    assert message in err
