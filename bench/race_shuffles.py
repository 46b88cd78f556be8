"""Are races right, and what do they save? All triples of the demo model and 2,000 random masks of
it, over many orders of its samples.

    python bench/race_shuffles.py [--shuffles 200] [--out bench/results/racing.json]

The losses of every mask on every sample are computed once; every race then runs on them in another
order, with the code that `Evaluator.select` runs. Work is the share of (mask, sample) pairs that
were looked at.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path

import numpy as np

import fastprune as fp
from fastprune import demo
from fastprune.plan.layout import look_rows
from fastprune.plan.racing import race

RANDOM = 2000


def races(
    shares: np.ndarray, looks: list[np.ndarray], keep: int, confidence: float, shuffles: int
) -> dict[str, float]:
    """shares float64[M, S]: see `racing.beaten`. looks: the samples of each look, see
    `look_rows`."""
    count, num_samples = shares.shape
    best = set(np.argsort(shares.mean(axis=1), kind="stable")[:keep].tolist())
    right, work = 0, []
    for seed in range(shuffles):
        order = np.random.default_rng(seed).permutation(num_samples)
        seen = [order[np.concatenate(looks[: n + 1])] for n in range(len(looks))]
        pairs = []

        def look(number: int, alive: np.ndarray, seen=seen, pairs=pairs) -> np.ndarray:
            pairs.append(len(alive) * len(looks[number]))
            return shares[np.ix_(alive, seen[number])]

        alive = race(count, len(looks), look, num_samples, keep, confidence)
        right += best <= set(alive.tolist())
        work.append(sum(pairs) / shares.size)
    return {"right": right / shuffles, "work": float(np.median(work)), "most_work": max(work)}


def random_masks(num_units: int, count: int) -> np.ndarray:
    """Different masks, bool[count, num_units], each unit kept by the toss of a coin."""
    rng = np.random.default_rng(0)
    numbers = rng.choice(2**num_units, count, replace=False)
    return (numbers[:, None] >> np.arange(num_units)) % 2 == 1


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shuffles", type=int, default=200)
    parser.add_argument("--confidence", type=float, default=0.99)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    model = fp.load_model("demo")
    text = fp.load_text(demo.TEXT, model.tokenizer, num_samples=250, seq_len=128)
    tasks = fp.load_tasks(demo.QUESTIONS, model.tokenizer)
    found = {}
    for objective in (fp.Perplexity(text), fp.TaskMargin(tasks)):
        ev = fp.Evaluator(model, objective)
        triples = fp.from_removed(itertools.combinations(range(ev.num_units), 3), ev.num_units)
        for masks, kind in (
            (triples, "triples"),
            (random_masks(ev.num_units, RANDOM), "random masks"),
        ):
            losses = ev.score_samples(masks)
            shares = losses * objective.sample_weight * ev.num_samples
            looks = look_rows(objective.batch)  # a sample is a row here
            for keep in (1, 5):
                name = (
                    f"{objective.name}, keep {keep}, {len(masks)} {kind}, {ev.num_samples} samples"
                )
                found[name] = races(shares, looks, keep, given.confidence, given.shuffles)
                print(name, found[name], flush=True)
    if given.out:
        given.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
