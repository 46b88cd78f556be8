"""Kernels run on a GPU where there is one, else under Triton's interpreter; with `--executed` they
are compiled for sm_90a, and that code is executed (tests/executed).

Whether a kernel is interpreted is settled when it is defined. So the variable that asks for it is
set only while triton and the kernels are imported, and no other test, nor a process that one
starts, sees it.

triton may have been imported before, by transformers; its own library of kernels is then compiled,
and interpreted ones cannot call it. So its Python modules are imported once more; the extension
module stays.

What the interpreter itself would get wrong is mended, see triton_interpreter.py.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from contextlib import nullcontext

import pytest
import torch
import triton_interpreter

HAS_TRITON = importlib.util.find_spec("triton") is not None


def _import_kernels() -> None:
    before = os.environ.get("TRITON_INTERPRET")
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
        for name in [
            name for name in sys.modules if name.split(".")[0] in ("triton", "fastprune_kernels")
        ]:
            if not name.startswith("triton._C") and name not in (
                "fastprune_kernels",
                "fastprune_kernels.reference",
            ):
                del sys.modules[name]
    try:
        importlib.import_module(
            "triton.experimental.gluon"
        )  # a first launch imports it, and it reads the variable too
        for name in ("norm", "gated_mlp", "rope", "linear_loss", "attention"):
            importlib.import_module(f"fastprune_kernels.{name}")
        if not torch.cuda.is_available():
            triton_interpreter.mend()
    finally:
        if before is None:
            os.environ.pop("TRITON_INTERPRET", None)
        else:
            os.environ["TRITON_INTERPRET"] = before


def pytest_configure(config):
    if config.getoption("--executed"):
        from executed.driver import card

        card()
    elif HAS_TRITON:
        _import_kernels()


def pytest_generate_tests(metafunc):
    """Tests that ask for `arithmetic` run twice without a card: exact, and as inexact as a card may
    be.

    The second time in float32: of 16-bit outputs a unit in float32's last place says nothing. Where
    compiled code is executed, they have one: sums of the tensor core.
    """
    if "arithmetic" in metafunc.fixturenames:
        modes = ["compiled"] if torch.cuda.is_available() else ["exact", "approximate"]
        metafunc.parametrize("arithmetic", modes, indirect=True)


def pytest_collection_modifyitems(config, items):
    if config.getoption("--executed"):
        return
    items[:] = [item for item in items if not _says_nothing(getattr(item, "callspec", None))]


def _says_nothing(call) -> bool:
    halves = (torch.float16, torch.bfloat16)
    return (
        call is not None
        and call.params.get("arithmetic") == "approximate"
        and call.params.get("dtype") in halves
    )


@pytest.fixture
def arithmetic(request):
    mode = nullcontext()
    if request.config.getoption("--executed"):
        from executed.driver import card

        mode = card().rounding(request.param == "approximate")
    elif request.param == "approximate":
        mode = triton_interpreter.approximate()
    with mode:
        yield
