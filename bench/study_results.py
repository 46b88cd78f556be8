"""The finished cells of bench/long_study.py, with paired differences: bench/results/study.json.

    python bench/study_results.py OUT [--only smollm2,pairs,optimum,calibration,gemma3]
        [--out bench/results/study.json]

OUT is the folder that bench/long_study.py wrote. Every mask of a study is compared with the mask
of a reference search of the same size on the same samples: greedy under perplexity (SmolLM2), the
same algorithm on 64 windows of 128 tokens of text (calibration), greedy under the divergence
(Gemma 3), and the exhaustive search (pairs and triples). The losses by sample come from the study's
store, so nothing is run again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import read, write

import fastprune as fp
from fastprune.objectives import OBJECTIVES, Objective
from fastprune.study.config import DataConfig, Document, read_document

REFERENCES = {  # of a cell (objective, algorithm), the one that it is compared with
    "smollm2": lambda objective, algorithm: ("perplexity-text", "greedy"),
    "pairs": lambda objective, algorithm: (objective, "exhaustive"),
    "optimum": lambda objective, algorithm: (objective, "exhaustive"),
    "calibration": lambda objective, algorithm: ("perplexity-text-64x128", algorithm),
    "gemma3": lambda objective, algorithm: (objective, "greedy"),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="OUT")
    parser.add_argument("--only", default=",".join(REFERENCES))
    parser.add_argument("--out", type=Path, default=Path("bench/results/study.json"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    known = json.loads(given.out.read_text()) if given.out.exists() else {}
    for name in given.only.split(","):
        if (given.folder / f"study-{name}" / "study.json").exists():
            known[name] = results(given.folder, name)
            write(given.out, known)
        else:
            print(f"{name}: no finished study in {given.folder}", file=sys.stderr)


def results(folder: Path, name: str) -> dict[str, Any]:
    """The cells of one study, its controls, and their differences to the reference."""
    study = json.loads((folder / f"study-{name}" / "study.json").read_text())
    document = read_document(folder / f"{name}.toml")
    ((model_name, dense),) = study["dense"].items()
    model = fp.load_model(document.models[model_name], dtype=document.config.model.dtype)
    objectives = objectives_of(document, model)
    rows = [cell_row(cell) for cell in study["cells"]]
    rows += [
        {"algorithm": f"({control['name']})", "objective": control["under"], **sized(control)}
        for control in study["controls"]
    ]
    store = folder / f"study-{name}" / "scores.db"
    whole: dict[str, dict[str, Any]] = {}
    for label, objective in objectives.items():
        held_out = label in study["held_out"]
        judged = [row for row in rows if held_out or row["objective"] == label]
        ev = fp.Evaluator(model, objective, store=store)
        everything = tuple(range(ev.num_units))
        sequences = [everything, *sorted({run_by(row, ev.num_units) for row in judged})]
        losses = ev.score_samples(sequences=sequences)
        print(
            f"{name}, {label}: {len(losses)} losses, {ev.stats.unit_runs:g} unit runs", flush=True
        )
        if not np.isclose(float(objective.mean(losses[:1])[0]), dense[label]["loss"], rtol=1e-9):
            raise SystemExit(f"{name}, {label}: these are not the samples of the study")
        by_sequence = dict(zip(sequences, losses, strict=True))
        whole[label] = value_of(objective, losses[0])
        for row in judged:
            own, other = by_sequence[run_by(row, ev.num_units)], reference(rows, row, name)
            row["judged"][label] = value_of(objective, own) | {
                "to_whole": difference(objective, own, losses[0])
            }
            base = by_sequence.get(run_by(other, ev.num_units)) if other else None
            if base is not None:
                row["judged"][label]["to_reference"] = difference(objective, own, base)
    judges = {
        label: {
            "metric": objective.header(),
            "samples": objective.num_samples,
            "held_out": label in study["held_out"],
        }
        for label, objective in objectives.items()
    }
    return {
        "judges": judges,
        "whole_model": whole,
        "machine": {"processor": "AMD EPYC", "device": study_device(study), "threads": 1},
        "dtype": document.config.model.dtype,
        "rows": rows,
    } | read(folder / f"study-{name}" / "run.json")


def objectives_of(document: Document, model: fp.Model) -> dict[str, Objective]:
    """The objectives of a document by label: the searched ones, and those held out."""
    config = document.config
    made = {
        label: make(objective.name, calibration, objective.settings, model)
        for label, (objective, calibration) in config.objectives.items()
    }
    return made | {
        held.name: make(held.objective, held, held.settings, model) for held in config.held_out
    }


def make(name: str, data: DataConfig, settings: Mapping[str, Any], model: fp.Model) -> Objective:
    """The objective on the data that a table of the document names."""
    kind = OBJECTIVES[name]
    if kind.data == "tasks":
        tasks = fp.load_tasks(data.file, model.tokenizer, limit=data.num_samples, **data.reading)
        return kind(tasks, **settings)
    text = fp.load_text(
        data.file, model.tokenizer, data.num_samples, data.seq_len, data.seed or 0, **data.reading
    )
    return kind(text, **settings)


def cell_row(cell: Mapping[str, Any]) -> dict[str, Any]:
    kept = ("objective", "algorithm", "masks", "unit_runs", "asked_unit_runs", "naive_unit_runs")
    return {key: cell[key] for key in kept} | {"seconds": round(cell["seconds"], 1)} | sized(cell)


def sized(record: Mapping[str, Any]) -> dict[str, Any]:
    units = "removed" if record.get("removed") is not None else "sequence"
    return {"size": record["num_remove"], units: record[units], "judged": {}}


def run_by(row: Mapping[str, Any], num_units: int) -> tuple[int, ...]:
    """The sequence of units that a row's candidate runs."""
    if "sequence" in row:
        return tuple(row["sequence"])
    return tuple(unit for unit in range(num_units) if unit not in row["removed"])


def reference(
    rows: list[dict[str, Any]], row: Mapping[str, Any], name: str
) -> dict[str, Any] | None:
    """The row that a row is compared with: of its size, by the study's reference search."""
    wanted = REFERENCES[name](row["objective"], row["algorithm"])
    for other in rows:
        if (other["objective"], other["algorithm"], other["size"]) == (*wanted, row["size"]):
            return other
    return None


def value_of(objective: Objective, sample_losses: np.ndarray) -> dict[str, Any]:
    loss = float(objective.mean(sample_losses[None])[0])
    return {
        "loss": loss,
        "value": objective.metric(loss),
        "error": abs(objective.slope(loss))
        * float(objective.standard_error(sample_losses[None])[0]),
    }


def difference(objective: Objective, own: np.ndarray, other: np.ndarray) -> dict[str, Any]:
    if np.array_equal(own, other):
        return {"value": 0.0, "error": 0.0}
    paired = objective.compare(own, other)
    return {"value": paired.value, "error": paired.error}


def study_device(study: Mapping[str, Any]) -> str:
    return ", ".join(
        sorted({machine["device"] for machine in study["inputs"]["machines"].values()})
    )


if __name__ == "__main__":
    main()
