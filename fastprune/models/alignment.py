"""Addresses of weights: a matrix product may round otherwise if a tensor begins off a multiple
of its alignment. Weights that we load are aligned; of others the remainders are part of the
digest."""

from __future__ import annotations

import torch
from torch import nn

ALIGNMENT = 512  # bytes, as torch's allocator aligns on a GPU; a multiple of every other
CPU_ALIGNMENT = 64  # as on a CPU


def remainder(tensor: torch.Tensor) -> int:
    """The bytes by which a tensor begins after a multiple of its device's alignment."""
    if tensor.is_meta or not tensor.numel():
        return 0
    return tensor.data_ptr() % (CPU_ALIGNMENT if tensor.device.type == "cpu" else ALIGNMENT)


def placement(tensor: torch.Tensor) -> str:
    """A tensor's place in memory, as far as bits may depend on it; "" as one of torch's own."""
    strides = "" if tensor.is_contiguous() else f" strides {tensor.stride()}"
    offset = remainder(tensor)
    return strides + (f" at {offset}" if offset else "")


def align(hf: nn.Module) -> None:
    """Move each unaligned parameter and buffer to an aligned address. Tied ones stay
    tied."""
    for tensor in (*hf.parameters(), *hf.buffers()):
        if remainder(tensor):
            tensor.data = tensor.detach().clone()
