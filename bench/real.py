"""The study on a real model: algorithms, objectives and calibration sets, judged on what no search
saw.

    python bench/real.py MODEL --text FILE --questions FILE --judge FILE --out FOLDER [--other FILE]
        [--algorithms one_shot,greedy,...] [--num-remove 3,5,7] [--lengths 128,512] [--amounts
        16,64] [--limit 100] [--racing 0.99] [--only text|other|questions]

Calibration sets: windows of the text, of each length and amount; of another text, such as code, of
the first length and amount; and questions, under the margin. Judges: other windows of the text, and
the share of wrong answers to the questions of --judge. Prints Markdown tables, of the losses and of
what each set's searches cost against one transformers pass for each mask, reckoned by unit runs
from passes timed here. Interrupted, it continues in its folder, where run.json has command, machine
and time.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from record import save

import fastprune as fp
from fastprune.masks import format_removed
from fastprune.models.surgery import without
from fastprune.objectives import objective_class

ALGORITHMS = "one_shot,greedy,shortgpt,streamline,contiguous,lorp,taylor"


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    for name in ("text", "questions", "judge", "out"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--other")
    parser.add_argument("--algorithms", default=ALGORITHMS)
    parser.add_argument("--num-remove", type=numbers, default=[3, 5, 7])
    parser.add_argument("--lengths", type=numbers, default=[128, 512])
    parser.add_argument("--amounts", type=numbers, default=[16, 64])
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--racing", type=float)
    parser.add_argument("--only", default="", help="of the calibration sets")
    given = parser.parse_args()

    def text(path: str, amount: int, length: int, seed: int = 0) -> dict:
        settings = {"num_samples": amount, "seq_len": length, "seed": seed}
        return {"kind": "text", "file": str(Path(path).absolute()), **settings}

    def questions(path: str) -> dict:
        return {"kind": "tasks", "file": str(Path(path).absolute()), "num_samples": given.limit}

    length, amount = given.lengths[0], given.amounts[0]
    sets = {
        f"text-{n}x{tokens}": text(given.text, n, tokens)
        for n in given.amounts
        for tokens in given.lengths
    }
    if given.other:
        sets[f"other-{amount}x{length}"] = text(given.other, amount, length)
    sets["questions"] = questions(given.questions)
    sets = {label: data for label, data in sets.items() if label.startswith(given.only)}
    kinds = {data["kind"] for data in sets.values()}
    judges = {
        "text-unseen": text(given.text, given.amounts[-1], length, seed=1),
        "error_rate-unseen": questions(given.judge),
    }
    local = Path(given.model).exists() and given.model != "demo"
    model_path = str(Path(given.model).absolute()) if local else given.model
    search = {"num_remove": given.num_remove, "algorithms": given.algorithms.split(",")}
    if given.racing is not None:
        search["racing"] = given.racing
    document = [
        *table("[model]", path=model_path),
        *(
            line
            for name, data in sets.items()
            for line in table("[[calibration]]", name=name, **data)
        ),
        *(table("[[objective]]", name="perplexity") if "text" in kinds else []),
        *(table("[[objective]]", name="margin") if "tasks" in kinds else []),
        *table("[search]", **search),
    ]
    for (name, data), objective in zip(judges.items(), ("perplexity", "accuracy")):
        data = {key: value for key, value in data.items() if key != "kind"}
        document += table("[[held_out]]", name=name, objective=objective, **data)
    out = Path(given.out)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "study.toml"
        path.write_text("\n".join([f"base = {json.dumps(str(Path.cwd()))}", *document]) + "\n")
        command = [sys.executable, "-m", "fastprune", "study", str(path), "--out", str(out)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    save(out / "run.json", {})
    found = json.loads((out / "study.json").read_text())
    model = fp.load_model(given.model)
    makers = {}
    for label, described in found["objectives"].items():
        data = sets[label.partition("-")[2]]
        if described["name"] == "margin":
            makers[label] = fp.TaskMargin(
                fp.load_tasks(data["file"], model.tokenizer, data["num_samples"])
            )
        else:
            size = (data["num_samples"], data["seq_len"], data["seed"])
            makers[label] = fp.Perplexity(fp.load_text(data["file"], model.tokenizer, *size))
    print(
        f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}, torch "
        f"{torch.__version__}\n"
    )
    print_losses(found, list(judges))
    print_calibration(found)
    print_costs(found, model, makers)


def table(header: str, **values: object) -> list[str]:
    """The lines of a TOML table."""
    return ["", header, *(f"{key} = {json.dumps(value)}" for key, value in values.items())]


def print_losses(found: dict, judges: list[str]) -> None:
    """Every search: what it chose, its own metric, and the judges'."""
    (dense,) = found["dense"].values()
    described = {**found["objectives"], **found["held_out"]}
    of = {label: objective_class(entry["name"]) for label, entry in described.items()}
    heads = " | ".join(f"{judge}: {of[judge].header()}" for judge in judges)
    print(f"| removed | calibration | algorithm | blocks | own metric | {heads} |")
    print("|---|---|---|---|---|" + "---|" * len(judges))
    whole = " | ".join(of[judge].format(dense[judge]["loss"], named=False) for judge in judges)
    print(f"| 0 | | whole model | - | | {whole} |")
    for cell in sorted(found["cells"], key=lambda cell: cell["num_remove"]):
        chosen = (
            f"{cell['objective']} | {cell['algorithm']} | {format_removed(cell['removed'])} "
            f"| {of[cell['objective']].format(cell['loss'])}"
        )
        judged = " | ".join(
            of[judge].format(cell["losses"][judge], named=False) for judge in judges
        )
        print(f"| {cell['num_remove']} | {chosen} | {judged} |")
    print()


