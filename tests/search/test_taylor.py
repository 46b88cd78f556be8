"""taylor against torch's own gradients of the whole model."""

from __future__ import annotations

import families
import numpy as np
import pytest
import torch

import fastprune as fp
from fastprune.testing import SyntheticEvaluator


def importances(hf, rows, power: int) -> tuple[list[float], list[float], list[float]]:
    """sum of |w dL/dw|^power, L over all rows, of each block, and of its attention and its mlp with
    the norms before them."""
    loss = sum(
        torch.nn.functional.cross_entropy(
            hf(torch.tensor([row])).logits[0, :-1], torch.tensor(row[1:]), reduction="sum"
        )
        for row in rows
    ) / sum(len(row) - 1 for row in rows)
    loss.backward()
    whole, attention, mlp = [], [], []
    for layer in families.layers_of(hf):
        found = {
            name: float((w.detach() * w.grad).abs().pow(power).sum())
            for name, w in layer.named_parameters()
            if not name.endswith("bias")
        }
        whole.append(sum(found.values()))
        attention.append(
            sum(v for n, v in found.items() if n.startswith(("self_attn", "input_", "attention")))
        )
        mlp.append(sum(v for n, v in found.items() if n.startswith(("mlp", "post_attention"))))
    hf.zero_grad()
    return whole, attention, mlp


@pytest.mark.parametrize("family", ["llama", "gpt-neox", "qwen3-moe"])
@pytest.mark.parametrize("power", [1, 2])
def test_importance_is_that_of_a_backward_pass(family, power):
    hf = families.build(family, torch.float64)
    rows = families.random_rows(hf.config.vocab_size, [9, 6, 12], seed=1)
    whole, attention, mlp = importances(hf, rows, power)
    frozen = next(hf.parameters()).requires_grad_(False)  # others' choice, which is left as it is
    objective = fp.Perplexity(fp.TokenBatch.from_ids(rows))
    blocks = fp.Evaluator(hf, objective)
    np.testing.assert_allclose(blocks.unit_salience(power), whole, rtol=1e-4)
    halves = fp.Evaluator(hf, objective, granularity="sublayer").unit_salience(power)
    np.testing.assert_allclose(halves, np.ravel([attention, mlp], order="F"), rtol=1e-4)
    assert not frozen.requires_grad
    assert all(parameter.grad is None for parameter in hf.parameters())
    expected = sorted(np.argsort(whole, kind="stable")[:2].tolist())
    assert fp.run_search(blocks, "taylor", 2, power=power).history == [
        (tuple(expected), blocks.score(fp.from_removed([expected], blocks.num_units))[0])
    ]


def test_parameters_that_were_frozen_stay_frozen():
    hf = families.build("llama").requires_grad_(False)
    ev = fp.Evaluator(hf, fp.Perplexity(fp.TokenBatch.from_ids(families.random_rows(97, [8]))))
    assert (ev.unit_salience() > 0).all()
    assert not any(parameter.requires_grad for parameter in hf.parameters())
    with pytest.raises(fp.InputError, match="power must be 1 or 2, not 3"):
        ev.unit_salience(3)


def test_what_is_not_finite_comes_last(monkeypatch):
    evaluator = SyntheticEvaluator(6)
    monkeypatch.setattr(
        evaluator, "unit_salience", lambda power: np.array([np.nan, 3.0, 1.0, np.inf, 2.0, 0.5])
    )
    assert fp.run_search(evaluator, "taylor", 3).removed == (2, 4, 5)
    assert fp.run_search(evaluator, "taylor", 5).removed == (0, 1, 2, 4, 5)
