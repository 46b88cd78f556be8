"""The scripts of tools/ that keep pages and words."""

import importlib.util
from pathlib import Path

import pytest
from tables_for_tests import package_of_tables

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
    markers, pages = package_of_tables().markers, package_of_tables().pages
    texts = [page.read_text(encoding="utf-8") for page in markers.PAGES]
    placed = {place["name"] for text in texts for place in markers.PLACE.finditer(text)}
    assert placed <= set(pages.TABLES)
    for name in set(pages.TABLES) - placed:  # such a table waits for its results
        with pytest.raises((FileNotFoundError, KeyError)):
            pages.TABLES[name].write()
    for path, text in zip(markers.PAGES, texts, strict=True):
        assert markers.updated(text) == text, path


def test_no_two_pages_name_a_table_alike():
    pages = package_of_tables().pages
    assert sum(len(module.TABLES) for module in pages.MODULES) == len(pages.TABLES)


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
    ("text", "status"),
    [("A module of words.", 0), ("Of words.", 1), ("Whatever is said.", 1), ("All that is.", 1)],
)
@pytest.mark.parametrize("folder", ["fastprune", "tests"])
def test_a_headless_docstring_fails(text, status, folder, tmp_path, monkeypatch, capsys):
    tool = load("check_words")
    for made in {"fastprune", folder}:
        (tmp_path / made).mkdir()
        (tmp_path / made / "package.py").write_text('"""Words to count."""')
    (tmp_path / folder / "module.py").write_text(f'"""{text}"""\n')
    monkeypatch.setattr(tool, "ROOT", tmp_path)
    assert tool.main() == status
    assert ("module.py:1" in capsys.readouterr().err) == bool(status)
