"""BlockPruner (arXiv 2406.10594) and FinerCut (2405.18218): attentions and MLPs go one by one,
greedily."""

from shared import evaluator, loss, main, without_halves

import fastprune as fp

REMOVE = 3


def loop(hf, rows):
    removed, losses = [], []
    for _ in range(REMOVE):
        found = {}
        for half in range(2 * len(hf.model.layers)):
            if half not in removed:
                with without_halves(hf, [*removed, half]):
                    found[half] = loss(hf, rows)
        removed.append(min(found, key=found.get))
        losses.append(found[removed[-1]])
    return removed, losses


def fast(hf, rows):
    ev = evaluator(hf, rows, granularity="sublayer")
    removed, losses = [], []
    for _ in range(REMOVE):
        candidates = [half for half in range(ev.num_units) if half not in removed]
        found = ev.score(fp.from_removed([[*removed, half] for half in candidates], ev.num_units))
        removed.append(candidates[found.argmin()])
        losses.append(found.min())
    return removed, losses


if __name__ == "__main__":
    main("block_halves", loop, fast)
