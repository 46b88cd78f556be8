"""README.md: its Python prints what the page shows, its commands run, and its length is bounded."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
NUMBER = r"\d+(?:\.\d+)?"


@pytest.mark.slow
def test_the_python_prints_what_the_page_shows(tmp_path):
    code, shown = re.search(r"```python\n(.*?)```\n\n```\n(.*?)```", README, re.DOTALL).groups()
    printed = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True, text=True
    ).stdout
    assert re.sub(NUMBER, "N", printed) == re.sub(NUMBER, "N", shown)
    numbers = [[float(number) for number in re.findall(NUMBER, text)] for text in (printed, shown)]
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-3)  # perplexities have three decimals


@pytest.mark.slow
def test_the_commands_run(tmp_path, monkeypatch, run):
    monkeypatch.chdir(tmp_path)
    (commands,) = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    for command in commands.splitlines():
        status, _, err = run(*shlex.split(command)[1:])
        assert status == 0, f"{command}\n{err}"
    assert (tmp_path / "pruned" / "config.json").exists()


def test_the_page_is_short():
    assert len(README.split()) <= 650
