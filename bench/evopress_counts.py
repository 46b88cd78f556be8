"""Unit runs x tokens of fastprune's evopress beside one forward pass for each mask and sample, as
the authors' code runs them. Counts alone: no model runs.

    python bench/evopress_counts.py [--out bench/results/evopress_counts.json]

32 blocks of which 8 go, 64 samples of 2,048 tokens, the published steps, on random losses. Each
sample is a chunk with a prefix cache of its own; its capacity is printed, in states.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from record import save

import fastprune as fp
from fastprune.plan.retention import Prefixes
from fastprune.plan.schedule import plan_call
from fastprune.plan.trie import kept_units
from fastprune.testing import SyntheticEvaluator

NUM_UNITS, NUM_REMOVE, NUM_SAMPLES, GENERATIONS = 32, 8, 64, 40


class Recorder(SyntheticEvaluator):
    """Notes the sequences and the samples of every call."""

    noted: list[tuple[list[tuple[int, ...]], list[int]]]

    def score(self, masks, *, samples=None, tokens=None):
        chosen = range(NUM_SAMPLES) if samples is None else np.asarray(samples).tolist()
        self.noted.append((kept_units(np.asarray(masks)), list(chosen)))
        return super().score(masks, samples=samples, tokens=tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    ev = Recorder(NUM_UNITS, num_samples=NUM_SAMPLES, tokens=2048)
    ev.noted = []
    fp.run_search(ev, "evopress", NUM_REMOVE, generations=GENERATIONS)
    naive = sum(len(samples) * sum(map(len, masks)) for masks, samples in ev.noted)
    found = []
    for capacity in (0, 30, 100, 1000):
        held, runs = [Prefixes()] * NUM_SAMPLES, 0
        for masks, samples in ev.noted:
            asked = sorted(set(masks))
            for sample in samples:
                schedule = plan_call(asked, held[sample], capacity)
                held[sample], runs = schedule.held, runs + schedule.unit_runs
        row = {"states": capacity, "theirs": naive, "made": runs, "fewer": round(naive / runs, 3)}
        found.append(row)
        print(row, flush=True)
    save(given.out, {"unit_runs_of_a_sample": found})


if __name__ == "__main__":
    main()