def print_calibration(found: dict) -> None:
    """The spread of the judges' losses (nats, error rates) over calibration sets, for one
    algorithm, and over algorithms, for one set."""
    print(
        "| removed | loss of | spread over calibration sets, mean of algorithms | over algorithms, "
        "mean of sets |"
    )
    print("|---|---|---|---|")
    for num_remove, judge in itertools.product(found["inputs"]["budgets"], found["held_out"]):
        cells = [cell for cell in found["cells"] if cell["num_remove"] == num_remove]
        spreads = []
        for fixed in ("algorithm", "objective"):
            groups = [
                [c["losses"][judge] for c in cells if c[fixed] == name]
                for name in {c[fixed] for c in cells}
            ]
            spreads.append(np.mean([max(losses) - min(losses) for losses in groups]))
        print(f"| {num_remove} | {judge} | {spreads[0]:.3f} | {spreads[1]:.3f} |")
    print()


def print_costs(found: dict, model: fp.Model, objectives: dict) -> None:
    """Seconds of every set's searches, against transformers passes of as many unit runs as one a
    mask takes."""
    print("| calibration | unit runs of a loop | made | seconds | loop, seconds | ratio |")
    print("|---|---|---|---|---|---|")
    for label, objective in objectives.items():
        cells = [cell for cell in found["cells"] if cell["objective"] == label]
        naive, made, seconds = (
            sum(cell[name] for cell in cells)
            for name in ("naive_unit_runs", "unit_runs", "seconds")
        )
        removed = [cell["removed"] for cell in cells[:3]]
        timed = zip(passes(model, objective.batch, removed), removed)
        loop = naive * statistics.median(
            taken / (model.num_blocks - len(units)) for taken, units in timed
        )
        print(
            f"| {label} | {naive:.0f} | {made:.0f} | {seconds:.0f} | {loop:.0f} | "
            f"{loop / seconds:.1f} |"
        )


def passes(model: fp.Model, batch: fp.TokenBatch, removed: list) -> list[float]:
    """Seconds of a transformers pass over the batch for each of some masks; the choices of a
    question run together."""
    rows = []
    for ids, branch in zip(
        *(np.split(part, batch.row_starts[1:-1]) for part in (batch.ids, batch.branch)), strict=True
    ):
        sequences = [
            torch.from_numpy(ids[(branch == 0) | (branch == b)]) for b in range(1, branch.max() + 1)
        ]
        rows.append(
            torch.nn.utils.rnn.pad_sequence(sequences or [torch.from_numpy(ids)], batch_first=True)
        )
    together = (
        max(1, 1024 // max(row.numel() for row in rows))
        if all(len(row) == 1 for row in rows)
        else 1
    )
    batches = [torch.cat(rows[i : i + together]) for i in range(0, len(rows), together)]
    found = []
    for units in removed:
        pruned, started = without(model, units), time.perf_counter()
        with torch.inference_mode():
            for ids in batches:
                pruned(input_ids=ids, use_cache=False)
        found.append(time.perf_counter() - started)
    return found


if __name__ == "__main__":
    main()
