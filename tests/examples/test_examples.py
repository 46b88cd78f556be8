"""Every example's two functions choose the same, by the same losses."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
LOOPS = sorted(path.stem for path in EXAMPLES.glob("*.py") if "def loop(" in path.read_text())


@pytest.fixture(scope="module", autouse=True)
def found():
    sys.path.insert(0, str(EXAMPLES))
    yield
    sys.path.remove(str(EXAMPLES))


@pytest.fixture(scope="module")
def setting(found):
    shared = importlib.import_module("shared")
    hf, tokenizer = shared.open_model("demo")
    return hf, shared.read_rows(tokenizer, shared.demo.TEXT, rows=3, length=24)


@pytest.mark.slow
@pytest.mark.parametrize("name", LOOPS)
def test_the_loop_and_fastprune_choose_the_same(name, setting):
    example = importlib.import_module(name)
    (chosen, losses), (also, same) = example.loop(*setting), example.fast(*setting)
    assert list(chosen) == list(also)
    np.testing.assert_allclose(
        same, losses, rtol=2e-4, atol=2e-5
    )  # KL near 0 is a difference of large numbers


def test_the_list_of_examples_is_whole(found):
    assert set(LOOPS) == set(importlib.import_module("all").NAMES)
