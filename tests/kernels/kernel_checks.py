"""Tools that the tests of kernels share: the device, outputs full of NaN, and the error that a
kernel is allowed."""

from __future__ import annotations

import pytest
import torch
import triton_interpreter

pytest.importorskip("triton", reason="triton is not installed")

from fastprune_kernels.launch import INTERPRETED

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def random(
    *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(DEVICE, dtype)


def integers(*shape: int, high: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def nans(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """An output as a kernel finds it in a test: what it does not write shows."""
    return torch.full(shape, torch.nan, dtype=dtype, device=DEVICE)


def double(*tensors: torch.Tensor | None):
    """Floating tensors in float64, for the truth; anything else as it is."""
    wide = [x.double() if x is not None and x.is_floating_point() else x for x in tensors]
    return wide[0] if len(wide) == 1 else wide


def approximate_units() -> int:
    """By how many units in the last place an exponential, logarithm, root or division may be off: 1
    under `triton_interpreter.approximate`, which moves each by one, and 2 in compiled code."""
    return 2 if not INTERPRETED else 1 if triton_interpreter.is_approximate() else 0


def assert_as_exact(
    result: torch.Tensor, same: torch.Tensor, truth: torch.Tensor, approximations: float = 0.0
) -> None:
    """The greatest error of `result` is at most that of `same`, torch's own in the same dtype, plus
    one rounding.

    One rounding: half a unit in the last place of the output's dtype at the greatest magnitude of
    the truth.
    approximations: how far off a result may be besides, in units of float32's eps, where each
    exponential, logarithm, root and division is off by a relative eps: derived from the kernel's
    formula. It counts as often as `approximate_units` says.
    """
    assert result.shape == truth.shape
    assert torch.isfinite(result).all()
    rounding = torch.finfo(result.dtype).eps / 2 * truth.abs().max().item()
    budget = approximate_units() * approximations * torch.finfo(torch.float32).eps
    error, allowed = (_error(x, truth) for x in (result, same))
    assert error <= allowed + rounding + budget, (
        f"error {error:.3g}, torch's {allowed:.3g}, one rounding {rounding:.3g}, approximations "
        f"{budget:.3g}"
    )


def _error(x: torch.Tensor, truth: torch.Tensor) -> float:
    return (x.double() - truth).abs().max().item()
