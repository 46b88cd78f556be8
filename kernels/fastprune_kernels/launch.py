"""The parts that all launchers share: argument checks, and block sizes by architecture.

Kernel, variant (element size, head size, row size) and architecture choose a configuration. To
tune, pass `config=Config(...)` to a launcher. No search at run time chooses the defaults, so that a
result does not depend on a timing.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from triton import knobs, next_power_of_2

INTERPRETED = bool(
    knobs.runtime.interpret
)  # read once: a kernel's definition decides whether it is interpreted
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
TMA = ("sm_90", "sm_100")  # architectures with a tensor memory accelerator
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Config:
    """Block sizes by name, warps per program, depth of the software pipeline."""

    blocks: tuple[tuple[str, int], ...]
    num_warps: int
    num_stages: int

    @classmethod
    def of(cls, num_warps: int, num_stages: int, **blocks: int) -> Config:
        return cls(tuple(blocks.items()), num_warps, num_stages)

    def __getitem__(self, name: str) -> int:
        return self.launch[name]

    @cached_property
    def launch(self) -> dict[str, int]:
        """Keyword arguments of a launch."""
        return {**dict(self.blocks), "num_warps": self.num_warps, "num_stages": self.num_stages}

    def __str__(self) -> str:
        blocks = " ".join(f"{name}={value}" for name, value in self.blocks)
        return f"{blocks} warps={self.num_warps} stages={self.num_stages}"


@cache
def architecture(device: torch.device) -> str:
    """The architecture whose configurations serve a device. Raises ValueError if there is none."""
    if INTERPRETED:
        return "interpreter"
    if device.type != "cuda":
        raise ValueError(
            f"kernels run on CUDA or ROCm tensors, not on {device.type} (or with "
            f"TRITON_INTERPRET=1)"
        )
    if torch.version.hip:
        name = torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
        if name != "gfx942":
            raise ValueError(f"no kernel configuration for {name}; gfx942 has one")
        return name
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        raise ValueError(
            f"no kernel configuration for compute capability {major}.{minor}; 8.0 is the least"
        )
    # sm_80's configurations also fit the 99 KB of shared memory of 8.6, 8.9 and 12.x
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")


def has_tma(x: torch.Tensor) -> bool:
    """Whether the tensor memory accelerator loads tiles of x: 16-bit elements on such a device."""
    return x.element_size() == 2 and (INTERPRETED or architecture(x.device) in TMA)


def on_device(x: torch.Tensor) -> AbstractContextManager:
    """A context in which the tensor's device is the current one, on which Triton launches."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def check(condition: bool, message: Callable[[], str]) -> None:
    """Raise ValueError with message() unless the condition holds.

    The message is a function: a launch checks a dozen conditions, and the host may be the limit.
    """
    if not condition:
        raise ValueError(message())


def check_tensor(
    name: str, x: torch.Tensor, shape: tuple[int | None, ...], dtypes, device: torch.device
) -> None:
    """Raise ValueError for a wrong shape, dtype, device or layout. None in a shape is any size."""
    dtypes = dtypes if isinstance(dtypes, tuple) else (dtypes,)
    fits = x.shape == shape or (
        x.dim() == len(shape)
        and all(want is None or have == want for have, want in zip(x.shape, shape))
    )
    if fits and x.dtype in dtypes and x.device == device and x.is_contiguous():
        return
    wanted = ", ".join("any" if size is None else str(size) for size in shape)
    check(fits, lambda: f"{name} must have shape [{wanted}], not {list(x.shape)}")
    names = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
    check(
        x.dtype in dtypes,
        lambda: f"{name} must be {names}, not {str(x.dtype).removeprefix('torch.')}",
    )
    check(x.device == device, lambda: f"{name} must be on {device}, not on {x.device}")
    check(x.is_contiguous(), lambda: f"{name} must be contiguous")


