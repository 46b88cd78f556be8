"""examples/heal.py trains the pruned model and the whole one alike, and judges both."""

import importlib
import re
import sys
from pathlib import Path

import pytest

import fastprune as fp
from fastprune import demo

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.slow
def test_both_models_are_judged_before_and_after(tmp_path, monkeypatch, capsys):
    pytest.importorskip("peft")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    heal = importlib.import_module("heal")
    model = fp.load_model("demo")
    text = fp.load_text(demo.TEXT, tokenizer=model.tokenizer, num_samples=2, seq_len=32)
    fp.export(fp.Evaluator(model, fp.Perplexity(text)), tmp_path / "pruned", removed=(3, 7))
    judges = ["--judge", str(demo.TEXT_HELDOUT), "--judge", str(demo.TEXT)]
    sizes = ["--steps", "2", "--rows", "2", "--length", "32"]
    folders = ["--base", str(demo.MODEL_DIR), "--out", str(tmp_path / "healed")]
    training = ["--text", str(demo.TEXT), *judges, *sizes]
    monkeypatch.setattr(sys, "argv", ["heal.py", str(tmp_path / "pruned"), *folders, *training])
    heal.main()
    printed = re.findall(
        r"^(\w+), (\w+), (.+): perplexity ([\d.]+) ±", capsys.readouterr().out, re.MULTILINE
    )
    states = [(name, state) for name, state, _, _ in printed]
    assert states == [
        (name, state)
        for name in ("whole", "pruned")
        for state in ("untrained", "trained")
        for _ in range(2)
    ]
    assert (tmp_path / "healed" / "config.json").exists()
    healed = fp.load_model(tmp_path / "healed")
    assert healed.num_blocks == model.num_blocks - 2
    rows = heal.read_rows(healed.tokenizer, demo.TEXT_HELDOUT, 32, 32)
    ev = fp.Evaluator(healed, fp.Perplexity(fp.TokenBatch.from_ids(rows)))
    perplexity = {(name, state, path): float(value) for name, state, path, value in printed}
    expected = perplexity["pruned", "trained", str(demo.TEXT_HELDOUT)]
    assert ev.objective.metric(ev.dense_loss) == pytest.approx(expected, rel=1e-3)
