"""Every wrong input ends with exit status 2 and one line that names it and what would be right."""

from __future__ import annotations

import shutil
import sys

import numpy as np
import pytest
from documents import text_study, write_document


@pytest.fixture
def fails(run):
    def fails(*arguments, status: int = 2) -> str:
        found, _, err = run(*arguments)
        assert found == status, err
        assert err.count("\n") == 1, err
        assert err.startswith("fastprune: ")
        return err

    return fails


@pytest.fixture
def score(fails, checkpoint, text_file):
    def score(*arguments) -> str:
        return fails(
            "score",
            checkpoint,
            "--calibration",
            text_file,
            "--num-samples",
            2,
            "--seq-len",
            16,
            *arguments,
        )

    return score


def test_masks(score, tmp_path):
    np.save(tmp_path / "long.npy", np.ones((2, 6)))
    assert "6 entries, but the model has 5 units" in score("--masks", tmp_path / "long.npy")
    np.save(tmp_path / "two.npy", np.full((1, 5), 2))
    assert "only 0 and 1" in score("--masks", tmp_path / "two.npy")
    (tmp_path / "row.jsonl").write_text('{"removed": [1]}\n{"kept": [1]}\n')
    assert "row.jsonl:2" in score("--masks", tmp_path / "row.jsonl")
    assert "no such masks file" in score("--masks", tmp_path / "none.npy")
    assert "either" in score()
    assert "either" in score("--masks", tmp_path / "two.npy", "--removed", "1")


def test_removed_units(score, fails, checkpoint, text_file, tmp_path):
    assert "5 is out of range" in score("--removed", "5")
    assert "-1 is out of range" in score("--removed", "-1")
    assert "2 is given twice" in score("--removed", "2,2")
    assert "commas" in score("--removed", "one")
    assert "--removed: units must be integers" in score("--removed", "one")
    search = (
        "search",
        checkpoint,
        "--calibration",
        text_file,
        "--num-samples",
        2,
        "--seq-len",
        16,
        "--num-remove",
        1,
    )
    assert "--protect: protected unit 5 is out of range" in fails(*search, "--protect", "5")
    assert "--protect: units must be integers" in fails(*search, "--protect", "one")
    assert "or one of the presets sleb, shortened-llama" in fails(*search, "--protect", "one")
    assert "out of range" in fails("export", checkpoint, "--removed", "7", "--out", tmp_path / "x")
    assert "--sequence: sequence 0: 7 is no unit" in fails(
        "export", checkpoint, "--sequence", "0,7", "--out", tmp_path / "x"
    )
    assert "one of --removed BLOCKS, --sequence" in fails(
        "export", checkpoint, "--out", tmp_path / "x"
    )
    assert "nothing to export" in fails(
        "export", checkpoint, "--removed", "0,1,2,3,4", "--out", tmp_path / "x"
    )


@pytest.mark.parametrize("budget", [-1, 5, 9])
def test_budget(fails, checkpoint, text_file, budget):
    arguments = ("--calibration", text_file, "--num-samples", 2, "--seq-len", 16)
    assert "num" in fails("search", checkpoint, *arguments, "--num-remove", budget)


def test_names_are_suggested(fails, checkpoint, text_file):
    search = ("search", checkpoint, "--num-remove", 1, "--calibration", text_file)
    beam = (*search, "--algorithm", "beam")
    assert "did you mean 'beam'" in fails(*search, "--algorithm", "beem")
    assert "--racing" not in fails(*search, "--algorithm", "beem")
    assert "did you mean 'perplexity'" in fails(*search, "--objective", "perplexety")
    assert "its options: beam_width=5" in fails(*beam, "--option", "width=5")
    assert "takes int" in fails(*beam, "--option", "beam_width=wide")
    assert "NAME=VALUE" in fails(*beam, "--option", "beam_width")
    assert "granularity" in fails(
        *search, "--granularity", "head", "--num-samples", 2, "--seq-len", 16
    )
    assert "backend" in fails(*search, "--backend", "fast", "--num-samples", 2, "--seq-len", 16)
    assert "dtype" in fails(*search, "--dtype", "float12")
    assert "did you mean 'bfloat16'" in fails(*search, "--dtype", "bf16")
    assert "--device: 'abacus' is no kind of device; such as cpu" in fails(
        *search, "--device", "abacus"
    )
    assert "beam_width of beam must be at least 1" in fails(*beam, "--option", "beam_width=0")
    assert "did you mean 'beam'" in fails("algorithms", "beem")


def test_a_sample_longer_than_the_model_can_take(fails, checkpoint, text_file):
    arguments = ("score", checkpoint, "--calibration", text_file, "--removed", 1, "--seq-len", 65)
    assert "seq-len 65 is longer than the model's 64 positions" in fails(*arguments)


def test_calibration_files(fails, checkpoint, tmp_path):
    def score(file, *more) -> str:
        return fails("score", checkpoint, "--removed", "1", "--calibration", file, *more)

    assert "no such file" in score(tmp_path / "none.txt")
    (tmp_path / "empty.txt").write_text("")
    assert "no text" in score(tmp_path / "empty.txt")
    (tmp_path / "short.txt").write_text("w1 w2 w3 w4 w5 w6 w7 w8 w9")
    short = score(tmp_path / "short.txt", "--seq-len", 4, "--num-samples", 3)
    assert "holds 2 windows of 4 tokens, but 3" in short
    assert "what fits: --num-samples 2 or --seq-len 3" in short
    (tmp_path / "rows.jsonl").write_text('{"txt": "a"}\n')
    assert "rows.jsonl:1" in score(tmp_path / "rows.jsonl")
    (tmp_path / "broken.jsonl").write_text('{"text": \n')
    assert "not valid JSON" in score(tmp_path / "broken.jsonl")
    np.save(tmp_path / "ids.npy", np.full((2, 8), 61))
    assert "outside the model's vocabulary (0 to 60)" in score(tmp_path / "ids.npy")
    np.save(tmp_path / "long.npy", np.ones((1, 65), dtype=int))
    assert "65 tokens is longer than the model's 64 positions" in score(tmp_path / "long.npy")
    np.save(tmp_path / "empty.npy", np.ones((0, 8), dtype=int))
    assert "no token ids" in score(tmp_path / "empty.npy")
    (tmp_path / "text.pdf").write_text("x")
    assert ".safetensors" in score(tmp_path / "text.pdf")


def test_fewer_questions_than_asked_for(fails, checkpoint, questions):
    on = ("--calibration", questions, "--objective", "margin", "--num-samples", 8)
    assert "holds 7 questions, but 8 samples" in fails("score", checkpoint, *on, "--removed", "1")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"prompt": "w1", "choices": [], "answer": 0}', "choices"),
        ('{"prompt": "w1", "answer": 0}', "choices"),
        ('{"prompt": "w1", "choices": [" w2"], "answer": 0}', "at least 2"),
        ('{"prompt": "w1", "choices": [" w2", " w3"], "answer": 2}', "0 to 1, not 2"),
        ('{"prompt": "w1", "choices": [" w2", " w3"], "answer": "w2"}', "answer"),
        ('{"choices": [" w2", " w3"], "answer": 0}', "expected a row"),
        ('{"prompt": "", "choices": [" w2", " w3"], "answer": 0}', "prompt is empty"),
        ("", "no questions"),
    ],
)
def test_task_rows(fails, checkpoint, tmp_path, row, message):
    (tmp_path / "tasks.jsonl").write_text(row + "\n")
    arguments = (
        "--objective",
        "margin",
        "--calibration",
        tmp_path / "tasks.jsonl",
        "--removed",
        "1",
    )
    err = fails("score", checkpoint, *arguments)
    assert message in err
    assert "tasks.jsonl" in err


