"""Agreement with the whole model, against transformers' probabilities in float64, on every path."""

import numpy as np
import pytest
import torch
from families import build, full_log_probs, num_blocks, random_rows, reference_model, some_masks

import fastprune as fp
from fastprune.engine.memory import MemoryLimit
from fastprune.models import head as heads
from fastprune.models.head import DenseLogits

LENGTHS = [31, 9, 31, 2]
DECODINGS = ["sampling", "greedy"]


def rejected(hf, masks, rows) -> dict[str, list[float]]:
    """1 - acceptance of each mask over all positions that predict a token, in float64."""
    dense = [row[:-1].double().exp() for row in full_log_probs(hf, rows)]
    losses: dict[str, list[float]] = {name: [] for name in DECODINGS}
    for mask in masks:
        draft = [row[:-1].double().exp() for row in full_log_probs(reference_model(hf, mask), rows)]
        pairs = list(zip(dense, draft, strict=True))
        overlap = torch.cat([torch.minimum(p, q).sum(-1) for p, q in pairs])
        equal = torch.cat([(p.argmax(-1) == q.argmax(-1)).double() for p, q in pairs])
        losses["sampling"].append(1 - float(overlap.mean()))
        losses["greedy"].append(1 - float(equal.mean()))
    return losses


@pytest.mark.parametrize("backend", ["generic", "auto"])
@pytest.mark.parametrize("family", ["llama", "gemma2-eager", "gpt2"])
def test_acceptance_is_that_of_the_probabilities(family, backend):
    hf = build(family)
    rows = random_rows(hf.config.vocab_size, LENGTHS)
    masks = some_masks(num_blocks(hf), 20, seed=4)[::2]
    expected = rejected(hf, masks, rows)
    for decoding in DECODINGS:
        objective = fp.Agreement(fp.TokenBatch.from_ids(rows), decoding)
        ev = fp.Evaluator(hf, objective, backend=backend)
        losses = ev.score(masks)
        np.testing.assert_allclose(losses, expected[decoding], rtol=1e-5, atol=1e-6)
        assert np.ptp(losses) > 0.01
        assert ev.dense_loss == 0
        assert objective.metric(ev.dense_loss) == 100
        alone = fp.Evaluator(hf, objective, backend=backend, cache_bytes=0).score(masks[3])
        assert alone.tobytes() == losses[3:4].tobytes()
        assert ev.score(masks[::-1]).tobytes() == losses[::-1].tobytes()


def test_acceptance_of_sequences_sublayers_and_questions(tmp_path):
    hf = build("llama")
    rows = random_rows(hf.config.vocab_size, LENGTHS)
    batch = fp.TokenBatch.from_ids(rows)
    ev = fp.Evaluator(hf, fp.Agreement(batch), granularity="sublayer", store=tmp_path / "s.db")
    halves = fp.from_removed([(2, 3), (1,)], ev.num_units)
    (whole,) = fp.Evaluator(hf, fp.Agreement(batch)).score(fp.from_removed([(1,)], 5))
    assert ev.score(halves)[0] == pytest.approx(whole, rel=1e-5)
    ev.score(sequences=[(0, 1, 0, 1, 2, 3)])
    again = fp.Evaluator(hf, fp.Agreement(batch), granularity="sublayer", store=tmp_path / "s.db")
    assert again.score(halves).tobytes() == ev.score(halves).tobytes()
    assert again.stats.unit_runs == 0
    question = [([1, 2, 3], 2), ([1, 2, 4, 5], 2)]
    tree = fp.TokenBatch.from_continuations([question])
    tasks = fp.Tasks(tree, np.array([0, 0]), np.array([1]), np.array([3, 8]), np.array([3, 8]))
    on_questions = fp.Evaluator(hf, fp.Agreement(tasks))
    assert on_questions.dense_loss == 0
    assert 0 < on_questions.score(fp.from_removed([(0, 1)], 5))[0] <= 1


@pytest.mark.parametrize("decoding", DECODINGS)
def test_the_same_bits_whether_the_reference_is_kept(monkeypatch, decoding):
    monkeypatch.setitem(heads.PART, "cpu", 16)  # several parts of the vocabulary
    hf = build("llama")
    objective = fp.Agreement(
        fp.TokenBatch.from_ids(random_rows(hf.config.vocab_size, LENGTHS)), decoding
    )
    masks = some_masks(num_blocks(hf), 24, seed=1)
    kept = fp.Evaluator(hf, objective).score(masks)
    monkeypatch.setattr(MemoryLimit, "room_for_references", lambda self, tokens, positions: 0)
    lean = fp.Evaluator(hf, objective)
    assert lean.score(masks).tobytes() == kept.tobytes()
    assert lean.dense_loss == 0


def in_parts(logits, part):
    return ((start, logits[:, start : start + part]) for start in range(0, logits.shape[1], part))


@pytest.mark.parametrize("part", [61, 7])
def test_rejection_of_logits(part):
    generator = torch.Generator().manual_seed(0)
    dense, masked = torch.randn(2, 7, 61, generator=generator) * 4
    sums = [heads.exact_log_sum_exp(piece) for piece in dense.split(part, dim=1)]
    reference = DenseLogits(dense, torch.stack(sums), part)
    p, q = (x.double().softmax(-1) for x in (dense, masked))
    losses = heads.rejection(reference, in_parts(masked, part))
    np.testing.assert_allclose(losses, 1 - torch.minimum(p, q).sum(-1), rtol=1e-5)
    assert not heads.rejection(reference, in_parts(dense.clone(), part)).any()
    masked[2, 40] = torch.nan
    shows = torch.arange(7) == 2
    assert torch.equal(heads.rejection(reference, in_parts(masked, part)).isnan(), shows)
    assert torch.equal(heads.most_likely(in_parts(masked, part)) == -1, shows)
    masked[2] = 0
    masked[3, [5, 50]] = 100
    token = heads.most_likely(in_parts(masked, part))
    assert token[2] == 0
    assert token[3] == 5


def test_refusals():
    batch = fp.TokenBatch.from_ids([[1, 2, 3]])
    with pytest.raises(fp.InputError, match="decoding must be"):
        fp.Agreement(batch, "beam")
    with pytest.raises(fp.InputError, match="Agreement takes a TokenBatch"):
        fp.Agreement([[1, 2, 3]])
    ev = fp.Evaluator(build("llama"), fp.Agreement(batch))
    with pytest.raises(fp.InputError, match="Agreement has not"):
        ev.unit_gradients()
