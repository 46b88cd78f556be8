"""Shared by the benchmarks that compare with the loop, cell by cell: the loop, ratios, and results
that an interrupted run goes on with.

*The loop* removes the blocks, runs rows one at a time, and holds a row's full logits; for KL it
holds the dense model's log-probabilities.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import record
import torch

import fastprune as fp
from fastprune.models.surgery import without

Row = tuple[np.ndarray, int]  # tokens, and the first one that counts


class Loop:
    """Each mask's loss by a forward pass of the model without its blocks.

    Args:
        model: The model, or a transformers model.
        rows: One for each continuation of the objective.
        objective: Reduces the sums over continuations.
        masks: Those that it will score. Their models, which share weights, are made here, so that
            no pass pays for it.
    """

    def __init__(self, model: Any, rows: Iterable[Row], objective: fp.Objective, masks: np.ndarray):
        self._model = model if isinstance(model, fp.Model) else fp.load_model(model)
        self._pruned = {
            mask.tobytes(): without(self._model, np.flatnonzero(~mask).tolist()) for mask in masks
        }
        self._rows = [(torch.from_numpy(np.asarray(ids)), start) for ids, start in rows]
        self._objective = objective
        self.log_p: list[torch.Tensor] = []
        if objective.measure == "kl":
            with torch.no_grad():
                logits = [self._logits(self._model.hf, *row) for row in self._rows]
                self.log_p = [torch.log_softmax(part, dim=-1) for part in logits]

    def score(self, masks: np.ndarray) -> np.ndarray:
        sums = []
        for mask in masks:
            pruned = self._pruned[mask.tobytes()]
            with torch.no_grad():
                sums.append([self._sum(pruned, number) for number in range(len(self._rows))])
        return self._objective.loss(np.array(sums))

    def _sum(self, pruned: Any, number: int) -> float:
        ids, start = self._rows[number]
        logits = self._logits(pruned, ids, start)
        if not self.log_p:
            return float(torch.nn.functional.cross_entropy(logits, ids[start:], reduction="sum"))
        log_q = torch.log_softmax(logits, dim=-1)
        log_p = self.log_p[number]
        return float(torch.nn.functional.kl_div(log_q, log_p, reduction="sum", log_target=True))

    @staticmethod
    def _logits(hf: Any, ids: torch.Tensor, start: int) -> torch.Tensor:
        """float32[T, V], of the tokens that predict one that counts."""
        logits = hf(input_ids=ids[None], use_cache=False).logits[0, start - 1 : -1]
        return logits.float()


def compare(ways: dict[str, Callable[[], np.ndarray]], repeats: int) -> dict[str, Any]:
    """CPU seconds of fastprune and the loop, in turns; the median of their ratios, and its standard
    error (of a mean, which is a little less than a median's)."""
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    losses = {}
    for _ in range(repeats):
        for way, score in ways.items():
            started = time.process_time()
            losses[way] = score()
            seconds[way].append(time.process_time() - started)
    ratios = [a / b for a, b in zip(seconds["loop"], seconds["fastprune"], strict=True)]
    error = statistics.stdev(ratios) / len(ratios) ** 0.5 if len(ratios) > 1 else None
    return {
        **{f"{way}_s": round(statistics.median(times), 4) for way, times in seconds.items()},
        "times_faster": round(statistics.median(ratios), 3),
        "standard_error": None if error is None else round(error, 3),
        "repeats": repeats,
        "greatest_difference": float(np.abs(losses["loop"] - losses["fastprune"]).max()),
    }


def run_cells(
    cells: dict[str, Callable[[], dict]], path: Path, again: bool = False
) -> list[dict[str, Any]]:
    """Run the cells that the file of results does not hold, and save it after each. Prints them.

    Returns:
        All cells of the file.
    """
    kept = record.read(path)
    known = {} if again else kept
    results: dict[str, Any] = {"cells": kept.get("cells", [])}
    for name, run in cells.items():
        if not again and any(cell["cell"] == name for cell in results["cells"]):
            continue
        try:
            cell = {"cell": name, **run()}
        except Exception as error:  # one cell that fails stops no other
            print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            continue
        results["cells"] = [kept for kept in results["cells"] if kept["cell"] != name] + [cell]
        record.save(path, results, goes_on=known)
        print(json.dumps(cell), flush=True)
    return results["cells"]
