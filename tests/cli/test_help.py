"""Help groups options by concern; the shell completes commands, options and names."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

from fastprune.search import ALGORITHMS


@pytest.mark.parametrize("command", ["score", "search", "eval"])
def test_help_groups_options(run, command):
    status, out, _ = run(command, "--help")
    assert status == 0
    sections = [line[:-1] for line in out.splitlines() if line.endswith(":") and line[0] != " "]
    assert [name for name in sections if name in ("Output", "Model", "Running")] == [
        name for name in sections if name not in ("Options", "Data")
    ]
    assert {"Options", "Output", "Model", "Running"} <= {*sections}
    options = [line.split()[0] for line in out.splitlines() if line.startswith("  -")]
    assert len(options) == len(set(options))
    assert out.index("Model:") < out.index("--device")
    assert out.index("Running:") < out.index("--workers")


def complete(words: str) -> list[str]:
    """The completions that bash is offered for the last of these words."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    environment |= {"_FASTPRUNE_COMPLETE": "bash_complete", "COMP_WORDS": words}
    environment["COMP_CWORD"] = str(len(words.split(" ")) - 1)
    command = [sys.executable, "-m", "fastprune"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return [line.partition(",")[2] for line in done.stdout.splitlines()]


def test_the_shell_completes():
    assert complete("fastprune se") == ["search"]
    assert complete("fastprune score m --obj") == ["--objective"]
    assert complete("fastprune score m --objective per") == ["perplexity"]
    expected = [name for name in ALGORITHMS if name.startswith("s")]
    assert set(complete("fastprune search m --algorithm s")) == set(expected)
    assert complete("fastprune score m --backend f") == ["fused"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_code_is_printed(run, shell):
    if shutil.which("bash") is None:
        pytest.skip("click asks bash for its version")
    status, out, _ = run("--completion", shell)
    assert status == 0
    assert "_FASTPRUNE_COMPLETE" in out
    assert run("--completion", "csh")[0] == 2


def test_completion_of_bash_works_in_bash():
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("no bash")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    script = (
        f'fastprune() {{ "{sys.executable}" -m fastprune "$@"; }}\n'
        'code="$(fastprune --completion bash)" && eval "$code" && complete -p fastprune'
    )
    done = subprocess.run(
        [bash, "--norc", "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    assert "_fastprune_completion" in done.stdout
