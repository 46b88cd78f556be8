"""The free memory of a device, and the errors that report too little of it."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

import torch


def available_bytes(device: torch.device) -> int:
    """The bytes that a device can still allocate.

    On a GPU these are its free and its cached memory. On a host it is the memory that the kernel
    reports as available, within the limits of the control group.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    available = (
        os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    )  # without better information
    with suppress(OSError):
        if match := re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text()):
            available = int(match[1]) << 10
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
            if match := re.search(rf"^{cached} (\d+)$", (group / counts).read_text(), re.MULTILINE):
                left += int(
                    match[1]
                )  # pages of files, which the kernel frees when memory is needed
            available = min(available, max(0, left))
    return available


_OUT_OF_MEMORY = re.compile(
    r"not enough memory|can't allocate memory"  # torch on a host
    r"|(CUDA|HIP) error: out of memory"  # pinned memory
    r"|Triton Error \[\w+\]: out of memory"
    r"|BLAS_STATUS_ALLOC_FAILED"
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception reports that memory ran out, on a GPU or on the host."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(str(error)) is not None
