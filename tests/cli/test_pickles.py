"""A pickle is never opened, wherever a file can be given."""

from __future__ import annotations

import pickle

import numpy as np
import pytest


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.fixture
def sprung(tmp_path):
    return tmp_path / "sprung"


@pytest.fixture
def trap(tmp_path, sprung):
    """A .npy file that is a pickle, one that holds one, and a folder of pickled weights."""
    (tmp_path / "raw.npy").write_bytes(pickle.dumps(Trap(sprung)))
    np.save(tmp_path / "objects.npy", np.array([Trap(sprung)], dtype=object), allow_pickle=True)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(sprung)))
    return tmp_path


def test_the_trap_works(trap, sprung):
    np.load(trap / "objects.npy", allow_pickle=True)
    assert sprung.exists()


@pytest.mark.parametrize("file", ["raw.npy", "objects.npy"])
def test_arrays(run, trap, sprung, checkpoint, text_file, file):
    for arguments in (
        ("--removed", "1", "--calibration", trap / file),
        ("--masks", trap / file, "--calibration", text_file, "--num-samples", 2, "--seq-len", 16),
        ("--removed", "1", "--calibration", text_file, "--store", trap / file),
    ):
        status, _, err = run("score", checkpoint, *arguments)
        assert status == 2, err
        assert file in err
    assert not sprung.exists()


def test_weights(run, trap, sprung, text_file):
    status, _, err = run("score", trap / "model", "--removed", "1", "--calibration", text_file)
    assert status == 2
    assert "pickles are never opened" in err
    assert not sprung.exists()
