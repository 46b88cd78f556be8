"""Files that somebody, or something, has altered: one line, status 2, little time and memory, and
no pickle opened.

A file whose alteration matters to nobody is taken: then the status is 0. It is never 1.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import shutil
import sqlite3

import numpy as np
import pytest
from documents import text_study, write_document
from harness import EFFORT, LONGEST_LINE, command, forked
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastprune as fp
from fastprune.study import read_document

pytestmark = pytest.mark.slow

EXAMPLES = max(1, round(4 * EFFORT))
fuzzed = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=EFFORT <= 1,
    database=None,
    suppress_health_check=list(HealthCheck),
)

ODD = [
    None,
    True,
    -1,
    0,
    1,
    2**31,
    2**63,
    10**30,
    0.5,
    -1e308,
    float("nan"),
    float("inf"),
    "",
    "x",
    "../x",
    "/etc/passwd",
    "model.bin",
    "\\u0000",
    "\\ud800",
    "x" * 5000,
    [],
    {},
    [[]],
    [0] * 500,
    {"a": {"a": {}}},
]
TOKENS = [
    b"",
    b"\0",
    b"{",
    b"}",
    b"[" * 3000,
    b'"',
    b",",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"9" * 5000,
    b"NaN",
    b"\n",
]


def places(value, path=()):
    """The path of every value within a JSON value."""
    yield path
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, item in items:
        yield from places(item, (*path, key))


@st.composite
def altered_json(draw, value):
    """The value with one to three of its parts replaced, removed or doubled, as JSON text."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from([*places(value)][:400]))
        if not path:
            continue
        owner = value
        for key in path[:-1]:
            owner = owner[key]
        action = draw(st.sampled_from(["replace", "remove", "add"]))
        if action == "remove":
            del owner[path[-1]]
        elif action == "replace":
            owner[path[-1]] = copy.deepcopy(
                draw(st.sampled_from(ODD))
            )  # whose parts may be altered next
        elif isinstance(owner, dict):
            owner[
                draw(st.sampled_from(["x", "__metadata__", "", "quantization_config", "auto_map"]))
            ] = owner[path[-1]]
        else:
            owner.append(owner[path[-1]])
    return json.dumps(value).encode()


@st.composite
def altered_bytes(draw, content):
    """The bytes with one to three spans replaced, removed or doubled, or the end cut off."""
    content = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(content)))
        span = draw(st.sampled_from([0, 1, 1, 8, 100, len(content)]))
        action = draw(st.sampled_from(["flip", "insert", "remove", "double"]))
        if action == "flip" and at < len(content):
            content[at] ^= 1 << draw(st.integers(0, 7))
        elif action == "insert":
            content[at:at] = draw(st.sampled_from(TOKENS))
        elif action == "remove":
            del content[at : at + span]
        else:
            content[at:at] = content[at : at + span]
    return bytes(content)


def check(*arguments) -> None:
    outcome = forked(lambda: command(*arguments))
    assert outcome.status in (0, 2), outcome
    if outcome.status:
        assert outcome.is_one_line, outcome.err
        assert len(outcome.err) <= LONGEST_LINE + 1
        assert outcome.err.startswith("fastprune: ")


@pytest.fixture(scope="module")
def model(checkpoint, tmp_path_factory):
    """A copy of the checkpoint whose files may be written to; restore(name) puts one back."""
    folder = tmp_path_factory.mktemp("fuzz") / "model"
    shutil.copytree(checkpoint, folder)
    return folder


def altering(model, name, content, text_file):
    """Score a model with one of its files altered."""
    path = model / name
    before = path.read_bytes() if path.exists() else None
    path.write_bytes(content)
    try:
        check(
            "score",
            model,
            "--removed",
            "1",
            "--calibration",
            text_file,
            "--num-samples",
            2,
            "--seq-len",
            16,
        )
    finally:
        path.unlink() if before is None else path.write_bytes(before)


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"]
)
def test_configs(model, text_file, name):
    path = model / name
    if not path.exists():
        pytest.skip("transformers writes no such file here")
    value = json.loads(path.read_text())

    @fuzzed
    @given(st.one_of(altered_json(value), altered_bytes(path.read_bytes())))
    def run(content):
        altering(model, name, content, text_file)

    run()


