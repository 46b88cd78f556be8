"""The same budget gives the same chunks, whatever the process did before."""

from __future__ import annotations

import gc
import json

import numpy as np
import pytest
import torch
from families import build, random_rows, reference_losses, some_masks
from helpers import run_python

import fastprune as fp
from fastprune.engine import memory
from fastprune.engine.memory import peak_bytes

MEASURE = """
import json
import numpy as np, torch
import fastprune as fp
from families import build

BUDGETS = (400_000, 700_000, 2_000_000, None)

def cuts(hf, backend, objective):
    '''By budget: unit runs over all chunks, and peak bytes, which follow the chunk size.'''
    found = []
    for budget in BUDGETS:
        totals = []
        ev = fp.Evaluator(
            hf, objective, backend=backend, memory_bytes=budget,
            progress=lambda event: totals.append(event.total)
        )
        ev.score(np.ones((1, ev.num_units), dtype=bool))
        found.append([totals[-1], ev.stats.peak_activation_bytes])
    return found

def all_cuts(hf):
    rows = np.random.default_rng(0).integers(0, hf.config.vocab_size, (30, 17))
    batch = fp.TokenBatch.from_ids(rows)
    return [
        cuts(hf, backend, objective)
        for backend in ("generic", "fused")
        for objective in (fp.Perplexity(batch), fp.KLDivergence(batch))
    ]
"""


@pytest.mark.nightly
def test_the_same_budget_gives_the_same_chunks_in_a_fresh_process_and_after_other_work():
    fresh = MEASURE + "print(json.dumps(all_cuts(build('llama'))))"
    used = (
        MEASURE
        + """
hf = build('llama')
first = all_cuts(hf)
kept = [torch.ones(n, n) for n in (3, 50, 700)]  # and much that was freed
for family in ('gpt2', 'llama', 'gemma3'):
    other = build(family)
    rows = np.arange(60).reshape(2, 30) % 40
    ev = fp.Evaluator(other, fp.Perplexity(fp.TokenBatch.from_ids(rows)))
    ev.score(np.random.default_rng(0).random((20, ev.num_units)) < 0.6)
for _ in range(300):
    loop = [torch.ones(1000)]
    loop.append(loop)  # garbage that waits for its collector
print(json.dumps([first, all_cuts(hf), all_cuts(build('llama'))]))
"""
    )
    found = json.loads(run_python(fresh).splitlines()[-1])
    for again in json.loads(run_python(used).splitlines()[-1]):
        assert again == found
    runs = [total for total, _ in found[0]]
    assert runs[0] > runs[1] > runs[-1]  # the budget decides about the chunks


def test_bytes_are_those_that_were_asked_for_and_garbage_counts_as_held():
    def work():
        for _ in range(40):
            loop = [torch.ones(1000)]
            loop.append(loop)
        return torch.ones(3)

    thresholds = gc.get_threshold()
    found = set()
    try:
        for threshold in (1, 7, 10_000):
            gc.set_threshold(threshold)
            result, peak = peak_bytes(work)
            assert gc.isenabled()
            found.add(peak)
    finally:
        gc.set_threshold(*thresholds)
    assert found == {40 * 4000 + result.nbytes}


def test_the_collector_is_left_as_it_was():
    gc.disable()
    try:
        peak_bytes(lambda: None)
        assert not gc.isenabled()
    finally:
        gc.enable()
    with pytest.raises(ZeroDivisionError):
        peak_bytes(lambda: 1 / 0)
    assert gc.isenabled()


def test_rows_run_apart_if_their_workspace_would_be_large(monkeypatch):
    hf = build("llama")
    rows = random_rows(hf.config.vocab_size, [17] * 30)
    objective = fp.Perplexity(fp.TokenBatch.from_ids(rows))
    assert len(fp.Evaluator(hf, objective).layout.chunks) < 30
    monkeypatch.setitem(memory.WORKSPACE_BYTES, "cpu", 1)
    ev = fp.Evaluator(hf, objective)
    assert len(ev.layout.chunks) == 30
    masks = some_masks(ev.num_units, 24, seed=1)[::4]
    np.testing.assert_allclose(ev.score(masks), reference_losses(hf, masks, rows), rtol=1e-5)
