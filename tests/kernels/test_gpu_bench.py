"""The GPU benchmark, every section of it at tiny shapes: kernels interpreted, times without
meaning."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from kernel_checks import DTYPES  # noqa: F401 (skips where triton is not installed)

SECTIONS = ("bits", "ceilings", "block", "loss", "kernels", "pairs", "margin", "beam")
SECTIONS += ("margin, Qwen3", "pairs, Qwen3", "compiled")
BENCH = Path(__file__).resolve().parents[2] / "bench"


def run_bench(root: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "bench/gpu.py", "--device", "cpu", "--tiny", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command,
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done


def test_the_tests_that_run_on_a_gpu_exist():
    source = (BENCH / "gpu.py").read_text(encoding="utf-8")
    named = re.findall(r'"(kernels/test_\w+)"', source)
    makefile = (BENCH.parent / "Makefile").read_text(encoding="utf-8")
    (executed,) = re.findall(r"^EXECUTED := (.*)$", makefile, re.MULTILINE)
    named += [f"kernels/test_{name}" for name in executed.split()]
    assert len(named) > 7
    assert all((BENCH.parent / "tests" / f"{name}.py").exists() for name in named)


@pytest.mark.slow
def test_what_was_cut_short_is_resumed(tmp_path, pytestconfig):
    """By the same command: a section that is whole stays, what one lacks is run."""
    out = tmp_path / "gpu.json"
    whole = {name: {"section_s": 1.0} for name in SECTIONS}
    kept = {"shape": "kept", "ms": 2.0}
    compiled = {"add_rms_norm": kept, "rotary": {"failed": "cut"}, "section_s": 1.0}
    cut = {"ceilings": {"skipped": "no time"}, "compiled": compiled}
    out.write_text(json.dumps(whole | cut))
    run_bench(pytestconfig.rootpath, "--resume", "--out", str(out))
    found = json.loads(out.read_text())
    assert {name: found[name] for name in SECTIONS if name not in cut} == {
        name: whole[name] for name in SECTIONS if name not in cut
    }
    assert found["ceilings"]["copy_bytes_per_s"] > 0
    assert found["compiled"]["add_rms_norm"] == kept
    assert found["compiled"]["rotary"]["ms"] > 0
    assert found["compiled"]["gated_mlp"]["ms"] > 0


@pytest.mark.nightly
def test_every_section_runs_and_every_goal_is_reported(tmp_path, pytestconfig):
    out = tmp_path / "gpu.json"
    done = run_bench(pytestconfig.rootpath, "--minutes", "4", "--out", str(out))
    found = json.loads(out.read_text())
    assert [name for name in found if name in SECTIONS] == list(
        SECTIONS
    )  # what matters most comes first
    assert {
        name: found[name] for name in SECTIONS if {"failed", "skipped"} & set(found[name])
    } == {}
    assert found["bits"]["equal"]
    for case in found["bits"]["cases"].values():
        assert len(case["chunks"]) > 1
        assert len(case["different"]) >= 5
    for name, kernel in (found["loss"] | found["kernels"]).items():
        if isinstance(kernel, dict):
            assert kernel.get("ms", 0) > 0, f"{name}: {kernel}"
            assert all("ms" in variant for variant in kernel["variants"].values()), (
                f"{name}: {kernel['variants']}"
            )
    assert found["block"]["error"] < 0.02
    assert all(found[name]["agrees"] for name in SECTIONS if name.startswith(("pairs", "margin")))
    assert found["goals"]["rows"]
    for goal, measured, _ in found["goals"]["rows"]:
        assert measured != "not measured", goal
        assert goal in done.stdout


def verdicts(results: dict) -> dict[str, tuple[str, str]]:
    from gpu import goals

    return {goal: (measured, verdict) for goal, measured, verdict in goals(results)}


@pytest.fixture
def bench_modules(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))


def test_a_figure_is_met_or_missed_only_if_it_was_measured(bench_modules):
    """Neither where nothing ran, nor where time ran out, nor for an extrapolated figure."""
    from gpu_watch import failure

    late, broken = failure(TimeoutError("not done within 5 s")), failure(RuntimeError("broken"))
    sections = ("bits", "block", "loss", "kernels", *SECTIONS[5:10])
    for results, said in (
        ({}, "open"),
        (dict.fromkeys(sections, late), "timed out"),
        (dict.fromkeys(sections, broken), "open"),
    ):
        assert set(verdicts(results).values()) == {("not measured", said)}
    case = {"finite": True, "different": {"grouped": {"numbers": 0}}}
    results = {
        "bits": {"equal": False, "cases": {"trees": case}, **late},
        "loss": {"linear_nll": late},
        "block": {"of_floor": 0.9, **late},
        "beam": {"seconds": 75.0, "extrapolated": "after 30 s", "raced": late},
    }
    said = verdicts(results)
    by_start = {goal.split(":")[0]: cells for goal, cells in said.items()}
    assert by_start["bits"] == ("1 of 1 cases", "timed out")
    assert by_start["linear_nll"] == ("not measured", "timed out")
    assert by_start["one block"] == ("0.9", "met")
    assert by_start["beam"] == ("75 s", "extrapolated")
    assert by_start["beam of the divergence, raced at 0.99"] == ("not measured", "timed out")
    assert by_start["add_rms_norm"] == ("not measured", "open")


def test_a_measured_figure_is_judged(bench_modules):
    different = {"finite": True, "different": {"grouped": {"numbers": 3}}}
    head = {"of_floor": 0.9, "ms": 6.0, "torch": {"ms": 8.0}, "Liger": {"ms": 5.0}}
    results = {
        "bits": {"equal": False, "cases": {"trees": different}},
        "loss": {"linear_nll": head},
        "block": {"of_floor": 0.68},
        "beam": {"seconds": 90.0, "raced": {"seconds": 12.0}},
    }

    def judged(results: dict) -> dict[str, str]:
        return {goal.split(",")[0]: verdict for goal, (_, verdict) in verdicts(results).items()}

    found = judged(results)
    rate = "linear_nll: 0.95 of the matrix product's rate"
    assert found["bits: the same scores in whatever company"] == "missed"
    assert found[rate] == "price of fixed bits: 1.20 times Liger"
    assert found["one block: 0.85 of the matrix product's rate"] == "missed: 0.80 of it"
    assert found["beam: under 60 s"] == "missed: 1.50 times it"
    assert found["beam of the divergence"] == "met"
    alone = {"loss": {"linear_nll": {"of_floor": 0.9, "ms": 6.0, "torch": {"failed": "memory"}}}}
    assert judged(alone)[rate] == "missed: 0.95 of it"
    assert judged({"loss": {"linear_nll": head | {"of_floor": 0.96}}})[rate] == "met"


WORKER = """
import os, signal, sys, time
sys.path.insert(0, {bench!r})
from gpu_watch import Reports

