"""Sequences in the shell: score, eval, search and export take them, and results name them."""

from __future__ import annotations

import json

import pytest

import fastprune as fp

DATA = ("--num-samples", 4, "--seq-len", 16)


@pytest.fixture
def evaluator(checkpoint, text_file):
    model = fp.load_model(checkpoint)
    return fp.Evaluator(model, fp.Perplexity(fp.load_text(text_file, model.tokenizer, 4, 16)))


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_score_takes_sequences(run, checkpoint, text_file, tmp_path, evaluator):
    arguments = ("score", checkpoint, "--calibration", text_file, *DATA)
    named = ("--sequence", "0-3,2-4", "--sequence", "0,2 4")
    status, *_ = run(*arguments, *named, "--out", tmp_path / "s.jsonl")
    assert status == 0
    repeated, mask = lines(tmp_path / "s.jsonl")
    assert repeated["sequence"] == [0, 1, 2, 3, 2, 3, 4]
    assert mask["removed"] == [1, 3]  # a sequence that ascends is a mask
    losses = evaluator.score(sequences=[(0, 1, 2, 3, 2, 3, 4), (0, 2, 4)]).tolist()
    assert [repeated["loss"], mask["loss"]] == losses
    status, out, _ = run(*arguments, *named)
    assert "sequence 0-3 2-4" in out
    assert "1 mask that removes 2 of 5 units, 1 sequence that runs 7 units of 5" in out
    status, out, _ = run(*arguments, *named, "--json")
    rows = json.loads(out)["masks"]
    assert rows[0]["sequence"] == [0, 1, 2, 3, 2, 3, 4]
    assert rows[0]["difference"]["error"] > 0


def test_a_file_may_hold_masks_and_sequences(run, checkpoint, text_file, tmp_path, evaluator):
    masks = tmp_path / "masks.jsonl"
    masks.write_text('{"sequence": [0, 1, 1, 2, 3, 4]}\n{"removed": [2]}\n')
    out_file = tmp_path / "s.jsonl"
    arguments = ("--calibration", text_file, *DATA, "--masks", masks, "--out", out_file)
    assert run("score", checkpoint, *arguments)[0] == 0
    sequences = [(0, 1, 1, 2, 3, 4), (0, 1, 3, 4)]
    assert fp.load_sequences(masks, 5) == sequences
    assert [row["loss"] for row in lines(out_file)] == evaluator.score(sequences=sequences).tolist()


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("score", ("--sequence", "0-9"), "--sequence: sequence 0: 5 is no unit; the model's units"),
        ("score", ("--sequence", "0-3-1"), "--sequence: units must be integers separated by"),
        ("score", ("--sequence", "3-1"), "--sequence: 3-1 runs backwards"),
        ("score", ("--sequence", ""), "--sequence: a sequence names at least one unit"),
        ("score", ("--sequence", "-"), "--sequence: a sequence names at least one unit"),
        ("score", ("--sequence", "all"), "--sequence: units must be integers"),
        ("score", ("--sequence", "0-4 " * 2000), "sequence 0 has more than 4096 units"),
        ("score", ("--sequence", "0,1", "--removed", "1"), "give masks either as --masks FILE"),
        ("score", (), "give masks either as --masks FILE, or as --removed or"),
        (
            "search",
            ("--algorithm", "repeat", "--num-remove", 1),
            "--num-remove has no meaning for repeat",
        ),
        ("search", ("--algorithm", "greedy"), "--num-remove is missing"),
        ("export", ("--sequence", "0,9", "--out", "x"), "--sequence: sequence 0: 9 is no unit"),
        ("export", ("--sequence", "0", "--removed", "1", "--out", "x"), "one of --removed BLOCKS"),
    ],
)
def test_refusals(run, checkpoint, text_file, command, arguments, message):
    data = () if command == "export" else ("--calibration", text_file, *DATA)
    status, _, err = run(command, checkpoint, *data, *arguments)
    assert status == 2
    assert message in err
    assert err.count("\n") == 1


def test_a_search_over_sequences_is_printed_and_exported(
    run, checkpoint, text_file, tmp_path, evaluator
):
    data = ("--calibration", text_file, *DATA, "--option", "lengths=1-2")
    command = ("search", checkpoint, *data, "--algorithm", "repeat", "--out", tmp_path / "run")
    status, out, _ = run(*command)
    assert status == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert "removed" not in result
    assert result["loss"] == evaluator.score(sequences=[result["sequence"]])[0]
    assert result["loss"] == min(row["loss"] for row in result["history"])
    assert len(result["history"]) == 9
    assert result["difference"]["error"] > 0
    text = ",".join(map(str, result["sequence"]))
    assert f"sequence: {spelled(result['sequence'])}" in out
    assert "difference to the whole model" in out
    again = run(*command)[1]
    assert f"sequence: {spelled(result['sequence'])}" in again
    status, out, _ = run(
        "export", checkpoint, "--result", tmp_path / "run" / "result.json", "--out", tmp_path / "m"
    )
    assert status == 0
    assert f"made of 5: {text}" in out
    model = fp.load_model(tmp_path / "m")
    assert model.num_blocks == len(result["sequence"])
    ev = fp.Evaluator(model, evaluator.objective)
    assert ev.dense_loss == pytest.approx(result["loss"], rel=1e-6)


def spelled(sequence) -> str:
    """Runs by their ends: [0, 1, 1, 2] is 0-1 1-2."""
    runs = [[sequence[0]]]
    for unit in sequence[1:]:
        runs.append([unit]) if unit != runs[-1][-1] + 1 else runs[-1].append(unit)
    return " ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
