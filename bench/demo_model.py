"""The demo model's abilities on held-out data, and its losses without each block.

    OMP_NUM_THREADS=1 python bench/demo_model.py [--out bench/results/demo_model.json]

The abilities are those that `tools/demo_model/train.py --evaluate` measures. Perplexity and margin
without a block are those of `fastprune score demo`.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from record import ROOT, save

import fastprune as fp
from fastprune import demo

sys.path.append(str(ROOT / "tools" / "demo_model"))
import train


def without_each_block() -> list[dict[str, Any]]:
    """Perplexity and margin of the whole model, and without each of its blocks."""
    model = fp.load_model("demo")
    text = fp.load_text(demo.TEXT, model.tokenizer, 64, demo.WINDOW, bos=False)
    questions = fp.load_tasks(demo.QUESTIONS, model.tokenizer)
    removed = [(), *((block,) for block in range(model.num_blocks))]
    masks = fp.from_removed(removed, model.num_blocks)
    rows: list[dict[str, Any]] = [{"removed": list(blocks)} for blocks in removed]
    for objective in (fp.Perplexity(text), fp.TaskMargin(questions)):
        for row, loss in zip(rows, fp.Evaluator(model, objective).score(masks)):
            row[objective.metric_name] = float(objective.metric(loss))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = {**train.evaluate(demo.HERE), "without": without_each_block()}
    print(json.dumps(found, indent=1))
    save(given.out, found)


if __name__ == "__main__":
    main()
