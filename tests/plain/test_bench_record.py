"""Files of results: they say their command, machine and time, and keep their other parts."""

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def record(monkeypatch):
    spec = importlib.util.spec_from_file_location("record", ROOT / "bench" / "record.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr("sys.argv", [str(ROOT / "bench" / "counts.py"), "--out", "x.json"])
    return module


def test_results_have_their_command_machine_and_time(record, tmp_path):
    record.save(tmp_path / "new" / "x.json", {"rows": [1]})
    found = json.loads((tmp_path / "new" / "x.json").read_text())
    assert found["rows"] == [1]
    assert found["command"].endswith("python bench/counts.py --out x.json")
    assert found["machine"]["cores"] >= 1
    assert set(found["took"]) == {"cpu_seconds", "wall_seconds"}
    record.save(None, {"rows": [1]})  # nowhere to write


def test_parts_of_a_file_stay(record, tmp_path):
    path = tmp_path / "x.json"
    record.save(path, {"rows": [1]}, part="a")
    record.save(path, {"rows": [2]}, part="b")
    record.save(path, {"rows": [3]}, part="a")
    assert {name: part["rows"] for name, part in record.read(path).items()} == {"a": [3], "b": [2]}


def test_the_time_of_a_run_that_goes_on_is_added_where_it_is_known(record):
    earlier = {"took": {"cpu_seconds": 1000.0, "wall_seconds": 2000.0}}
    assert record.origin(goes_on=earlier)["took"]["cpu_seconds"] >= 1000
    assert "took" not in record.origin(goes_on={"rows": []})
    assert record.origin(goes_on={})["took"]["cpu_seconds"] < 1000


def test_a_command_names_no_folder_of_this_machine(record, tmp_path, monkeypatch):
    (tmp_path / "smollm2").mkdir()
    text = tmp_path / "text.txt"
    given = ["bench/quality.py", str(tmp_path / "smollm2"), "--text", str(text), "build/x"]
    monkeypatch.setattr("sys.argv", [str(ROOT / given[0]), *given[1:]])
    assert record.command().endswith("python bench/quality.py SMOLLM2 --text text.txt build/x")
    monkeypatch.setattr("sys.argv", [pytest.__path__[0] + "/__main__.py", "bench/bench_paths.py"])
    assert record.command().endswith("python -m pytest bench/bench_paths.py")
