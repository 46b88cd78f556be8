"""A replace-one-block score, as in Puzzle (arXiv 2411.19146): each block is exchanged for each of
its alternatives (here: without attention, without MLP, without both), and scored by the distance to
the parent's output. There a solver picks one alternative for each block; here, the blocks that do
without either go, cheapest first."""

import numpy as np
import torch
from evopress import divergence
from shared import main, without_halves

import fastprune as fp

REMOVE = 3


def alternatives(num_blocks: int) -> list[list[int]]:
    return [
        halves for i in range(num_blocks) for halves in ([2 * i], [2 * i + 1], [2 * i, 2 * i + 1])
    ]


def chosen(found) -> list[int]:
    return np.argsort(np.reshape(found, (-1, 3))[:, 2], kind="stable")[:REMOVE].tolist()


@torch.no_grad()
def loop(hf, rows):
    dense = [
        hf(input_ids=row[None], use_cache=False).logits[0, :-1].log_softmax(-1) for row in rows
    ]
    found = []
    for halves in alternatives(len(hf.model.layers)):
        with without_halves(hf, halves):
            logits = (hf(input_ids=row[None], use_cache=False).logits[0, :-1] for row in rows)
            found.append(
                np.mean([divergence(parent, child) for parent, child in zip(dense, logits)])
            )
    return chosen(found), found


def fast(hf, rows):
    ev = fp.Evaluator(hf, fp.KLDivergence(fp.TokenBatch.from_ids(rows)), granularity="sublayer")
    found = ev.score(fp.from_removed(alternatives(ev.num_units // 2), ev.num_units))
    return chosen(found), found


if __name__ == "__main__":
    main("replace_one_block", loop, fast)
