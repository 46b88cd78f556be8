"""The study on a real model: algorithms, objectives and calibration sets, judged on what no search
saw.

    python bench/real.py MODEL --text FILE --questions FILE --judge FILE --out FOLDER [--other FILE]
        [--algorithms one_shot,greedy,...] [--num-remove 3,5,7] [--lengths 128,512] [--amounts
        16,64] [--limit 100] [--racing 0.99] [--only text|other|questions]

Calibration sets: windows of the text, of each length and amount; of another text, such as code, of
the first length and amount; and questions, under the margin. Judges: other windows of the text, and
the share of wrong answers to the questions of --judge. Prints Markdown tables, of the losses and of
what each set's searches cost against one transformers pass for each mask, reckoned by unit runs
from passes timed here. Interrupted, it continues in its folder.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

import fastprune as fp
from fastprune.objectives import objective_class
from fastprune.study import run_study, write_report
from fastprune.study.tables import format_removed

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
    model = fp.load_model(given.model)

    def text(path: str, amount: int, length: int, seed: int = 0):
        return lambda model: fp.Perplexity(
            fp.load_text(path, model.tokenizer, amount, length, seed)
        )

    def questions(path: str, objective):
        return lambda model: objective(fp.load_tasks(path, model.tokenizer, given.limit))

    length, amount = given.lengths[0], given.amounts[0]
    sets = {
        f"text-{n}x{tokens}": text(given.text, n, tokens)
        for n in given.amounts
        for tokens in given.lengths
    }
    if given.other:
        sets[f"other-{amount}x{length}"] = text(given.other, amount, length)
    sets["questions-margin"] = questions(given.questions, fp.TaskMargin)
    sets = {label: make for label, make in sets.items() if label.startswith(given.only)}
    judges = {
        "text-unseen": text(given.text, given.amounts[-1], length, seed=1),
        "error_rate-unseen": questions(given.judge, fp.TaskAccuracy),
    }
    note = functools.partial(print, file=sys.stderr, flush=True)
    found = run_study(
        [model],
        sets,
        given.algorithms.split(","),
        given.num_remove,
        given.out,
        racing=given.racing,
        held_out=judges,
        notify=note,
    )
    write_report(found, Path(given.out) / "report.html")
    print(
        f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}, torch "
        f"{torch.__version__}\n"
    )
    print_losses(found, list(judges))
    print_calibration(found)
    print_costs(found, model, sets)


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
    """How far the judges' losses (nats, error rates) spread over calibration sets, for one
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


def print_costs(found: dict, model: fp.Model, sets: dict) -> None:
    """Seconds of every set's searches, against transformers passes of as many unit runs as one a
    mask takes."""
    print("| calibration | unit runs of a loop | made | seconds | loop, seconds | ratio |")
    print("|---|---|---|---|---|---|")
    for label, make in sets.items():
        cells = [cell for cell in found["cells"] if cell["objective"] == label]
        naive, made, seconds = (
            sum(cell[name] for cell in cells)
            for name in ("naive_unit_runs", "unit_runs", "seconds")
        )
        removed = [cell["removed"] for cell in cells[:3]]
        timed = zip(passes(model, make(model).batch, removed), removed)
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
        pruned, started = model.pruned(units), time.perf_counter()
        with torch.inference_mode():
            for ids in batches:
                pruned(input_ids=ids, use_cache=False)
        found.append(time.perf_counter() - started)
    return found


if __name__ == "__main__":
    main()
