"""The choice of torch's kernels for scaled_dot_product_attention while a model's units run.

torch chooses by global switches and an order of preference that differ by release and by card, and
each choice rounds differently. Here the choice is always the same: flash attention if it can serve
(float16 and bfloat16 without a mask, and on a CPU), else the memory-efficient kernel, else plain
matrix products. cuDNN's is left out. On Hopper it would come first in some releases; it plans for
20 to 40 ms whenever a shape is new, and by a search of its own that no switch records, for the sake
of about 4 % of a block (LLaMA-3 8B, rows of 2,048 tokens). `bench/gpu.py` times it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch.nn.attention import SDPBackend, sdpa_kernel

# in order of preference; the last serves devices other than GPUs of these kinds and CPUs
SDPA_BACKENDS = (
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
    SDPBackend.OVERRIDEABLE,
)
BACKEND_NAMES = [backend.name for backend in SDPA_BACKENDS]

_turn = threading.Lock()
# open blocks of `pinned_attention`, in all threads: torch's switches are the process's
_inside = 0
_switches = ExitStack()


@contextmanager
def pinned_attention() -> Iterator[None]:
    """The backends above, in this order; whoever leaves last puts the caller's switches back."""
    global _inside
    with _turn:
        if not _inside:
            # all are allowed first, since the order of the others would be lost on the way out
            _switches.enter_context(sdpa_kernel([*SDPA_BACKENDS, SDPBackend.CUDNN_ATTENTION]))
            _switches.enter_context(sdpa_kernel(list(SDPA_BACKENDS), set_priority=True))
        _inside += 1
    try:
        yield
    finally:
        with _turn:
            _inside -= 1
            if not _inside:
                _switches.close()
