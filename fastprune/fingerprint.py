"""What the bits of a result depend on besides weights, data and mask: device, software, and their switches."""

from __future__ import annotations

import hashlib
import os

import torch

from . import __version__
from .models.attention import BACKENDS

_ENVIRONMENT = ("MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA", "CUBLAS_WORKSPACE_CONFIG")


def machine_fingerprint(device: torch.device) -> dict[str, object]:
    """Plain values, by name: equal on two machines whose results have the same bits as far as is known.

    Software versions and torch's build (its BLAS among it), the device and what it computes with, the backends of
    attention, and every global switch of torch that chooses or changes a matrix product.
    """
    import transformers

    return {
        "fastprune": __version__,
        "torch": torch.__version__,
        "build": hashlib.sha256(torch.__config__.show().encode()).hexdigest(),
        "transformers": transformers.__version__,
        "environment": {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
        "float32_matmul": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "sdpa": [backend.name for backend in BACKENDS],
        **(_gpu(device) if device.type == "cuda" else _cpu()),
    }


def _cpu() -> dict[str, object]:
    return {
        "device": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "mkldnn": torch.backends.mkldnn.enabled,
    }


def _gpu(device: torch.device) -> dict[str, object]:
    properties = torch.cuda.get_device_properties(device)
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    return {
        "device": [properties.name, properties.major, properties.minor, properties.multi_processor_count],
        "cuda": torch.version.cuda or torch.version.hip,
        "cudnn": [cudnn.version(), cudnn.enabled, cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark],
        "matmul": [
            matmul.allow_tf32,
            str(matmul.allow_bf16_reduced_precision_reduction),
            str(matmul.allow_fp16_reduced_precision_reduction),
        ],
    }
