"""Files in and out: small wrong files are refused at once, and what is written is whole or not
there."""

import errno
import json
import os
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest

import fastprune as fp
from fastprune.io import write_json, write_jsonl


def refused(call, *args, **options) -> str:
    """The message of the InputError that the call raises: one line, not a long one."""
    with pytest.raises(fp.InputError) as caught:
        call(*args, **options)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    return str(caught.value)


def words(documents, **options):
    """A tokenizer of single letters."""
    one = isinstance(documents, str)
    ids = [
        [ord(letter) % 97 for letter in document]
        for document in ([documents] if one else documents)
    ]
    return {"input_ids": ids[0] if one else ids}


@pytest.mark.parametrize(
    "shape", ["(1000000000000000000,)", "(4, 1000000000000)", "(3, 3)", "((((((", "'x'"]
)
def test_token_ids_that_are_not_there(tmp_path, shape):
    header = (
        f"{{'descr': '<i8', 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117)
        + b"\n"
    )
    content = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(64)
    (tmp_path / "ids.npy").write_bytes(content)
    assert "ids.npy: not a readable .npy array" in refused(fp.load_text, tmp_path / "ids.npy")


def test_token_ids_that_are_objects(tmp_path):
    np.save(tmp_path / "ids.npy", np.array([[{}]], dtype=object), allow_pickle=True)
    assert "ids.npy: not a readable .npy array" in refused(fp.load_text, tmp_path / "ids.npy")


def test_token_ids_are_read_in_any_order(tmp_path):
    ids = np.arange(12).reshape(3, 4)
    for array in (ids, np.asfortranarray(ids), ids.astype(">u2")):
        np.save(tmp_path / "ids.npy", array)
        assert fp.load_text(tmp_path / "ids.npy").ids.tolist() == ids.ravel().tolist()


def test_counts_beyond_everything(tmp_path):
    np.save(tmp_path / "ids.npy", np.arange(12).reshape(3, 4))
    (tmp_path / "a.txt").write_text("some text")
    for name in ("num_samples", "seq_len", "seed"):
        for value in (2**63, 10**5000, -(10**5000)):
            for file in ("ids.npy", "a.txt"):
                assert name in refused(fp.load_text, tmp_path / file, words, **{name: value})


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b'{"text": "a", "text": "b"}', "the key 'text' is given twice"),
        (b'{"text": "a", "more": {"b": 1, "b": 2}}', "the key 'b' is given twice"),
        (b'{"text": "\\ud83d"}', "half a surrogate pair"),
        (b'{"text": "a", "score": NaN}', "NaN is no JSON number"),
        (b'{"text": "a\0b"}', "not valid JSON"),
        (b'{"text": ' * 20000, "nested too deeply"),
        (b'{"text": ' + b"1" * 9999 + b"}", "too many digits"),
        (b'{"' + b"k" * 9999 + b'": 1, "' + b"k" * 9999 + b'": 2}', "is given twice"),
    ],
    ids=lambda value: repr(value[:40]),
)
def test_lines_that_are_not_taken(tmp_path, line, why):
    path = tmp_path / "rows.jsonl"
    good = b'{"text": "abc", "prompt": "a", "choices": ["b", "c"], "answer": 0}'
    path.write_bytes(good + b"\n" + line + b"\n")
    for load in (fp.load_text, fp.load_tasks):
        message = refused(load, path, words)
        assert f"{path}:2: " in message
        assert why in message


def test_whole_surrogate_pairs_and_byte_order_marks(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a\\ud83d\\ude00b"}\n')
    assert (
        fp.load_text(tmp_path / "rows.jsonl", words, 1, 3).ids.tolist()
        == words("a\U0001f600b")["input_ids"]
    )


def test_long_answers_are_quoted_in_brief(tmp_path):
    row = {"prompt": "a", "choices": ["b", "c"], "answer": "x" * 9999}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    assert "answer must be the index" in refused(fp.load_tasks, tmp_path / "rows.jsonl", words)


# -- what is written -------------------------------------------------------------------------------


def test_a_new_file_is_whole_and_alone(tmp_path):
    write_jsonl(tmp_path / "new" / "rows.jsonl", [{"a": 1}, {"a": float("nan")}])
    assert (tmp_path / "new" / "rows.jsonl").read_text() == '{"a": 1}\n{"a": "nan"}\n'
    assert os.listdir(tmp_path / "new") == ["rows.jsonl"]


def test_what_is_there_is_kept(tmp_path):
    path = tmp_path / "value.json"
    for make in (lambda: path.write_text("mine"), lambda: path.symlink_to("nowhere"), path.mkdir):
        make()
        before = os.lstat(path)
        assert "value.json: exists already" in refused(write_json, path, {"a": 1})
        assert os.lstat(path) == before
        assert os.listdir(tmp_path) == ["value.json"]
        path.rmdir() if path.is_dir() else path.unlink()


def test_a_file_is_replaced_where_that_is_asked_for(tmp_path):
    for value in (1, 2):
        write_json(tmp_path / "value.json", {"a": value}, replace=True)
        assert json.loads((tmp_path / "value.json").read_text()) == {"a": value}


def test_leftovers_of_a_killed_run_do_not_block(tmp_path):
    write_json(tmp_path / "first.json", {"a": 1})
    (tmp_path / f".second.json.{os.getpid()}").write_text("half")
    (tmp_path / ".second.json.1").write_text("half")
    write_json(tmp_path / "second.json", {"a": 2})
    for name, value in (("first", 1), ("second", 2)):
        assert json.loads((tmp_path / f"{name}.json").read_text()) == {"a": value}


def test_a_leftover_that_is_a_finished_file_is_not_written_to(tmp_path):
    """A run that was killed after its file had appeared leaves the same file by another name."""
    path = tmp_path / "value.json"
    write_json(path, {"a": 1})
    os.link(path, tmp_path / f".value.json.{os.getpid()}")
    assert "exists already" in refused(write_json, path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_json(tmp_path / "value.json", {"a": 1})
    assert os.listdir(tmp_path) == []


def write_own(path, number: int) -> bool:
    """Whether this process was the one to write the file."""
    try:
        write_json(path, {"writer": [number] * 1000})
    except fp.InputError:
        return False
    return True


def test_one_of_several_writers_wins(tmp_path):
    with ProcessPoolExecutor(3) as pool:
        for attempt in range(5):
            path = tmp_path / f"{attempt}.json"
            won = list(pool.map(write_own, [path] * 3, range(3)))
            assert sum(won) == 1
            assert json.loads(path.read_text()) == {"writer": [won.index(True)] * 1000}
