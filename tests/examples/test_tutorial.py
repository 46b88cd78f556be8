"""Every step of docs/tutorial.md runs in an empty folder, in order, and does what the text says."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import fastprune as fp

PAGE = (Path(__file__).parents[2] / "docs" / "tutorial.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(sh|python)\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.slow
def test_the_tutorial(tmp_path, monkeypatch, run):
    pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    path = os.pathsep.join(map(os.path.abspath, sys.path))  # for Python in the shell's commands
    outputs = {}  # of fastprune's commands
    for language, text in BLOCKS:
        for command in [text] if language == "python" else text.replace("\\\n", "").splitlines():
            words = shlex.split(command)
            if language == "python":
                exec(compile(text, "tutorial.md", "exec"), {})
            elif words[0] == "fastprune":
                status, outputs[command], err = run(*words[1:])
                assert status == 0, f"{command}\n{err}"
            else:
                words[0] = sys.executable
                subprocess.run(words, check=True, env={**os.environ, "PYTHONPATH": path})

    result = json.loads(Path("run/result.json").read_text())
    assert result["removed"] == [3, 5, 7, 8, 11]  # which the page judges
    loaded = fp.load_model("pruned")
    ev = fp.Evaluator(
        loaded, fp.Perplexity(fp.load_text("data/text.jsonl", loaded.tokenizer, 32, 128, bos=False))
    )
    np.testing.assert_allclose(ev.dense_loss, result["loss"], rtol=1e-5)
    assert f"{result['perplexity']:.3f}" in Path("pruned/README.md").read_text()

    whole, pruned, healed = (
        float(value)
        for command, out in outputs.items()
        if "text-heldout" in command
        for value in re.findall(r"(\d\.\d{3}) ±", out)[: 2 if " model " in command else 1]
    )
    assert whole < pruned
    assert healed < pruned


@pytest.mark.slow
def test_its_tables_are_what_the_commands_print(tmp_path, monkeypatch, run):
    from fastprune import demo

    monkeypatch.chdir(tmp_path)
    Path("model").symlink_to(demo.MODEL_DIR)
    Path("data").symlink_to(demo.TEXT.parent)
    printed = "".join(
        run(*shlex.split(command)[1:])[1]
        for command in re.findall(
            r"^(fastprune score model .*)$", PAGE.replace("\\\n", ""), re.MULTILINE
        )
    )
    tables = PAGE[: PAGE.index("## 6.")]  # a training's rounding follows the processor
    shown = re.findall(r"(\d+\.\d+) ± (\d\.\d+)", "".join(re.findall(r"^\|.*$", tables, re.M)))
    values = re.findall(r"(\d+\.\d+) ± (\d\.\d+)", printed)
    for number, error in shown:
        assert any(
            abs(float(number) - float(other)) <= 0.002 and abs(float(error) - float(its)) <= 0.002
            for other, its in values
        ), (number, error)
