"""Twelve families of unlike kinds, measured as the table of docs/models.md is: blocks, questions,
folder, streaming and export against transformers' own losses; and refusals of a line."""

import importlib.util
import warnings
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "sweep_families.py"


@pytest.fixture(scope="module")
def sweep():
    spec = importlib.util.spec_from_file_location("sweep_families", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SAMPLE = {
    "openai-gpt": "trees",  # layers return lists; no norm before the head
    "longcat_flash": "trees",  # two depths; two attentions in a layer
    "deepseek_v3": "trees",  # latent attention, experts behind leading dense layers
    "bloom": "rows",  # positions as biases
    "gpt_neo": "rows",  # local attention of its own
    "mamba": "rows",  # no attention
    "lfm2": "rows",  # convolutions
    "falcon_h1": "rows",  # attention and state space side by side; multipliers at the head
    "nemotron_h": "rows",  # one sublayer a layer, of four kinds
    "fuyu": "trees",  # images as tokens
    "qwen2_vl": "trees",  # positions of three kinds
    "llava": "trees",  # any text behind a tower
}


@pytest.mark.parametrize("name", sorted(SAMPLE))
def test_families_of_unlike_kinds(sweep, name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = sweep.measure(name)
    wrong = {
        step: error
        for step, error in found["errors"].items()
        if not isinstance(error, float) or not error <= 1e-5
    }
    assert not wrong
    assert set(found["errors"]) == {"blocks", "questions", "folder", "streaming", "export"}
    kind = "rows" if found["support"]["questions"].startswith("rows") else "trees"
    assert kind == SAMPLE[name]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("bert", "list of 6 decoder layers was found"),
        ("t5gemma2", "it is an encoder-decoder"),
        ("deepseek_v4", "its states have 4 dimensions"),
        ("blip-2", "it does not run on text alone"),
    ],
)
def test_refusals_name_the_family_and_the_reason(sweep, name, reason):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = sweep.measure(name)
    assert reason in found["refused"]
    assert f"the family {name!r}" in found["refused"]
    assert "\n" not in found["refused"]
