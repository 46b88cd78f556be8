"""Commands that need no model work without the libraries that models need."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
from documents import text_study, write_document

PROGRAM = """
import sys
from fastprune.cli import main
try:
    main()
finally:
    libraries = ("sklearn", "scipy", "pandas", "datasets", "accelerate")
    print(*[name for name in libraries if name in sys.modules])
"""


def without_openmp() -> dict[str, str]:
    """This process's environment without OpenMP's variables."""
    return {
        "PYTHONPATH": os.pathsep.join(sys.path),
        **{
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("OMP_", "GOMP_", "KMP_", "PYTHONPATH"))
        },
    }


SEARCH = ("search", "nowhere/model", "--num-remove", "1", "--calibration", __file__)

COMMANDS = [
    (("--help",), 0),
    (("algorithms",), 0),
    (("algorithms", "beem"), 2),
    ((*SEARCH, "--algorithm", "beem"), 2),
    ((*SEARCH, "--objective", "perplexety"), 2),
    ((*SEARCH, "--option", "width=5"), 2),
    ((*SEARCH, "--calibration", "nowhere.txt"), 2),
    (("eval", "nowhere/model", "--tasks", "arc_easy"), 2),
    (("study", "--example"), 0),
    (("study", "nowhere.toml", "--out", "nowhere/study"), 2),
    (("export", "nowhere/model", "--removed", "1", "--out", __file__), 2),
    (("export", "nowhere/model", "--removed", "1", "--out", "nowhere/x", "--base-model", "a b"), 2),
    (("export", "nowhere/model", "--removed", "1", "--sequence", "1", "--out", "nowhere/x"), 2),
    (("export", "nowhere/model", "--result", __file__, "--out", "nowhere/x"), 2),
]
MISTAKES = [
    {"search_algorithms": ["beem"]},
    {"search_options": {"beam": {"width": 5}}},
    {"search_seeds": 5},
    {"objective": [{"name": "margin"}]},
    {"calibration": [{"name": "a", "kind": "text", "file": "nowhere.txt"}]},
]


def test_no_model_library_is_imported(tmp_path):
    """One process runs them all: a library that any of them imports is there from then on."""
    commands = list(COMMANDS)
    for number, mistake in enumerate(MISTAKES):
        tables = text_study("nowhere/model", __file__, **mistake)
        document = write_document(tmp_path / f"{number}.toml", **tables)
        commands.append((("study", str(document), "--out", "nowhere/study"), 2))
    program = f"""
import contextlib, io, json, sys
from fastprune.cli import main
for arguments, _ in {commands!r}:
    sys.argv = ["fastprune", *arguments]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            main()
        except SystemExit as end:
            status = end.code or 0
    heavy = ("torch", "transformers", "sklearn", "matplotlib")
    libraries = [name for name in heavy if name in sys.modules]
    print(json.dumps([status, libraries]))
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert list(zip(commands, found, strict=True)) == [(case, [case[1], []]) for case in commands]


@pytest.fixture(scope="module")
def opened():
    """A new process that opens a model, with nothing said about threads, and what OpenMP reads."""
    environment = {**without_openmp(), "OMP_DISPLAY_ENV": "verbose"}
    command = [sys.executable, "-c", PROGRAM, "info", "demo"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done


def test_opening_a_model_imports_nothing_that_takes_long_and_is_not_needed(opened):
    assert opened.stdout.splitlines()[-1] == ""


@pytest.mark.parametrize(
    ("given", "waits"),
    [({}, "passive"), ({"OMP_WAIT_POLICY": "active"}, "active"), ({"GOMP_SPINCOUNT": "9"}, None)],
)
def test_threads_sleep_at_barriers_unless_the_environment_says_how_they_wait(given, waits):
    """It is settled before torch, which reads it once, is imported."""
    code = (
        "import os, sys; from fastprune.cli import main; sys.argv = ['fastprune', '--version']\n"
        "try: main()\n"
        "except SystemExit: print(os.environ.get('OMP_WAIT_POLICY'), 'torch' in sys.modules)"
    )
    environment = {**without_openmp(), **given}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == f"{waits} False"


def test_openmp_reads_how_threads_wait(opened):
    """It does when it is loaded, by whatever is linked to it. libgomp, which is asked here, then
    spins 0 times."""
    spins = re.search(r"GOMP_SPINCOUNT = '(\d+)'", opened.stderr)
    if spins is None:
        pytest.skip("torch has another OpenMP here")
    assert spins[1] == "0"
