"""A model in memory, for another process: its modules without their tensors, and the tensors beside
them.

The modules go by Python's own serialisation, which runs code when it is read. It is read only from
the process that started the reader, over a pipe or a cluster's own channel, and never from a file.
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
    """Leaves out tensors, and notes them; one that stands twice is noted once."""

    def __init__(self, file: io.BytesIO):
        super().__init__(file)
        self.tensors: list[torch.Tensor] = []
        self._place: dict[int, int] = {}

    def persistent_id(self, thing: object) -> tuple | None:
        if not isinstance(thing, torch.Tensor):
            return None
        if id(thing) not in self._place:
            self._place[id(thing)] = len(self.tensors)
            self.tensors.append(thing)
        return self._place[id(thing)], isinstance(thing, nn.Parameter), thing.requires_grad


class _Unpacker(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, tensors: Sequence[torch.Tensor]):
        super().__init__(file)
        self._given: Sequence[torch.Tensor] = tensors
        self._made: dict[int, torch.Tensor] = {}

    def persistent_load(self, entry: tuple) -> torch.Tensor:
        place, is_parameter, requires_grad = entry
        if place not in self._made:
            tensor = self._given[place]
            self._made[place] = nn.Parameter(tensor, requires_grad) if is_parameter else tensor
        return self._made[place]


def pack(hf: nn.Module) -> tuple[bytes, list[torch.Tensor]]:
    """The modules of a transformers model, and its tensors, which they name by number.

    Raises InputError for objects that no other process can have: code made in this one, open files.
    """
    file = io.BytesIO()
    packer = _Packer(file)
    try:
        packer.dump(hf)
    except Exception as error:  # of any kind: each class has its own way of not being serialised
        raise InputError(f"this model cannot be handed to other processes: {error}") from error
    return file.getvalue(), packer.tensors


def unpack(modules: bytes, tensors: Sequence[torch.Tensor]) -> nn.Module:
    """The model of `pack`, on these tensors."""
    return _Unpacker(io.BytesIO(modules), tensors).load()


Place = tuple[int, tuple[int, ...], torch.dtype]  # a tensor's first byte; its shape


def places(tensors: Sequence[torch.Tensor]) -> tuple[list[Place], int]:
    """The place of each tensor in one buffer, and the bytes of all.

    Each is as far from a multiple of 64 bytes as it is in memory: a matrix product may round
    otherwise elsewhere.
    """
    found: list[Place] = []
    end = 0
    for tensor in tensors:
        if (
            not tensor.is_contiguous()
        ):  # a contiguous copy may take another way through a matrix product
            raise InputError(
                "this model cannot be handed to other processes: a tensor of it is not contiguous"
            )
        start = end + (tensor.data_ptr() - end) % CPU_ALIGNMENT
        found.append((start, tuple(tensor.shape), tensor.dtype))
        end = start + tensor.numel() * tensor.dtype.itemsize
    return found, max(end, 1)


def fill(buffer: np.ndarray, tensors: Sequence[torch.Tensor], at: Sequence[Place]) -> None:
    """Write tensors into a buffer, uint8[n], at their places."""
    for tensor, (start, _, _) in zip(tensors, at, strict=True):
        values = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        buffer[start : start + len(values)] = values


def views(storage: torch.UntypedStorage, at: Sequence[Place]) -> list[torch.Tensor]:
    """The tensors that stand at these places of a buffer, on the CPU; nothing is copied."""
    return [
        # torch's stubs know no storage without a dtype here
        torch.empty(0, dtype=dtype).set_(storage, start // dtype.itemsize, shape)  # type: ignore[call-overload]
        for start, shape, dtype in at
    ]
