"""Recipes: the lines that go into other tools' own scripts, in place of the loops that they have.

Each function takes the place of one loop, and returns the choice that the loop makes.
`bench/other_tools.py` runs the scripts with and without them.
"""

from __future__ import annotations

import random

import numpy as np

import fastprune as fp


def evopress(model, calibration_data, drop_entire_block: bool):
    """EvoPress, `selection` of evo_drop_search.py. The lines that load a mask onto the model, and
    those that compute the dense logits, go: an evaluator scores the model as it is."""
    batch = fp.TokenBatch.from_ids(calibration_data)
    halves, unit = (("attn",), "block") if drop_entire_block else (("attn", "mlp"), "sublayer")
    # it draws single rows, so each runs alone: by default short rows run together
    ev = fp.Evaluator(model, fp.KLDivergence(batch), granularity=unit, layout="rows")

    def selection(candidates, num_survive: int, num_tokens: int, **unused):
        samples: list[int] = []
        while sum(calibration_data[i].shape[1] for i in samples) < num_tokens:
            sample = random.randint(0, len(calibration_data) - 1)  # the draws of the script
            if sample not in samples:
                samples.append(sample)
        removed = np.stack([np.array([c[half] for half in halves]).T.ravel() for c in candidates])
        fitnesses = ev.score(~removed, samples=samples, tokens=num_tokens)
        best = np.argsort(fitnesses)[:num_survive]
        return [candidates[i] for i in best], fitnesses[best].tolist()

    return selection


def sleb(model, rows, num_remove: int, early_barrier: int = 1, latter_barrier: int = 1):
    """SLEB, the two loops of sleb.py: the blocks removed, in order."""
    ev = fp.Evaluator(model, fp.Perplexity(fp.TokenBatch.from_ids(rows)))
    alive, removed = list(range(ev.num_units)), []
    for _ in range(num_remove):
        inside = alive[early_barrier : len(alive) - latter_barrier]
        losses = ev.score(fp.from_removed([[*removed, block] for block in inside], ev.num_units))
        removed.append(inside[losses.argmin()])
        alive.remove(removed[-1])
    return removed


def block_pruner(model, rows, num_remove: int, racing: float | None = None):
    """BlockPruner, the loops of block_search.py: ("mha" or "mlp", block) of each half removed."""
    ev = fp.Evaluator(model, fp.Perplexity(fp.TokenBatch.from_ids(rows)), granularity="sublayer")
    removed: list[int] = []
    for _ in range(num_remove):
        order = [*range(0, ev.num_units, 2), *range(1, ev.num_units, 2)]  # attentions first
        tried = [[*removed, half] for half in order if half not in removed]
        masks = fp.from_removed(tried, ev.num_units)
        best = ev.score(masks).argmin() if racing is None else ev.race(masks, 1, racing).indices[0]
        removed = tried[best]
    return [("mlp" if half % 2 else "mha", half // 2) for half in sorted(removed)]


def shortened_llama(model, rows):
    """Shortened LLaMA, the loop of anal_block_sensitivity_ppl.py: the perplexity without each
    block."""
    ev = fp.Evaluator(model, fp.Perplexity(fp.TokenBatch.from_ids(rows)))
    return np.exp(
        ev.score(fp.from_removed([[block] for block in range(ev.num_units)], ev.num_units))
    )


def finercut(model, rows, num_remove: int, exclude: float = 0.0, perplexity: bool = False):
    """FinerCut, `greedy_pruning` and its loop in prune_layer.py: the halves removed, in order (2 i
    is the attention of block i, 2 i + 1 its MLP). Its evaluators "kl_divergence" and Perplexity."""
    batch = fp.TokenBatch.from_ids(rows)
    objective = fp.Perplexity(batch) if perplexity else fp.KLDivergence(batch, positions="all")
    ev, removed = fp.Evaluator(model, objective, granularity="sublayer"), []
    front = 2 * (int(ev.num_units * exclude / 2) + 1)  # halves that stay at first
    for _ in range(num_remove):
        first = 0 if len(removed) > int(ev.num_units * exclude) else front
        tried = [[*removed, half] for half in range(first, ev.num_units) if half not in removed]
        losses = ev.score_samples(fp.from_removed(tried, ev.num_units))
        losses = np.exp(losses).mean(axis=1) if perplexity else ev.objective.mean(losses)
        removed = tried[losses.argmin()]
    return removed


def rys(model, rows):
    """RYS, its scan of all windows: the loss of each (i, j), whose blocks i to j - 1 run twice."""
    ev = fp.Evaluator(model, fp.Perplexity(fp.TokenBatch.from_ids(rows)))
    windows = [(0, 0), *((i, j) for j in range(ev.num_units + 1) for i in range(j))]
    order = range(ev.num_units)
    losses = ev.score(sequences=[[*order[:j], *order[i:]] for i, j in windows])
    return dict(zip(windows, losses.tolist(), strict=True))
