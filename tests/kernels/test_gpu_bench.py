"""The GPU benchmark, every section of it at tiny shapes: kernels interpreted, times without meaning."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from kernel_checks import DTYPES  # noqa: F401  skips where triton is not installed

SECTIONS = ("ceilings", "kernels", "block", "pairs", "margin", "beam", "pairs, Qwen3", "margin, Qwen3")


def test_every_section_runs_and_every_goal_is_reported(tmp_path, pytestconfig):
    out = tmp_path / "gpu.json"
    command = [sys.executable, "bench/gpu.py", "--device", "cpu", "--tiny", "--minutes", "4", "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=pytestconfig.rootpath, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(out.read_text())
    assert {name: found[name] for name in SECTIONS if {"failed", "skipped"} & set(found[name])} == {}
    for name, kernel in found["kernels"].items():
        if isinstance(kernel, dict):
            assert kernel.get("ms", 0) > 0, f"{name}: {kernel}"
            assert all("ms" in variant for variant in kernel["variants"].values()), f"{name}: {kernel['variants']}"
    assert found["block"]["error"] < 0.02
    assert all(found[name]["agrees"] for name in SECTIONS if name.startswith(("pairs", "margin")))
    assert found["goals"]["rows"]
    for goal, measured, _ in found["goals"]["rows"]:
        assert measured != "not measured", goal
        assert goal in done.stdout
