"""The public checks: an algorithm of somebody's own, from the documentation, passes them; one that
cheats does not."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastprune as fp
from fastprune import testing
from fastprune.search import ALGORITHMS, Search, algorithm, load_plugins

PAGE = Path(__file__, "../../../docs/algorithms.md").resolve()


@pytest.fixture
def registry(monkeypatch):
    """The registered algorithms; those that a test adds are gone after it."""
    before = dict(ALGORITHMS)
    yield ALGORITHMS
    ALGORITHMS.clear()
    ALGORITHMS.update(before)


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """installed(name, source): a package of this one module, with an entry point for it."""

    def install(name: str, source: str) -> None:
        (tmp_path / f"{name}.py").write_text(source, encoding="utf-8")
        info = tmp_path / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[fastprune.algorithms]\n{name} = {name}\n")
        monkeypatch.syspath_prepend(tmp_path)
        importlib.invalidate_caches()

    yield install
    for name in [path.stem for path in tmp_path.glob("*.py")]:
        sys.modules.pop(name, None)


def documented() -> str:
    (source,) = re.findall(
        r"```python\n(# my_package.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL
    )
    return source


def test_an_installed_algorithm_is_known_and_passes(registry, installed, run):
    installed("swaps_of_somebody", documented())
    load_plugins()
    testing.check_algorithm("swaps", rounds=3)
    status, out, _ = run("algorithms", "swaps")
    assert status == 0
    assert "rounds=10 (int, at least 1): of swaps" in out


def test_plugins_are_loaded_at_the_first_look_up_of_what_is_not_ours(installed, tmp_path):
    """Once, and neither at import nor for an algorithm of fastprune's own."""
    installed("noisy_one", f"open({str(tmp_path / 'loads')!r}, 'a').write('x')")
    code = f"""
import os, fastprune, fastprune.cli, fastprune.search as search
search.find_algorithm("beam")
assert not os.path.exists({str(tmp_path / "loads")!r})
search.known_algorithms()
search.describe_algorithms()
try:
    search.find_algorithm("noisy")
except fastprune.InputError:
    print(open({str(tmp_path / "loads")!r}).read())
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout == "x\n", done.stderr


def test_one_that_cannot_be_imported_is_named_and_left_out(registry, installed):
    installed("broken_one", "raise OSError('no licence')")
    with pytest.warns(RuntimeWarning, match="'broken_one' are left out: no licence"):
        load_plugins()


def test_a_name_is_taken_once(registry):
    with pytest.raises(
        fp.InputError, match=r"'beam' is there already, from fastprune\.search\.beam"
    ):

        @algorithm
        def beam(search: Search) -> None:
            """Another one."""


def first_units(search: Search) -> None:
    """The first units that may go.

    Source: this test.
    Cost: 1.
    """
    search.score([search.candidates[: search.num_remove]])


def ignores_protection(search: Search) -> None:
    """The first units, whether or not they may go.

    Source: this test.
    Cost: 1.
    """
    search.score([tuple(range(search.num_remove))])


def scores_aside(search: Search) -> None:
    """Asks the evaluator, so that nothing is remembered.

    Source: this test.
    Cost: 2.
    """
    search.evaluator.score([[True] * search.num_units])
    first_units(search)


def never_the_same(search: Search, drawn=iter(range(10**6))) -> None:  # noqa: B008 (one for all calls)
    """Another subset on every run.

    Source: this test.
    Cost: 1.
    """
    start = next(drawn) % len(search.candidates)
    search.score([(search.candidates[start:] + search.candidates[:start])[: search.num_remove]])


def wants_what_left(search: Search) -> None:
    """The best unit by a race, then the losses of all that took part.

    Source: this test.
    Cost: U.
    """
    units = [(unit,) for unit in search.candidates]
    search.select(units, keep=1)
    sorted(units, key=search.losses.__getitem__)
    first_units(search)


def undescribed(search: Search) -> None:
    first_units(search)


@pytest.mark.parametrize(
    ("function", "check"),
    [
        (ignores_protection, testing.check_protection),
        (scores_aside, testing.check_history),
        (never_the_same, testing.check_repeats),
        (undescribed, testing.check_description),
    ],
)
def test_a_wrong_one_fails(registry, function, check):
    name = function.__name__
    algorithm(without_options(function), name=name)
    with pytest.raises(AssertionError, match=name):
        check(name)


def without_options(function):
    def alone(search: Search) -> None:
        function(search)

    alone.__doc__ = function.__doc__
    return alone


def test_a_blind_one_passes_all_but_another_process(registry):
    """It scores one subset, which may have no finite loss."""
    algorithm(first_units)
    for check in testing.CHECKS:
        if check is not testing.check_another_process:  # which would import this file
            check("first_units")


@pytest.mark.parametrize("function", [first_units, wants_what_left])
def test_one_that_cannot_race_and_says_so_fails(registry, function):
    algorithm(races=True)(function)
    with pytest.raises(AssertionError, match=function.__name__):
        testing.check_races(function.__name__)
