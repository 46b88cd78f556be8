"""Kernels run on a GPU where there is one, else under Triton's interpreter.

Whether a kernel is interpreted is settled when it is defined. So the variable that asks for it is set only while
triton and the kernels are imported, and no other test, nor a process that one starts, sees it.

triton may have been imported before, by transformers; its own library of kernels is then compiled, and interpreted ones
cannot call it. So its Python modules are imported once more; the extension module stays.

The interpreter's own product of blocks is NumPy's, hence a BLAS's, which on some processors sums a row in an order that
follows the row's place. It gets one here that sums every row alike, so that tests of bits test the kernels.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys

import numpy as np
import torch

HAS_TRITON = importlib.util.find_spec("triton") is not None


def _order_products(interpreter) -> None:
    """Gives the interpreter a dot that sums every element from the first k to the last, wherever its row stands.

    In float64, rounded once at the end: what float32 loses within a block is the hardware's to say, not a kernel's.
    8-bit floats, which no kernel takes, stay with the interpreter's own.
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


def _import_kernels() -> None:
    before = os.environ.get("TRITON_INTERPRET")
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
        for name in [name for name in sys.modules if name.split(".")[0] in ("triton", "fastprune_kernels")]:
            if not name.startswith("triton._C") and name not in ("fastprune_kernels", "fastprune_kernels.reference"):
                del sys.modules[name]
    try:
        importlib.import_module("triton.experimental.gluon")  # a first launch imports it, and it reads the variable too
        for name in ("norm", "gated_mlp", "rope", "linear_loss", "attention"):
            importlib.import_module(f"fastprune_kernels.{name}")
        if not torch.cuda.is_available():
            _order_products(importlib.import_module("triton.runtime.interpreter"))
    finally:
        if before is None:
            os.environ.pop("TRITON_INTERPRET", None)
        else:
            os.environ["TRITON_INTERPRET"] = before


if HAS_TRITON:
    _import_kernels()
