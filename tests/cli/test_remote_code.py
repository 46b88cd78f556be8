"""Models whose folder brings code along: refused unless that is asked for, and exported with their
code."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

MODELING = """
from transformers import LlamaConfig, LlamaForCausalLM

class OddConfig(LlamaConfig):
    model_type = "odd_llama"

class OddForCausalLM(LlamaForCausalLM):
    config_class = OddConfig

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 0.5
        return output
"""


@pytest.fixture(scope="module")
def odd(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("odd") / "model"
    shutil.copytree(checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    config["model_type"], config["architectures"] = "odd_llama", ["OddForCausalLM"]
    config["auto_map"] = {
        "AutoConfig": "modeling_odd.OddConfig",
        "AutoModelForCausalLM": "modeling_odd.OddForCausalLM",
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_odd.py").write_text(MODELING)
    return folder


@pytest.fixture(autouse=True)
def modules_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules")
    )


def test_code_runs_only_when_it_is_asked_for(run, odd):
    status, _, err = run("info", odd)
    assert status == 2
    assert err.count("\n") == 1
    assert "brings code of its own, which runs only with --trust-remote-code" in err


def test_an_export_keeps_the_code(run, odd, text_file, tmp_path):
    trust = "--trust-remote-code"
    status, _, err = run("export", odd, trust, "--removed", "1,3", "--out", tmp_path / "pruned")
    assert status == 0, err
    assert (tmp_path / "pruned" / "modeling_odd.py").is_file()
    data = ("--calibration", text_file, "--num-samples", 2, "--seq-len", 16, trust)
    for folder, removed, file in ((odd, "1,3", "a.jsonl"), (tmp_path / "pruned", "", "b.jsonl")):
        status, _, err = run("score", folder, "--removed", removed, *data, "--out", tmp_path / file)
        assert status == 0, err
    a, b = (json.loads((tmp_path / file).read_text())["loss"] for file in ("a.jsonl", "b.jsonl"))
    assert np.isclose(a, b, rtol=1e-6)
