"""The study on the demo model: every algorithm, two objectives, two budgets.

    python bench/study_demo.py OUT_DIR [--document bench/study_demo.toml]
        [--out bench/results/study_demo.json]

The document runs in OUT_DIR, where the figures are written, too. `exhaustive` is one of its
algorithms, so the optimum of every objective and budget is known.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from record import save

from fastprune.study import figures
from fastprune.study.report import study_figures

DOCUMENT = Path(__file__).with_suffix(".toml")
COSTS = "masks", "unit_runs", "asked_unit_runs", "naive_unit_runs", "seconds"
CELL = "objective", "num_remove", "algorithm", "removed", "loss", *COSTS


def results(study: dict[str, Any]) -> dict[str, Any]:
    """The searches with their distances from the optimum, and how they compare."""
    (dense,) = study["dense"].values()
    (similarity,) = study["similarity"].values()
    cells = [{key: cell[key] for key in CELL} for cell in study["cells"]]
    optima = {
        (cell["objective"], cell["num_remove"]): cell["loss"]
        for cell in cells
        if cell["algorithm"] == "exhaustive"
    }
    for cell in cells:
        cell["above_optimum"] = cell["loss"] - optima[cell["objective"], cell["num_remove"]]
    return {
        "whole_model": dense,
        "rls": similarity["rls"],
        "cells": cells,
        **{key: study[key] for key in ("jaccard", "spearman", "spread")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="OUT_DIR")
    parser.add_argument("--document", type=Path, default=DOCUMENT)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    command = ["fastprune", "study", given.document, "--out", given.folder]
    subprocess.run(
        [sys.executable, "-m", *map(str, command)], check=True, stdout=subprocess.DEVNULL
    )
    study = json.loads((given.folder / "study.json").read_text())
    for kind, made in study_figures(study).items():
        for number, figure in enumerate(made, 1):
            figures.save(figure, given.folder / f"{kind}-{number}.png")
    found = results(study)
    print(json.dumps(found, indent=1))
    save(given.out, found)


if __name__ == "__main__":
    main()
