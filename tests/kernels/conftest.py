"""Kernels run on a GPU where there is one, else under Triton's interpreter.

Whether a kernel is interpreted is settled when it is defined. So the variable that asks for it is set only while
triton and the kernels are imported, and no other test, nor a process that one starts, sees it.
"""

from __future__ import annotations

import importlib
import importlib.util
import os

import torch

HAS_TRITON = importlib.util.find_spec("triton") is not None


def _import_kernels() -> None:
    before = os.environ.get("TRITON_INTERPRET")
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
    try:
        importlib.import_module("triton.experimental.gluon")  # a first launch imports it, and it reads the variable too
        for name in ("norm", "gated_mlp", "rope", "linear_loss", "attention"):
            importlib.import_module(f"fastprune_kernels.{name}")
    finally:
        if before is None:
            os.environ.pop("TRITON_INTERPRET", None)
        else:
            os.environ["TRITON_INTERPRET"] = before


if HAS_TRITON:
    _import_kernels()
