"""The registry of measured tables and figures is whole, and so is the page that is made from it."""

import ast
import importlib
import re
from pathlib import Path

import pytest
from tables_for_tests import package_of_tables

ROOT = Path(__file__).resolve().parents[2]
# Pages whose tables of numbers are measured; a quarter of the cells decides what such a table is.
PAGES = [
    ROOT / "README.md",
    ROOT / "examples" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
NUMBER = re.compile(r"[-+~<*± ]*\d")


TABLES = package_of_tables()
REGISTRY = TABLES.registry.read()
ENTRIES = REGISTRY["evidence"]
PLACES = [place for entry in ENTRIES for place in entry["at"]]


def slug(heading):
    words = re.sub(r"[^\w\s-]", "", heading.strip().lower().replace("`", ""))
    return re.sub(r"\s", "-", words)


def sections(page):
    """The lines of each section, by the anchor of its heading; no code blocks."""
    found, anchor, code = {}, "", False
    for line in page.read_text(encoding="utf-8").splitlines():
        code ^= line.startswith("```")
        if not code and re.match(r"#+ ", line):
            anchor = slug(line.lstrip("# "))
        if not code:
            found.setdefault(anchor, []).append(line)
    return found


def is_measured(lines):
    """Whether a section shows a figure, or a table of numbers."""
    if any(line.startswith("![") and "prefix-tree" not in line for line in lines):
        return True
    tables = re.findall(r"(?:^\|.*\n)+", "\n".join(lines) + "\n", re.MULTILINE)
    for table in tables:
        rows = [row.strip("|").split("|") for row in table.splitlines()[2:]]
        cells = [cell.strip() for row in rows for cell in row]
        if sum(bool(NUMBER.match(cell)) for cell in cells) * 4 >= len(cells):
            return True
    return False


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_measured_section_is_in_the_registry(page):
    name = page.relative_to(ROOT).as_posix()
    measured = {
        f"{name}#{anchor}" for anchor, lines in sections(page).items() if is_measured(lines)
    }
    assert measured <= {*PLACES, *REGISTRY["not_measured"]}


@pytest.mark.parametrize("place", sorted({*PLACES, *REGISTRY["not_measured"]}))
def test_a_place_is_on_its_page(place):
    page, _, anchor = place.partition("#")
    assert not anchor or anchor in sections(ROOT / page)


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry["shows"])
def test_an_entry_names_files_that_exist(entry):
    assert set(entry) <= {"at", "shows", "command", "result", "time", "machine", "needs"}
    for script in re.findall(r"[\w/]+\.py\b", entry["command"]):
        assert (ROOT / script).is_file()
    for result in entry.get("result", []):
        file, _, part = result.partition("#")
        assert (TABLES.render.RESULTS / file).is_file()
        assert not part or part in TABLES.render.load(file.removesuffix(".json"))
    assert set(entry.get("needs", [])) <= set(REGISTRY["needs"])


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry["shows"])
def test_a_time_that_a_file_records_is_not_typed_too(entry):
    known = [TABLES.registry.time_recorded(result) for result in entry.get("result", [])]
    assert "time" not in entry or not known or None in known


@pytest.mark.parametrize("folder", ["bench", "examples", "tools"])
def test_scripts_import_names_that_exist(folder):
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("fastprune"):
                module = importlib.import_module(node.module)
                for alias in node.names:
                    if not hasattr(module, alias.name):  # then it is a submodule
                        importlib.import_module(f"{node.module}.{alias.name}")


def test_every_file_of_results_has_its_command():
    results = [result for entry in ENTRIES for result in entry.get("result", [])]
    named = {result.partition("#")[0] for result in results}
    assert {path.name for path in TABLES.render.RESULTS.glob("*.json")} <= named


def test_the_judges_of_healing_were_seen_by_no_training_or_choice():
    judges = [
        judge for run in TABLES.render.load("healing").values() for judge in run["judges"].values()
    ]
    assert judges
    assert all(judge["seen"] == 0 for judge in judges)


def test_the_list_names_every_entry(capsys):
    TABLES.__main__.main(["--evidence"])
    printed = capsys.readouterr().out
    for entry in ENTRIES:
        assert entry["shows"] in printed
        assert entry["command"] in printed
    for needed in REGISTRY["needs"]:
        assert f"{needed}: " in printed
