"""Short inputs to try a model on, and comparisons of tensors: to the bit or with a tolerance."""

from __future__ import annotations

import torch

from .model import Model


def probe_ids(model: Model) -> torch.Tensor:
    """A short row of token ids spread over the vocabulary, int64[1, T]."""
    length = min(8, model.max_positions or 8)
    return (torch.arange(1, length + 1, device=model.device) * 7919 % model.vocab_size)[None]


def probe_tree(model: Model) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The short row as a trunk with two branches: ids, positions, branch, each int64[1, T]."""
    ids = probe_ids(model)
    tree = torch.tensor([[0, 1, 2, 3, 4, 3, 4, 5], [0, 0, 0, 1, 1, 2, 2, 2]], device=model.device)
    tree = tree[:, : ids.shape[1]]
    return ids, tree[:1], tree[1:]


def continued_otherwise(model: Model, ids: torch.Tensor, kept: int) -> torch.Tensor:
    """Rows int64[B, T] with other tokens after the first `kept`."""
    other = ids.clone()
    other[:, kept:] = (other[:, kept:] + 1 + model.vocab_size // 3) % model.vocab_size
    return other


def same_bits(result: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether two tensors are equal to the bit, NaN included."""
    if result.shape != expected.shape or result.dtype != expected.dtype:
        return False
    if torch.equal(result, expected):
        return True
    bits, expected_bits = (t.contiguous().view(torch.uint8) for t in (result, expected))
    return torch.equal(bits, expected_bits)


def agree(result: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether two tensors are equal up to a few roundings of a dtype, by relative norm.

    Values that are not `ordinary` must be at the same places.
    """
    chosen = ordinary(expected)
    if result.shape != expected.shape or not torch.equal(ordinary(result), chosen):
        return False
    result, expected = result[chosen].double(), expected[chosen].double()
    return bool((result - expected).norm() <= tolerance(dtype) * expected.norm())


def ordinary(values: torch.Tensor) -> torch.Tensor:
    """Whether values are neither NaN, infinite, nor about the largest numbers of their dtype.

    Some families give hidden tokens the lowest number as their logit. Beside it, a norm would show
    no other difference.
    """
    return values.abs() < 0.99 * torch.finfo(values.dtype).max


def agreeing_share(result: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> float:
    """The share of positions at which states, [..., D], are equal up to a few roundings."""
    if result.shape != expected.shape:
        return 0.0
    alike = (result.isfinite() == expected.isfinite()).all(dim=-1)
    result, expected = (states.double().nan_to_num(0, 0, 0) for states in (result, expected))
    norms = expected.norm(dim=-1)
    close = (result - expected).norm(dim=-1) <= tolerance(dtype) * norms.maximum(norms.mean() / 8)
    return float((alike & close).double().mean())


def tolerance(dtype: torch.dtype) -> float:
    """A few roundings of a dtype, as a relative error."""
    return max(8 * torch.finfo(dtype).eps, 1e-5)
