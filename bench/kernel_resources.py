"""Prints what every kernel takes in every shipped configuration: the table of docs/kernels.md.
Needs no GPU.

PYTHONPATH=kernels python bench/kernel_resources.py [sm_80 sm_90 sm_100 gfx942]
"""

from __future__ import annotations

import sys

from fastprune_kernels.resources import ARCHITECTURES, table

if __name__ == "__main__":
    print(table(tuple(sys.argv[1:]) or ARCHITECTURES))
