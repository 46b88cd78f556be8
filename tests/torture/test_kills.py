"""Killed at any unit run, a command that is given again ends with the same result, and repeats one
chunk at most."""

from __future__ import annotations

import signal

import pytest
from harness import EFFORT, killed_at, spread, watched

pytestmark = pytest.mark.slow

COMMANDS = ("score", "search", "study", "export")


@pytest.mark.parametrize("name", COMMANDS)
def test_killed_and_given_again(commands, tmp_path, name):
    arguments, read = commands(name, tmp_path)
    outcome, whole = watched(tmp_path, *arguments)
    assert outcome.status == 0, outcome.err
    expected = read()
    for number in spread(whole.runs, round(EFFORT) + 2)[1:-1]:
        folder = tmp_path / str(number)
        folder.mkdir()
        arguments, read = commands(name, folder)
        assert killed_at(number, *arguments).status == -signal.SIGKILL
        outcome, rest = watched(folder, *arguments)
        assert outcome.status == 0, (number, outcome.err)
        assert read() == expected, number
        if name != "export":  # the check of a written checkpoint begins again
            assert rest.runs <= whole.most_again(number), number


@pytest.mark.parametrize("name", ["score"] if EFFORT <= 1 else ["score", "search", "study"])
def test_killed_again_and_again(commands, tmp_path, name):
    """A run that is killed after so many unit runs, each time it is given, comes to its end all the
    same."""
    (tmp_path / "whole").mkdir()
    arguments, read = commands(name, tmp_path / "whole")
    _, whole = watched(tmp_path, *arguments)
    expected = read()
    arguments, read = commands(name, tmp_path)
    each = whole.longest_gap * 2 + 20
    for _ in range(whole.runs):
        if killed_at(each, *arguments).status != -signal.SIGKILL:
            break
    assert read() == expected
