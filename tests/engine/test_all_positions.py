"""KLDivergence over every position of a row, the last too, against transformers in float64."""

import numpy as np
import pytest
import torch
from families import build, random_rows, reference_model, some_masks

import fastprune as fp

LENGTHS = [19, 7, 19, 2]


def divergence(hf, mask, rows, last: bool) -> float:
    """The mean over positions, with the last of each row or without."""
    each = []
    with torch.no_grad():
        removed = reference_model(hf, mask)
        for row in rows:
            dense, masked = (
                model(torch.tensor([row]), use_cache=False).logits[0].double().log_softmax(-1)
                for model in (hf, removed)
            )
            each.append((dense.exp() * (dense - masked)).sum(-1)[: None if last else -1])
    return torch.cat(each).mean().item()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_position_counts_the_last_too(family):
    hf = build(family, torch.float64)
    rows = random_rows(hf.config.vocab_size, LENGTHS)
    batch = fp.TokenBatch.from_ids(rows)
    for positions, last in (("all", True), ("targets", False)):
        ev = fp.Evaluator(hf, fp.KLDivergence(batch, positions=positions))
        masks = some_masks(ev.num_units, 20, seed=3)[::4]
        expected = [divergence(hf, mask, rows, last) for mask in masks]
        np.testing.assert_allclose(ev.score(masks), expected, rtol=1e-6, atol=1e-12)
        assert ev.dense_loss == 0


def test_a_cut_row_reads_every_position_of_its_part():
    hf = build("llama", torch.float64)
    rows = random_rows(hf.config.vocab_size, LENGTHS)
    ev = fp.Evaluator(hf, fp.KLDivergence(fp.TokenBatch.from_ids(rows), positions="all"))
    masks = some_masks(ev.num_units, 20, seed=3)[::6]
    expected = [divergence(hf, mask, [rows[2], rows[0][:4]], last=True) for mask in masks]
    losses = ev.score(masks, samples=[2, 0], tokens=len(rows[2]) + 4)
    np.testing.assert_allclose(losses, expected, rtol=1e-6, atol=1e-12)


def test_labels_do_not_leave_positions_out():
    ids = torch.tensor([[5, 6, 7, 8]])
    labels = torch.tensor([[-100, -100, 7, 8]])
    batch = fp.TokenBatch.from_ids({"input_ids": ids, "labels": labels})
    counts = {
        positions: len(fp.KLDivergence(batch, positions=positions).batch.target_source)
        for positions in ("targets", "all")
    }
    assert counts == {"targets": 2, "all": 4}


def test_positions_of_another_value_and_of_questions_are_refused():
    batch = fp.TokenBatch.from_ids([[5, 6, 7]])
    with pytest.raises(fp.InputError, match="positions"):
        fp.KLDivergence(batch, positions="last")
    question = fp.TokenBatch.from_continuations([[([1, 2, 7], 2), ([1, 2, 8], 2)]])
    with pytest.raises(fp.InputError, match="plain text, not questions"):
        fp.KLDivergence(question, positions="all")
