"""The speculative example: the acceptance that it predicts is the one that generation measures."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

import fastprune as fp

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def examples():
    sys.path.insert(0, str(EXAMPLES))
    yield {name: importlib.import_module(name) for name in ("speculative", "continuations")}
    sys.path.remove(str(EXAMPLES))


@pytest.fixture(scope="module")
def setting(examples):
    shared = importlib.import_module("shared")
    hf, tokenizer = shared.open_model("demo")
    return hf, shared.read_rows(tokenizer, shared.demo.TEXT, rows=4, length=40)


def test_continuations_are_the_models_own_and_the_only_targets(examples, setting):
    hf, rows = setting
    continuations = examples["continuations"]
    own = continuations.continued(hf, rows[:2, :16], 12)
    assert torch.equal(own[:, :16], rows[:2, :16])
    with torch.no_grad():
        logits = hf(own).logits[:, 15:-1]
    logits[:, :, hf.config.eos_token_id] = -torch.inf  # generation was told not to end
    assert torch.equal(logits.argmax(-1), own[:, 16:])
    batch = continuations.written_batch(own)
    assert batch.target_counts.tolist() == [12, 12]
    ev = fp.Evaluator(hf, fp.Agreement(batch, "greedy"))
    assert ev.dense_loss == 0


@pytest.mark.slow
def test_predicted_and_measured_acceptance(examples, setting):
    hf, rows = setting
    speculative = examples["speculative"]
    found = speculative.compare(hf, rows)
    assert found["same_text"]  # the whole model decides every token
    assert len(found["removed"]) == speculative.REMOVE
    # a token that the model adds behind an accepted draft is in the prediction alone
    assert found["predicted"] == pytest.approx(found["measured"], abs=0.1)
    whole, written = speculative.measured(hf, rows[2:3, :16], 12, ())
    assert whole == 1
    bad = tuple(range(2, 24))
    share, text = speculative.measured(hf, rows[2:3, :16], 12, bad)
    assert torch.equal(text, written)
    assert share < found["measured"]
