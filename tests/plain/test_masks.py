"""Masks: forms that are accepted, what they mean, and what is refused."""

import itertools
import json

import numpy as np
import pytest
import torch

import fastprune as fp
from fastprune.masks import as_masks, check_removed, format_removed, parse_removed


@pytest.mark.parametrize("num_units", [1, 5, 9])
def test_removed_and_masks_are_inverse(num_units):
    for count in range(num_units + 1):
        for removed in itertools.combinations(range(num_units), count):
            (mask,) = fp.from_removed([removed[::-1]], num_units)
            assert mask.dtype == bool
            assert mask.tolist() == [i not in removed for i in range(num_units)]
            assert fp.to_removed(mask) == removed
    assert fp.from_removed([], num_units).shape == (0, num_units)


def test_to_removed_gives_plain_integers():
    assert [type(unit) for unit in fp.to_removed(np.array([0, 1, 0]))] == [int, int]
    assert fp.from_removed([np.array([2, 0])], 3).tolist() == [[False, True, False]]


EXPECTED = np.array([[True, False, True], [False, True, True]])


@pytest.mark.parametrize(
    "masks",
    [
        EXPECTED,
        EXPECTED.astype(np.int8),
        EXPECTED.astype(np.uint64),
        EXPECTED.astype(np.float32),
        EXPECTED.tolist(),
        EXPECTED.astype(int).tolist(),
        torch.tensor(EXPECTED),
        torch.tensor(EXPECTED).float().requires_grad_(),
        np.asfortranarray(EXPECTED),
        EXPECTED[::-1][::-1],
    ],
)
def test_accepted_forms(masks):
    found = as_masks(masks, 3)
    assert found.dtype == bool
    assert found.tolist() == EXPECTED.tolist()


def test_one_mask_and_no_masks():
    assert as_masks([1, 0, 1], 3).tolist() == [[True, False, True]]
    assert as_masks([], 3).shape == (0, 3)
    assert as_masks(np.zeros((0, 3)), 3).shape == (0, 3)


@pytest.mark.parametrize(
    ("masks", "culprit"),
    [
        ([[1, 0]], "2 entries.*3 units"),
        ([1, 0, 1, 1], "4 entries.*3 units"),
        ([[1, 0, 1], [1, 0]], "rows differ"),
        ([[1, 0, 2]], "mask 0 has the value 2 at unit 2"),
        ([[1, 0, 1], [1, -1, 1]], "mask 1 has the value -1 at unit 1"),
        ([[1, 0, 0.5]], "0.5 at unit 2"),
        ([[1, 0, float("nan")]], "nan at unit 2"),
        ([["a", "b", "c"]], "bool or 0/1"),
        ([[None, 1, 0]], "bool or 0/1"),
        (np.ones((1, 1, 3)), r"\[1, 1, 3\]"),
        (np.array(1), r"shape"),
        (np.ones((0, 4)), "4 entries.*3 units"),
    ],
)
def test_refused_masks(masks, culprit):
    with pytest.raises(fp.InputError, match=culprit) as caught:
        as_masks(masks, 3)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("removed", "culprit"),
    [
        ((3,), "3 is out of range.*0 to 2"),
        ((-1,), "-1 is out of range"),
        ((1, 0, 1), "1 is given twice"),
        ((True,), "True is not an integer"),
        ((1.0,), "1.0 is not an integer"),
        (("1",), "'1' is not an integer"),
    ],
)
def test_refused_removed_units(removed, culprit):
    for check in (lambda: check_removed(removed, 3), lambda: fp.from_removed([(0,), removed], 3)):
        with pytest.raises(fp.InputError, match=culprit) as caught:
            check()
        assert "\n" not in str(caught.value)


def test_parse_removed():
    assert parse_removed("9,10") == (9, 10)
    assert parse_removed(" 3 ") == (3,)
    assert parse_removed("") == parse_removed("-") == ()
    assert parse_removed("3-5 9, 11") == (3, 4, 5, 9, 11)  # as tables print it
    with pytest.raises(fp.InputError, match="5-3 runs backwards"):
        parse_removed("1,5-3")
    for text in ("a", "1;2", "1,,2", "1.5", "1-2-3"):
        with pytest.raises(fp.InputError, match="separated by commas"):
            parse_removed(text)


