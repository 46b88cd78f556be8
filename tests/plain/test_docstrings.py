"""Examples in docstrings that need no model run; editors and type checkers see the public names."""

import ast
import doctest
import importlib
from pathlib import Path

import pytest

import fastprune

MODULES = ("data.tokens", "layout", "masks", "solver.subset")


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    found = doctest.testmod(importlib.import_module(f"fastprune.{name}"))
    assert found.attempted > 0
    assert found.failed == 0


def test_type_checkers_see_the_public_names():
    tree = ast.parse(Path(fastprune.__file__).read_text(encoding="utf-8"))
    seen = {
        (alias.name, node.module)
        for block in tree.body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname == alias.name
    }
    assert seen == {(name, module) for module, names in fastprune._HOMES.items() for name in names}


def test_every_public_name_has_a_docstring():
    for name in fastprune.__all__:
        assert getattr(fastprune, name).__doc__, name
