"""Triton's interpreter, mended where it would test something else than the kernels.

`mend` is called once, where TRITON_INTERPRET was set as Triton was imported, before the first
kernel is run.
"""

from __future__ import annotations

import importlib
from contextlib import contextmanager

import numpy as np

_approximate = False


@contextmanager
def approximate():
    """Makes exp, exp2, log, log2, rsqrt and division of float32 numbers miss by one unit in the
    last place, as compiled code may; up or down by the bits of the result, so that the same
    operands always give the same.

    What the hardware gives exactly stays exact: zeros, what is not finite, and the exponential of
    zero.
    """
    global _approximate
    _approximate = True
    try:
        yield
    finally:
        _approximate = False


def is_approximate() -> bool:
    return _approximate


def mend() -> bool:
    """Whether the interpreter, as it came, would not have run with this NumPy."""
    interpreter = importlib.import_module("triton.runtime.interpreter")
    _order_products(interpreter)
    _perturb(interpreter)
    return _mend_index(interpreter)


def _order_products(interpreter) -> None:
    """Gives the interpreter a dot that sums every element from the first k to the last, wherever
    its row stands.

    Its own is NumPy's, hence a BLAS's, which on some processors sums a row in an order that follows
    the row's place: tests of bits would test that. In float64, rounded once at the end: what
    float32 loses within a block is the hardware's to say, not a kernel's. 8-bit floats, which no
    kernel takes, stay with the interpreter's own.
    """
    own = interpreter.InterpreterBuilder.create_dot

    def create_dot(self, a, b, d, *precision):
        if 8 in (a.dtype.primitive_bitwidth, b.dtype.primitive_bitwidth):
            return own(self, a, b, d, *precision)
        left, right, total = (x.data.astype(np.float64) for x in (a, b, d))
        for k in range(left.shape[-1]):
            total += left[..., :, k, None] * right[..., None, k, :]
        return interpreter.TensorHandle(total.astype(d.data.dtype), d.dtype.scalar)

    interpreter.InterpreterBuilder.create_dot = create_dot


def _perturb(interpreter) -> None:
    """Lets the functions that compiled code approximates be off, inside `approximate`."""
    builder = interpreter.InterpreterBuilder

    def perturbed(own, is_exponential):
        def call(self, *operands):
            result = own(self, *operands)
            if _approximate and result.data.dtype == np.float32:
                missed = _miss(result.data)
                result.data = (
                    np.where(operands[0].data == 0, result.data, missed)
                    if is_exponential
                    else missed
                )
            return result

        return call

    for name in ("exp", "exp2", "log", "log2", "rsqrt", "fdiv"):
        own = getattr(builder, f"create_{name}")
        setattr(builder, f"create_{name}", perturbed(own, name.startswith("exp")))


def _miss(exact: np.ndarray) -> np.ndarray:
    """The next number above or below, by a hash of the bits."""
    up = np.ascontiguousarray(exact).view(np.uint32) * np.uint32(2654435761) >> np.uint32(31)
    missed = np.nextafter(exact, np.where(up == 1, np.inf, -np.inf).astype(np.float32))
    return np.where(np.isfinite(exact) & (exact != 0), missed, exact)


def _mend_index(interpreter) -> bool:
    """Lets Triton 3.6 run with NumPy 2.4 and later, which no longer makes an index of an array of
    one element.

    The bound of a `range` in a kernel is such an array; Triton 3.7 does this by itself. Returns
    whether it was needed.
    """
    release = tuple(
        int(part) for part in importlib.import_module("triton").__version__.split(".")[:2]
    )
    try:
        int(np.zeros(1, dtype=np.int32))
        return False
    except TypeError:
        if release >= (3, 7):
            return False
    own = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor, *scope):
        own(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    interpreter._patch_lang_tensor = patch_lang_tensor
    return True
