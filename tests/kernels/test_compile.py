"""Every kernel, in every shipped configuration, compiled ahead of time for every architecture: no GPU is needed.

In a process of its own for each architecture: the kernels of this one are interpreted.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from kernel_checks import DTYPES  # skips where triton is not installed

COMPILE = """
import json
from fastprune_kernels import resources
arch = {arch!r}
found = {{}}
for case in resources.cases(arch):
    if case.variant.startswith({element!r}):
        r = resources.measure(case)
        found[str(case)] = [case.kernel, r.spills, r.shared, r.matrix_unit]
print(json.dumps([resources.SHARED_LIMIT[arch], found]))
"""
MATRIX_UNITS = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma", "gfx942": "v_mfma"}
MATRIX_KERNELS = ("linear_nll", "linear_kl", "tree_attention")


@pytest.mark.parametrize("arch", MATRIX_UNITS)
@pytest.mark.parametrize("element", ["bf16", "fp32"])
def test_every_configuration_compiles_fits_and_does_not_spill(arch, element, tmp_path, pytestconfig):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(pytestconfig.rootpath / "kernels"), "TRITON_CACHE_DIR": str(tmp_path)}
    code = COMPILE.format(arch=arch, element=element)
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    limit, found = json.loads(result.stdout.splitlines()[-1])
    assert {kernel for kernel, *_ in found.values()} >= {"add_rms_norm", "gated_mlp", "rotary", *MATRIX_KERNELS}
    assert {name: spills for name, (_, spills, _, _) in found.items() if spills} == {}
    assert {name: shared for name, (_, _, shared, _) in found.items() if shared > limit} == {}
    if element == "bf16":
        units = {name: unit for name, (kernel, _, _, unit) in found.items() if kernel in MATRIX_KERNELS}
        assert {name: unit for name, unit in units.items() if not unit.startswith(MATRIX_UNITS[arch])} == {}


def test_every_float_has_a_configuration():
    from fastprune_kernels.launch import ARCHITECTURES, tree_attention_config

    for dtype in DTYPES:
        for arch in ARCHITECTURES:
            sizes = [tree_attention_config(arch, dtype.itemsize, head)["BLOCK_M"] for head in (1, 64, 65, 96, 128, 256)]
            assert all(sizes)
