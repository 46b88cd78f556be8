"""The rounding of the card: 16-bit floats, approximated functions, and sums of the tensor core."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SMALLEST_NORMAL = np.float32(2.0**-126)


def widen(bits: np.ndarray) -> np.ndarray:
    """bfloat16, as uint16, in float32."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """float32, rounded to the nearest bfloat16, ties to even; as uint16."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = (bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)
    return np.where(np.isnan(values), 0x7FFF, rounded).astype(np.uint16)


def flush(values: np.ndarray) -> np.ndarray:
    """With numbers below the normal ones taken for zero (.ftz)."""
    return np.where(np.abs(values) < SMALLEST_NORMAL, np.copysign(np.float32(0), values), values)


@dataclass(frozen=True)
class Arithmetic:
    """Arithmetic that PTX leaves to the card.

    Args:
        approximate: functions that PTX only bounds (ex2, rsqrt, div.full) miss by one unit in the
            last place. Otherwise they are rounded correctly.
        truncate: the tensor core aligns 16 products and the sum to the greatest of them, and cuts
            off what is lower than one bit below float32's last place: a model of Hopper's, which
            does not round either. Otherwise the sum is exact and rounded once.
    """

    approximate: bool = False
    truncate: bool = False

    def function(self, exact: np.ndarray) -> np.ndarray:
        """The result of an approximated function. float64 -> float32."""
        nearest = exact.astype(np.float32)
        if not self.approximate:
            return nearest
        # up or down by a hash of the bits: the same operands always give the same result
        up = (nearest.view(np.uint32) * np.uint32(2654435761)) >> np.uint32(31) == 1
        missed = np.nextafter(nearest, np.where(up, np.inf, -np.inf).astype(np.float32))
        keeps = ~np.isfinite(nearest) | (nearest == 0) | (exact == 1)
        return np.where(keeps, nearest, missed)

    def multiply(self, a: np.ndarray, b: np.ndarray, total: np.ndarray) -> np.ndarray:
        """total + a b^T, one step of the tensor core.

        Args:
            a: float32[M, 16]. b: float32[N, 16]. total: float32[M, N].
        """
        a, b = a.astype(np.float64), b.astype(np.float64)
        if not self.truncate:
            return (a @ b.T + total).astype(np.float32)
        products = a[:, None, :] * b[None, :, :]
        greatest = np.maximum(np.abs(products).max(-1), np.abs(total))
        unit = np.ldexp(1.0, np.frexp(greatest)[1] - 25)  # float32's last place, halved
        aligned = np.trunc(products / unit[..., None]).sum(-1) + np.trunc(total / unit)
        exact = aligned * unit
        last = np.ldexp(1.0, np.frexp(exact)[1] - 24)
        return (np.trunc(exact / last) * last).astype(np.float32)
