"""Makes Triton believe in one Hopper card, and executes what it launches there.

Everything between a launcher of fastprune_kernels and the card is Triton's own: its JIT, its
compiler for sm_90a, its driver and its launcher in C. Only libcuda is ours (fakecuda.c).
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import os
import subprocess
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.compiler.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from .machine import execute
from .ptx import Fault, Kernel, parse
from .rounding import Arithmetic

Change = Callable[[str], str]

_CALLBACK = ctypes.CFUNCTYPE(
    None, ctypes.c_uint64, *[ctypes.c_uint] * 5, ctypes.POINTER(ctypes.c_void_p)
)


def build_libcuda(folder: Path) -> Path:
    """Compiles fakecuda.c into a folder; the path of the library."""
    library = folder / "libcuda.so.1"
    folder.mkdir(parents=True, exist_ok=True)
    made = folder / f"libcuda-{os.getpid()}.so"  # then renamed: another process may do the same
    source = Path(__file__).with_name("fakecuda.c")
    include = Path(nvidia.__file__).with_name("include")
    command = ["cc", "-shared", "-fPIC", "-O1", "-Wl,-soname,libcuda.so.1", "-I", str(include)]
    subprocess.run([*command, "-o", str(made), str(source)], check=True)
    made.rename(library)
    return library


class _Driver(nvidia.CudaDriver):
    """Triton's driver for NVIDIA, but for what it asks torch."""

    def __init__(self):
        self.utils = nvidia.CudaUtils()
        self.launcher_cls = nvidia.CudaLauncher
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device: 0
        self.set_current_device = lambda device: None
        self.get_device_capability = lambda device: (9, 0)

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self):
        return torch.device("cpu")


class Card:
    """The card that Triton believes in. `install` it once, before the first launch.

    Attributes:
        arithmetic: how the card rounds.
        change: alters a kernel's PTX before it is executed, for tests of this executor.
    """

    def __init__(self):
        self.arithmetic = Arithmetic()
        self.change: Change | None = None
        self._sources: dict[int, str] = {}  # PTX, by the function's number
        self._kernels: dict[str, Kernel] = {}  # parsed, by PTX
        self._storages: list[tuple[int, int]] = []
        self._error: BaseException | None = None

    def install(self, folder: Path) -> None:
        """folder: for the library."""
        path = build_libcuda(folder)
        os.environ["TRITON_LIBCUDA_PATH"] = str(path.parent)  # to link against
        # loaded under its name, so that Triton's own dlopen("libcuda.so.1") returns it
        library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        self._callback = _CALLBACK(self._launched)
        library.executed_set_callback(self._callback)
        driver.set_active(_Driver())
        for name in ("launch", "attention", "linear_loss"):
            module = importlib.import_module(f"fastprune_kernels.{name}")
            module.architecture = lambda device: "sm_90"
        self._keep_sources()
        self._watch_arguments()

    @contextmanager
    def rounding(self, coarse: bool):
        """Within: as coarsely as a card may round, or as exactly as PTX allows."""
        before, self.arithmetic = self.arithmetic, Arithmetic(coarse, coarse)
        try:
            yield
        finally:
            self.arithmetic = before

    def _keep_sources(self) -> None:
        init_handles = CompiledKernel._init_handles

        def keep(kernel):
            if kernel.module is None:
                init_handles(kernel)
                self._sources[kernel.function] = kernel.asm["ptx"]

        CompiledKernel._init_handles = keep

    def _watch_arguments(self) -> None:
        """Notes the storages of a launch's tensors, and raises what went wrong in the callback."""
        run = JITFunction.run

        def watched(function, *args, grid, warmup, **kwargs):
            tensors = [getattr(x, "base", x) for x in (*args, *kwargs.values())]
            storages = [x.untyped_storage() for x in tensors if isinstance(x, torch.Tensor)]
            self._storages = [(s.data_ptr(), s.data_ptr() + s.nbytes()) for s in storages]
            self._error = None
            result = run(function, *args, grid=grid, warmup=warmup, **kwargs)
            if self._error is not None:
                raise self._error
            return result

        JITFunction.run = watched

    def _launched(self, function, grid_x, grid_y, grid_z, threads, shared_bytes, params):
        try:
            source = self._sources[function]
            if self.change is not None:
                source = self.change(source)
            if source not in self._kernels:
                self._kernels[source] = parse(source)
            kernel = self._kernels[source]
            if kernel.threads != threads:
                raise Fault(f"{kernel.name} is made for {kernel.threads} threads, not {threads}")
            values = [ctypes.string_at(params[i], p.size) for i, p in enumerate(kernel.params)]
            grid = (grid_x, grid_y, grid_z)
            execute(kernel, grid, shared_bytes, values, self._storages, self.arithmetic)
        except BaseException as error:  # an exception would be lost in the C code that called
            self._error = error


@functools.cache
def card() -> Card:
    """The one card of this process, installed."""
    if torch.cuda.is_available():
        raise Fault("there is a card: hide it, with CUDA_VISIBLE_DEVICES=")
    installed = Card()
    installed.install(Path(knobs.cache.dir).resolve() / "libcuda")
    return installed
