"""Counts unit runs without a model: prefix caches of whole searches, and a trie cut for 64 workers.

    python bench/counts.py [--out bench/results/counts.json]

A search of 32 blocks, 7 removed, runs on random losses, and its calls are planned again with caches
of several sizes. 500 random masks of 32 units are cut for 64 workers that share one chunk.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from record import save

import fastprune as fp
from fastprune.plan.schedule import make_schedule
from fastprune.plan.split import cut
from fastprune.plan.trie import kept_units, make_trie
from fastprune.testing import SyntheticEvaluator

BLOCKS, REMOVED, MASKS, WORKERS = 32, 7, 500, 64
SEARCHES: dict[str, tuple[str, dict[str, int]]] = {
    "greedy": ("greedy", {}),
    "beam, width 5": ("beam", {"beam_width": 5}),
    "evopress, 160 x 32": ("evopress", {"offspring": 32, "generations": 160}),
}
UNBOUNDED = 10**6  # states


class Recorder(SyntheticEvaluator):
    """Records the sequences of each call."""

    def __init__(self) -> None:
        super().__init__(BLOCKS, num_samples=64)
        self.trace: list[list[tuple[int, ...]]] = []

    def score(self, masks: Any, *, samples: Any = None, tokens: Any = None) -> np.ndarray:
        if samples is None:  # else `score_samples` records the call
            self.trace.append(kept_units(np.asarray(masks)))
        return super().score(masks, samples=samples, tokens=tokens)

    def score_samples(self, masks: Any, samples: Any = None) -> np.ndarray:
        self.trace.append(kept_units(np.asarray(masks)))
        return super().score_samples(masks, samples)


def unit_runs(calls: list[list[tuple[int, ...]]], capacity: int) -> int:
    """Unit runs of the calls, with a cache of `capacity` states."""
    known, likelihood, runs = (), None, 0
    for sequences in calls:
        schedule = make_schedule(make_trie(sequences, known), likelihood, capacity)
        known, likelihood = schedule.held.prefixes, schedule.held.likelihood
        runs += schedule.unit_runs
    return runs


def cached() -> list[dict[str, Any]]:
    rows = []
    for name, (algorithm, options) in SEARCHES.items():
        recorder = Recorder()
        fp.run_search(recorder, algorithm, REMOVED, **options)
        calls = recorder.trace
        within, unbounded = unit_runs(calls, 0), unit_runs(calls, UNBOUNDED)
        row = {
            "search": name,
            "loop": sum(len(sequence) for call in calls for sequence in call),
            "within": within,
            "unbounded": unbounded,
        }
        for capacity in (1000, 100):
            saved = (within - unit_runs(calls, capacity)) / (within - unbounded)
            row[f"share of {capacity}"] = round(saved, 4)
        print(row, flush=True)
        rows.append(row)
    return rows


def split() -> list[dict[str, Any]]:
    rows = []
    for name in ("each unit kept with probability 0.5", "0.8", "7 units removed"):
        rng = np.random.default_rng(0)
        if name == "7 units removed":
            drawn = [rng.choice(BLOCKS, REMOVED, replace=False) for _ in range(MASKS)]
            masks = np.array([~np.isin(np.arange(BLOCKS), units) for units in drawn])
        else:
            masks = rng.random((MASKS, BLOCKS)) < float(name.split()[-1])
        trie = make_trie(kept_units(masks))
        parts = cut(trie, WORKERS, 1)
        runs = [make_trie(trie.sequences[part.start : part.stop]).unit_runs for part in parts]
        work = [made + len(part) for made, part in zip(runs, parts)]  # a head counts as one run
        row = {
            "masks": name,
            "one worker": trie.unit_runs,
            "repeated": round(sum(runs) / trie.unit_runs - 1, 4),
            "busiest": round(float(max(work) / np.mean(work)), 4),
        }
        print(row, flush=True)
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    save(arguments.out, {"split": split(), "cached": cached()})


if __name__ == "__main__":
    main()
