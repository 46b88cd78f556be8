"""The commands, from arguments to files, compared with the library."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import fastprune as fp
from fastprune import demo
from fastprune.evaluator import BACKENDS
from fastprune.masks import parse_removed
from fastprune.search import ALGORITHMS


@pytest.fixture
def evaluator(checkpoint, text_file):
    model = fp.load_model(checkpoint)
    return fp.Evaluator(model, fp.Perplexity(fp.load_text(text_file, model.tokenizer, 4, 16)))


def test_info(run, checkpoint):
    status, out, _ = run("info", checkpoint)
    assert status == 0
    model = fp.load_model(checkpoint)
    parameters = sum(values.numel() for values in model.hf.parameters())
    backend = fp.Evaluator(model, fp.Perplexity(fp.TokenBatch.from_ids([[1, 2]]))).backend
    for word in ("llama", "blocks", "5", backend.split()[0], "sublayers", "questions"):
        assert word in out
    lines = {line.split()[0]: " ".join(line.split()[1:]) for line in out.splitlines()}
    assert lines["blocks"] == "5, numbered 0 to 4"
    assert lines["sublayers"].startswith("10, numbered 0 to 9 (attn 0, mlp 0 to mlp 4)")
    assert lines["questions"] == "the choices of a question share its tokens"
    sizes = f"{parameters:,}, {parameters * 4 / 2**20:,.0f} MiB in float32"
    assert lines["parameters"] == sizes


def test_every_backend_can_be_asked_for(run):
    status, out, _ = run("score", "--help")
    assert status == 0
    assert f"[{'|'.join(BACKENDS)}]" in out


def test_score_writes_what_the_library_computes(run, checkpoint, text_file, tmp_path, evaluator):
    arguments = ("--calibration", text_file, "--num-samples", 4, "--seq-len", 16)
    status, out, _ = run(
        "score",
        checkpoint,
        *arguments,
        "--removed",
        "1,2",
        "--removed",
        "",
        "--removed",
        "4",
        "--out",
        tmp_path / "s.jsonl",
    )
    assert status == 0
    rows = [json.loads(line) for line in (tmp_path / "s.jsonl").read_text().splitlines()]
    assert [row["removed"] for row in rows] == [[1, 2], [], [4]]
    assert [row["loss"] for row in rows] == evaluator.score(
        fp.from_removed([(1, 2), (), (4,)], 5)
    ).tolist()
    assert "unit runs" in out


@pytest.mark.parametrize("kind", ["npy", "jsonl"])
def test_score_reads_mask_files(run, checkpoint, text_file, tmp_path, evaluator, kind):
    subsets = [(0,), (1, 3), ()]
    masks = tmp_path / f"masks.{kind}"
    if kind == "npy":
        np.save(masks, fp.from_removed(subsets, 5).astype(int))
    else:
        masks.write_text("".join(json.dumps({"removed": s}) + "\n" for s in subsets))
    out_file = tmp_path / "scores.jsonl"
    status, *_ = run(
        "score",
        checkpoint,
        "--calibration",
        text_file,
        "--num-samples",
        4,
        "--seq-len",
        16,
        "--masks",
        masks,
        "--out",
        out_file,
    )
    assert status == 0
    losses = [json.loads(line)["loss"] for line in out_file.read_text().splitlines()]
    assert losses == evaluator.score(fp.from_removed(subsets, 5)).tolist()


@pytest.mark.parametrize("objective", ["margin", "likelihood", "accuracy", "kl", "agreement"])
def test_score_under_every_objective(run, checkpoint, text_file, questions, objective):
    on_text = objective in ("kl", "agreement")
    calibration = text_file if on_text else questions
    extra = ("--num-samples", 4, "--seq-len", 16) if on_text else ()
    status, out, _ = run(
        "score",
        checkpoint,
        "--objective",
        objective,
        "--calibration",
        calibration,
        *extra,
        "--removed",
        "1",
    )
    assert status == 0
    assert objective in out


def test_search_writes_its_result(run, checkpoint, text_file, tmp_path, evaluator):
    arguments = (
        "--calibration",
        text_file,
        "--num-samples",
        4,
        "--seq-len",
        16,
        "--out",
        tmp_path / "r",
    )
    beam = ("--algorithm", "beam", "--option", "beam_width=2")
    status, out, _ = run("search", checkpoint, *beam, "--num-remove", 2, *arguments)
    assert status == 0
    written = json.loads((tmp_path / "r" / "result.json").read_text())
    expected = fp.run_search(evaluator, "beam", 2, beam_width=2)
    assert tuple(written["removed"]) == expected.removed
    assert written["loss"] == expected.loss
    assert written["dense_loss"] == evaluator.dense_loss
    assert len(written["history"]) == written["evaluations"] == expected.evaluations
    assert "removed: " in out
    assert written["removed_names"] == [f"block {unit}" for unit in expected.removed]
    assert written["unit_runs"] == expected.cost.unit_runs < written["naive_unit_runs"]


def test_sublayer_search_and_protection(run, checkpoint, text_file):
    arguments = (
        "--calibration",
        text_file,
        "--num-samples",
        4,
        "--seq-len",
        16,
        "--granularity",
        "sublayer",
    )
    status, out, _ = run(
        "search",
        checkpoint,
        "--num-remove",
        3,
        "--protect",
        "0,9",
        "--algorithm",
        "greedy",
        *arguments,
    )
    assert status == 0
    removed = parse_removed(out.split("removed: ")[1].splitlines()[0])
    assert not {0, 9} & set(removed)
    names = [f"{('attn', 'mlp')[unit % 2]} {unit // 2}" for unit in removed]
    assert f"sublayers: {', '.join(names)}" in out
    status, out, _ = run("search", checkpoint, "--num-remove", 2, "--protect", "sleb", *arguments)
    assert status == 0
    assert not {0, 1, 8, 9} & set(parse_removed(out.split("removed: ")[1].splitlines()[0]))
    status, out, _ = run("score", checkpoint, "--removed", "1,4", *arguments)
    assert status == 0
    assert "mlp 0, attn 2" in out
    assert "1 mask that removes 2 of 10 units" in out


def test_the_demo_text_is_scored_alike_however_its_path_is_written(run, monkeypatch):
    monkeypatch.chdir(demo.HERE)
    found = []
    for calibration in (
        (),
        ("--calibration", demo.TEXT),
        ("--calibration", demo.TEXT.relative_to(demo.HERE)),
    ):
        status, out, _ = run("score", "demo", "--removed", "3", "--num-samples", 2, *calibration)
        assert status == 0
        found.append(out.splitlines()[:5])  # the table, not the seconds
    assert found[0] == found[1] == found[2]


def test_algorithms_can_be_asked_for_by_name(run):
    status, out, _ = run("algorithms")
    assert status == 0
    assert all(name in out for name in ALGORITHMS)
    assert out.startswith("Begin with greedy: ")
    status, out, _ = run("algorithms", "surrogate")
    assert status == 0
    assert "ridge regression" in out
    assert "beam_width" not in out


def test_savings_are_claimed_only_where_there_are_any(run, checkpoint, text_file):
    arguments = (
        "score",
        checkpoint,
        "--calibration",
        text_file,
        "--num-samples",
        4,
        "--seq-len",
        16,
    )
    _, out, _ = run(*arguments, "--removed", "4", "--removed", "3-4", "--removed", "2-4")
    assert (
        "3 masks that remove 1 to 3 of 5 units, and the whole model: 5 unit runs where one pass "
        "per mask takes 14 (2.8x fewer)" in out
    )
    _, out, _ = run(*arguments, "--removed", "4", "--objective", "kl")
    reference = "kl's run of the whole model among them"
    assert f"5 unit runs, {reference}, where one pass per mask takes 4" in out


def test_exported_checkpoint_has_the_same_loss(run, checkpoint, text_file, tmp_path, evaluator):
    status, *_ = run("export", checkpoint, "--removed", "1,3", "--out", tmp_path / "pruned")
    assert status == 0
    model = fp.load_model(tmp_path / "pruned")
    again = fp.Evaluator(model, fp.Perplexity(fp.load_text(text_file, model.tokenizer, 4, 16)))
    assert again.num_units == 3
    assert again.dense_loss == evaluator.score(fp.from_removed([(1, 3)], 5))[0]


def test_an_exported_sequence_has_its_score(run, checkpoint, text_file, tmp_path, evaluator):
    status, out, _ = run(
        "export", checkpoint, "--sequence", "0,1,1-2,4", "--out", tmp_path / "grown"
    )
    assert status == 0
    assert "5 blocks, made of 5: 0,1,1,2,4" in out
    model = fp.load_model(tmp_path / "grown")
    again = fp.Evaluator(model, fp.Perplexity(fp.load_text(text_file, model.tokenizer, 4, 16)))
    np.testing.assert_allclose(
        again.dense_loss, evaluator.score(sequences=[(0, 1, 1, 2, 4)])[0], rtol=1e-6
    )


def test_the_result_of_a_search_is_exported_with_its_losses(run, checkpoint, text_file, tmp_path):
    data = ("--calibration", text_file, "--num-samples", 4, "--seq-len", 16)
    run(
        "search",
        checkpoint,
        *data,
        "--algorithm",
        "greedy",
        "--num-remove",
        2,
        "--out",
        tmp_path / "run",
    )
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    of = {"file": str(text_file), "num_samples": 4, "seq_len": 16, "sample_seed": 0}
    assert result["calibration"] == of
    status, out, _ = run(
        "export",
        checkpoint,
        "--result",
        tmp_path / "run" / "result.json",
        "--base-model",
        "org/base",
        "--out",
        tmp_path / "pruned",
    )
    assert status == 0
    (line,) = (line for line in out.splitlines() if line.startswith("for other tools: "))
    recipes = [Path(place) for place in line.partition(": ")[2].split(", ")]
    names = ["evopress.txt", "llama.cpp.txt", "llm-drop.json", "mergekit.yaml"]
    assert [path.name for path in recipes] == names
    assert all(path.is_file() for path in recipes)
    card = (tmp_path / "pruned" / "README.md").read_text()
    assert "base_model: org/base" in card
    assert (
        f"| perplexity (lower is better), 4 samples of {text_file.name} "
        f"| {math.exp(result['dense_loss']):.3f} | {math.exp(result['loss']):.3f} |" in card
    )
    assert "its card has the losses" not in out
    assert f"without the blocks {', '.join(map(str, result['removed']))}" in card


def test_an_exported_checkpoint_has_the_modes_that_the_umask_leaves(checkpoint, tmp_path):
    before = os.umask(0o027)
    try:
        fp.export(fp.load_model(checkpoint), tmp_path / "pruned", removed=(1,))
    finally:
        os.umask(before)
    assert (tmp_path / "pruned").stat().st_mode & 0o777 == 0o750
    assert {
        file.stat().st_mode & 0o777 for file in (tmp_path / "pruned").rglob("*") if file.is_file()
    } == {0o640}
    assert [path.name for path in tmp_path.iterdir()] == ["pruned"]


def test_non_finite_losses_are_written_as_such(run, checkpoint, text_file, tmp_path):
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    status, *_ = run("export", checkpoint, "--removed", "", "--out", broken)
    assert status == 0
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.2.mlp.down_proj.weight"][:] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    arguments = ("--calibration", text_file, "--num-samples", 2, "--seq-len", 16)
    status, *_ = run(
        "score",
        broken,
        *arguments,
        "--removed",
        "2",
        "--removed",
        "1",
        "--out",
        tmp_path / "s.jsonl",
    )
    assert status == 0
    finite, broken_loss = [
        json.loads(line)["loss"] for line in (tmp_path / "s.jsonl").read_text().splitlines()
    ]
    assert isinstance(finite, float)
    assert broken_loss == "nan"
    status, out, _ = run("search", broken, *arguments, "--num-remove", 1, "--algorithm", "greedy")
    assert status == 0
    assert "removed: 2" in out
    status, _, err = run("search", broken, *arguments, "--num-remove", 1, "--protect", "2")
    assert status == 1
    assert "finite" in err


def test_score_prints_the_whole_model_that_it_ran(run, checkpoint, questions):
    data = ("--calibration", questions, "--objective", "accuracy")
    model = fp.load_model(checkpoint)
    ev = fp.Evaluator(model, fp.TaskAccuracy(fp.load_tasks(questions, model.tokenizer)))
    whole = ev.objective.format(ev.dense_loss)
    status, out, _ = run("score", checkpoint, "--removed", "1", *data)
    assert status == 0
    assert f"whole model: {whole.split()[0]} {whole.split()[1]} ±" in out
    assert "difference to the whole model" in out
    assert "whole model:" not in run("score", checkpoint, "--removed", "-", *data)[1]


def test_runs_as_a_program(checkpoint):
    command = [sys.executable, "-m", "fastprune", "score", checkpoint, "--removed", "1"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "--calibration" in done.stderr


def test_weights_that_are_read_by_turns(run, checkpoint, text_file):
    status, _, error = run("info", checkpoint, "--weights-gb", 2**-30)
    assert status == 2
    least = re.search(
        r"the smallest that works is \d+, not 1 \(--weights-gb ([\d.]+)\)$", error.strip()
    )[1]
    status, output, _ = run("info", checkpoint, "--weights-gb", least)
    assert status == 0
    assert "5 of up to 1 blocks" in output
    assert "read by turns" in output
    score = (
        "score",
        checkpoint,
        "--calibration",
        text_file,
        "--seq-len",
        16,
        "--num-samples",
        4,
        "--removed",
        "1",
    )
    whole, streamed = run(*score), run(*score, "--weights-gb", least)
    assert whole[0] == streamed[0] == 0
    assert [line for line in streamed[1].splitlines() if "│" in line] == [
        line for line in whole[1].splitlines() if "│" in line
    ]


def test_the_memory_that_is_named_is_enough(run, checkpoint, text_file):
    score = (
        "score",
        checkpoint,
        "--calibration",
        text_file,
        "--seq-len",
        16,
        "--num-samples",
        4,
        "--removed",
        "1",
    )
    status, _, error = run(*score, "--memory-gb", 1e-7)
    assert status == 2
    assert error.startswith("fastprune: --memory-gb is too small: one row of the batch takes ")
    least = re.search(r"\(--memory-gb ([\d.]+)\)$", error.strip())[1]
    assert run(*score, "--memory-gb", least)[0] == 0
    assert run(*score, "--memory-gb", float(least) / 2)[0] == 2


def test_the_demo_writes_its_model_and_data(run, tmp_path):
    status, out, err = run("demo", "--files", tmp_path / "new")
    assert (status, err) == (0, "")
    _, *command = out.splitlines()[-1].removeprefix("next: ").split()
    assert run(*command)[0] == 0
    text = ("--calibration", tmp_path / "new" / "data" / "text.jsonl", "--no-bos")
    options = ("--num-samples", 2, "--seq-len", 16, "--removed", 3)
    assert run("score", tmp_path / "new" / "model", *text, *options)[0] == 0
    status, _, err = run("demo", "--files", tmp_path / "new")  # nothing is overwritten
    assert (status, "--files" in err, "exists already" in err) == (2, True, True)
    assert run("demo", "--files", tmp_path / "other", "--quick")[0] == 2


def test_an_interrupted_copy_of_the_demo_leaves_nothing(run, tmp_path, monkeypatch):
    copytree = shutil.copytree

    def interrupted(source, place):
        copy = copytree(source, place)
        if place.name == "data":
            raise KeyboardInterrupt
        return copy

    monkeypatch.setattr("shutil.copytree", interrupted)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    status, _, err = run("demo", "--files", tmp_path / "new")
    assert status == 130
    assert err == "fastprune: interrupted; nothing is kept; the same command begins again\n"
    assert not list((tmp_path / "new").iterdir())


def test_a_package_that_a_study_lacks_is_not_blamed_on_its_folder(run, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    status, _, err = run("demo", "--quick", "--out", tmp_path / "file" / "s")
    assert (status, err.startswith("fastprune: --out: ")) == (2, True)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    status, _, err = run("demo", "--quick", "--out", tmp_path / "s")
    assert (status, err.startswith("fastprune: a study needs scikit-learn")) == (2, True)


@pytest.mark.slow
def test_the_demo_ends_with_its_answer_and_the_next_command(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, err = run("demo", "--quick", "--quiet", "--out", "demo")
    assert (status, err) == (0, "")
    answer, written, following = out.splitlines()[-3:]
    assert re.fullmatch(
        r"Remove [\d -]+: perplexity \(lower is better\) [\d.]+ ± [\d.]+ -> [\d.]+ ± [\d.]+, "
        r"difference [-+][\d.]+ ± .*, accuracy \(higher is better\) [\d.]+ ± [\d.]+ % -> .* points"
        r".*, \d+ % fewer parameters \(on held-out data\)",
        answer,
    )
    assert written == "written to demo: report.html, study.json, study.toml"
    program, *command = following.removeprefix("next: ").split()
    assert program == "fastprune"
    assert run(*command)[0] == 0
    assert (tmp_path / "demo" / "pruned" / "model.safetensors").is_file()