def test_model_folders(fails, checkpoint, text_file, tmp_path):
    def score(folder) -> str:
        return fails("score", folder, "--removed", "1", "--calibration", text_file)

    assert "no such model folder" in score(tmp_path / "nowhere")
    (tmp_path / "bare").mkdir()
    assert "config.json" in score(tmp_path / "bare")
    cut = tmp_path / "cut"
    shutil.copytree(checkpoint, cut)
    weights = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(weights[:-100])
    assert "truncated" in score(cut)
    (cut / "model.safetensors").unlink()
    (cut / "pytorch_model.bin").write_bytes(b"pickle")
    assert "pickle" in score(cut)
    (cut / "model.safetensors.index.json").write_text(
        '{"weight_map": {"lm_head.weight": "model-1.safetensors"}}'
    )
    assert "model-1.safetensors: this shard is missing" in score(cut)


def test_nothing_is_overwritten(score, fails, checkpoint, tmp_path):
    (tmp_path / "s.jsonl").write_text("mine")
    assert "not overwritten" in score("--removed", "1", "--out", tmp_path / "s.jsonl")
    assert "not overwritten" in fails("export", checkpoint, "--removed", "1", "--out", tmp_path)
    assert (tmp_path / "s.jsonl").read_text() == "mine"


@pytest.mark.parametrize("command", ["score", "search", "export", "study", "demo"])
def test_an_output_below_a_file_is_refused_before_the_model_is_opened(
    fails, text_file, tmp_path, command
):
    arguments = {
        "score": ("nowhere/model", "--removed", "1", "--calibration", text_file),
        "search": ("nowhere/model", "--num-remove", "1", "--calibration", text_file),
        "export": ("nowhere/model", "--removed", "1"),
        "study": (write_document(tmp_path / "s.toml", **text_study("nowhere/model", text_file)),),
        "demo": (),
    }[command]
    assert "is a file, not a folder" in fails(
        command, *arguments, "--out", text_file / "below" / "x"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "not the result.json of a search"),
        (
            '{"removed": 3, "objective": "kl", "granularity": "block", "dense_loss": 1, "loss": '
            '2, "num_units": 5}',
            "not the result.json",
        ),
        (
            '{"removed": [], "objective": "kl", "granularity": "sublayer", "dense_loss": 1, '
            '"loss": 2, "num_units": 5}',
            "sublayers",
        ),
        (
            '{"removed": [], "objective": "kl", "granularity": "block", "dense_loss": [], "loss": '
            '2, "num_units": 5}',
            "must be numbers",
        ),
        (
            '{"removed": [9], "objective": "kl", "granularity": "block", "dense_loss": 1, "loss": '
            '2, "num_units": 5}',
            "9 is out of range",
        ),
        (
            '{"removed": [1], "objective": "kl", "granularity": "block", "dense_loss": 1, "loss": '
            '2, "num_units": 12}',
            "of a model of 12 blocks; ",
        ),
    ],
)
def test_a_result_that_cannot_be_exported(fails, checkpoint, tmp_path, text, message):
    (tmp_path / "result.json").write_text(text)
    err = fails("export", checkpoint, "--result", tmp_path / "result.json", "--out", tmp_path / "x")
    assert message in err
    assert "--result: " in err
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("command", ["study", "demo"])
@pytest.mark.parametrize("library", ["sklearn", "matplotlib"])
def test_a_missing_library_is_named_before_the_model_is_opened(
    fails, text_file, tmp_path, monkeypatch, command, library
):
    monkeypatch.setitem(sys.modules, library, None)
    tables = text_study("nowhere/model", text_file, search_algorithms=["greedy"])
    document = write_document(tmp_path / "study.toml", **tables)
    err = fails(command, *([document] if command == "study" else []), "--out", tmp_path / "s")
    assert "pip install 'fastprune[" in err
    assert not (tmp_path / "s").exists()


def test_usage(fails, checkpoint):
    assert "No such command" in fails("serach")
    assert "No such option" in fails("info", checkpoint, "--fast")
    assert "num-remove" in fails("search", checkpoint)
    assert "--memory-gb" in fails(
        "score", checkpoint, "--calibration", __file__, "--removed", "1", "--memory-gb", 0
    )
