"""Calls to the system that fail, any of them, once, at any point: one line, nothing half written,
and the same result when the command is given again."""

from __future__ import annotations

import errno
import json
import os
import sys

import pytest
from harness import EFFORT, command, failing, forked, how_often, small_files, spread, unit_runs

pytestmark = pytest.mark.slow

COMMANDS = ("score", "search", "export", "study")
CALLS = ("fsync", "rename", "replace", "mkdir", "open", "unlink", "rmdir", "scandir")
SHORT = EFFORT <= 1
PAIRS = [
    (name, call)
    for i, name in enumerate(COMMANDS)
    for j, call in enumerate(CALLS)
    if not SHORT or (i + j) % 4 == 0
]


def no_space() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture(scope="module")
def expected():
    return {}


def check(commands, tmp_path, expected, name, tag, broken) -> bool:
    """Run a command under `broken`, then again without; whether the fault was reached, as far as
    can be seen."""
    if name not in expected:
        whole = tmp_path / "whole"
        whole.mkdir()
        arguments, read = commands(name, whole)
        assert forked(lambda: command(*arguments)).status == 0
        expected[name] = read()
    folder = tmp_path / tag
    folder.mkdir()
    arguments, read = commands(name, folder)
    first = forked(lambda: broken(arguments))
    assert "Traceback" not in first.err, first.err
    if first.status == 0:
        assert read() == expected[name], (name, tag)
        return False
    assert first.status in (1, 2), (name, tag, first)
    assert first.is_one_line, (name, tag, first.err)
    again = forked(lambda: command(*arguments))
    if again.status != 0:  # the first had written its result already
        assert "is not overwritten" in again.err, (name, tag, again.err)
    assert read() == expected[name], (name, tag)
    return True


def fails(owner, call: str, number: int, error=no_space):
    def broken(arguments):
        with failing(owner, call, number, error):
            return command(*arguments)

    return broken


@pytest.mark.parametrize(("name", "call"), PAIRS)
def test_a_call_to_the_system_fails(commands, tmp_path, expected, name, call):
    """At every one of these calls that the command makes; of many, at some."""
    numbers = [1]
    if not SHORT:
        folder = tmp_path / "counted"
        folder.mkdir()
        arguments, _ = commands(name, folder)
        numbers = spread(how_often(tmp_path, os, call, *arguments), round(3 * EFFORT))
    for number in numbers:
        check(commands, tmp_path, expected, name, f"{call}-{number}", fails(os, call, number))


@pytest.mark.parametrize("name", COMMANDS)
def test_the_disk_is_full(commands, tmp_path, expected, name):
    """No file grows beyond so many bytes, the store's neither: the result is right, or said to be
    missing."""
    sizes = (
        (5000,)
        if SHORT
        else (0, 1, 100, 1000, 4096, 5000, 8192, 20_000, 40_000, 100_000, 1_000_000)
    )

    def broken(size):
        def run(arguments):
            small_files(max(size, 0))
            return command(*arguments)

        return run

    for size in sizes:
        check(commands, tmp_path, expected, name, f"size-{size}", broken(size))


@pytest.mark.parametrize("name", COMMANDS)
def test_printing_fails(commands, tmp_path, name):
    """The n-th write to stdout fails: the result is there, the status 0."""
    for number in [1] if SHORT else range(1, 12):
        folder = tmp_path / str(number)
        folder.mkdir()
        arguments, read = commands(name, folder)

        def broken(arguments=arguments, number=number):
            with failing(sys.stdout, "write", number, no_space):
                return command(*arguments)

        outcome = forked(broken)
        assert outcome.status == 0, (number, outcome.err)
        assert outcome.err.count("\n") <= 1
        assert read()


@pytest.mark.parametrize(
    "error", [MemoryError, lambda: RuntimeError("DefaultCPUAllocator: not enough memory")]
)
def test_an_allocation_fails_once(commands, tmp_path, error):
    """At any unit run, once: smaller steps are taken, and the result is the same up to the last
    bits."""
    arguments, read = commands("score", tmp_path)
    runs = 0

    def count() -> int:
        with unit_runs(lambda number: (tmp_path / "runs").write_text(str(number))):
            return command(*arguments)

    assert forked(count).status == 0
    expected, runs = _losses(read()), int((tmp_path / "runs").read_text())
    for number in spread(runs, round(2 * EFFORT))[1:]:
        folder = tmp_path / str(number)
        folder.mkdir()
        arguments, read = commands("score", folder)

        def broken(arguments=arguments, number=number):
            def tell(now):
                if now == number:
                    raise error()

            with unit_runs(tell):
                return command(*arguments)

        outcome = forked(broken)
        if outcome.status:  # before the engine has begun, there is nothing to be taken smaller
            assert outcome.is_one_line, outcome.err
        else:
            assert _losses(read()) == pytest.approx(expected, rel=1e-5)


def test_memory_never_suffices(commands, tmp_path):
    """Every unit run fails: one line in the end, and nothing written."""
    arguments, _ = commands("score", tmp_path)

    def broken():
        def tell(_):
            raise MemoryError

        with unit_runs(tell):
            return command(*arguments)

    outcome = forked(broken)
    assert outcome.status in (1, 2)
    assert outcome.is_one_line, outcome.err
    assert not (tmp_path / "scores.jsonl").exists()


def _losses(text: str) -> list[float]:
    return [json.loads(line)["loss"] for line in text.splitlines()]
