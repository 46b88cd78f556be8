"""Pruned, trained and judged on three disjoint texts of two domains; the whole model trained alike.

    python bench/healing.py MODEL --folder FOLDER [--text FILE --other FILE]
        [--num-remove 3,5,7 | --removed 14,17,26 ...] [--steps 60] [--rows 4] [--length 128]
        [--rate 5e-4] [--choice-windows 16] [--windows 96] [--name NAME]
        [--out bench/results/healing.json]

The first half of --text trains. A greedy search under perplexity chooses the blocks on windows of
128 tokens of its third quarter, unless --removed names them. The last quarter judges, and so does
--other, of another domain: a text, by windows of 128 tokens, or .jsonl questions, by accuracy. The
script counts the judges' samples that share 32 tokens with the other parts. MODEL is `demo`, whose
texts and questions come with it, or a folder of a checkpoint. FOLDER keeps the choices, each
model's losses by sample and each healed checkpoint, for one set of arguments; a run that was
interrupted goes on in it. Results are written after each model.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import save

import fastprune as fp
from fastprune import demo
from fastprune.masks import parse_removed
from fastprune.models.surgery import without
from fastprune.study.judging import shared_rows

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from heal import heal, read_text

LENGTH = 128  # tokens in a window of choice and judges
Losses = dict[str, list[float]]  # by judge, of each sample


def parse(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--text")
    parser.add_argument("--other")
    parser.add_argument("--num-remove", type=parse, default=[3, 5, 7])
    parser.add_argument("--removed", type=parse_removed, action="append")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rate", type=float, default=5e-4)
    parser.add_argument("--choice-windows", type=int, default=16)
    parser.add_argument("--windows", type=int, default=96, help="of each judge")
    parser.add_argument("--name")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.folder.mkdir(parents=True, exist_ok=True)
    texts = [demo.TEXT, demo.TEXT_HELDOUT] if given.model == "demo" else [given.text]
    parts = split_text("\n".join(map(read_text, texts)))
    tokenizer = fp.load_model(given.model, dtype="float32").tokenizer
    choice = load(parts["choice"], tokenizer, given.choice_windows)
    judges: dict[str, fp.Objective] = {
        "same domain": fp.Perplexity(load(parts["judge"], tokenizer, given.windows)),
        "other domain": other_judge(given, tokenizer),
    }
    training = tokenizer(parts["training"], add_special_tokens=False, verbose=False)["input_ids"]
    seen = [choice, fp.TokenBatch.from_ids([training])]
    shared = {
        name: shared_rows(judge.batch, seen, questions=judge.data == "tasks")
        for name, judge in judges.items()
    }
    print("samples of judges that share 32 tokens with training or choice:", shared, flush=True)
    settings = {name: getattr(given, name) for name in ("steps", "rows", "length", "rate")}
    result = {
        "choice": "--removed",
        "training": settings | {"tokens": given.steps * given.rows * given.length, "rank": 16},
        "judges": {
            name: {"metric": judge.metric_name, "samples": judge.num_samples, "seen": shared[name]}
            for name, judge in judges.items()
        },
    }
    if not given.removed:
        result["choice"] = f"greedy, perplexity, {given.choice_windows} x {LENGTH} tokens"
    models = []
    for removed in [(), *(given.removed or given.num_remove)]:
        units = choose(given, choice, removed) if isinstance(removed, int) else removed
        models.append(run(given, parts["training"], judges, units, settings))
        result["rows"] = make_rows(judges, models)
        save(given.out, result, part=given.name or Path(given.model).name)
    print(json.dumps(result, indent=1))


def split_text(text: str) -> dict[str, str]:
    """The first half, the third and the last quarter, cut at ends of lines."""
    cuts = [0, *(text.index("\n", len(text) * share // 4) + 1 for share in (2, 3)), len(text)]
    pieces = [text[start:stop] for start, stop in itertools.pairwise(cuts)]
    return dict(zip(("training", "choice", "judge"), pieces, strict=True))


def load(text: str, tokenizer: Any, windows: int) -> fp.TokenBatch:
    """Windows of a text without a token in front, as the training has them."""
    return fp.load_text([text], tokenizer, windows, LENGTH, bos=False)


def other_judge(given: argparse.Namespace, tokenizer: Any) -> fp.Objective:
    """Perplexity on a text, or the accuracy on questions."""
    path = demo.QUESTIONS_HELDOUT if given.model == "demo" else Path(given.other)
    if path.suffix == ".jsonl":
        return fp.TaskAccuracy(fp.load_tasks(path, tokenizer))
    return fp.Perplexity(load(read_text(path), tokenizer, given.windows))


def choose(given: argparse.Namespace, choice: fp.TokenBatch, num_remove: int) -> tuple[int, ...]:
    """The blocks that a greedy search removes; those of few are among those of many."""
    path = given.folder / "choice.json"
    chosen = json.loads(path.read_text()) if path.exists() else {}
    if str(num_remove) not in chosen:
        model = fp.load_model(given.model, dtype="float32")
        store = given.folder / "choice.db"  # searches for more blocks ask for the same first
        ev = fp.Evaluator(model, fp.Perplexity(choice), store=store)
        started = time.process_time()
        result = fp.run_search(ev, "greedy", num_remove=num_remove)
        chosen[str(num_remove)] = [int(unit) for unit in result.removed]
        path.write_text(json.dumps(chosen) + "\n")
        print(f"chosen in {time.process_time() - started:.0f} CPU seconds", flush=True)
    return tuple(chosen[str(num_remove)])


def name_of(removed: tuple[int, ...]) -> str:
    """The name of a model's files."""
    return "-".join(map(str, removed)) or "whole"


