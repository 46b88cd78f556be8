"""The scripts of tools/ that keep pages and words."""

import importlib.util
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"


def load(name):
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_picture_of_the_prefix_tree_is_up_to_date():
    tool = load("draw_prefix_tree")
    assert tool.FIGURE.read_text(encoding="utf-8") == tool.draw()
    assert "9 block runs instead of 16" in tool.draw()


def test_tables_of_pages_are_those_of_the_results():
    tool = load("tables")
    pages = [page.read_text(encoding="utf-8") for page in tool.PAGES]
    assert {place[2] for page in pages for place in tool.PLACE.finditer(page)} == set(tool.TABLES)
    for path, page in zip(tool.PAGES, pages, strict=True):
        assert tool.updated(page) == page, path


SOURCE = '''"""What a module does.

>>> what = 1
"""
x = 1  # where it is
'''


def test_words_are_read_from_docstrings_and_comments_but_not_from_examples():
    tool = load("check_words")
    ((line, text),) = tool.docstrings(SOURCE)
    assert line == 1
    assert text.strip() == "What a module does."
    assert list(tool.comments(SOURCE)) == ["where it is"]


@pytest.mark.parametrize(
    ("source", "status"), [('"""A module of words."""\n', 0), ('"""Of words."""\n', 1)]
)
def test_a_docstring_that_begins_headless_fails(source, status, tmp_path, monkeypatch, capsys):
    tool = load("check_words")
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "module.py").write_text(source)
    monkeypatch.setattr(tool, "ROOT", tmp_path)
    monkeypatch.setattr(tool, "FOLDERS", ("package",))
    monkeypatch.setattr(tool, "MAX_HEADLESS", 0)
    assert tool.main() == status
    assert ("module.py:1" in capsys.readouterr().err) == bool(status)
