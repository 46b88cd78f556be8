"""A candidate for each kind of question, as routers choose it (PuDDing, arXiv 2502.04348;
IG-Pruning, arXiv 2511.02213): every block removed alone and every block run twice are scored once,
and each kind gets its best. The gain is measured on questions that did not choose.

winners.py
"""

from __future__ import annotations

import json

import fastprune as fp
from fastprune import demo
from fastprune.masks import kept_by, repeated


def candidates(num_units: int) -> dict[str, tuple[int, ...]]:
    whole = {"whole model": repeated(num_units, [])}
    removed = {f"without {unit}": kept_by([unit], num_units) for unit in range(num_units)}
    twice = {f"{unit} twice": repeated(num_units, [(unit, unit + 1)]) for unit in range(num_units)}
    return whole | removed | twice


def by_kind(limit: int | None = None) -> tuple[list[str], fp.Winners]:
    """The names of the candidates, and the winners for each kind of the demo model's questions."""
    model = fp.load_model("demo")
    tasks = fp.load_tasks(demo.QUESTIONS_HELDOUT, model.tokenizer, limit=limit)
    lines = demo.QUESTIONS_HELDOUT.read_text().splitlines()[:limit]
    ev = fp.Evaluator(model, fp.TaskMargin(tasks))
    named = candidates(ev.num_units)
    losses = ev.score_samples(sequences=named.values())
    return list(named), fp.best_by_group(losses, [json.loads(line)["kind"] for line in lines])


def said(gain) -> str:
    """A gain in margin with its standard error."""
    return (
        f"{gain.value:+.3f} ± {gain.error:.3f} nats{'' if gain.told_apart else ' (not told apart)'}"
    )


if __name__ == "__main__":
    names, found = by_kind()
    print(f"best for all: {names[found.best]}")
    for winner in found.groups:
        print(f"{winner.group}: {names[winner.candidate]}, {said(winner.gain)}")
    print(f"all questions, each by its kind's winner: {said(found.gain)}")
