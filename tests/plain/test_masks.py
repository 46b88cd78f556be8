"""Masks: forms that are accepted, what they mean, and what is refused."""

import itertools
import json

import numpy as np
import pytest
import torch

import fastprune as fp
from fastprune.masks import as_masks, check_removed, parse_removed
from fastprune.report import format_removed


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
    for text in ("a", "1;2", "1,,2", "1.5", "5-3", "1-2-3"):
        with pytest.raises(fp.InputError, match="separated by commas"):
            parse_removed(text)


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


@pytest.mark.parametrize(
    ("name", "content", "culprit"),
    [
        ("masks.jsonl", b"", "holds no masks"),
        ("masks.jsonl", b'{"removed": [1]}\n{"removed": [9]}\n', "9 is out of range"),
        ("masks.jsonl", b'{"removed": [1]}\n{"kept": [1]}\n', "masks.jsonl:2: expected a row"),
        ("masks.jsonl", b'{"removed": 1}\n', "masks.jsonl:1: expected a row"),
        ("masks.jsonl", b'{"removed": [1]}\n{"removed"\n', "masks.jsonl:2: not valid JSON"),
        ("masks.jsonl", b"\xff\xfe\n", "masks.jsonl"),
        ("masks.npy", b"not an array", "not a readable .npy"),
        ("masks.npy", b"", "not a readable .npy"),
        ("masks.txt", b"1 0 1", "read from .npy or .jsonl"),
    ],
)
def test_refused_mask_files(tmp_path, name, content, culprit):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(fp.InputError, match=culprit) as caught:
        fp.load_masks(tmp_path / name, 5)
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_and_pickled_mask_files(tmp_path):
    with pytest.raises(fp.InputError, match="no such masks file"):
        fp.load_masks(tmp_path / "nowhere.npy", 5)
    np.save(tmp_path / "object.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(fp.InputError, match="not a readable"):
        fp.load_masks(tmp_path / "object.npy", 5)
    np.save(tmp_path / "wide.npy", np.ones((2, 6)))
    with pytest.raises(fp.InputError, match=r"wide\.npy: a mask has 6 entries"):
        fp.load_masks(tmp_path / "wide.npy", 5)
