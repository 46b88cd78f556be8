"""The saving of a greedy search whose inner rounds find the best candidate without its loss.

    OMP_NUM_THREADS=1 python bench/race_rounds.py [--model demo] [--samples 1000] [--length 32]
        [--rounds 5] [--shuffles 20] [--text FILE]

Losses of every candidate of each round are computed once. Then whole searches run on them in many
orders of the samples, with the code of `Evaluator.race`. In every round but the last, a race ends
as soon as one candidate remains: its remaining samples do not run. Unit runs are counted as nodes
of the trie of each look times the samples of the look, as shares of the same search with exact
losses. `no cache` keeps no state from one look to the next, `cached` keeps every one.
"""

from __future__ import annotations

import numpy as np
from race_rule import CONFIDENCE, looks_of, open_trial
from record import save

import fastprune as fp
from fastprune.plan.racing import race

Sequences = list[tuple[int, ...]]


class Counted:
    """Unit runs of one search, look by look.

    Args:
        looks: The samples of each look.
        exact: Whether inner rounds run their best candidate on every sample.
    """

    def __init__(self, looks: list[np.ndarray], exact: bool):
        self._looks, self._exact = looks, exact
        self._held: list[set[tuple[int, ...]]] = [set() for _ in looks]
        self.unit_runs = {"no cache": 0, "cached": 0}

    def round(self, sequences: Sequences, losses: np.ndarray, is_last: bool) -> int:
        """Race one round, and return its best candidate."""

        def look(number: int, alive: np.ndarray) -> np.ndarray:
            if self._exact or is_last or len(alive) > 1:
                self._count(number, [sequences[i] for i in alive])
            return losses[np.ix_(alive, np.concatenate(self._looks[: number + 1]))]

        count = losses.shape[1]
        alive = race(len(sequences), len(self._looks), look, count, 1, CONFIDENCE)
        return int(alive[losses[alive].mean(axis=1).argmin()])

    def _count(self, number: int, sequences: Sequences) -> None:
        prefixes = {s[:length] for s in sequences for length in range(1, len(s) + 1)}
        samples, held = len(self._looks[number]), self._held[number]
        self.unit_runs["no cache"] += samples * len(prefixes)
        self.unit_runs["cached"] += samples * len(prefixes - held)
        held |= prefixes


def main() -> None:
    options, ev = open_trial(__doc__, samples=1000, length=32, shuffles=20)
    units, looks = range(ev.num_units), looks_of(ev.num_samples, options.length)
    scored: dict[tuple[int, ...], tuple[Sequences, np.ndarray]] = {}  # by parent

    def candidates(parent: tuple[int, ...]) -> tuple[Sequences, np.ndarray]:
        if parent not in scored:
            children = [tuple(sorted({*parent, unit})) for unit in units if unit not in parent]
            scored[parent] = children, ev.score_samples(fp.from_removed(children, ev.num_units))
        return scored[parent]

    shares: list[dict[str, float]] = []
    for seed in range(options.shuffles):
        order = np.random.default_rng(seed).permutation(ev.num_samples)
        runs, results = [], []
        for exact in (True, False):
            counted, parent = Counted(looks, exact), ()
            for number in range(options.rounds):
                children, losses = candidates(parent)
                kept = [tuple(u for u in units if u not in child) for child in children]
                best = counted.round(kept, losses[:, order], number == options.rounds - 1)
                parent = children[best]
            runs.append(counted.unit_runs)
            results.append(parent)
        assert results[0] == results[1]  # the same decisions
        shares.append({name: runs[1][name] / runs[0][name] for name in runs[0]})
    found = {}
    for name in shares[0]:
        values = [share[name] for share in shares]
        found[name] = {"mean": float(np.mean(values)), "least": min(values), "most": max(values)}
    print(found)
    save(options.out, {"share_of_unit_runs": found, "orders": len(shares)})


if __name__ == "__main__":
    main()
