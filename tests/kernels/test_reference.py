"""The reference operators against float64 NumPy."""

import numpy as np
import pytest
import torch

from fastprune_kernels.reference import token_kl, token_nll

SHAPES = [(1, 1), (3, 2), (7, 97), (63, 1001)]
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
# Inputs are exact on both sides (whatever the dtype, they are widened first). The sums over V of
# terms in [0, 1] and the difference of two numbers of size `scale` are rounded in float32: a few
# epsilons of the largest term.
EPSILON = {"float32": 1.2e-7, "bfloat16": 1.2e-7, "float16": 1.2e-7, "float64": 2.3e-16}


def make_logits(shape, dtype: str, scale: float, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(shape, generator=generator)).to(DTYPES[dtype])


def log_softmax(logits: torch.Tensor) -> np.ndarray:
    x = logits.double().numpy()
    shifted = x - x.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def tolerance(dtype: str, vocabulary: int, *tensors: torch.Tensor) -> float:
    largest = max(float(tensor.double().abs().max()) for tensor in tensors)
    return EPSILON[dtype] * (8 * (1 + largest) + np.sqrt(vocabulary))


@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0, 1000.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_token_nll(shape, dtype, scale):
    logits = make_logits(shape, dtype, scale, seed=0)
    rng = np.random.default_rng(1)
    rows, tokens = (
        rng.integers(0, shape[0], 13),
        rng.integers(0, shape[1], 13),
    )  # rows repeat and are not in order
    found = token_nll(logits, torch.tensor(rows), torch.tensor(tokens))
    assert found.dtype == (torch.float64 if dtype == "float64" else torch.float32)
    expected = -log_softmax(logits)[rows, tokens]
    np.testing.assert_allclose(
        found.numpy(), expected, rtol=0, atol=tolerance(dtype, shape[1], logits)
    )
    assert (found >= -tolerance(dtype, shape[1], logits)).all()


@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_token_kl(shape, dtype, scale):
    dense, masked = (
        make_logits(shape, dtype, scale, seed=2),
        make_logits(shape, dtype, scale, seed=3),
    )
    found = token_kl(dense, masked)
    assert found.shape == shape[:1]
    assert found.dtype == (torch.float64 if dtype == "float64" else torch.float32)
    log_p, log_q = log_softmax(dense), log_softmax(masked)
    expected = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    # p sums to 1, and each log p - log q is off by a few epsilons of its size; p itself by as much,
    # relatively
    atol = 4 * tolerance(dtype, shape[1], dense, masked) * (1 + float(np.abs(expected).max()))
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=atol)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_distribution_does_not_diverge_from_itself(dtype):
    logits = make_logits((5, 97), dtype, 10.0, seed=4)
    assert torch.equal(
        token_kl(logits, logits), torch.zeros(5, dtype=token_kl(logits, logits).dtype)
    )


def test_extreme_logits_are_finite_and_right():
    """Far beyond what exp can hold: one token takes all the probability."""
    logits = torch.full((2, 9), -3e38)
    logits[:, 4] = 3e38
    nll = token_nll(torch.tensor([[1e30, 0.0, -1e30]]), torch.tensor([0, 0]), torch.tensor([0, 1]))
    assert nll.tolist() == [0.0, pytest.approx(1e30)]
    assert token_nll(logits, torch.tensor([0, 1]), torch.tensor([4, 4])).tolist() == [0.0, 0.0]
    same = torch.tensor([[1e4] * 7, [-1e4] * 7, [0.0] * 7])
    nll = token_nll(same, torch.arange(3), torch.tensor([0, 3, 6]))
    np.testing.assert_allclose(nll.numpy(), np.log(7), atol=1e4 * 1.2e-7)
    kl = token_kl(torch.tensor([[200.0, 0.0]]), torch.tensor([[0.0, 200.0]]))
    assert kl.tolist() == [pytest.approx(200.0)]


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_row(broken):
    logits = make_logits((4, 11), "float32", 1.0, seed=5)
    clean = token_nll(logits, torch.arange(4), torch.arange(4))
    kl = token_kl(logits.flip(0), logits)
    logits[2, 7] = broken
    found = token_nll(logits, torch.arange(4), torch.arange(4))
    assert not torch.isfinite(found[2])
    assert torch.equal(found[[0, 1, 3]], clean[[0, 1, 3]])
    assert not torch.isfinite(
        token_kl(make_logits((4, 11), "float32", 1.0, seed=5).flip(0), logits)[2]
    )
    assert torch.equal(
        token_kl(make_logits((4, 11), "float32", 1.0, seed=5).flip(0), logits)[[0, 1, 3]],
        kl[[0, 1, 3]],
    )


def test_no_rows_and_no_targets():
    logits = make_logits((3, 5), "float32", 1.0, seed=6)
    none = torch.zeros(0, dtype=torch.int64)
    assert token_nll(logits, none, none).shape == (0,)
    assert token_kl(logits[:0], logits[:0]).shape == (0,)


def test_inputs_are_left_alone():
    logits = make_logits((3, 5), "float32", 1.0, seed=7)
    before = logits.clone()
    token_nll(logits, torch.arange(3), torch.arange(3))
    token_kl(logits, logits)
    assert torch.equal(logits, before)
