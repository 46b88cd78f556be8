"""The dtype in which a CPU computes, and 16-bit weights, widened when they are used.

Without instructions for bfloat16, torch's products in it are many times slower than in float32. A
16-bit number is a float32 number, too, so widened weights lose no digit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

# instructions for products of 16-bit numbers, as torch.cpu.get_capabilities names them, on x86 and
# on ARM
INSTRUCTIONS = {
    torch.bfloat16: ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"),
    torch.float16: ("avx512_fp16", "amx_fp16", "fp16_arith"),
}


def capabilities() -> Mapping[str, object]:
    """The instruction sets of this processor, by name."""
    if hasattr(torch.cpu, "get_capabilities"):
        return torch.cpu.get_capabilities()
    return {
        "avx512_bf16": torch.cpu._is_avx512_bf16_supported(),
        "amx_fp16": torch.cpu._is_amx_fp16_supported(),
    }


def has_instructions(dtype: torch.dtype) -> bool:
    """Whether this CPU has instructions for products in this dtype."""
    return dtype not in INSTRUCTIONS or any(
        capabilities().get(name) for name in INSTRUCTIONS[dtype]
    )


def _widened(module: Any) -> torch.Tensor:
    return module._parameters["weight"].float()


class Widening:
    """A mixin for a module that keeps its weight in 16 bits. Each read makes a float32 copy."""

    weight: Any = property(_widened)


class WideningLinear(Widening, nn.Linear):
    pass


class WideningEmbedding(nn.Embedding):
    """Widens only the rows that it looks up."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input).float()


def widen(hf: nn.Module) -> bool:
    """Let a model with 16-bit weights run in float32, with the bits of a float32 load.

    Linear maps and embeddings, which hold nearly all weights, keep them in 16 bits. All other
    tensors become float32.

    Returns:
        Whether the model was changed. A family that has rounded a constant to its weights' dtype
        (Gemma) is not.
    """
    low = tuple(INSTRUCTIONS)
    if any(buffer.dtype in low for buffer in hf.buffers()):
        return False
    kinds = _widening_kinds()
    for module in hf.modules():
        kind = kinds.get(type(module))
        if kind is not None and module.weight.dtype in low:
            module.__class__ = kind
            kept = {"weight"}
        else:
            kept = set()
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dtype in low and name not in kept:
                parameter.data = parameter.data.float()
    return True


def _widening_kinds() -> dict[type, type]:
    from transformers.pytorch_utils import Conv1D

    conv = type("WideningConv1D", (Widening, Conv1D), {"__doc__": "GPT-2's linear map."})
    return {nn.Linear: WideningLinear, nn.Embedding: WideningEmbedding, Conv1D: conv}


def working_dtype(hf: nn.Module) -> torch.dtype:
    """The dtype of a model's states: its weights' dtype, or float32 if these are widened."""
    widened = any(isinstance(module, (Widening, WideningEmbedding)) for module in hf.modules())
    return torch.float32 if widened else first_loaded(hf).dtype


def first_loaded(hf: nn.Module) -> nn.Parameter:
    """The first parameter that has values; streamed blocks and towers left in files have none."""
    parameters = list(hf.parameters())
    return next((weights for weights in parameters if not weights.is_meta), parameters[0])
