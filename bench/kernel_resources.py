"""Registers and shared memory of every kernel in every shipped configuration. Needs no GPU.

PYTHONPATH=kernels python bench/kernel_resources.py [sm_80 sm_90 sm_100 gfx942]
    [--out bench/results/kernel_resources.json]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import triton
from record import save

from fastprune_kernels import resources


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(resources.TARGETS))
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    found = []
    for row in resources.rows(tuple(given.targets) or resources.ARCHITECTURES):
        found.append(row)
        print(json.dumps(row), flush=True)
    save(given.out, {"triton": triton.__version__, "kernels": found})


if __name__ == "__main__":
    main()