def check_output(
    name: str,
    out: torch.Tensor | None,
    shape: tuple[int | None, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> torch.Tensor:
    """Check the output tensor `out`, or make a new one if it is None."""
    if out is None:
        return torch.empty(shape, dtype=dtype, device=device)
    check_tensor(name, out, shape, dtype, device)
    return out


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


# One program holds a whole row in registers; a thread loads 16 bytes at a time.
MAX_ROW = 16384


@cache
def norm_config(size: int) -> Config:
    """The configuration of add_rms_norm by row size, the same on every architecture."""
    block = max(16, next_power_of_2(size))
    return Config.of(min(max(block // 512, 1), 16), 1, BLOCK_D=block)


@cache
def rotary_config(head_dim: int) -> Config:
    """The configuration of rotary, the same on every architecture.

    A program takes BLOCK_R pairs of a token and a head, 2,048 elements.
    """
    return Config.of(
        4, 1, BLOCK_R=32 if INTERPRETED else 2048 // max(16, next_power_of_2(head_dim))
    )


@cache
def gated_mlp_config() -> Config:
    """The configuration of gated_mlp, the same on every architecture."""
    return Config.of(4, 1, BLOCK_F=32 if INTERPRETED else 1024)


def _matrix(p: int, v: int, d: int, warps: int, stages: int, split: int = 1024) -> Config:
    return Config.of(warps, stages, BLOCK_P=p, BLOCK_V=v, BLOCK_D=d, SPLIT_V=split, GROUP_P=8)


# By element size in bytes. SPLIT_V decides a row's bits, so the number of rows must not decide it.
_FLOAT32 = {
    "sm_80": _matrix(128, 64, 16, 8, 3),
    "sm_90": _matrix(128, 64, 16, 8, 3),
    "sm_100": _matrix(64, 128, 16, 8, 3),
    "gfx942": _matrix(64, 64, 16, 8, 2),
}
LINEAR_NLL = {
    2: {
        "sm_80": _matrix(128, 128, 32, 8, 4),
        "sm_90": _matrix(128, 256, 64, 8, 4),
        "sm_100": _matrix(128, 256, 64, 8, 4),
        "gfx942": _matrix(128, 128, 32, 8, 2),
    },
    4: _FLOAT32,
}
LINEAR_KL = {
    2: {
        "sm_80": _matrix(64, 128, 32, 8, 3),
        "sm_90": _matrix(128, 128, 64, 8, 4),
        "sm_100": _matrix(64, 128, 64, 8, 3),
        "gfx942": _matrix(64, 128, 32, 8, 2),
    },
    4: {
        "sm_80": _matrix(64, 32, 16, 8, 3),
        "sm_90": _matrix(64, 32, 16, 8, 3),
        "sm_100": _matrix(64, 32, 16, 8, 3),
        "gfx942": _matrix(64, 64, 16, 8, 2),
    },
}
_INTERPRETED_MATRIX = _matrix(32, 32, 32, 1, 1, split=64)


@cache
def linear_nll_config(arch: str, itemsize: int) -> Config:
    return _INTERPRETED_MATRIX if arch == "interpreter" else LINEAR_NLL[itemsize][arch]


@cache
def linear_kl_config(arch: str, itemsize: int) -> Config:
    return _INTERPRETED_MATRIX if arch == "interpreter" else LINEAR_KL[itemsize][arch]


def _attention(m: int, n: int, warps: int, stages: int) -> Config:
    return Config.of(warps, stages, BLOCK_M=m, BLOCK_N=n)


# by element size in bytes, then by the greatest head size that a configuration serves
_FLOAT32_ATTENTION = {
    64: _attention(64, 32, 8, 1),
    128: _attention(32, 16, 8, 1),
    256: _attention(32, 16, 8, 1),
}
TREE_ATTENTION = {
    2: {
        "sm_80": {
            64: _attention(128, 64, 8, 3),
            128: _attention(128, 32, 8, 3),
            256: _attention(64, 16, 8, 3),
        },
        "sm_90": {
            64: _attention(128, 64, 8, 3),
            128: _attention(128, 64, 8, 3),
            256: _attention(128, 32, 8, 3),
        },
        "sm_100": {
            64: _attention(128, 64, 8, 3),
            128: _attention(128, 64, 8, 3),
            256: _attention(128, 32, 8, 3),
        },
        "gfx942": {
            64: _attention(128, 64, 8, 1),
            128: _attention(128, 32, 8, 1),
            256: _attention(64, 32, 8, 1),
        },
    },
    4: dict.fromkeys(ARCHITECTURES, _FLOAT32_ATTENTION),
}
MAX_HEAD = 256


@cache
def tree_attention_config(arch: str, itemsize: int, head_dim: int) -> Config:
    if arch == "interpreter":
        return _attention(16, 16, 1, 1)
    by_head = TREE_ATTENTION[itemsize][arch]
    return by_head[min(size for size in by_head if size >= head_dim)]
