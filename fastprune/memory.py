"""How many bytes of tensors a piece of work holds at its peak, measured; and how many are free."""

from __future__ import annotations

import gc
import os
import re
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
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


def available_bytes(device: torch.device) -> int:
    """What may still be allocated on a device: of a GPU, what is free or only cached; of a host,
    what its kernel says is available, and no more than the limits of its control group leave."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    available = (
        os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    )  # where nobody says more
    with suppress(OSError):
        if said := re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text()):
            available = int(said[1]) << 10
    group = Path("/sys/fs/cgroup")
    for most, used, counts, cached in (
        ("memory.max", "memory.current", "memory.stat", "inactive_file"),
        (
            "memory/memory.limit_in_bytes",
            "memory/memory.usage_in_bytes",
            "memory/memory.stat",
            "total_inactive_file",
        ),
    ):
        with suppress(OSError, ValueError):
            left = int((group / most).read_text()) - int((group / used).read_text())
            if said := re.search(rf"^{cached} (\d+)$", (group / counts).read_text(), re.MULTILINE):
                left += int(
                    said[1]
                )  # pages of files, which the kernel takes back when they are wanted
            available = min(available, max(0, left))
    return available


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on a GPU or on the host."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    said = ("not enough memory", "can't allocate memory")
    return isinstance(error, RuntimeError) and any(words in str(error) for words in said)
