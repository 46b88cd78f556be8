"""lm-evaluation-harness for 20 masks: its `hf` model on 20 exported checkpoints against one
`evaluate_masks`.

The demo model, 60 of its held-out questions (2 to 5 choices) and texts. `hf` gets the batch size,
of those tried on the whole model, at which it takes the least. CPU seconds of this process and its
children, since other work on the machine does not count into them; standard errors are not
estimated on either side, and the harness does not ask the machine about itself after each run
(seconds in which nothing is evaluated). `answers` are the seconds in which likelihoods were
computed, the rest is the harness's own. Results are compared before any is reported. Texts and next
words are run with BENCH=full.
"""

from __future__ import annotations

import logging
import os
import resource
from pathlib import Path

import numpy as np
import pytest

import fastprune as fp
from fastprune.plan.trie import kept_units, make_trie

pytest.importorskip("lm_eval")

FULL = os.environ.get("BENCH") == "full"
TASKS = Path(__file__).parents[1] / "tests" / "integrations" / "tasks"
BLOCKS, MASKS, BATCH_SIZES, LIMIT = 12, 20, (1, 16), 60
FIELDS = {
    "3 of 12, at random": [
        tuple(np.random.default_rng(i).choice(BLOCKS, 3, replace=False)) for i in range(MASKS)
    ],
    "one added to 9-10": [tuple(sorted({9, 10, i})) for i in range(BLOCKS)]
    + [tuple(sorted({8, 10, i})) for i in range(MASKS - BLOCKS)],
}


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize(
    "names", [["demo_choices"], *([["demo_text"], ["demo_next"]] if FULL else [])], ids="-".join
)
def test_20_masks(report, tmp_path, monkeypatch, field, names):
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from fastprune.integrations.lm_eval import MaskedLM, evaluate_masks

    spent = {kind: _count_seconds(monkeypatch, kind) for kind in (MaskedLM, HFLM)}
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    settings = {"task_manager": manager, "bootstrap_iters": 0, "log_samples": False, "limit": LIMIT}
    model = fp.load_model("demo")
    masks = fp.from_removed(FIELDS[field], BLOCKS)
    folders = [fp.export(model, units, tmp_path / str(i)) for i, units in enumerate(FIELDS[field])]

    def by_hf(folder, batch_size) -> tuple[dict, float]:
        started = cpu_seconds()
        arguments = {"pretrained": str(folder), "device": "cpu"}
        return simple_evaluate(
            "hf", arguments, names, batch_size=batch_size, **settings
        ), cpu_seconds() - started

    whole = fp.export(model, (), tmp_path / "whole")
    by_hf(whole, 1)  # imports
    batch_size = min(BATCH_SIZES, key=lambda size: by_hf(whole, size)[1])
    spent[HFLM].clear()
    half = [by_hf(folder, batch_size) for folder in folders[: MASKS // 2]]
    started = cpu_seconds()
    found = evaluate_masks(model, masks, names, **settings)
    seconds = cpu_seconds() - started
    expected = [*half, *(by_hf(folder, batch_size) for folder in folders[MASKS // 2 :])]
    for mine, (theirs, _) in zip(found, expected, strict=True):
        for name, value in theirs["results"][names[0]].items():
            if isinstance(value, float):
                assert mine["results"][names[0]][name] == pytest.approx(value, rel=1e-3), name
    trie = make_trie(kept_units(masks))
    by_loop = sum(taken for _, taken in expected)
    report(
        field=field,
        task=names[0],
        hf_batch_size=batch_size,
        hf_cpu_s=by_loop,
        fastprune_cpu_s=seconds,
        ratio=by_loop / seconds,
        hf_answers_s=sum(spent[HFLM]),
        fastprune_answers_s=sum(spent[MaskedLM]),
        answers_ratio=sum(spent[HFLM]) / sum(spent[MaskedLM]),
        blocks_ratio=trie.naive_unit_runs / trie.unit_runs,
    )


def _count_seconds(monkeypatch, kind) -> list[float]:
    """CPU seconds of each time that likelihoods are asked of a class's models, its own calls of
    others not twice."""
    spent, inside = [], []

    def counted(method):
        def run(self, requests, *rest, **settings):
            if inside or type(self) is not kind:
                return method(self, requests, *rest, **settings)
            inside.append(True)
            started = cpu_seconds()
            try:
                return method(self, requests, *rest, **settings)
            finally:
                spent.append(cpu_seconds() - started)
                inside.pop()

        return run

    for name in ("loglikelihood", "loglikelihood_rolling"):
        monkeypatch.setattr(kind, name, counted(getattr(kind, name)))
    return spent


def cpu_seconds() -> float:
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(part.ru_utime + part.ru_stime for part in used)
