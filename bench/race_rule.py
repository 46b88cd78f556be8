"""Are races right, and what do they save? On synthetic losses, and on the demo model's.

    python bench/race_rule.py [--trials 400] [--shuffles 200] [--model FOLDER --text FILE]
        [--old FILE.py] [--out bench/results/races.json]

The losses of every candidate on every sample are computed once; races then run on them in many
orders of the samples, with the code that `Evaluator.race` runs. `wrong` is the share of races whose
result has a higher loss than the best `keep`; `work` is the share of (candidate, sample) pairs that
were looked at. --model and --text: race instead on the losses of this model without each of its
blocks, on 96 x 48 tokens of the text. --old: another racing.py, to compare with. --out: results are
added to those in the file.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from record import save

import fastprune as fp
from fastprune import demo
from fastprune.plan.racing import look_rows, race

CONFIDENCE = 0.99
KEEPS = 1, 3, 5, 8
RANDOM_MASKS = 500
ROWS, LENGTH = 96, 48  # of a text given by name
Make = Callable[[np.random.Generator], np.ndarray]


def common(rng: np.random.Generator, num_samples: int) -> np.ndarray:
    """The difficulty of each sample, which all candidates share."""
    return rng.gamma(4.0, 0.8, num_samples)


def copies(num_copies: int, num_rivals: int, behind: float, noise: float) -> Make:
    """Exact copies of the dense model beside rivals that are a little worse, 128 samples."""

    def make(rng: np.random.Generator) -> np.ndarray:
        base = common(rng, 128)
        rivals = base + rng.normal(behind, noise, (num_rivals, 128))
        return np.concatenate([np.repeat(base[None], num_copies, axis=0), rivals])

    return make


def ladder(count: int, step: float, noise: float) -> Make:
    """Candidates evenly spaced, each with noise in proportion to its distance, 200 samples."""

    def make(rng: np.random.Generator) -> np.ndarray:
        gaps = step * np.arange(count)[:, None]
        return common(rng, 200) + gaps + (noise + gaps) * rng.normal(size=(count, 200))

    return make


def families(num_families: int, size: int, noise: float) -> Make:
    """Families of near copies: members differ a hundred times less than families do, 96 samples."""

    def make(rng: np.random.Generator) -> np.ndarray:
        shared = rng.normal(0.02, noise, (num_families, 1, 96))
        own = rng.normal(0, noise / 100, (num_families, size, 96))
        return common(rng, 96) + (shared + own).reshape(-1, 96)

    return make


def skewed(shape: float) -> Make:
    """Differences of a gamma distribution, one candidate skewed to either side, 160 samples."""

    def make(rng: np.random.Generator) -> np.ndarray:
        base, spread = common(rng, 160), 0.1 / np.sqrt(shape)
        draws = rng.gamma(shape, spread, (2, 160)) - shape * spread
        return np.array([base, base + 0.002 + draws[0], base + 0.002 - draws[1]])

    return make


def rare(share: float) -> Make:
    """A candidate that is worse but for rare samples, on which it is far better, 256 samples."""

    def make(rng: np.random.Generator) -> np.ndarray:
        base, difference = common(rng, 256), rng.normal(0.02, 0.01, 256)
        few = rng.choice(256, max(1, round(share * 256)), replace=False)
        difference[few] -= 0.024 / share
        return np.array([base, base + difference])

    return make


SETTINGS: list[tuple[str, Make, tuple[int, ...]]] = [
    ("6 copies, 12 rivals", copies(6, 12, 0.01, 0.1), (1, 3, 5)),
    ("3 copies, 60 rivals close behind", copies(3, 60, 0.002, 0.05), (1, 3, 5)),
    ("ladder of 40", ladder(40, 0.01, 0.02), KEEPS),
    ("ladder of 40, steep", ladder(40, 0.05, 0.05), KEEPS),
    ("8 families of 5", families(8, 5, 0.1), KEEPS),
    ("gamma differences, shape 4", skewed(4), (1,)),
    ("gamma differences, shape 0.5", skewed(0.5), (1,)),
    ("1 of 256 samples decides", rare(1 / 256), (1,)),
    ("2 % of 256 samples decide", rare(0.02), (1,)),
]


def run(
    losses: np.ndarray, looks: list[np.ndarray], keep: int, rule: Callable
) -> tuple[bool, float]:
    """Whether a race is wrong, and its work. looks: the columns of each look."""
    pairs = 0

    def look(number: int, alive: np.ndarray) -> np.ndarray:
        nonlocal pairs
        pairs += len(alive) * len(looks[number])
        return losses[np.ix_(alive, np.concatenate(looks[: number + 1]))]

    alive = rule(len(losses), len(looks), look, losses.shape[1], keep, CONFIDENCE)
    means = losses.mean(axis=1)
    best, kept = np.sort(means)[:keep], np.sort(means[alive])[:keep]
    wrong = len(kept) < keep or not np.allclose(best, kept, rtol=0, atol=1e-12)
    return wrong, pairs / losses.size


def measure(
    races: Iterable[tuple[np.ndarray, list[np.ndarray]]], keep: int, rules: dict[str, Callable]
) -> dict[str, float]:
    """The share of wrong races and the work of each rule, and the ratio of their work."""
    results: dict[str, list[tuple[bool, float]]] = {name: [] for name in rules}
    for losses, looks in races:
        for name, rule in rules.items():
            results[name].append(run(losses, looks, keep, rule))
    row = {}
    for name, pairs in results.items():
        wrong, work = np.mean(pairs, axis=0)
        row |= {f"{name}wrong": round(float(wrong), 4), f"{name}work": round(float(work), 4)}
    if "old_" in rules:
        row["work_of_old"] = round(row["work"] / row["old_work"], 3)
    return row


def open_trial(
    description: str, samples: int, length: int, shuffles: int
) -> tuple[argparse.Namespace, fp.Evaluator]:
    """The options of a trial on a model's text, with these defaults, and its evaluator."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--text", default=demo.TEXT)
    parser.add_argument("--samples", type=int, default=samples)
    parser.add_argument("--length", type=int, default=length)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shuffles", type=int, default=shuffles)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    model = fp.load_model(options.model)
    text = fp.load_text(options.text, model.tokenizer, options.samples, options.length, bos=False)
    return options, fp.Evaluator(model, fp.Perplexity(text))


