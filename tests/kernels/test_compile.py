"""Every kernel, in every shipped configuration, compiled ahead of time for every architecture: no GPU is needed.

In a process of its own for each architecture: the kernels of this one are interpreted. Each takes a core.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="triton is not installed")

COMPILE = """
import json, sys
from fastprune_kernels import resources
found = {}
for case in resources.cases(sys.argv[1]):
    r = resources.measure(case)
    found[str(case)] = [case.kernel, r.spills, r.shared, r.matrix_unit]
print(json.dumps([resources.SHARED_LIMIT[sys.argv[1]], found]))
"""
MATRIX_UNITS = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma", "gfx942": "v_mfma"}
MATRIX_KERNELS = ("linear_nll", "linear_kl", "tree_attention")


def compile_every_kernel(arch: str, folder, cache) -> str:
    """What a fresh process, whose kernels are not interpreted, prints of this architecture."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "TRITON_CACHE_DIR": str(cache)}
    command = [sys.executable, "-c", COMPILE, arch]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.compile
@pytest.mark.parametrize("arch", MATRIX_UNITS)
def test_every_configuration_compiles_fits_and_does_not_spill(arch, tmp_path, pytestconfig):
    out = compile_every_kernel(arch, pytestconfig.rootpath / "kernels", tmp_path)
    limit, found = json.loads(out.splitlines()[-1])
    assert {kernel for kernel, *_ in found.values()} >= {"add_rms_norm", "gated_mlp", "rotary", *MATRIX_KERNELS}
    assert {name: spills for name, (_, spills, _, _) in found.items() if spills} == {}
    assert {name: shared for name, (_, _, shared, _) in found.items() if shared > limit} == {}
    # float32 is not rounded to what the matrix units of NVIDIA take
    half = {name: unit for name, (kernel, _, _, unit) in found.items() if kernel in MATRIX_KERNELS and "bf16" in name}
    assert half
    assert {name: unit for name, unit in half.items() if not unit.startswith(MATRIX_UNITS[arch])} == {}


def test_every_float_has_a_configuration():
    from fastprune_kernels.launch import ARCHITECTURES, FLOATS, tree_attention_config

    for dtype in FLOATS:
        for arch in ARCHITECTURES:
            sizes = [tree_attention_config(arch, dtype.itemsize, head)["BLOCK_M"] for head in (1, 64, 65, 96, 128, 256)]
            assert all(sizes)
