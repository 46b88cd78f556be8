"""Every kernel, in every shipped configuration, compiled ahead of time for every architecture: no
GPU is needed.

In a process of its own for each architecture: the kernels of this one are interpreted. About a
minute of a core each: `make test-compile`, and `make test-triton-3.6` for the other series of
Triton. CI does both.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="triton is not installed")

COMPILE = """
import dataclasses, json, sys
from fastprune_kernels import resources
known = {}
for case in resources.cases(sys.argv[1]):
    if sys.argv[2] in str(case):
        known[str(case)] = case.kernel, resources.measure(case)
found = {name: {"kernel": kernel, **dataclasses.asdict(r)} for name, (kernel, r) in known.items()}
print(json.dumps([resources.SHARED_LIMIT[sys.argv[1]], found]))
"""
# bench/gpu_model.py compiles what it reckons with, which has just been compiled here
CARD = """
import runpy
sys.path.insert(0, "bench")
sys.argv = ["bench/gpu_model.py"]
resources.measure = lambda case: known[str(case)][1]
runpy.run_path("bench/gpu_model.py", run_name="__main__")
"""
MATRIX_UNITS = {
    "sm_80": "mma.sync",
    "sm_90": "wgmma.mma_async",
    "sm_100": "tcgen05.mma",
    "gfx942": "v_mfma",
}
MATRIX_KERNELS = ("linear_nll", "finish_nll", "linear_kl", "tree_attention")


def compile_every_kernel(
    arch: str, only: str, root, then: str = ""
) -> tuple[int, dict[str, dict], list[str]]:
    """The limit of shared memory, and what each case takes, by its name, of which `only` is a part:
    of a process whose kernels are compiled. The lines that it prints when it goes on with `then`.

    Nothing comes from Triton's cache: what the assembler says is said while it works. So there is
    one test for each.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = [str(root / "kernels"), str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment |= {"PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", COMPILE + then, arch, only]
    done = subprocess.run(
        command, cwd=root, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    limit, found = json.loads(next(line for line in lines if line.startswith("[")))
    return limit, found, lines


@pytest.mark.compile
@pytest.mark.parametrize(
    ("arch", "only"),
    [
        ("sm_90", "bf16"),
        *(pytest.param(arch, "", marks=pytest.mark.nightly) for arch in MATRIX_UNITS),
    ],
)
def test_compiled_code(arch, only, pytestconfig):
    """It fits, does not spill, makes its products on the matrix unit, and copies ahead while it
    makes them.

    What the model of the card reckons from that for sm_90 are fractions of what the card could do.
    """
    limit, found, lines = compile_every_kernel(
        arch, only, pytestconfig.rootpath, CARD if arch == "sm_90" else ""
    )
    assert {r["kernel"] for r in found.values()} >= {
        "add_rms_norm",
        "gated_mlp",
        "rotary",
        *MATRIX_KERNELS,
    }
    assert {name: r["spills"] for name, r in found.items() if r["spills"]} == {}
    assert {name: r["shared"] for name, r in found.items() if r["shared"] > limit} == {}
    # float32 is not rounded to what the matrix units of NVIDIA take
    half = {
        name: r["matrix_unit"]
        for name, r in found.items()
        if r["kernel"] in MATRIX_KERNELS and "bf16" in name
    }
    assert half
    assert {
        name: unit for name, unit in half.items() if not unit.startswith(MATRIX_UNITS[arch])
    } == {}
    assert {name: r["stalls"] for name, r in found.items() if r["stalls"]} == {}
    assert [name for name, r in found.items() if r["serialised"]] == []
    if arch == "sm_90":
        shapes = {name: set(r["shapes"]) for name, r in found.items() if "bf16" in name}
        assert {
            x for name, has in shapes.items() if name.startswith("linear_nll") for x in has
        } == {"m64n256k16"}
        assert {x for name, has in shapes.items() if name.startswith("linear_kl") for x in has} == {
            "m64n128k16"
        }
        plain = found["linear_nll-bf16-sm_90"]
        # room below the 255 that spill; the tile is 128 logits a thread, which cost 6 instructions
        # each at most
        assert plain["registers"] <= 192
        assert plain["instructions"] <= 1500
        assert plain["registers"] < found["linear_nll-bf16-pointers-sm_90"]["registers"]
        card = json.loads("\n".join(lines[lines.index("{") :]))
        losses = [row for row in card["kernels"] if row["kernel"] == "linear_nll"]
        assert losses
        assert all(0.5 < row["of_floor"] <= 1 for row in losses)


def test_every_float_has_a_configuration():
    from fastprune_kernels.launch import ARCHITECTURES, FLOATS, tree_attention_config

    for dtype in FLOATS:
        for arch in ARCHITECTURES:
            sizes = [
                tree_attention_config(arch, dtype.itemsize, head)["BLOCK_M"]
                for head in (1, 64, 65, 96, 128, 256)
            ]
            assert all(sizes)
