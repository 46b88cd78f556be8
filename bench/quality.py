"""The cost of removing blocks from a real model: the table of README.

    python bench/quality.py MODEL --text FILE --questions FILE --folder FOLDER
        --removed 13,14,17 [--removed ...] [--healed FOLDER] [--out bench/results/quality.json]

For the whole model and each mask: parameters, perplexity on 96 x 128 tokens of the last quarter of
the text, accuracy on the last 500 of the questions, and the tokens that transformers generates in a
CPU second, one at a time. --healed is the folder of `bench/healing.py`, whose checkpoints of the
same masks are judged as well. Masks must have been chosen, and checkpoints trained, on other parts
of the data: those of `bench/healing.py` on the first three quarters of the text. FOLDER keeps
finished sums, and results are written after each model, so that an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from healing import load, name_of, split_text
from record import save

import fastprune as fp
from fastprune.masks import parse_removed
from fastprune.models.surgery import without

WINDOWS = 96  # of 128 tokens
QUESTIONS = 500
GENERATED, PROMPT, REPEATS = 48, 16, 3


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--questions", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--removed", type=parse_removed, action="append", default=[])
    parser.add_argument("--healed", type=Path)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    model = fp.load_model(arguments.model, dtype="float32")
    text = split_text(arguments.text.read_text(encoding="utf-8"))["judge"]
    rows = [json.loads(line) for line in arguments.questions.read_text().splitlines()]
    questions = arguments.folder / "questions.jsonl"
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows[-QUESTIONS:]))
    judges: dict[str, fp.Objective] = {
        "perplexity": fp.Perplexity(load(text, model.tokenizer, WINDOWS)),
        "accuracy": fp.TaskAccuracy(fp.load_tasks(questions, model.tokenizer)),
    }
    store = arguments.folder / "sums.db"
    evaluators = {name: fp.Evaluator(model, judge, store=store) for name, judge in judges.items()}
    results: dict[str, Any] = {
        "samples": {name: judge.num_samples for name, judge in judges.items()},
        "rows": [],
    }
    whole: dict[str, np.ndarray] = {}
    for removed in ((), *arguments.removed):
        mask = fp.from_removed([removed], model.num_blocks)
        losses = {name: ev.score_samples(mask)[0] for name, ev in evaluators.items()}
        whole = whole or losses
        pruned = without(model, removed)
        row = {
            "removed": list(removed),
            "parameters": sum(parameter.numel() for parameter in pruned.parameters()),
            "tokens_per_cpu_second": round(generation_speed(pruned), 2),
            "untrained": judged(judges, losses, whole),
            "healed": judge_healed(arguments, removed, judges, whole),
        }
        results["rows"].append(row)
        print(json.dumps(row), flush=True)
        save(arguments.out, results)


def judged(
    judges: dict[str, fp.Objective], losses: dict[str, np.ndarray], whole: dict[str, np.ndarray]
) -> dict[str, Any]:
    """Each metric with its standard error, and its paired difference to the whole model."""
    entries: dict[str, Any] = {}
    for name, judge in judges.items():
        samples = losses[name][None]
        (loss,), (error,) = judge.mean(samples), judge.standard_error(samples)
        entries[name] = {
            "value": judge.metric(loss),
            "error": abs(judge.slope(loss)) * error,
            "to_whole": dataclasses.asdict(judge.compare(losses[name], whole[name])),
        }
    return entries


def judge_healed(
    arguments: argparse.Namespace,
    removed: tuple[int, ...],
    judges: dict[str, fp.Objective],
    whole: dict[str, np.ndarray],
) -> dict[str, Any] | None:
    """The same of the checkpoint that was trained, if the folder has it."""
    if arguments.healed is None:
        return None
    checkpoint = arguments.healed / f"healed-{name_of(removed)}"
    if not checkpoint.exists():
        return None
    model = fp.load_model(checkpoint, dtype="float32")
    losses = {}
    for name, judge in judges.items():
        ev = fp.Evaluator(model, judge, store=arguments.folder / "sums.db")
        (losses[name],) = ev.score_samples(fp.from_removed([()], model.num_blocks))
    return judged(judges, losses, whole)


@torch.inference_mode()
def generation_speed(pruned: Any) -> float:
    """Tokens a CPU second, generated one at a time behind a short prompt; the median of runs.

    The blocks of a pruned model in memory keep the numbers under which they cache keys. So a model
    with the same config and random weights generates; the speed is the same.
    """
    hf = type(pruned)(pruned.config).eval()
    prompt = torch.arange(PROMPT)[None] + 100
    speeds = []
    for _ in range(REPEATS):
        started = time.process_time()
        hf.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            min_new_tokens=GENERATED,
            max_new_tokens=GENERATED,
            do_sample=False,
        )
        speeds.append(GENERATED / (time.process_time() - started))
    return statistics.median(speeds)


if __name__ == "__main__":
    main()
