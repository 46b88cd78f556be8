"""Help groups options by concern; the shell completes commands, options and names."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator

import click
import pytest

from fastprune.cli import cli
from fastprune.search import ALGORITHMS

HEADLESS = {"What", "Which", "Who", "Where", "Whether", "Of", "For", "Such"}


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


def every_command(group: click.Group, name: str = "") -> Iterator[tuple[str, click.Command]]:
    """The group and all commands below it, by name."""
    yield name, group
    for command in group.commands.values():
        if isinstance(command, click.Group):
            yield from every_command(command, f"{name} {command.name}")
        else:
            yield f"{name} {command.name}", command


@pytest.mark.parametrize("command", dict(every_command(cli)).values(), ids=dict(every_command(cli)))
def test_help_is_in_plain_sentences(command):
    """Every option is explained. No sentence lacks a head, as "Of generated texts." does."""
    options = [own for own in command.params if isinstance(own, click.Option)]
    texts = {own.opts[0]: own.help for own in options} | {"the command": command.help}
    for place, text in texts.items():
        assert text, f"{place} has no help"
        for sentence in re.split(r"(?<=[.;:])\s+", text.strip()):
            assert sentence.split()[0] not in HEADLESS, f"{place}: {sentence}"
        assert text.rstrip().endswith("."), f"{place}: {text}"
