"""The operators of the fused path, a module for each set of them: Triton's on a GPU (`kernels`),
csrc's on a CPU (`compiled`), and plain torch's (`plain`), which define them.

Every module has the same functions. States are [T, D], the rows of a chunk one after the other;
`qkv` is packed as [T, (heads + 2 kv_heads) * Dh], `gate_up` as [T, 2F].
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, Protocol

import torch

from .. import native
from ..head import Head
from ..model import Model
from .rows import Rows

MODULES = {"torch": "plain", "native": "compiled", "triton": "kernels"}


class Operators(Protocol):
    """The functions of a module of operators. `plain` defines them."""

    name: str
    add_rms_norm: Callable[..., torch.Tensor]
    rotary: Callable[..., torch.Tensor]
    gated_mlp: Callable[..., torch.Tensor]

    def plan_attention(
        self, rows: Rows, head_dim: int, grouped: bool, window: int | None, altered: bool = False
    ) -> object: ...

    def attention(
        self,
        qkv: torch.Tensor,
        plan: Any,
        num_heads: int,
        num_kv_heads: int,
        scale: float,
        soft_cap: float | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor: ...

    def head(
        self,
        model: Model,
        norm: Callable[[torch.Tensor], torch.Tensor],
        scale: float,
        soft_cap: float | None,
    ) -> Head: ...

    def numerics(self) -> str: ...


def operators_named(name: str) -> Operators:
    """Return a set of operators: "torch", "native", or "triton", which needs that package."""
    module: Any = importlib.import_module(f".{MODULES[name]}", __name__)
    return module


def fast_operators(device: torch.device, dtype: torch.dtype) -> str | None:
    """The name of the set for a device and dtype; None if it cannot run."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return None
    if device.type == "cuda":
        try:
            from fastprune_kernels.launch import architecture

            architecture(device)
        except (ImportError, ValueError):
            return None
        return "triton"
    if device.type == "cpu" and dtype != torch.float16:
        return "native" if native.available() else None
    return None
