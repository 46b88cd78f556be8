"""Printing never costs a result: files come first, and any name, terminal and reader is borne."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import types
import warnings
from pathlib import Path

import numpy as np
import pytest
from documents import text_study, write_document
from torture.harness import forked

import fastprune as fp
from fastprune.cli import main
from fastprune.engine.store import SumStore

FULL = Path("/dev/full")


def closed_pipe():
    reader, writer = os.pipe()
    os.close(reader)
    return open(writer, "w", encoding="utf-8")


def full_disk():
    if not FULL.exists():
        pytest.skip("no /dev/full")
    return FULL.open("w", encoding="utf-8")


def ascii_terminal():
    return io.TextIOWrapper(io.BytesIO(), encoding="ascii")


@pytest.fixture
def run_on(monkeypatch, capsys):
    """run_on(stdout, *arguments) -> (exit status, stderr)."""

    def run_on(stdout, *arguments):
        monkeypatch.setattr(sys, "argv", ["fastprune", *map(str, arguments)])
        with monkeypatch.context() as patched:
            patched.setattr(sys, "stdout", stdout)
            with pytest.raises(SystemExit) as exit_:
                main()
        return exit_.value.code, capsys.readouterr().err

    return run_on


@pytest.fixture
def scored(text_file):
    return ("--calibration", text_file, "--num-samples", 2, "--seq-len", 16)


@pytest.mark.parametrize("stdout", [closed_pipe, full_disk, ascii_terminal])
def test_results_are_written_whatever_stdout_is(
    run_on, checkpoint, text_file, scored, tmp_path, stdout
):
    status, _ = run_on(
        stdout(), "search", checkpoint, "--num-remove", 1, *scored, "--out", tmp_path / "r"
    )
    assert status == 0
    assert len(json.loads((tmp_path / "r" / "result.json").read_text())["removed"]) == 1
    status, _ = run_on(
        stdout(), "score", checkpoint, "--removed", "1", *scored, "--out", tmp_path / "s.jsonl"
    )
    assert status == 0
    assert json.loads((tmp_path / "s.jsonl").read_text())["removed"] == [1]
    status, _ = run_on(stdout(), "export", checkpoint, "--removed", "1", "--out", tmp_path / "e")
    assert status == 0
    assert (tmp_path / "e" / "model.safetensors").exists()
    document = write_document(tmp_path / "study.toml", **text_study(checkpoint, text_file))
    status, _ = run_on(stdout(), "study", document, "--quiet", "--out", tmp_path / "study")
    assert status == 0
    assert "</html>" in (tmp_path / "study" / "report.html").read_text()


def test_a_full_stdout_is_said_in_one_line(run_on, checkpoint, scored, tmp_path):
    status, err = run_on(
        full_disk(), "search", checkpoint, "--num-remove", 1, *scored, "--out", tmp_path / "r"
    )
    assert status == 0
    assert "stdout cannot be written to" in err
    assert err.endswith(f"the result goes to {tmp_path / 'r' / 'result.json'}\n")
    assert err.count("\n") == 1
    for arguments in (
        ("algorithms",),
        ("--help",),
        ("search", checkpoint, "--num-remove", 1, *scored),
    ):
        status, err = run_on(full_disk(), *arguments)
        assert status == 1
        assert err.count("\n") == 1
        assert "stdout cannot be written to" in err


@pytest.mark.parametrize("arguments", [("algorithms",), ("--help",), ("algorithms", "beam")])
def test_a_reader_may_go_away(run_on, arguments):
    assert run_on(closed_pipe(), *arguments) == (0, "")


def test_a_reader_that_went_away_does_not_hide_another_failure(run_on, checkpoint, monkeypatch):
    def fails(*_, **__):
        raise BrokenPipeError(errno.EPIPE, "of something else")

    monkeypatch.setattr("fastprune.models.load_model", fails)
    status, err = run_on(io.TextIOWrapper(io.BytesIO(), encoding="utf-8"), "info", checkpoint)
    assert status == 1
    assert "of something else" in err


def test_an_ascii_terminal_gets_tables_and_patterns_in_ascii(run_on, checkpoint, scored, tmp_path):
    named = tmp_path / "модель"
    shutil.copytree(checkpoint, named)
    stdout = ascii_terminal()
    status, _ = run_on(stdout, "search", named, "--num-remove", 2, *scored)
    assert status == 0
    printed = stdout.buffer.getvalue().decode("ascii")
    (pattern,) = [
        line.split() for line in printed.splitlines() if line.startswith("perplexity  greedy")
    ]
    assert sorted(pattern[2:]) == ["#", "#", ".", ".", "."]
    assert "|" in printed


def test_the_program_prints_in_ascii_where_that_is_asked_for():
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "PYTHONIOENCODING": "ascii",
        "LC_ALL": "C",
    }
    command = [sys.executable, "-m", "fastprune", "algorithms", "cbo", "bayesian"]
    done = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii()
    assert not done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["m[/x]", r"[red]m[:smile:m$\frac$", "m--><script>alert(1)</script>"]
)
def test_any_folder_name_is_printed_and_drawn_as_it_is(
    run, checkpoint, text_file, scored, tmp_path, monkeypatch, name
):
    monkeypatch.setenv("COLUMNS", "400")
    folder = tmp_path / name
    folder.parent.mkdir(exist_ok=True, parents=True)
    shutil.copytree(checkpoint, folder)
    status, out, err = run("search", folder, "--num-remove", 1, *scored, "--out", tmp_path / "r")
    assert status == 0, err
    assert json.loads((tmp_path / "r" / "result.json").read_text())["removed"]
    assert folder.name in "".join(out.split())  # a title is wrapped at its table's width
    status, out, err = run("info", folder)
    assert status == 0, err
    assert folder.name in "".join(out.split())  # a title is wrapped at its table's width
    tables = text_study(folder, text_file, search_algorithms=["one_shot", "beam"])
    document = write_document(tmp_path / "study.toml", **tables)
    status, out, err = run("study", document, "--out", tmp_path / "s")
    assert status == 0, err
    assert folder.name in "".join(out.split())  # a title is wrapped at its table's width
    page = (tmp_path / "s" / "report.html").read_text()
    assert "<script>alert" not in page


@pytest.fixture
def vanishes(monkeypatch):
    """vanishes(folder): a file that cannot be written to once the model is open."""
    from fastprune.cli import opening

    def vanishes(folder):
        opened = opening.open_model

        def open_model(*arguments, **options):
            folder.write_text("a file by now")
            return opened(*arguments, **options)

        monkeypatch.setattr(opening, "open_model", open_model)

    return vanishes


@pytest.mark.parametrize("command", ["search", "score"])
def test_a_result_whose_file_cannot_be_written_is_printed_and_put_beside(
    run, vanishes, checkpoint, scored, tmp_path, command
):
    vanishes(tmp_path / "out")
    search = ("search", checkpoint, "--num-remove", 1, "--out", tmp_path / "out")
    score = ("score", checkpoint, "--removed", "1", "--out", tmp_path / "out" / "s.jsonl")
    status, out, err = run(*(search if command == "search" else score), *scored, "--quiet")
    assert status == 1
    assert "removed" in out
    assert "written" not in out
    assert err.count("\n") == 1
    assert "cannot be written (" in err
    (beside,) = tmp_path.glob("*-*.json*")
    assert str(beside) in err
    assert "loss" in json.loads(beside.read_text())


@pytest.mark.parametrize("columns", ["0", "-1", "", "wide"])
def test_any_number_of_columns_prints(run, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    status, out, _ = run("algorithms", "beam")
    assert status == 0
    assert "beam" in out


def test_a_file_without_permission_is_status_2(run, checkpoint, scored, monkeypatch):
    opened = os.open

    def refuse(path, *more, **options):
        if str(path).endswith("config.json"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, *more, **options)

    monkeypatch.setattr(os, "open", refuse)
    status, _, err = run("score", checkpoint, "--removed", "1", *scored)
    assert status == 2
    assert err.endswith("config.json: Permission denied\n")
    assert err.count("\n") == 1


KEPT_NOTHING = "nothing is kept; the same command begins again"
WITHOUT_STORE = "nothing is kept; with --store FILE the same command would continue"
WITH_STORE = "s.db keeps all finished sums; the same command continues from them"
NOTHING_FINISHED = "no sum was finished; the same command begins again"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("score", "demo", "--removed", "1", "--store", "s.db"), WITH_STORE),
        (("score", "demo", "--removed", "1", "--store=s.db"), WITH_STORE),
        (("score", "demo", "--removed", "1", "--store", "new.db"), NOTHING_FINISHED),
        (("score", "demo", "--removed", "1", "--store", "empty.db"), NOTHING_FINISHED),
        (("demo", "--quick", "--out", "new"), NOTHING_FINISHED),
        (("demo", "--quick"), NOTHING_FINISHED),
        (("score", "demo", "--removed", "1"), WITHOUT_STORE),
        (("search", "demo", "--num-remove", "1"), WITHOUT_STORE),
        (("search", "demo", "--num-remove", "1", "--store", "s.db"), WITH_STORE),
        (
            ("demo", "--quick", "--out", "d"),
            "d keeps all finished searches and sums; the same command continues there",
        ),
        (
            ("export", "demo", "--removed", "1", "--out", "x"),
            "nothing is written; the same command begins again",
        ),
        (("info", "demo"), KEPT_NOTHING),
        (("env",), KEPT_NOTHING),
    ],
)
def test_the_line_upon_ctrl_c_says_how_to_continue(run, tmp_path, monkeypatch, arguments, said):
    from fastprune import cli

    def interrupt(*_, **__):
        SumStore(tmp_path / "empty.db")
        (tmp_path / "d").mkdir()
        for place in ("s.db", "d/scores.db"):
            store = SumStore(tmp_path / place)
            store.put(store.context({}), b"chunk", {b"units": np.ones(1)})
        raise KeyboardInterrupt

    handlers = {}
    monkeypatch.setattr("fastprune.models.load_model", interrupt)
    monkeypatch.setattr(cli.signal, "signal", handlers.__setitem__)
    monkeypatch.chdir(tmp_path)
    status, _, err = run(*arguments)
    assert status == 130
    assert err == f"fastprune: interrupted; {said}\n"
    for name in ("x", "new", "new.db"):
        assert not (tmp_path / name).exists()
    for number, ended in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        process = forked(lambda second=handlers[number], by=number: second(by))
        assert process.status == ended
        assert process.err == "fastprune: interrupted twice; ended at once\n"


@pytest.fixture
def program(monkeypatch, capsys):
    """program(*arguments) -> (exit status, stderr) of the whole program, run in this process."""
    from fastprune import __main__

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def program(*arguments):
        monkeypatch.setattr(sys, "argv", ["fastprune", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            __main__.main()
        return ended.value.code, capsys.readouterr().err

    yield program
    for number, handler in before.items():
        signal.signal(number, handler)


def test_sigterm_ends_in_one_line_that_says_how_to_continue(program, monkeypatch):
    def terminate(*_, **__):
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr("fastprune.models.load_model", terminate)
    status, err = program("search", "demo", "--num-remove", 1)
    assert (status, err) == (143, f"fastprune: terminated; {WITHOUT_STORE}\n")


@pytest.mark.parametrize(
    ("number", "status", "word"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")],
)
def test_signals_while_the_program_is_imported_are_one_line(
    program, monkeypatch, number, status, word
):
    monkeypatch.setitem(sys.modules, "fastprune.cli", _Interrupting(number))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    assert program() == (status, f"fastprune: {word}; nothing was begun\n")


def test_a_warning_is_one_line_without_a_place_in_the_code(run, monkeypatch):
    def warn(*_, **__):
        warnings.warn("the rows\nare few", RuntimeWarning, stacklevel=2)
        raise fp.InputError("no model")

    monkeypatch.setattr("fastprune.models.load_model", warn)
    status, _, err = run("info", "demo")
    assert (status, err) == (2, "fastprune: warning: the rows are few\nfastprune: no model\n")


class _Interrupting(types.ModuleType):
    """A module during whose import a signal arrives."""

    def __init__(self, number):
        super().__init__("fastprune.cli")
        self.number = number

    def __getattr__(self, name):
        signal.raise_signal(self.number)
