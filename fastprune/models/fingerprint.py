"""The settings that decide the bits of a result besides weights, data and mask: device, software,
and their switches."""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
import uuid
import weakref
from collections.abc import Callable
from typing import Any

import torch

from .. import __version__
from .code import global_hooks

_ENVIRONMENT = (
    "MKL_CBWR",
    "MKL_ENABLE_INSTRUCTIONS",
    "ONEDNN_MAX_CPU_ISA",
    "CUBLAS_WORKSPACE_CONFIG",
    "NVIDIA_TF32_OVERRIDE",
)


_DENORMAL = 1e-310

_PROCESS = uuid.uuid4().hex
_MARKS: dict[int, tuple[Callable[[], object], int]] = {}
_NUMBERS = itertools.count()


def number_of(thing: object) -> int:
    """A number that identifies an object, such as a hook, in this process.

    An address would not: once an object is freed, another object may get it.
    """
    known = _MARKS.get(id(thing))
    if known is None or known[0]() is not thing:
        reference: Callable[[], object]
        try:
            reference = weakref.ref(thing)
        except TypeError:  # an object without weak references is kept alive
            reference = functools.partial(lambda kept: kept, thing)
        known = _MARKS[id(thing)] = (reference, next(_NUMBERS))
    return known[1]


def mark(thing: object) -> str:
    """A text that identifies an object among all processes."""
    return f"{_PROCESS}-{os.getpid()}-{number_of(thing)}"


def machine_fingerprint(device: torch.device) -> dict[str, object]:
    """Plain values by name that decide the bits of results on a machine.

    They are software versions, torch's build with its BLAS, the device with its instructions, the
    backends of attention, and every global switch of torch that changes a matrix product.
    """
    return {
        **_software(),
        "environment": {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
        "float32_matmul": _float32_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "default_dtype": str(torch.get_default_dtype()),
        "denormals": _DENORMAL * 0.5 != 0,  # a switch of the processor that cannot be read
        "hooks": [mark(hook) for hooks in global_hooks() for hook in hooks.values()],
        **(_gpu(device) if device.type == "cuda" else _cpu()),
    }


@functools.cache
def _software() -> dict[str, object]:
    """Versions, and the hash of torch's build."""
    import transformers

    return {
        "fastprune": __version__,
        "torch": torch.__version__,
        "build": hashlib.sha256(torch.__config__.show().encode()).hexdigest(),
        "transformers": transformers.__version__,
    }


def _float32_precision() -> str:
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # set for each backend by itself, which only they can say
        return "by backend"


def _cpu() -> dict[str, object]:
    return {
        "device": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "mkldnn": [torch.backends.mkldnn.enabled, *_mkldnn_precisions()],
    }


def _mkldnn_precisions() -> list[str]:
    mkldnn: Any = torch.backends.mkldnn  # whose parts are made when it is imported
    precisions = [operator.fp32_precision for operator in (mkldnn, mkldnn.matmul, mkldnn.conv)]
    return [
        "ieee" if precision == "none" else precision for precision in precisions
    ]  # never set: the same, unsaid


def _gpu(device: torch.device) -> dict[str, object]:
    properties = torch.cuda.get_device_properties(device)
    backends: Any = torch.backends  # whose attributes are made when they are read
    cuda, cudnn = backends.cuda, backends.cudnn
    # fp32_precision, not allow_tf32: reading that raises once precisions are set by operator
    return {
        "device": [
            properties.name,
            properties.major,
            properties.minor,
            properties.multi_processor_count,
        ],
        "cuda": torch.version.cuda or torch.version.hip,
        "cudnn": [
            cudnn.version(),
            cudnn.enabled,
            cudnn.fp32_precision,
            cudnn.conv.fp32_precision,
            cudnn.deterministic,
            cudnn.benchmark,
        ],
        "matmul": [
            backends.fp32_precision,
            cuda.matmul.fp32_precision,
            str(cuda.matmul.allow_bf16_reduced_precision_reduction),
            str(cuda.matmul.allow_fp16_reduced_precision_reduction),
            cuda.matmul.allow_fp16_accumulation,
            str(cuda.preferred_blas_library()),
        ],
    }
