"""env: the versions, the machine and the path that decide how fastprune runs, for bug reports."""

from __future__ import annotations

import os
import platform
import re
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import click

from .. import __version__
from .opening import open_model
from .options import Command, json_option
from .output import printing, say_json, say_values

PACKAGES = (
    *("torch", "transformers", "tokenizers", "safetensors", "numpy", "scipy", "triton"),
    *("scikit-learn", "matplotlib", "lm-eval", "ray", "optuna"),
)


@click.command(cls=Command)
@json_option
def env(as_json: bool) -> None:
    """Show versions, processor, threads, GPU and the path that would run, for bug reports."""
    values = environment()
    with printing():
        if as_json:
            say_json(values)
        else:
            say_values((name.replace("_", " "), value) for name, value in values.items())


def environment() -> dict[str, object]:
    """Plain values by name. No path or name of the user is among them."""
    import torch

    from ..models import native, open_runner

    gpus = [
        torch.cuda.get_device_properties(number).name for number in range(torch.cuda.device_count())
    ]
    built = "yes" if native.available() else "no: NumPy and torch run in its place"
    return {
        "fastprune": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        **{name: _version(name) for name in PACKAGES},
        "compiled_extension": built,
        "extension_instructions": native.instruction_set(),
        "processor": _processor(),
        "torch_instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS", "not set"),
        "cuda": torch.version.cuda or torch.version.hip or "none",
        "gpu": ", ".join(gpus) or "none",
        "path": f"{open_runner(open_model('demo')).path_name}, for the demo model",
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    """The processor's name, as Linux gives it, or the machine's kind."""
    with suppress(FileNotFoundError):
        information = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        if name := re.search(r"^model name\s*:(.*)$", information, re.MULTILINE):
            return name[1].strip()
    return platform.processor() or platform.machine()
