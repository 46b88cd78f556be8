"""Checks of arguments: which values pass, and how errors name the others."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest

import fastprune as fp
from fastprune import validate

INTEGERS = [3, np.int8(3), np.uint64(3), np.int64(3)]
FLOATS = [0.5, np.float16(0.5), np.float32(0.5), np.float64(0.5)]
NO_NUMBERS = [True, False, np.bool_(True), "3", None, 1j, [3], np.array([3])]


def refused(check, *arguments, **options) -> fp.InputError:
    with pytest.raises(fp.InputError) as caught:
        check("name", *arguments, **options)
    error = caught.value
    assert error.argument == "name"
    assert error.message.startswith("name must be ")
    assert "\n" not in str(error)
    return error


@pytest.mark.parametrize("value", INTEGERS, ids=repr)
def test_integers(value):
    checked = validate.check_integer("name", value, 3, 3)
    assert checked == 3
    assert type(checked) is int


@pytest.mark.parametrize("value", [*NO_NUMBERS, *FLOATS, 3.0, float("nan")], ids=repr)
def test_no_integers(value):
    refused(validate.check_integer, value)
    refused(validate.check_integer, value, 0, 9)


def test_limits_of_integers():
    error = refused(validate.check_integer, 4, 1, 3, of="the number of masks")
    assert str(error) == "name must be an integer from 1 to 3, the number of masks, not 4"
    assert (error.least, error.most) == (1, 3)
    error = refused(validate.check_integer, 0, least=1)
    assert str(error) == "name must be an integer of at least 1, not 0"
    assert (error.least, error.most) == (1, None)
    error = refused(validate.check_integer, 2**70, most=3)
    assert str(error) == "name must be an integer of at most 3, not 1180591620717411303424"
    assert "thousands of digits" in str(refused(validate.check_integer, 10**5000, most=3))


@pytest.mark.parametrize("value", [*INTEGERS, *FLOATS], ids=repr)
def test_numbers(value):
    checked = validate.check_number("name", value, 0.5, 3)
    assert checked == value
    assert type(checked) is float


@pytest.mark.parametrize("value", [*NO_NUMBERS, np.nan, np.inf, -np.inf, -1, 3.5], ids=repr)
def test_no_numbers(value):
    error = refused(validate.check_number, value, 0, 3)
    assert "a number from 0 to 3, not" in str(error)
    assert (error.least, error.most) == (0, 3)


@pytest.mark.parametrize("value", [*FLOATS, 1e-9, 1 - 1e-9], ids=repr)
def test_probabilities(value):
    assert validate.check_probability("name", value) == value


@pytest.mark.parametrize("value", [*NO_NUMBERS, 0, 1, 0.0, 1.0, -0.5, np.nan, 99], ids=repr)
def test_no_probabilities(value):
    refused(validate.check_probability, value)


def test_bytes():
    assert validate.check_bytes("name", None, 1) is None
    for value in (1, 2.0**40, np.int32(7), np.float32(8)):
        checked = validate.check_bytes("name", value, 1)
        assert checked == value
        assert type(checked) is int
    for value in (0, -1, 0.5, np.nan, np.inf, True, "1", 1j):
        assert refused(validate.check_bytes, value, 1).least == 1


def test_one_of():
    assert validate.check_one_of("name", "auto", ("auto", "fused")) == "auto"
    error = refused(validate.check_one_of, "fuse", ("auto", "fused"))
    assert str(error) == "name must be one of auto, fused, not 'fuse'; did you mean 'fused'?"
    error = refused(validate.check_one_of, "x", ("auto", "fused"), also="a number")
    assert str(error) == "name must be a number, or one of auto, fused, not 'x'"
    for value in (None, 3, ["auto"], np.array(["auto"])):
        refused(validate.check_one_of, value, ("auto", "fused"))


def test_kinds_and_callables():
    assert validate.check_kind("name", "x", str, "text") == "x"
    assert str(refused(validate.check_kind, 3, str, "text")) == "name must be text, not int"
    assert validate.check_callable("name", len, "a function") is len
    error = refused(validate.check_callable, 3, "a function")
    assert str(error) == "name must be a function, not 3"


def test_folders_are_made_below_folders_only(tmp_path):
    assert validate.check_folder(tmp_path) == tmp_path
    assert validate.check_folder(tmp_path / "new" / "below") == tmp_path / "new" / "below"
    assert not (tmp_path / "new").exists()
    file = tmp_path / "file"
    file.touch()
    for folder in (file, file / "below", file / "below" / "x"):
        with pytest.raises(fp.InputError, match=f"{file} is a file, not a folder"):
            validate.check_folder(folder)


def test_folders_that_cannot_be_written_to_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda place, mode: Path(place) != tmp_path)
    for folder in (tmp_path, tmp_path / "new" / "below"):
        with pytest.raises(fp.InputError, match=f"{folder}: {tmp_path} cannot be written to"):
            validate.check_folder(folder)
    (tmp_path / "other").mkdir()
    assert validate.check_folder(tmp_path / "other" / "new") == tmp_path / "other" / "new"


def test_errors_say_what_fits():
    error = fp.InputError("the text is short", fits={"num_samples": 2, "seq_len": 3})
    assert error.message == "the text is short"
    assert str(error) == "the text is short; what fits: num_samples=2 or seq_len=3"


def test_errors_cross_processes():
    error = fp.InputError("it is small", argument="a", least=2, most=3, fits={"b": 1})
    copy = pickle.loads(pickle.dumps(error))
    assert str(copy) == str(error) == "it is small; what fits: b=1"
    assert vars(copy) == vars(error)
