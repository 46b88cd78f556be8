"""The whole fused model on Triton's operators, on the device that the kernels' tests run on.

The interpreter takes milliseconds for each program, so rows are short and masks few; the same properties are tested
broadly, on the other operators, in tests/engine/test_fused.py.
"""

from __future__ import annotations

import numpy as np
import pytest
from engine.helpers import make_tasks
from families import build, random_rows, reference_losses
from kernel_checks import DEVICE, INTERPRETED  # skips where triton is not installed

import fastprune as fp
from fastprune.models import fused

FAMILIES = ["qwen3", "mistral"]  # with a norm of each head; with a window shorter than a row
LENGTHS = [9, 8]
MASKS = np.array([[1, 1, 0, 1, 0], [1, 1, 0, 0, 1]], dtype=bool)
RELATIVE = 1e-5
BUDGET = 300_000 if INTERPRETED else None  # small tiles, one of which is run as a measurement


@pytest.fixture(autouse=True)
def triton_operators(monkeypatch):
    monkeypatch.setattr(fused, "fast_operators", lambda device, dtype: "triton")


def evaluator(hf, objective) -> fp.Evaluator:
    ev = fp.Evaluator(hf, objective, backend="auto", cache_bytes=BUDGET)
    assert ev.backend == "fused (triton)"
    return ev


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_equal_physical_removal(family):
    hf = build(family)
    rows = random_rows(hf.config.vocab_size, LENGTHS)
    expected = reference_losses(hf, MASKS, rows)
    ev = evaluator(hf.to(DEVICE), fp.Perplexity(fp.TokenBatch.from_ids(rows)))
    together = ev.score(MASKS)
    np.testing.assert_allclose(together, expected, rtol=RELATIVE)
    assert ev.score(MASKS[1])[0] == together[1]  # to the bit


@pytest.mark.parametrize("family", FAMILIES)
def test_choices_in_a_tree_equal_the_generic_path(family):
    """One position predicts the first tokens of 18 choices."""
    hf = build(family).to(DEVICE)
    tasks = make_tasks(hf.config.vocab_size, [(7, [1, 3]), (2, [1] * 18)])
    expected = fp.Evaluator(hf, fp.TaskMargin(tasks), backend="generic").score_samples(MASKS[:1])
    found = evaluator(hf, fp.TaskMargin(tasks)).score_samples(MASKS[:1])
    np.testing.assert_allclose(found, expected, atol=5 * RELATIVE)  # differences of numbers of about 5


def test_divergence_equals_the_generic_path():
    hf = build("qwen3").to(DEVICE)
    objective = fp.KLDivergence(fp.TokenBatch.from_ids(random_rows(hf.config.vocab_size, [7])))
    expected = fp.Evaluator(hf, objective, backend="generic").score(MASKS[:1])
    np.testing.assert_allclose(evaluator(hf, objective).score(MASKS[:1]), expected, rtol=RELATIVE, atol=1e-6)
