"""Send a model in memory to another process: its modules without tensors, and the tensors.

The modules are pickled, and reading a pickle runs code. A worker reads them only from the process
that started it, over a pipe or the cluster's own channel, never from a file.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from ..errors import InputError
from ..models.alignment import CPU_ALIGNMENT


class _Packer(pickle.Pickler):
    """Leaves out tensors, and lists each of them once that has values."""

    def __init__(self, file: io.BytesIO):
        super().__init__(file)
        self.tensors: list[torch.Tensor] = []
        self._place: dict[int, int] = {}

    def persistent_id(self, value: object) -> tuple | None:
        # a tower that stayed in its files has tensors without values, which torch pickles itself
        if not isinstance(value, torch.Tensor) or value.is_meta:
            return None
        if id(value) not in self._place:
            self._place[id(value)] = len(self.tensors)
            self.tensors.append(value)
        return self._place[id(value)], isinstance(value, nn.Parameter), value.requires_grad


class _Unpacker(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, tensors: Sequence[torch.Tensor]):
        super().__init__(file)
        self._tensors: Sequence[torch.Tensor] = tensors
        self._read: dict[int, torch.Tensor] = {}  # by place, so that shared tensors stay shared

    def persistent_load(self, entry: tuple) -> torch.Tensor:
        place, is_parameter, requires_grad = entry
        if place not in self._read:
            tensor = self._tensors[place]
            self._read[place] = nn.Parameter(tensor, requires_grad) if is_parameter else tensor
        return self._read[place]


def pack(hf: nn.Module) -> tuple[bytes, list[torch.Tensor]]:
    """Separate the modules of a transformers model from its tensors.

    Returns:
        The pickled modules, which name tensors by number, and the tensors.

    Raises:
        InputError: The model holds objects of this process only, such as code defined in it, or
            open files.
    """
    file = io.BytesIO()
    packer = _Packer(file)
    try:
        packer.dump(hf)
    except Exception as error:  # classes refuse to be pickled in ways of their own
        raise InputError(f"this model cannot be handed to other processes: {error}") from error
    return file.getvalue(), packer.tensors


def unpack(modules: bytes, tensors: Sequence[torch.Tensor]) -> nn.Module:
    """Rebuild the model of `pack` on these tensors."""
    return _Unpacker(io.BytesIO(modules), tensors).load()


Place = tuple[int, tuple[int, ...], torch.dtype]  # a tensor's first byte, shape and dtype


def places(tensors: Sequence[torch.Tensor]) -> tuple[list[Place], int]:
    """Place tensors in one buffer.

    Each keeps its offset from a multiple of 64 bytes, since the rounding of a matrix product may
    depend on it.

    Returns:
        The place of each tensor, and the bytes of the buffer.
    """
    at: list[Place] = []
    end = 0
    for tensor in tensors:
        # the matrix product of a contiguous copy may round differently
        if not tensor.is_contiguous():
            raise InputError(
                "this model cannot be handed to other processes: a tensor of it is not contiguous"
            )
        start = end + (tensor.data_ptr() - end) % CPU_ALIGNMENT
        at.append((start, tuple(tensor.shape), tensor.dtype))
        end = start + tensor.numel() * tensor.dtype.itemsize
    return at, max(end, 1)


def fill(buffer: np.ndarray, tensors: Sequence[torch.Tensor], at: Sequence[Place]) -> None:
    """Write tensors into a buffer, uint8[n], at their places."""
    for tensor, (start, _, _) in zip(tensors, at, strict=True):
        values = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        buffer[start : start + len(values)] = values


def views(storage: torch.UntypedStorage, at: Sequence[Place]) -> list[torch.Tensor]:
    """View the tensors at these places of a buffer on the CPU, without a copy."""
    return [
        # torch's stubs know no storage without a dtype here
        torch.empty(0, dtype=dtype).set_(storage, start // dtype.itemsize, shape)  # type: ignore[call-overload]
        for start, shape, dtype in at
    ]
