"""Shared by the benchmarks: files of results that say by which command they were made, on which
machine, and how long that took.

The time is that of the whole process with those it started, from its begin to the writing.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

ROOT = Path(__file__).resolve().parents[1]
STARTED = time.perf_counter()
SETTINGS = (  # of the environment, which a command names
    "BENCH",
    "OMP_NUM_THREADS",
    "PYTHONPATH",
    "ATEN_CPU_CAPABILITY",
    "OPENBLAS_CORETYPE",
    "ONEDNN_MAX_CPU_ISA",
)


def save(
    path: Path | None,
    results: Mapping[str, Any],
    part: str | None = None,
    goes_on: Mapping[str, Any] | None = None,
) -> None:
    """Write results with their command, machine and time.

    Args:
        path: The file; nothing is written without one.
        results: Whatever else the file shall hold.
        part: The key under which the file keeps these results beside others.
        goes_on: Earlier results that this run goes on with, whose time is added.
    """
    if path is None:
        return
    content: dict[str, Any] = origin(goes_on) | dict(results)
    if part is not None:
        content = read(path) | {part: content}
    write(path, content)


def read(path: Path | None) -> dict[str, Any]:
    """The results in a file, if there is one."""
    return json.loads(path.read_text(encoding="utf-8")) if path and path.exists() else {}


def write(path: Path, content: Any) -> None:
    """Write results as they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def origin(goes_on: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Command, machine and time of this process. Without a time, where the earlier results have
    none."""
    found: dict[str, Any] = {"command": command(), "machine": machine()}
    own = took()
    if not goes_on:
        return found | {"took": own}
    if "took" not in goes_on:
        return found
    return found | {"took": {key: round(own[key] + goes_on["took"][key], 1) for key in own}}


def took(since: Mapping[str, float] | None = None) -> dict[str, float]:
    """Seconds of the processors and of the clock since the process began, or since an earlier
    call."""
    times = os.times()
    cpu = times.user + times.system + times.children_user + times.children_system
    now = {"cpu_seconds": cpu, "wall_seconds": time.perf_counter() - STARTED}
    return {key: round(value - (since[key] if since else 0), 1) for key, value in now.items()}


def command() -> str:
    """The command line of this process. A file outside of the repository goes by its name alone,
    a folder by its name in capitals."""
    settings = [f"{name}={os.environ[name]}" for name in SETTINGS if name in os.environ]
    script = Path(sys.argv[0]).resolve()
    shown = [str(script.relative_to(ROOT)) if script.is_relative_to(ROOT) else script.name]
    if script.name == "__main__.py":
        shown = ["-m", script.parent.name]
    return " ".join([*settings, "python", shlex.join([*shown, *map(place, sys.argv[1:])])])


def place(argument: str) -> str:
    """An argument of the command line, without the folders of this machine."""
    path = Path(argument)
    if not path.is_absolute() or path.is_relative_to(ROOT):
        return argument
    return path.name.upper() if path.is_dir() else path.name


def machine() -> dict[str, Any]:
    """The processor and the libraries, which a reader needs to place the numbers."""
    model = next(
        (line.split(":")[1].strip() for line in _cpu_info() if line.startswith("model name")), ""
    )
    return {
        "cpu": model or platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 1),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def _cpu_info() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []
