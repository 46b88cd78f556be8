"""Progress: one event for a call, a race, a search and a study; a bar, or a line every 30 s."""

from __future__ import annotations

import io
import logging
import re
import threading

import numpy as np
import pytest
from rich.console import Console

import fastprune as fp
from fastprune.cli import output
from fastprune.cli.output import Bar
from fastprune.study import run_study
from fastprune.testing import SyntheticEvaluator


class Clock:
    """Seconds that pass only when a test says so."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def untimed(text: str) -> list[str]:
    """The lines of a text, each of which begins with the time of day, without their times."""
    lines = text.splitlines()
    assert all(re.match(r"\d\d:\d\d:\d\d ", line) for line in lines)
    return [line[9:] for line in lines]


@pytest.fixture
def no_terminal(monkeypatch):
    """A stream in the place of stderr that is no terminal."""
    stream = io.StringIO()
    monkeypatch.setattr(output, "err", output.Terminal(file=stream))
    return stream


@pytest.fixture
def model(checkpoint):
    return fp.load_model(checkpoint)


@pytest.fixture
def objective():
    rows = np.random.default_rng(0).integers(1, 60, (40, 9))
    return fp.Perplexity(fp.TokenBatch.from_ids(rows))


def test_without_a_terminal_a_line_comes_every_30_seconds(no_terminal):
    clock = Clock()
    bar = Bar(clock)
    for second in range(91):
        clock.now = float(second)
        bar(fp.ProgressEvent(second, 100, share=second / 100, algorithm="beam", round=1, rounds=3))
    assert untimed(no_terminal.getvalue()) == [
        "fastprune: beam, round 1 of 3, 30% done, 70 s left",
        "fastprune: beam, round 1 of 3, 60% done, 40 s left",
        "fastprune: beam, round 1 of 3, 90% done, 10 s left",
    ]


def test_a_line_says_what_is_known(no_terminal):
    bar = Bar(Clock())
    assert bar.line(fp.ProgressEvent(1, 4)) == "scoring"
    event = fp.ProgressEvent(1, 4, None, "beam", 2, None, "perplexity 2.6", 43, "3/16 demo: beam")
    assert bar.line(event) == "3/16 demo: beam, round 2, best perplexity 2.6, 43 candidates left"


def test_time_left_starts_again_with_another_call(no_terminal):
    clock = Clock()
    bar = Bar(clock)
    bar(fp.ProgressEvent(9, 10, share=0.9))
    clock.now = 100.0
    bar(fp.ProgressEvent(1, 10, share=0.1))
    clock.now = 110.0
    event = fp.ProgressEvent(3, 10, share=0.3)
    bar(event)
    assert bar.line(event) == "scoring, 30% done, 35 s left"
    clock.now = 4000.0
    assert bar.line(event).endswith("3.8 h left")


def test_the_time_left_in_a_study_is_that_of_its_present_search(no_terminal):
    """A cheap search says nothing about the time of the next one, wherever its first event is."""
    clock = Clock()
    bar = Bar(clock)
    for share in (0.0, 0.5, 1.0):
        bar(fp.ProgressEvent(1, 2, share=share, cell="1/2 m: one_shot"))
        clock.now += 1
    clock.now = 100.0
    for seconds, share in ((100, 0.5), (140, 0.9)):
        clock.now = float(seconds)
        event = fp.ProgressEvent(1, 2, share=share, cell="2/2 m: beam")
        bar(event)
    assert bar.line(event) == "2/2 m: beam, 90% done, 10 s left of this search"
    clock.now = 150.0
    event = fp.ProgressEvent(1, 2, share=0.9, cell="2/2 m: other")
    bar(event)
    assert bar.line(event) == "2/2 m: other, 90% done"


def test_a_terminal_has_one_bar_that_is_gone_at_the_end(monkeypatch):
    stream = io.StringIO()
    terminal = output.Terminal(file=stream, force_terminal=True, width=100, color_system=None)
    monkeypatch.setattr(output, "err", terminal)
    with fp.progress_bar() as progress:
        assert progress is not None
        progress(fp.ProgressEvent(1, 2, share=0.5, algorithm="beam", round=2, rounds=3))
    shown = stream.getvalue()
    assert "50%" in shown
    assert "beam, round 2 of 3" in shown
    assert shown.endswith("\x1b[2K")  # the line is erased


def test_results_come_after_the_bar(run, monkeypatch, checkpoint, text_file):
    """A bar that lives takes stdout over, and would send results to stderr."""
    stream = io.StringIO()
    terminal = output.Terminal(file=stream, force_terminal=True, width=100, color_system=None)
    monkeypatch.setattr(output, "err", terminal)
    data = ("--calibration", text_file, "--num-samples", 4, "--seq-len", 16)
    for arguments in (
        ("search", checkpoint, "--num-remove", 2),
        ("score", checkpoint, "--removed", 1),
    ):
        status, out, _ = run(*arguments, *data)
        assert status == 0
        assert "perplexity" in out
        assert "lower is better" not in stream.getvalue()
    assert "100% scoring" in stream.getvalue()


def test_quiet_shows_nothing(no_terminal):
    with fp.progress_bar(quiet=True) as progress:
        assert progress is None
    assert not no_terminal.getvalue()


class Signal(io.StringIO):
    """A stream that sets `written` once a line is in it."""

    def __init__(self):
        super().__init__()
        self.written = threading.Event()

    def write(self, text: str) -> int:
        size = super().write(text)
        if "\n" in self.getvalue():
            self.written.set()
        return size


def test_long_opening_is_said_without_a_terminal(monkeypatch):
    stream = Signal()
    monkeypatch.setattr(output, "err", output.Terminal(file=stream))
    monkeypatch.setattr(output, "WAITING_SECONDS", 0.0)
    with output.waiting("opening m[/x]"):
        assert stream.written.wait(60)
    monkeypatch.setattr(output, "WAITING_SECONDS", 1e6)
    with output.waiting("opening another"):
        pass
    with output.waiting("opening a third", quiet=True):
        pass
    assert untimed(stream.getvalue()) == ["fastprune: opening m[/x]"]


def test_a_terminal_shows_that_a_model_opens(monkeypatch):
    stream = io.StringIO()
    terminal = output.Terminal(file=stream, force_terminal=True, width=100, color_system=None)
    monkeypatch.setattr(output, "err", terminal)
    with output.waiting("opening m[/x]"):
        pass
    assert "opening m[/x]" in stream.getvalue()
    assert stream.getvalue().endswith("\x1b[2K")  # the line is erased


def test_a_command_says_what_it_opens(run, monkeypatch, checkpoint, text_file):
    stream = io.StringIO()
    terminal = output.Terminal(file=stream, force_terminal=True, width=200, color_system=None)
    monkeypatch.setattr(output, "err", terminal)
    data = ("--calibration", text_file, "--num-samples", 4, "--seq-len", 16)
    score = ("score", checkpoint, "--removed", 1, *data)
    assert run(*score)[0] == 0
    assert f"opening {checkpoint}" in stream.getvalue()
    assert f"checking {checkpoint}" in stream.getvalue()
    assert f"reading {text_file}" in stream.getvalue()
    stream.truncate(0)
    assert run(*score, "--quiet")[0] == 0
    assert not stream.getvalue()


def test_the_run_of_the_whole_model_is_reported(model, objective):
    """KL's reference: 5 units on 40 samples before any mask, and the masks' own runs after it."""
    events: list[fp.ProgressEvent] = []
    ev = fp.Evaluator(model, fp.KLDivergence(objective.batch), progress=events.append)
    ev.score(fp.from_removed([(1,), (4,)], 5))
    shares = [event.share for event in events]
    assert shares == sorted(shares)
    assert shares[-1] == 1
    assert all(0 <= event.done <= event.total for event in events)
    chunks = events[-1].done // ev.stats.unit_runs
    assert events[-1].done == chunks * ev.stats.unit_runs
    assert events[0].total == chunks * (5 + 7)  # the masks share unit 0 alone
    assert any(0 < event.done < 5 * chunks for event in events)


def test_a_search_reports_its_rounds(model, objective):
    own, evaluators = [], []
    ev = fp.Evaluator(model, objective, progress=evaluators.append)
    result = fp.run_search(ev, "beam", 2, progress=own.append, beam_width=2)
    assert own == evaluators
    assert {event.algorithm for event in own} == {"beam"}
    assert {event.round for event in own} == {1, 2}
    assert {event.rounds for event in own} == {2}
    shares = [event.share for event in own]
    assert shares == sorted(shares)
    assert shares[-1] == 1
    assert all(0 <= event.done <= event.total for event in own)
    first = [event.best for event in own if event.round == 1]
    assert set(first) == {None}  # no call has ended yet
    singles = min(loss for removed, loss in result.history if len(removed) == 1)
    assert own[-1].best == f"{fp.Perplexity.format(singles)} (1 removed)"


def test_a_race_reports_its_candidates(model, objective):
    events = []
    ev = fp.Evaluator(model, objective, progress=events.append)
    race = ev.race(fp.from_removed([(i,) for i in range(5)], 5), keep=1)
    assert events[0].candidates == 5
    assert [event.share for event in events] == sorted(event.share for event in events)
    assert events[-1].share == pytest.approx(1)
    assert events[-1].candidates == 5 - race.decided_early


def test_searches_in_two_threads_report_each_for_itself(model, objective):
    seen = {"greedy": [], "one_shot": []}
    ev = fp.Evaluator(model, objective)
    threads = [
        threading.Thread(target=fp.run_search, args=(ev, name, 2), kwargs={"progress": of.append})
        for name, of in seen.items()
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, events in seen.items():
        assert {event.algorithm for event in events} <= {name}


def test_a_study_reports_its_cells(model, objective, tmp_path):
    events = []
    make = {"text": lambda model: objective}
    run_study([model], make, ["one_shot", "greedy"], [1, 2], tmp_path / "s", progress=events.append)
    cells = list(dict.fromkeys(event.cell for event in events))
    assert cells[0] == f"1/4 {model.name}: text, 1 removed, one_shot"
    assert all(re.match(r"[1-4]/4 ", cell) for cell in cells)
    for cell in cells:  # a share is that of the search: searches cost too differently for a total
        shares = [event.share for event in events if event.cell == cell]
        assert shares == sorted(shares)
        assert 0 <= shares[0] <= shares[-1] <= 1


@pytest.mark.parametrize("progress", [True, "bar", 3])
def test_progress_must_be_a_function(model, objective, tmp_path, progress):
    with pytest.raises(fp.InputError, match="progress must be a function of a ProgressEvent"):
        fp.run_search(SyntheticEvaluator(6), "greedy", 1, progress=progress)
    make = {"text": lambda model: objective}
    with pytest.raises(fp.InputError, match="progress must be a function of a ProgressEvent"):
        run_study([model], make, ["greedy"], [1], tmp_path / "s", progress=progress)


def test_v_shows_decisions_and_leaves_logging_as_it_was(run, checkpoint, text_file):
    data = ("--calibration", text_file, "--num-samples", 4, "--seq-len", 16)
    handlers, level = (
        list(logging.getLogger("fastprune").handlers),
        logging.getLogger("fastprune").level,
    )
    score = ("score", checkpoint, "--removed", 1, *data)
    status, quiet_out, err = run(*score)
    assert (status, err) == (0, "")
    status, out, err = run(*score, "-v")
    assert status == 0
    assert out.splitlines()[:5] == quiet_out.splitlines()[:5]
    assert "path (backend auto): 4 rows in" in err
    assert "windows of 16 tokens, drawn by seed 0: " in err
    assert "the windows hold tokens " in err
    assert "unit runs by chunk" not in err
    assert "unit runs by chunk" in run(*score, "-vv")[2]
    assert logging.getLogger("fastprune").handlers == handlers
    assert logging.getLogger("fastprune").level == level


def test_the_library_logs_at_info_and_below(model, objective, caplog):
    caplog.set_level(logging.DEBUG, logger="fastprune")
    ev = fp.Evaluator(model, objective)
    fp.run_search(ev, "greedy", 2, racing=0.9)
    assert {record.levelno for record in caplog.records} <= {logging.DEBUG, logging.INFO}
    said = [record.getMessage() for record in caplog.records]
    assert any("leave the race" in line for line in said)
    assert any(line.startswith("round 2: best perplexity") for line in said)


def test_a_notebook_has_a_bar(monkeypatch):
    console = output.Terminal(file=io.StringIO(), force_jupyter=True)
    assert isinstance(console, Console)
    monkeypatch.setattr(output, "err", console)
    shown = []
    monkeypatch.setattr(output.Progress, "start", lambda self: shown.append("start"))
    monkeypatch.setattr(output.Progress, "stop", lambda self: shown.append("stop"))
    with fp.progress_bar() as progress:
        progress(fp.ProgressEvent(1, 2, share=0.5))
    assert shown == ["start", "stop"]