@pytest.mark.parametrize(
    "text",
    [
        "0-30000000000",
        "0-99999,0-99999",
        "0-100000",
        "9" * 5000,
        "1-" + "9" * 5000,
        "-" * 9999,
        "3,\0",
    ],
    ids=lambda text: repr(text[:12]),
)
def test_units_beyond_all_models(text):
    with pytest.raises(
        fp.InputError, match=r"names more than 100000 units|separated by commas"
    ) as caught:
        parse_removed(text)
    assert len(str(caught.value)) < 200
    assert "\n" not in str(caught.value)


def test_units_too_long_to_print():
    for removed in ((10**5000,), (10**4000,), (-(10**5000),), ("x" * 5000,), 10**5000):
        with pytest.raises(fp.InputError) as caught:
            check_removed(removed, 3)
        assert len(str(caught.value)) < 200


@pytest.mark.parametrize("removed", [(), (3,), (3, 4, 5, 9), (0, 2, 4), (0, 1)])
def test_what_is_printed_can_be_given_back(removed):
    assert parse_removed(format_removed(removed)) == removed


def test_unit_indices_in_the_place_of_masks_get_a_hint():
    with pytest.raises(fp.InputError, match="from_removed"):
        as_masks([(2, 3)], 5)


def test_load_masks(tmp_path):
    masks = np.random.default_rng(0).random((7, 5)) < 0.5
    for array in (masks, masks.astype(np.uint8), masks.astype(float)):
        np.save(tmp_path / "masks.npy", array)
        assert np.array_equal(fp.load_masks(tmp_path / "masks.npy", 5), masks)
    lines = [json.dumps({"removed": list(fp.to_removed(mask))}) for mask in masks]
    (tmp_path / "masks.jsonl").write_text("\n\n".join(lines) + "\n")
    assert np.array_equal(fp.load_masks(str(tmp_path / "masks.jsonl"), 5), masks)


def npy_header(shape) -> bytes:
    """The start of a .npy file of bytes, whatever array its header promises."""
    header = (
        f"{{'descr': '|b1', 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117)
        + b"\n"
    )
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header


@pytest.mark.parametrize(
    ("name", "content", "culprit"),
    [
        ("masks.jsonl", b"", "holds no masks"),
        ("masks.jsonl", b'{"removed": [1]}\n{"removed": [9]}\n', "9 is out of range"),
        ("masks.jsonl", b'{"removed": [1]}\n{"kept": [1]}\n', "masks.jsonl:2: expected a row"),
        ("masks.jsonl", b'{"removed": 1}\n', "masks.jsonl:1: expected a row"),
        ("masks.jsonl", b'{"removed": [1]}\n{"removed"\n', "masks.jsonl:2: not valid JSON"),
        ("masks.jsonl", b"\xff\xfe\n", "masks.jsonl"),
        (
            "masks.jsonl",
            b'{"removed": [1], "removed": [2]}\n',
            "masks.jsonl:1: the key 'removed' is given twice",
        ),
        ("masks.jsonl", b'{"removed": [NaN]}\n', "masks.jsonl:1: not valid JSON .NaN"),
        ("masks.jsonl", b'{"removed": [-Infinity]}\n', "masks.jsonl:1: not valid JSON .-Infinity"),
        ("masks.jsonl", b'{"removed": [1]}\n\0\n', "masks.jsonl:2: not valid JSON"),
        (
            "masks.jsonl",
            b'{"removed": ["\\udc00"]}\n',
            "masks.jsonl:1: holds half a surrogate pair",
        ),
        ("masks.jsonl", b"[" * 10**6, "masks.jsonl:1: not valid JSON .nested too deeply"),
        (
            "masks.jsonl",
            b'{"removed": [' + b"9" * 5000 + b"]}",
            "masks.jsonl:1: not valid JSON .* too many digits",
        ),
        ("masks.jsonl", b'{"removed": [' + b"9" * 4000 + b"]}", "99 is out of range"),
        ("masks.jsonl", b'{"removed": ["' + b"9" * 9000 + b'"]}', "is not an integer"),
        ("masks.npy", b"not an array", "not a readable .npy"),
        ("masks.npy", b"", "not a readable .npy"),
        ("masks.npy", npy_header((10**18,)) + bytes(99), "not a readable .npy"),
        ("masks.npy", npy_header((10**9, 10**9, 10**9)) + bytes(99), "not a readable .npy"),
        ("masks.npy", npy_header((10**12, 5)), "not a readable .npy"),
        ("masks.npy", npy_header((-1, 5)) + bytes(99), "not a readable .npy"),
        ("masks.npy", npy_header("(" * 500) + bytes(99), "not a readable .npy"),
        ("masks.npy", npy_header((2, 5)) + bytes(9), "not a readable .npy"),
        ("masks.npy", npy_header((0, 5)), "holds no masks|not a readable .npy"),
        ("masks.npy", b"PK\x03\x04" + bytes(99), "not a readable .npy"),
        ("masks.csv", b"1 0 1", "read from .npy, .jsonl or .txt"),
    ],
    ids=lambda value: repr(value[:40]),
)
def test_refused_mask_files(tmp_path, name, content, culprit):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(fp.InputError, match=culprit) as caught:
        fp.load_masks(tmp_path / name, 5)
    assert str(tmp_path / name) in str(caught.value)
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)


