"""How many bytes of tensors a piece of work holds at its peak, measured; and how many are free."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Result = TypeVar("Result")


def peak_bytes(work: Callable[[], Result]) -> tuple[Result, int]:
    """Run `work`; return its result, and the most bytes that tensors made by it (the result's too)
    held at once.

    Every tensor that an operator returns is followed by the life of its storage, on any device:
    bytes as they were asked for. What an allocator has in its caches, or rounds up to, is not among
    them, so that the same work always counts the same, whatever the process did before; nor is
    scratch space inside an operator, nor a copy of a parameter in another dtype, which belongs to
    the weights. The collector of garbage rests meanwhile, since when it runs depends on the past,
    too.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        with _LiveStorages() as live:
            result = work()
    finally:
        if collects:
            gc.enable()
    return result, live.peak


class _LiveStorages(TorchDispatchMode):
    """Adds up the storages that operators return, until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.current = self.peak = 0
        self._known: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {
            id(t.untyped_storage())
            for t in tree_leaves((args, kwargs))
            if isinstance(t, torch.Tensor)
        }
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and isinstance(args[0], torch.nn.Parameter):
            return result
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if id(storage) not in self._known and id(storage) not in before:
                    self._follow(storage)
        return result

    def _follow(self, storage: torch.UntypedStorage) -> None:
        size, key = storage.nbytes(), id(storage)

        def freed(_: object) -> None:
            self.current -= size
            del self._known[key]

        self._known[key] = weakref.ref(storage, freed)
        self.current += size
        self.peak = max(self.peak, self.current)
