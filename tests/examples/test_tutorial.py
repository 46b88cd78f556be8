"""Every command of docs/tutorial.md runs, in order, and does what the text says."""

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

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(
    r"```(sh|python)\n(.*?)```", (ROOT / "docs" / "tutorial.md").read_text(), re.DOTALL
)


@pytest.mark.slow
def test_the_tutorial(tmp_path, monkeypatch, run, capsys):
    pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "examples")
    path = os.pathsep.join(
        os.path.abspath(entry) for entry in sys.path
    )  # for Python in the shell's commands
    shell = {
        **os.environ,
        "PYTHONPATH": path,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    outputs = []
    for language, text in BLOCKS:
        for command in [text] if language == "python" else text.splitlines():
            words = shlex.split(command)
            if language == "python":
                exec(compile(text, "tutorial.md", "exec"), {})
            elif words[0] == "fastprune":
                status, out, err = run(*words[1:])
                assert status == 0, f"{command}\n{err}"
                outputs.append(out)
            elif words[:2] == ["python", "examples/heal.py"]:
                import heal

                monkeypatch.setattr(sys, "argv", words[1:])
                capsys.readouterr()
                heal.main()
                printed = capsys.readouterr().out
                perplexities = [
                    float(value)
                    for value in re.findall(r"held-out text, .*: perplexity ([0-9.]+)", printed)
                ]
            else:
                subprocess.run(command, shell=True, check=True, env=shell)
    whole, pruned, healed = perplexities
    assert whole < pruned
    assert healed < pruned
    result = json.loads(Path("run/result.json").read_text())
    loaded = fp.load_model("pruned")
    ev = fp.Evaluator(loaded, fp.Perplexity(fp.load_text("text.jsonl", loaded.tokenizer, 16, 128)))
    np.testing.assert_allclose(ev.dense_loss, result["loss"], rtol=1e-5)
    assert f"{result['perplexity']:.3f}" in Path("pruned/README.md").read_text()
    assert any("fewer" in out for out in outputs)  # what sharing saved is said
