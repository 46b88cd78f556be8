"""Sequences of units that repeat and reorder: exact, shared with masks, the same bits in any
company."""

import numpy as np
import pytest
from families import build, num_blocks, physically_ordered, random_rows, reference_loss, some_masks

import fastprune as fp

LENGTHS = [19, 13, 19]


def evaluator(hf, **options) -> tuple[fp.Evaluator, list[list[int]]]:
    rows = random_rows(hf.config.vocab_size, LENGTHS)
    return fp.Evaluator(hf, fp.Perplexity(fp.TokenBatch.from_ids(rows)), **options), rows


def some_sequences(num_units: int, count: int, seed: int = 0) -> list[tuple[int, ...]]:
    """Random ones, and the whole model with a run of units repeated, or two exchanged."""
    rng = np.random.default_rng(seed)
    whole = list(range(num_units))
    found = [(*whole[:i], *whole[i - 1 :]) for i in range(1, num_units)]
    found += [(*whole[:i], i + 1, i, *whole[i + 2 :]) for i in range(num_units - 1)]
    found += [
        tuple(rng.integers(0, num_units, rng.integers(1, 2 * num_units)).tolist())
        for _ in range(count)
    ]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["generic", "auto"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2-sdpa", "gpt2", "gpt-neox"])
def test_equal_to_the_model_with_these_blocks_in_its_list(family, backend):
    hf = build(family)
    ev, rows = evaluator(hf, backend=backend)
    sequences = some_sequences(num_blocks(hf), 8)
    expected = [reference_loss(physically_ordered(hf, sequence), rows) for sequence in sequences]
    np.testing.assert_allclose(ev.score(sequences=sequences), expected, rtol=1e-5)


def test_shared_once_and_the_same_bits():
    hf = build("llama")
    ev, _ = evaluator(hf)
    sequences = some_sequences(ev.num_units, 30)
    together = ev.score(sequences=sequences)
    prefixes = {sequence[: i + 1] for sequence in sequences for i in range(len(sequence))}
    assert ev.stats.unit_runs == len(prefixes)
    assert ev.stats.naive_unit_runs == sum(map(len, sequences))
    assert ev.score(sequences=sequences[::-1]).tobytes() == together[::-1].tobytes()
    for number in range(0, len(sequences), 7):
        assert ev.score(sequences=[sequences[number]])[0] == together[number]


def test_an_ascending_sequence_is_a_mask_in_the_store_too(tmp_path):
    hf = build("llama")
    masks = some_masks(num_blocks(hf), 20, seed=1)
    first, _ = evaluator(hf, store=tmp_path / "s.db")
    losses = first.score(masks)
    second, _ = evaluator(hf, store=tmp_path / "s.db")
    found = second.score(sequences=[np.flatnonzero(mask) for mask in masks])
    assert found.tobytes() == losses.tobytes()
    assert second.stats.unit_runs == 0


def test_very_long_sequences_stay_within_the_budget():
    """Many more units than the model has: the calls are cut so that no more states are held than
    were budgeted."""
    hf = build("llama")
    ev, _ = evaluator(hf, memory_bytes=2_000_000)
    rng = np.random.default_rng(0)
    sequences = [tuple(rng.integers(0, 2, 12).tolist()) for _ in range(150)]
    losses = ev.score(sequences=sequences)
    assert ev.stats.peak_activation_bytes <= 2_000_000
    other, _ = evaluator(hf, memory_bytes=2_000_000)
    assert other.score(sequences=sequences[::-1])[::-1].tobytes() == losses.tobytes()


@pytest.mark.parametrize(
    ("sequences", "message"),
    [
        ([(0, 9)], "sequence 0: 9 is no unit"),
        ([(0,), (-1,)], "sequence 1: -1 is no unit"),
        ([(0, 1.0)], "sequence 0: 1.0 is no unit"),
        ([(True,)], "sequence 0: True is no unit"),
        ([3], "sequence 0 must be a list"),
        (["012"], "sequence 0 must be a list"),
        (5, "sequences are given as a list"),
        ([[0] * 5000], "sequence 0 has more than 4096 units"),
    ],
)
def test_wrong_sequences(sequences, message):
    ev, _ = evaluator(build("llama"))
    with pytest.raises(fp.InputError, match=message):
        ev.score(sequences=sequences)
