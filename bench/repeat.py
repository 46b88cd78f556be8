"""Does a model gain when a window of its blocks runs twice? Chosen and judged on separate halves.

    python bench/repeat.py MODEL [--text FILE] [--questions FILE.jsonl] [--samples 64]
        [--seq-len 64] [--limit 100] [--lengths 1-30] [--keep 5] [--dtype bfloat16] [--unraced 4]
        [--store FILE] [--out bench/results/repeat.json]

Every window of blocks of the lengths is a candidate. A race at 0.99 chooses the best on the first
half of the windows of text, by perplexity, and once more on every second question, by the margin.
The chosen sequences and the whole model are then judged on the other half of both: the difference
of the metric to the whole model, with its paired standard error. --samples and --limit count both
halves. Without --text and --questions, the demo model's own are taken. --unraced N scores every
window on N of the chooser's rows, without a race, against one pass of transformers for each of 15
windows. With --store, an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from record import save

import fastprune as fp
from fastprune import demo
from fastprune.masks import format_removed, parse_removed, repeated
from fastprune.models.surgery import ordered
from fastprune.objectives import Objective
from fastprune.plan.trie import make_trie

CONFIDENCE = 0.99


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--text")
    parser.add_argument("--questions")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=64)
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--lengths", type=parse_removed, help="of windows; default: all")
    parser.add_argument("--keep", type=int, default=5)
    parser.add_argument("--only", choices=("text", "questions"), help="what chooses; both judge")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--unraced", type=int, help="rows of text on which no window is raced")
    parser.add_argument("--store", help="a file that keeps finished sums")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.model == "demo":
        given.text = given.text or demo.TEXT_HELDOUT
        given.questions = given.questions or demo.QUESTIONS_HELDOUT
    model = fp.load_model(given.model, dtype=given.dtype)
    halves: dict[str, list[Objective]] = {}
    if given.text:
        halves["text"] = text_halves(model, given.text, given.samples, given.seq_len)
    if given.questions:
        halves["questions"] = question_halves(model, given.questions, given.limit)
    windows = all_windows(model.num_blocks, given.lengths)
    sequences = [repeated(model.num_blocks, [window]) for window in windows]
    record = {
        "model": f"{model.num_blocks} blocks, hidden size {model.hidden_size}",
        "windows": len(windows),
        "dtype": given.dtype,
        "unraced": flop_ratio(model, sequences),
        "chosen_by": {},
    }
    if given.text and given.unraced:
        record["unraced"] |= unraced(model, halves["text"][0][0].batch, sequences, given.unraced)
        print(json.dumps(record["unraced"]), flush=True)
    judges = {
        name: fp.Evaluator(model, judge, store=given.store)
        for _, second in halves.values()
        for judge in second
        for name in [judge.name]
    }
    for kind, ([chooser], _) in halves.items():
        if given.only in (None, kind):
            ev = fp.Evaluator(model, chooser, store=given.store)
            record["chosen_by"][kind] = chosen_by(ev, judges, windows, sequences, given.keep)
            print(json.dumps({kind: record["chosen_by"][kind]}, indent=1), flush=True)
    print(json.dumps({name: record[name] for name in ("model", "windows", "unraced")}))
    save(given.out, record, part=Path(given.model).name)


def text_halves(model: fp.Model, path: str, samples: int, length: int) -> list[list[Objective]]:
    """Perplexity on the first half of windows of a text, and on the second half."""
    settings = {"bos": False} if Path(path).parent == demo.TEXT.parent else {}
    ids = fp.load_text(path, model.tokenizer, samples, length, **settings).ids.reshape(samples, -1)
    first, second = np.array_split(ids, 2)
    return [[fp.Perplexity(fp.TokenBatch.from_ids(half))] for half in (first, second)]


def question_halves(model: fp.Model, path: str, limit: int) -> list[list[Objective]]:
    """The margin on every second question, and margin and accuracy on the others."""
    lines = Path(path).read_text().splitlines()[:limit]
    tasks = []
    with tempfile.TemporaryDirectory() as folder:
        for half in range(2):
            part = Path(folder, f"{half}.jsonl")
            part.write_text("\n".join(lines[half::2]))
            tasks.append(fp.load_tasks(part, model.tokenizer))
    chooser, judge = tasks
    return [[fp.TaskMargin(chooser)], [fp.TaskMargin(judge), fp.TaskAccuracy(judge, "characters")]]


def all_windows(num_blocks: int, lengths: tuple[int, ...] | None) -> list[tuple[int, int]]:
    sizes = [n for n in lengths or range(1, num_blocks + 1) if 1 <= n <= num_blocks]
    return [(first, first + n) for n in sizes for first in range(num_blocks - n + 1)]


def flop_ratio(model: fp.Model, sequences: list[tuple[int, ...]]) -> dict:
    """Unit runs of one pass for each sequence, those of their trie, and the ratio of FLOPs with
    the head, which every sequence runs."""
    trie = make_trie(sequences)
    block = sum(parameter.numel() for parameter in model.layers[0].parameters())
    heads = len(sequences) * model.vocab_size * model.hidden_size
    naive, made = trie.naive_unit_runs, trie.unit_runs
    ratio = (naive * block + heads) / (made * block + heads)
    return {"naive_unit_runs": naive, "unit_runs": made, "flop_ratio": ratio}


def unraced(
    model: fp.Model, batch: fp.TokenBatch, sequences: list[tuple[int, ...]], num_rows: int
) -> dict:
    """CPU seconds for all sequences on the first rows, against transformers' passes over a sample
    of 15 models that hold these sequences, scaled to all by their unit runs."""
    rows = [row[None] for row in torch.from_numpy(batch.ids.reshape(batch.num_rows, -1)[:num_rows])]
    ev = fp.Evaluator(model, fp.Perplexity(fp.TokenBatch.from_ids(torch.cat(rows).numpy())))
    ev.score(sequences=[range(model.num_blocks)])  # opens the evaluator
    started = time.process_time()
    losses = ev.score(sequences=sequences)
    seconds = time.process_time() - started
    sampled = np.linspace(0, len(sequences) - 1, 15).astype(int).tolist()
    models = [ordered(model, sequences[i]) for i in sampled]
    expected = []
    started = time.process_time()
    for hf in models:
        with torch.no_grad():
            sums = [
                torch.nn.functional.cross_entropy(
                    hf(input_ids=row, use_cache=False).logits[0, :-1].float(), row[0, 1:]
                )
                for row in rows
            ]
        expected.append(float(torch.stack(sums).mean()))
    passes = time.process_time() - started
    total = sum(map(len, sequences)) / sum(len(sequences[i]) for i in sampled)
    return {
        "rows": num_rows,
        "tokens": batch.ids.size // batch.num_rows,
        "fastprune_s": round(seconds, 1),
        "loop_s": round(passes * total, 1),
        "times_faster": round(passes * total / seconds, 2),
        "greatest_difference": float(np.abs(losses[sampled] - expected).max()),
    }


def chosen_by(
    ev: fp.Evaluator,
    judges: dict[str, fp.Evaluator],
    windows: list[tuple[int, int]],
    sequences: list[tuple[int, ...]],
    keep: int,
) -> dict:
    """The windows that a race keeps, and how far each is from the whole model, on both halves."""
    started, before = time.process_time(), ev.stats.unit_runs
    race = ev.race(sequences=sequences, keep=min(keep, len(sequences)), confidence=CONFIDENCE)
    seconds, unit_runs = time.process_time() - started, ev.stats.unit_runs - before
    whole = repeated(ev.num_units, [])
    kept = [sequences[i] for i in race.indices]
    rows: list[dict] = [{"window": format_removed(range(*windows[i]))} for i in race.indices]
    for half, evaluator in [("chosen on", ev), *judges.items()]:
        objective = evaluator.objective
        losses = evaluator.score_samples(sequences=[whole, *kept])
        for row, own in zip(rows, losses[1:], strict=True):
            difference = objective.compare(own, losses[0])
            row[half] = {
                "metric": objective.header(),
                "value": objective.metric(float(objective.mean(own[None])[0])),
                "whole_model": objective.metric(float(objective.mean(losses[:1])[0])),
                "difference": difference.value,
                "error": difference.error,
                "told_apart": difference.told_apart,
                "samples": difference.num_samples,
            }
    return {
        "objective": ev.objective.name,
        "race": {
            "keep": keep,
            "unit_runs": unit_runs,
            "share_of_unraced": race.share,
            "decided_early": race.decided_early,
            "cpu_s": round(seconds, 1),
        },
        "best": rows,
    }


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