def looks_of(num_samples: int, tokens: int = 128) -> list[np.ndarray]:
    """The looks at so many samples, each a row."""
    return look_rows(fp.TokenBatch.from_ids(np.zeros((num_samples, tokens), dtype=np.int64)))


def synthetic(make: Make, trials: int) -> Iterable[tuple[np.ndarray, list[np.ndarray]]]:
    for seed in range(trials):
        losses = make(np.random.default_rng([7, seed]))
        yield losses, looks_of(losses.shape[1])


def shuffled(
    losses: np.ndarray, looks: list[np.ndarray], shuffles: int
) -> Iterable[tuple[np.ndarray, list[np.ndarray]]]:
    for seed in range(shuffles):
        order = np.random.default_rng(seed).permutation(losses.shape[1])
        yield losses[:, order], looks


def demo_losses() -> Iterable[tuple[str, np.ndarray, list[np.ndarray]]]:
    """Losses [masks, samples] of the demo model's random masks under two objectives."""
    model = fp.load_model("demo")
    text = fp.load_text(demo.TEXT, model.tokenizer, num_samples=250, seq_len=128, bos=False)
    tasks = fp.load_tasks(demo.QUESTIONS, model.tokenizer)
    for objective in (fp.Perplexity(text), fp.TaskMargin(tasks)):
        ev = fp.Evaluator(model, objective)
        numbers = np.random.default_rng(0).choice(2**ev.num_units, RANDOM_MASKS, replace=False)
        masks = (numbers[:, None] >> np.arange(ev.num_units)) % 2 == 1
        losses = ev.score_samples(masks) * objective.sample_weight * ev.num_samples
        name = f"demo, {RANDOM_MASKS} random masks, {objective.name}, {ev.num_samples} samples"
        yield name, losses, look_rows(objective.batch)


def real_losses(folder: str, text: str) -> np.ndarray:
    """Losses [masks, samples] of a model without each of its blocks."""
    model = fp.load_model(folder, dtype="float32")
    objective = fp.Perplexity(fp.load_text(text, model.tokenizer, ROWS, LENGTH))
    ev = fp.Evaluator(model, objective)
    return ev.score_samples(fp.from_removed([(i,) for i in range(ev.num_units)], ev.num_units))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--trials", type=int, default=400)
    parser.add_argument("--shuffles", type=int, default=200)
    parser.add_argument("--model")
    parser.add_argument("--text")
    parser.add_argument("--old", type=Path)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rules = {"": race}
    if args.old:
        spec = importlib.util.spec_from_file_location("old_racing", args.old)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look it up
        spec.loader.exec_module(module)
        rules["old_"] = module.race
    results: dict[str, dict[str, float]] = {}

    def note(name: str, keep: int, races: Iterable) -> None:
        results[f"{name}, keep {keep}"] = row = measure(races, keep, rules)
        print(f"{name}, keep {keep}", row, flush=True)
        part = Path(args.model).name if args.model else "made up"
        save(args.out, {"races": results}, part=part)

    if args.model:
        losses = real_losses(args.model, args.text)
        looks = looks_of(losses.shape[1], LENGTH)
        for keep in KEEPS:
            name = f"{len(losses)} masks, {ROWS} x {LENGTH} tokens"
            note(name, keep, shuffled(losses, looks, args.shuffles))
        return
    for name, make, keeps in SETTINGS:
        for keep in keeps:
            note(name, keep, synthetic(make, args.trials))
    for name, losses, looks in demo_losses():
        for keep in KEEPS:
            note(name, keep, shuffled(losses, looks, args.shuffles))


if __name__ == "__main__":
    main()