def test_safetensors(model, text_file):
    content = (model / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, rest = json.loads(content[8 : 8 + length]), content[8 + length :]

    altered_header = altered_json(header).map(
        lambda text: len(text).to_bytes(8, "little") + text + rest
    )

    @fuzzed
    @given(st.one_of(altered_header, altered_bytes(content)))
    def run(altered):
        altering(model, "model.safetensors", altered, text_file)

    run()


def test_index(model, text_file, tmp_path):
    folder = tmp_path / "sharded"
    shutil.copytree(model, folder)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    (folder / "other.bin").write_bytes(b"\x80\x04K\x01.")
    content = (folder / "model-00001-of-00001.safetensors").read_bytes()
    names = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    weight_map = {
        name: "model-00001-of-00001.safetensors" for name in names if name != "__metadata__"
    }
    index = {"metadata": {"total_size": 1000}, "weight_map": weight_map}

    @fuzzed
    @given(st.one_of(altered_json(index), altered_bytes(json.dumps(index).encode())))
    def run(altered):
        altering(folder, "model.safetensors.index.json", altered, text_file)

    run()


def npy(array) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


DATA = {
    "ids.npy": npy(np.arange(48).reshape(4, 12)),
    "text.jsonl": b"".join(
        json.dumps({"text": f"w1 w2 w{i} " * 9}).encode() + b"\n" for i in range(5)
    ),
    "text.txt": b"w1 w2 w3 w4 " * 20,
    "tasks.jsonl": b"".join(
        json.dumps({"prompt": f"w{i} w3", "choices": [" w1", " w2 w5"], "answer": i % 2}).encode()
        + b"\n"
        for i in range(5)
    ),
}
MASKS = {
    "masks.npy": npy(np.array([[1, 1, 1, 0, 1], [1, 0, 1, 1, 1]])),
    "masks.jsonl": b'{"removed": [1, 2]}\n{"removed": [3]}\n',
}


def altered_file(name, content):
    """A file with altered bytes, or JSON lines with an altered value in one of them."""
    raw = altered_bytes(content)
    if not name.endswith(".jsonl"):
        return raw
    first, *rest = content.splitlines(keepends=True)
    return st.one_of(
        raw, altered_json(json.loads(first)).map(lambda line: line + b"\n" + b"".join(rest))
    )


@pytest.mark.parametrize("name", DATA)
def test_calibration(checkpoint, tmp_path, name):
    objective = (
        ("--objective", "margin") if name == "tasks.jsonl" else ("--num-samples", 2, "--seq-len", 6)
    )

    @fuzzed
    @given(altered_file(name, DATA[name]))
    def run(content):
        (tmp_path / name).write_bytes(content)
        check("score", checkpoint, "--removed", "1", "--calibration", tmp_path / name, *objective)

    run()


@pytest.mark.parametrize("name", MASKS)
def test_masks(checkpoint, text_file, tmp_path, name):
    data = ("--calibration", text_file, "--num-samples", 2, "--seq-len", 6)

    @fuzzed
    @given(altered_file(name, MASKS[name]))
    def run(content):
        (tmp_path / name).write_bytes(content)
        check("score", checkpoint, "--masks", tmp_path / name, *data)

    run()


@pytest.fixture(scope="module")
def store(checkpoint, text_file, tmp_path_factory):
    """A store, and the losses that belong to it."""
    folder = tmp_path_factory.mktemp("store")
    arguments = store_arguments(checkpoint, text_file, folder / "s.db", folder / "out.jsonl")
    assert forked(lambda: command(*arguments)).status == 0
    with sqlite3.connect(folder / "s.db") as db:
        db.execute("PRAGMA journal_mode=DELETE")
    db.close()
    return (folder / "s.db").read_bytes(), (folder / "out.jsonl").read_text()


def store_arguments(checkpoint, text_file, path, out) -> tuple:
    removed = [part for unit in range(5) for part in ("--removed", unit)]
    data = ("--calibration", text_file, "--num-samples", 2, "--seq-len", 16)
    return ("score", checkpoint, *removed, *data, "--store", path, "--out", out)


def test_stores(checkpoint, text_file, tmp_path, store):
    """An altered store is named, or what it holds is right: no loss comes out of it that is not the
    model's."""
    content, expected = store

    @fuzzed
    @given(altered_bytes(content))
    def run(altered):
        for path in tmp_path.iterdir():
            path.unlink()
        (tmp_path / "s.db").write_bytes(altered)
        check(*store_arguments(checkpoint, text_file, tmp_path / "s.db", tmp_path / "out.jsonl"))
        out = tmp_path / "out.jsonl"
        assert not out.exists() or out.read_text() == expected

    run()


@pytest.mark.parametrize("name", ["inputs.json", "cells", "scores.db"])
def test_study_folders(checkpoint, text_file, tmp_path, name):
    """A study continues from what it can believe, and gives what it has given before."""
    document = write_document(tmp_path / "study.toml", **text_study(checkpoint, text_file))
    arguments = ("study", document, "--quiet", "--out")
    whole = tmp_path / "whole"
    assert forked(lambda: command(*arguments, whole)).status == 0
    expected = _cells(whole)
    file = next((whole / name).iterdir()) if name == "cells" else whole / name

    @settings(fuzzed, max_examples=max(1, EXAMPLES // 2))
    @given(altered_bytes(file.read_bytes()))
    def run(altered):
        folder = tmp_path / "s"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(whole, folder)
        (folder / "study.json").unlink()
        (folder / file.relative_to(whole)).write_bytes(altered)
        check(*arguments, folder)
        assert not (folder / "study.json").exists() or _cells(folder) == expected

    run()


def test_study_documents(checkpoint, text_file, tmp_path):
    """An altered document is refused in one line, or names a study that runs."""
    tables = text_study(checkpoint, text_file, search_racing=0.9, search_protect=[0])
    path = write_document(tmp_path / "study.toml", **tables)

    @settings(fuzzed, max_examples=max(1, EXAMPLES // 2))
    @given(altered_bytes(path.read_bytes()))
    def run(altered):
        path.write_bytes(altered)
        with contextlib.suppress(fp.InputError):
            read_document(path)

    run()


def _cells(folder) -> list:
    cells = json.loads((folder / "study.json").read_text())["cells"]
    return [{k: v for k, v in cell.items() if k not in ("unit_runs", "seconds")} for cell in cells]