def test_a_byte_order_mark_is_skipped(tmp_path):
    (tmp_path / "masks.jsonl").write_bytes(b'\xef\xbb\xbf{"removed": [1]}\n')
    assert fp.load_masks(tmp_path / "masks.jsonl", 3).tolist() == [[True, False, True]]


def test_archives_are_no_masks(tmp_path):
    np.savez(tmp_path / "masks.npz", np.ones((2, 5)))
    (tmp_path / "masks.npz").rename(tmp_path / "masks.npy")
    with pytest.raises(fp.InputError, match=r"not a readable \.npy"):
        fp.load_masks(tmp_path / "masks.npy", 5)


def test_missing_and_pickled_mask_files(tmp_path):
    with pytest.raises(fp.InputError, match="no such masks file"):
        fp.load_masks(tmp_path / "nowhere.npy", 5)
    np.save(tmp_path / "object.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(fp.InputError, match="not a readable"):
        fp.load_masks(tmp_path / "object.npy", 5)
    np.save(tmp_path / "wide.npy", np.ones((2, 6)))
    with pytest.raises(fp.InputError, match=r"wide\.npy: a mask has 6 entries"):
        fp.load_masks(tmp_path / "wide.npy", 5)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"sequence": []}', "masks.jsonl:1: a sequence names at least one unit"),
        ('{"sequence": [0, 5]}', "masks.jsonl:1: sequence: 5 is no unit; the model's units are"),
        ('{"sequence": ["0-4"]}', "masks.jsonl:1: sequence: '0-4' is no unit"),
        ('{"sequence": 3}', "masks.jsonl:1: expected a row like"),
        ('{"sequence": [0], "removed": [1]}', "masks.jsonl:1: expected a row like .* one of them"),
        (json.dumps({"sequence": [0] * 10_001}), "sequence has more than 4096 units"),
    ],
)
def test_refused_sequences_of_files(tmp_path, line, message):
    path = tmp_path / "masks.jsonl"
    path.write_text(line)
    with pytest.raises(fp.InputError, match=message):
        fp.load_sequences(path, 5)


def test_masks_are_read_as_sequences_and_sequences_are_no_masks(tmp_path):
    np.save(tmp_path / "masks.npy", [[1, 0, 1], [0, 0, 0]])
    assert fp.load_sequences(tmp_path / "masks.npy", 3) == [(0, 2), ()]
    path = tmp_path / "masks.jsonl"
    path.write_text('{"sequence": [0, 2]}')
    assert fp.load_masks(path, 3).tolist() == [[True, False, True]]
    path.write_text('{"removed": [0]}\n{"sequence": [0, 0, 1]}')
    assert fp.load_sequences(path, 3) == [(1, 2), (0, 0, 1)]
    with pytest.raises(fp.InputError, match="row 1 is a sequence that repeats or reorders units"):
        fp.load_masks(path, 3)


def test_a_configuration_of_evopress_is_a_mask_of_blocks_or_of_sublayers(tmp_path):
    path = tmp_path / "layer_drop_config.txt"
    path.write_text("none\nattn\nattn+mlp\nmlp\n")
    removed = [fp.to_removed(mask) for mask in fp.load_masks(path, 8)]
    assert removed == [(2, 4, 5, 7)]  # 2i is block i's attention, 2i + 1 its MLP
    with pytest.raises(fp.InputError, match="line 2 removes attn alone, which needs sublayers"):
        fp.load_masks(path, 4)
    with pytest.raises(fp.InputError, match="holds 4 lines; 5 units need a line for each block"):
        fp.load_masks(path, 5)
    path.write_text("none\nattn+mlp\nnone\n")
    assert fp.load_masks(path, 3).tolist() == [[True, False, True]]
    path.write_text("none\nboth\n")
    with pytest.raises(fp.InputError, match=r"line 2 must be none, attn, mlp or attn\+mlp, not"):
        fp.load_masks(path, 2)
