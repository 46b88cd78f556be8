"""Device functions that more than one kernel uses."""

from __future__ import annotations

import triton
import triton.language as tl

from .launch import INTERPRETED

_INTERPRETED = tl.constexpr(INTERPRETED)
LOG2_E = tl.constexpr(1.4426950408889634)
# In place of minus infinity: a difference of two of these is 0, not NaN.
LEAST = tl.constexpr(-1e30)


@triton.jit
def dot(a, b, acc):
    """acc + a @ b in float32."""
    if _INTERPRETED:  # the interpreter's tl.dot is wrong on bfloat16
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def tanh(x):
    """tanh within a few float32 roundings. libdevice's exists only on some backends."""
    b_square = x * x
    b_tail = 62.0 / 2835.0 * b_square - 17.0 / 315.0
    b_tail = b_tail * b_square + 2.0 / 15.0
    b_tail = b_tail * b_square - 1.0 / 3.0
    b_small = x + x * b_square * b_tail
    b_large = 1.0 - 2.0 / (1.0 + tl.exp(2.0 * tl.abs(x)))
    return tl.where(b_square < 0.0625, b_small, tl.where(x < 0, -b_large, b_large))


@triton.jit
def soft_cap(x, CAP: tl.constexpr):
    """CAP * tanh(x / CAP); x itself if CAP is None."""
    if CAP is not None:
        x = CAP * tanh(x * (1.0 / CAP))
    return x


@triton.jit
def cast(x, dtype: tl.constexpr):
    """Round float32 x to nearest, ties to even."""
    if _INTERPRETED and dtype == tl.bfloat16:  # the interpreter's cast cuts the low bits off
        b_bits = x.to(tl.int32, bitcast=True)
        b_bits = (b_bits + 0x7FFF + ((b_bits >> 16) & 1)) & -65536
        x = tl.where(x == x, b_bits.to(tl.float32, bitcast=True), x)
    return x.to(dtype)
