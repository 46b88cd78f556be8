"""A cluster without a cluster: searches on a stub, whose calls are then shared out over 64 workers
and counted.

    python bench/simulate_workers.py [--workers 64] [--out bench/results/workers.json]

A search runs on `SyntheticEvaluator`, which notes the masks of every call. Each call is then what
it would be for a model of 80 blocks on 64 rows of 2,048 tokens, cut as a GPU cuts them: `split`
says who runs what, each worker's prefix cache and schedule are the library's own, and unit runs are
counted, by chunk and worker. A call takes as long as its busiest worker. Integers only: no model is
run. more_runs: what they all run beyond one worker; below 0 where caches together hold more than
one.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from record import save

import fastprune as fp
from fastprune.plan.layout import make_layout
from fastprune.plan.racing import look_rows
from fastprune.plan.schedule import make_schedule
from fastprune.plan.split import cut, owners, teams
from fastprune.plan.trie import kept_units, make_trie
from fastprune.testing import SyntheticEvaluator

UNITS, REMOVED, ROWS, LENGTH, CHUNK_TOKENS = 80, 16, 64, 2048, 16384
HEAD = 1.2  # of a 70B model, in unit runs: 8,192 x 128,256 weights against 856 million of a block
SEARCHES = {
    "greedy": {},
    "beam": {"beam_width": 5},
    "genetic": {"population": 50, "generations": 10},
    "random": {"num_masks": 500},
}


class Recorder(SyntheticEvaluator):
    """Notes the masks of every call."""

    def __init__(self, num_units: int):
        super().__init__(num_units, num_samples=ROWS, tokens=LENGTH)
        self.asked: list[list[tuple[int, ...]]] = []

    def score(self, masks):
        self.asked.append(kept_units(np.asarray(masks, dtype=bool)))
        return super().score(masks)


@dataclass
class Cache:
    """The results that one worker keeps of one chunk."""

    prefixes: tuple = ()
    likelihood: np.ndarray = field(default_factory=lambda: np.zeros(0))

    def run(self, sequences, capacity: int) -> int:
        """Unit runs of a call."""
        schedule = make_schedule(make_trie(sequences, self.prefixes), self.likelihood, capacity)
        self.prefixes, self.likelihood = schedule.held.prefixes, schedule.held.likelihood
        return schedule.unit_runs


def shared_out(trace, workers: int, loads, looks, capacity: int) -> tuple[float, float]:
    """Unit runs on chunks that all workers make, by the chunks' share of the tokens; and those of
    the busiest, heads included, over all calls."""
    weight = np.asarray(loads) / np.sum(loads)
    owner = owners(loads, looks, workers)
    caches: dict[tuple[int, int], Cache] = {}
    made = longest = 0.0
    for asked in trace:
        trie, busy = make_trie(asked), np.zeros(workers)
        known: dict[tuple, int] = {}  # chunks that are shared out alike know the same
        for chunk, team in enumerate(teams(loads, owner, workers)):
            for place, (worker, part) in enumerate(zip(team, cut(trie, len(team), HEAD))):
                key = len(team), place
                if key not in known:
                    cache = caches.setdefault(key, Cache())
                    known[key] = cache.run(trie.sequences[part.start : part.stop], capacity)
                made += known[key] * weight[chunk]
                busy[worker] += (known[key] + HEAD * len(part)) * weight[chunk]
        longest += busy.max()
    return made, longest


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--capacity", type=int, default=100, help="states that each chunk may keep")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    batch = fp.TokenBatch.from_ids(np.zeros((ROWS, LENGTH), dtype=np.int64))
    chunks = make_layout(batch, CHUNK_TOKENS, 8).chunks
    look_of = {row: look for look, rows in enumerate(look_rows(batch)) for row in rows.tolist()}
    loads, looks = [len(rows) * LENGTH for rows in chunks], [look_of[rows[0]] for rows in chunks]
    print(f"{len(chunks)} chunks of {min(loads)} to {max(loads)} tokens")
    found = {}
    for name, options in SEARCHES.items():
        started, stub = time.process_time(), Recorder(UNITS)
        fp.run_search(stub, name, REMOVED, **options)
        one = shared_out(stub.asked, 1, loads, looks, given.capacity)
        row = {"calls": len(stub.asked), "masks": sum(map(len, stub.asked)), "runs": round(one[0])}
        for workers in (8, len(chunks), given.workers):
            many = shared_out(stub.asked, workers, loads, looks, given.capacity)
            row[f"{workers} workers"] = {
                "more_runs": round(float(many[0] / one[0]) - 1, 3),
                "faster": round(float(one[1] / many[1]), 1),
            }
        found[name] = row
        print(name, row, f"({time.process_time() - started:.0f} s of a core)", flush=True)
    save(given.out, {"searches": found})


if __name__ == "__main__":
    main()