for section in sys.argv[2:]:
    Reports(int(sys.argv[1])).begins(section, 0.3 if section == "hangs" else 60)
    with open({log!r}, "a") as file:
        file.write(f"{{section}} {{os.getpid()}}\\n")
    if section == "hangs":
        others = set(signal.Signals) - {{signal.SIGKILL, signal.SIGSTOP}}
        signal.pthread_sigmask(signal.SIG_BLOCK, others)
        while True:
            time.sleep(1)
    if section == "dies":
        os.kill(os.getpid(), signal.SIGSEGV)
"""


def test_a_section_that_hangs_or_dies_costs_no_other(tmp_path, bench_modules):
    """A worker that no signal but the last one reaches is killed at its limit; the rest runs in
    another process."""
    from gpu_watch import watch

    log, failed = tmp_path / "log", {}
    script = WORKER.format(bench=str(BENCH), log=str(log))

    def command(sections, descriptor):
        return [sys.executable, "-c", script, str(descriptor), *sections]

    assert watch(
        command,
        ["first", "hangs", "second", "dies", "third", "fourth"],
        failed.__setitem__,
        grace=0.2,
    )
    assert set(failed) == {"hangs", "dies"}
    assert "hung" in str(failed["hangs"])
    assert isinstance(failed["hangs"], TimeoutError)
    assert "-11" in str(failed["dies"])
    assert not isinstance(failed["dies"], TimeoutError)
    ran = [line.split() for line in log.read_text().splitlines()]
    assert [section for section, _ in ran] == [
        "first",
        "hangs",
        "second",
        "dies",
        "third",
        "fourth",
    ]
    processes = [process for _, process in ran]
    assert (
        processes[0] == processes[1] != processes[2] == processes[3] != processes[4] == processes[5]
    )


def test_a_worker_that_begins_nothing_is_not_started_again(bench_modules):
    from gpu_watch import watch

    started = []

    def command(sections, descriptor):
        started.append(sections)
        return [sys.executable, "-c", "raise SystemExit(5)"]

    assert not watch(command, ["first", "second"], lambda *_: None, grace=0.1)
    assert len(started) == 1