def run(
    given: argparse.Namespace,
    training: str,
    judges: dict[str, fp.Objective],
    removed: tuple[int, ...],
    settings: dict[str, Any],
) -> dict[str, Any]:
    """A model judged, trained and judged again, unless the folder holds that."""
    name = name_of(removed)
    path = given.folder / f"{name}.json"
    result = json.loads(path.read_text()) if path.exists() else {}
    if "trained" in result:
        return result
    model = fp.load_model(given.model, dtype="float32")
    hf = without(model, removed)
    if not result:
        result = {
            "removed": list(removed),
            "parameters": sum(parameter.numel() for parameter in hf.parameters()),
            "untrained": sample_losses(hf, judges),
        }
        path.write_text(json.dumps(result) + "\n")
    started = time.process_time()
    healed = heal(hf, model.tokenizer, training, **settings)
    result["training_cpu_seconds"] = round(time.process_time() - started)
    result["trained"] = sample_losses(healed, judges)
    healed.save_pretrained(given.folder / f"healed-{name}")
    model.tokenizer.save_pretrained(given.folder / f"healed-{name}")
    path.write_text(json.dumps(result) + "\n")
    print(f"{name}: trained for {result['training_cpu_seconds']} CPU seconds", flush=True)
    return result


def sample_losses(hf: Any, judges: dict[str, fp.Objective]) -> Losses:
    losses = {}
    for name, judge in judges.items():
        ev = fp.Evaluator(hf, judge)
        (losses[name],) = ev.score_samples([[True] * ev.num_units]).tolist()
    return losses


def make_rows(
    judges: dict[str, fp.Objective], models: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Each model on each judge: metrics with standard errors, and how much higher the trained
    model's is than the whole model's, untrained and trained alike (paired)."""
    entries = []
    for model in models:
        for name, objective in judges.items():
            entry: dict[str, Any] = {"removed": model["removed"], "judge": name}
            for state in ("untrained", "trained"):
                losses = np.array([model[state][name]])
                (loss,), (error,) = objective.mean(losses), objective.standard_error(losses)
                entry[state] = round(objective.metric(loss), 3)
                entry[f"{state}_error"] = round(abs(objective.slope(loss)) * error, 3)
                whole = np.array(models[0][state][name])
                trained = np.array(model["trained"][name])
                difference = dataclasses.asdict(objective.compare(trained, whole))
                entry[f"trained_to_whole_{state}"] = difference
            entry["parameters"] = model["parameters"]
            entry["training_cpu_seconds"] = model["training_cpu_seconds"]
            entries.append(entry)
    return entries


if __name__ == "__main__":
    main()
