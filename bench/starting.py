"""Imports and opening: CPU seconds of fresh processes.

    OMP_NUM_THREADS=1 python bench/starting.py SMOLLM2 [--repeats 3]
        [--out bench/results/starting.json]

User and system seconds of each command, by turns; the table has the medians.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from record import save

TRANSFORMERS = (
    "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; "
    "M.from_pretrained('SMOLLM2'); T.from_pretrained('SMOLLM2')"
)
IMPORTS = "from fastprune.models.imports import import_transformers as load; load()"
COMMANDS = {  # what stands behind a command in the table
    'python -c "import torch"': "",
    'python -c "from transformers import AutoModelForCausalLM, LlamaForCausalLM"': "",
    f'python -c "{IMPORTS}"': "",
    f'python -c "{TRANSFORMERS}"': "",
    "python -c \"import fastprune; fastprune.load_model('SMOLLM2')\"": (
        ": checks every block against the model's own pass"
    ),
    "python -m fastprune info SMOLLM2": (
        ": checks fused operators, trees and the run without blocks, too"
    ),
    "python -m fastprune --help": "",
}


def cpu_seconds(command: str, folder: str) -> float:
    """Seconds of the processors that a command takes in a process of its own."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    before = os.times()
    subprocess.run(
        command.replace("SMOLLM2", folder),
        shell=True,
        check=True,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "PATH": path},
    )
    after = os.times()
    user = after.children_user - before.children_user
    return user + after.children_system - before.children_system


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", metavar="SMOLLM2")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    seconds: dict[str, list[float]] = {command: [] for command in COMMANDS}
    for _ in range(given.repeats):
        for command, found in seconds.items():
            found.append(cpu_seconds(command, given.folder))
            print(f"{found[-1]:6.2f}  {command}", flush=True)
    rows = [
        {
            "command": command,
            "remark": COMMANDS[command],
            "cpu_seconds": statistics.median(found),
            "runs": found,
        }
        for command, found in seconds.items()
    ]
    print(json.dumps(rows, indent=1))
    save(given.out, {"commands": rows})


if __name__ == "__main__":
    main()
