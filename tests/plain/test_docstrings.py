"""Examples in docstrings run; public names are documented, with examples; links in pages lead
somewhere."""

import ast
import doctest
import importlib
import re
from pathlib import Path

import pytest

import fastprune
from fastprune.search import ALGORITHMS

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ROOT, ROOT / "docs", ROOT / "examples", ROOT / "bench"
PAGES = sorted(page for folder in FOLDERS for page in folder.glob("*.md"))
PACKAGE = ROOT / "fastprune"
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py")
    if ">>> " in path.read_text(encoding="utf-8")
)
EXTRAS = "lm_eval", "optuna", "ray", "sklearn"  # libraries that a module may need


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    try:
        module = importlib.import_module(name)
    except (ImportError, fastprune.InputError) as error:
        if not any(extra in str(error) for extra in EXTRAS):
            raise
        pytest.skip(str(error))
    registered = dict(ALGORITHMS)
    try:
        examples = doctest.testmod(module, globs={})  # as copied, with their imports
    finally:  # an example may register an algorithm
        ALGORITHMS.clear()
        ALGORITHMS.update(registered)
    assert examples.attempted > 0
    assert examples.failed == 0


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


def test_every_public_name_has_an_example():
    for name in fastprune.__all__:
        assert ">>>" in getattr(fastprune, name).__doc__, name


def test_the_reference_has_every_public_name():
    page = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    named = set(re.findall(r"^::: fastprune\.(\w+)$", page, re.MULTILINE))
    assert named - {"testing"} == set(fastprune.__all__)


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://")):
            path, _, anchor = target.partition("#")
            found = page.parent / path if path else page
            assert found.exists(), target
            assert not anchor or anchor in anchors(found), target
