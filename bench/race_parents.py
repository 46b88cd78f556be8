"""Would races of a beam decide earlier on each candidate's loss less its own parent's?

    OMP_NUM_THREADS=1 python bench/race_parents.py [--model demo] [--shuffles 100] [--samples 250]
        [--length 128] [--text FILE]

Losses of every child of a beam's parents are computed once, round by round. Then races run on them
in many orders of the samples, as in `race_rule.py`: on the losses, and on the losses less those of
the parent plus the parent's mean, which every sample of the round before has told. Both have the
same means.
"""

from __future__ import annotations

import numpy as np
from race_rule import looks_of, measure, open_trial, shuffled
from record import save

import fastprune as fp
from fastprune.plan.racing import race

WIDTH = 5


def main() -> None:
    options, ev = open_trial(__doc__, samples=250, length=128, shuffles=100)
    looks = looks_of(ev.num_samples, options.length)
    found = []
    parents, parent_losses = [()], ev.score_samples([[True] * ev.num_units])
    for number in range(1, options.rounds + 1):
        parent_of: dict[tuple[int, ...], int] = {}
        for rank, parent in enumerate(parents):  # best first: a child of several has the best
            for unit in set(range(ev.num_units)) - set(parent):
                parent_of.setdefault(tuple(sorted((*parent, unit))), rank)
        children, ranks = list(parent_of), np.array(list(parent_of.values()))
        losses = ev.score_samples(fp.from_removed(children, ev.num_units))
        own = parent_losses[ranks]
        less = losses - own + own.mean(axis=1, keepdims=True)
        row = {
            name: measure(shuffled(of, looks, options.shuffles), WIDTH, {"": race})
            for name, of in (("losses", losses), ("less_parents", less))
        }
        ratio = row["less_parents"]["work"] / row["losses"]["work"]
        found.append({"round": number, "candidates": len(children), **row, "work_ratio": ratio})
        print(found[-1], flush=True)
        best = np.argsort(losses.mean(axis=1), kind="stable")[:WIDTH]
        parents, parent_losses = [children[i] for i in best], losses[best]
    save(options.out, {"rounds": found})


if __name__ == "__main__":
    main()
