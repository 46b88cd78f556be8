"""The study on the demo model: every algorithm, two objectives, two budgets, and each algorithm's
gap to the optimum.

    python bench/study_demo.py OUT_DIR        # runs bench/study_demo.toml there, prints tables

`exhaustive` is one of the algorithms, so the optimum of every objective and budget is known.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch

from fastprune.study import figures
from fastprune.study.report import study_figures
from fastprune.study.tables import format_removed

DOCUMENT = Path(__file__).with_suffix(".toml")


def main(out_dir: str) -> None:
    out = Path(out_dir)
    started = time.perf_counter()
    command = [sys.executable, "-m", "fastprune", "study", str(DOCUMENT), "--out", str(out)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - started
    study = json.loads((out / "study.json").read_text())
    for kind, made in study_figures(study).items():
        for number, figure in enumerate(made, 1):
            figures.save(figure, out / f"{kind}-{number}.png")

    print(
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}"
    )
    print(f"{len(study['cells'])} searches in {seconds:.0f} s\n")
    optimum = {
        (c["objective"], c["num_remove"]): c["loss"]
        for c in study["cells"]
        if c["algorithm"] == "exhaustive"
    }
    print(
        "| objective | removed | algorithm | blocks | loss | gap to optimum | masks | unit runs "
        "| naive | seconds |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for c in study["cells"]:
        gap = c["loss"] - optimum[c["objective"], c["num_remove"]]
        blocks = format_removed(c["removed"])
        counts = (
            f"{c['masks']} | {c['asked_unit_runs']:.0f} | {c['naive_unit_runs']:.0f} | "
            f"{c['seconds']:.1f}"
        )
        found = f"{c['algorithm']} | {blocks} | {c['loss']:.5f} | {gap:.5f}"
        print(f"| {c['objective']} | {c['num_remove']} | {found} | {counts} |")
    print("\n| removed | Jaccard within an objective | across objectives |\n|---|---|---|")
    for entry in study["jaccard"]:
        print(f"| {entry['num_remove']} | {entry['within']:.3f} | {entry['across']:.3f} |")
    print("\n| removed | chosen by | judged by | rho | losses |\n|---|---|---|---|---|")
    spread = {(e["num_remove"], e["chosen_by"], e["judged_by"]): e for e in study["spread"]}
    for entry in study["spearman"]:
        key = (entry["num_remove"], entry["chosen_by"], entry["judged_by"])
        rho = "n/a" if entry["rho"] is None else f"{entry['rho']:+.2f}"
        print(
            f"| {' | '.join(map(str, key))} | {rho} | {spread[key]['least_loss']:.4f} to "
            f"{spread[key]['most_loss']:.4f} |"
        )
    made, asked, naive = (
        sum(c[name] for c in study["cells"])
        for name in ("unit_runs", "asked_unit_runs", "naive_unit_runs")
    )
    print(f"\nunit runs: {made:.0f} made, {asked:.0f} alone, {naive:.0f} naive")


if __name__ == "__main__":
    main(sys.argv[1])
