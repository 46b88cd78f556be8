"""CosineDistance and NormalizedMSE against transformers' own last hidden states, and to the bit in
any company."""

import numpy as np
import pytest
import torch
from families import build, random_rows, reference_model, some_masks

import fastprune as fp

LENGTHS = [61, 23, 61, 2]


def reference(hf, mask, rows) -> dict[str, float]:
    """Both means over the positions that predict a token, in float64, without the library."""
    cosine, nmse = [], []
    with torch.no_grad():
        removed = reference_model(hf, mask)
        for row in rows:
            ids = torch.tensor([row])
            dense = hf.base_model(ids, use_cache=False).last_hidden_state[0, :-1].double().numpy()
            found = (
                removed.base_model(ids, use_cache=False).last_hidden_state[0, :-1].double().numpy()
            )
            for a, b in zip(found, dense):
                cosine.append(1 - a @ b / np.sqrt((a @ a) * (b @ b)))
                nmse.append(((a - b) ** 2).sum() / (b**2).sum())
    return {"cosine": np.mean(cosine), "nmse": np.mean(nmse)}


@pytest.mark.parametrize(
    ("family", "dtype"),
    [("llama", "float64"), ("gpt-neox", "float64"), ("llama", "float32"), ("gpt2", "float32")],
)
def test_distances_are_those_of_last_hidden_states(family, dtype):
    hf = build(family, getattr(torch, dtype))
    rows = random_rows(hf.config.vocab_size, LENGTHS)
    batch = fp.TokenBatch.from_ids(rows)
    evaluators = [fp.Evaluator(hf, made(batch)) for made in (fp.CosineDistance, fp.NormalizedMSE)]
    masks = some_masks(evaluators[0].num_units, 20, seed=3)[::2]
    expected = [reference(hf, mask, rows) for mask in masks]
    for ev in evaluators:
        found = ev.score(masks)
        # norms of transformers compute in float32 whatever the dtype
        np.testing.assert_allclose(
            found, [e[ev.objective.name] for e in expected], rtol=1e-5, atol=1e-12
        )
        assert np.ptp(found) > 0.01
        assert ev.dense_loss == 0


def flattened(hf, mask, rows) -> dict[str, float]:
    """The mean over rows of the distance of all states of a row as one vector, in float64."""
    cosine, nmse = [], []
    with torch.no_grad():
        removed = reference_model(hf, mask)
        for row in rows:
            ids = torch.tensor([row])
            a, b = (
                m.base_model(ids, use_cache=False).last_hidden_state.double().numpy().ravel()
                for m in (removed, hf)
            )
            cosine.append(1 - a @ b / np.sqrt((a @ a) * (b @ b)))
            nmse.append(((a - b) ** 2).sum() / (b @ b))
    return {"cosine": np.mean(cosine), "nmse": np.mean(nmse)}


@pytest.mark.parametrize("make", [fp.CosineDistance, fp.NormalizedMSE])
def test_flattened_distances_are_of_all_states_of_a_row(make):
    hf = build("llama", torch.float64)
    rows = random_rows(hf.config.vocab_size, LENGTHS)
    ev = fp.Evaluator(hf, make(fp.TokenBatch.from_ids(rows), flatten=True))
    masks = some_masks(ev.num_units, 20, seed=3)[::4]
    losses = ev.score(masks)
    expected = [flattened(hf, mask, rows)[ev.objective.name] for mask in masks]
    np.testing.assert_allclose(losses, expected, rtol=1e-5, atol=1e-12)
    assert np.ptp(losses) > 0.01
    assert ev.dense_loss == 0
    by_position = fp.Evaluator(hf, make(fp.TokenBatch.from_ids(rows))).score(masks)
    assert not np.allclose(losses, by_position, rtol=1e-3)
    some = ev.score_samples(masks, samples=[2, 0])
    assert some.tobytes() == ev.score_samples(masks)[:, [2, 0]].tobytes()
    assert ev.score(masks[1]).tobytes() == losses[1:2].tobytes()


@pytest.mark.parametrize("made", [fp.CosineDistance, fp.NormalizedMSE])
@pytest.mark.parametrize(("family", "granularity"), [("llama", "block"), ("gpt-neox", "sublayer")])
def test_distances_keep_their_bits_in_any_company(made, family, granularity):
    model = fp.Model(build(family))
    objective = made(fp.TokenBatch.from_ids(random_rows(model.vocab_size, LENGTHS)))
    ev = fp.Evaluator(model, objective, granularity=granularity)
    masks = some_masks(ev.num_units, 24, seed=5)
    together = ev.score(masks)
    for number in (0, 5, 11):
        alone = fp.Evaluator(model, objective, granularity=granularity, cache_bytes=0).score(
            masks[number]
        )
        assert alone.tobytes() == together[number : number + 1].tobytes()
    assert ev.score(masks[::-1]).tobytes() == together[::-1].tobytes()


def test_distances_have_no_gradient_at_the_dense_model():
    hf = build("llama")
    ev = fp.Evaluator(
        hf, fp.CosineDistance(fp.TokenBatch.from_ids(random_rows(hf.config.vocab_size, [5])))
    )
    for probe in (ev.unit_gradients, ev.unit_salience):
        with pytest.raises(fp.InputError, match="CosineDistance has not"):
            probe()
