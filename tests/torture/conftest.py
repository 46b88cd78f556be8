"""A calibration text of several chunks, and commands that leave something behind, by name."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path

import pytest
from documents import text_study, write_document

import fastprune.cli


@pytest.fixture(scope="session")
def long_text(tmp_path_factory):
    """4,000 words: 62 windows of 64 tokens, in several chunks."""
    path = tmp_path_factory.mktemp("data") / "long.txt"
    path.write_text(" ".join(f"w{i * i % 60}" for i in range(4000)))
    return path


@pytest.fixture(scope="session", autouse=True)
def everything_is_loaded(checkpoint, text_file, tmp_path_factory):
    """Modules that commands import late are imported once, and not in every child."""
    folder = tmp_path_factory.mktemp("loaded")
    document = write_document(folder / "study.toml", **text_study(checkpoint, text_file))
    for arguments in (
        ("study", document, "--quiet", "--out", folder / "study"),
        ("export", checkpoint, "--removed", "1", "--out", folder / "pruned"),
    ):
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
            patch.setattr(sys, "argv", ["fastprune", *map(str, arguments)])
            with pytest.raises(SystemExit) as end:
                fastprune.cli.main()
        assert not end.value.code


@pytest.fixture
def commands(checkpoint, long_text, questions):
    """commands(name, folder) -> (its arguments, a function that reads what it has left in the
    folder)."""

    def commands(name: str, folder: Path):
        data = ("--calibration", long_text, "--num-samples", 60, "--seq-len", 64, "--quiet")
        store = ("--store", folder / "s.db")
        removed = [
            part for units in ("", "1", "2", "1,2", "0,4", "3") for part in ("--removed", units)
        ]
        if name == "score":
            arguments = (
                "score",
                checkpoint,
                *removed,
                *data,
                *store,
                "--out",
                folder / "scores.jsonl",
            )
            return arguments, lambda: (folder / "scores.jsonl").read_text()
        if name == "search":
            # without a prefix cache, whose states a kill takes along: only sums are repeated
            wanted = ("--algorithm", "greedy", "--num-remove", 2, "--cache-gb", 0)
            arguments = ("search", checkpoint, *wanted, *data, *store, "--out", folder / "found")
            return arguments, lambda: _found(folder / "found" / "result.json")
        if name == "study":
            text = {"name": "text", "kind": "text", "file": long_text}
            tables = text_study(
                checkpoint,
                long_text,
                calibration=[
                    {**text, "num_samples": 60, "seq_len": 64},
                    {"name": "all", "kind": "tasks", "file": questions, "num_samples": 7},
                ],
                search_algorithms=["one_shot", "greedy"],
                search_num_remove=[1, 2],
            )
            document = write_document(folder / "study.toml", **tables)
            arguments = ("study", document, "--quiet", "--out", folder / "study")
            return arguments, lambda: _studied(folder / "study")
        arguments = ("export", checkpoint, "--removed", "1,3", "--out", folder / "pruned")
        return arguments, lambda: {
            path.name: path.read_bytes()
            for path in sorted((folder / "pruned").iterdir())
            if path.is_file()
        }

    return commands


def _found(path: Path) -> dict:
    result = json.loads(path.read_text())
    return {name: result[name] for name in ("removed", "loss", "dense_loss", "evaluations")}


def _studied(folder: Path) -> list:
    assert (folder / "report.html").read_text().rstrip().endswith("</html>")
    study = json.loads((folder / "study.json").read_text())
    cells = [
        {k: v for k, v in cell.items() if k not in ("unit_runs", "seconds")}
        for cell in study["cells"]
    ]
    return [cells, study["dense"], study["similarity"]]
