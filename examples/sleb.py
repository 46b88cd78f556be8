"""SLEB (arXiv 2402.09025), and Shortened LLaMA's one-shot criterion (2402.02834) as its first
round.

For each block: leave it out, measure. The block that hurts least goes, and so on until enough are
gone.
"""

from shared import evaluator, loss, main, without

import fastprune as fp

REMOVE = 3


def loop(hf, rows):
    removed, losses = [], []
    for _ in range(REMOVE):
        found = {}
        for block in range(len(hf.model.layers)):
            if block not in removed:
                with without(hf, [*removed, block]):
                    found[block] = loss(hf, rows)
        removed.append(min(found, key=found.get))
        losses.append(found[removed[-1]])
    return removed, losses


def fast(hf, rows):
    ev = evaluator(hf, rows)
    removed, losses = [], []
    for _ in range(REMOVE):
        candidates = [block for block in range(ev.num_units) if block not in removed]
        found = ev.score(fp.from_removed([[*removed, block] for block in candidates], ev.num_units))
        removed.append(candidates[found.argmin()])
        losses.append(found.min())
    return removed, losses


if __name__ == "__main__":
    main("sleb", loop, fast)
