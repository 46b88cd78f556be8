"""Layer duplication, as in frankenmerges and SOLAR's depth up-scaling (arXiv 2312.15166): every
window of blocks is run twice, and the one that hurts least (or helps) wins. fp.export
writes it."""

import numpy as np
from shared import blocks, evaluator, loss, main

SIZES = (1, 2, 3)


def sequences(num_blocks: int) -> list[list[int]]:
    whole = list(range(num_blocks))
    return [whole[: i + n] + whole[i:] for n in SIZES for i in range(num_blocks - n + 1)]


def loop(hf, rows):
    tried, losses = sequences(len(hf.model.layers)), []
    for sequence in tried:
        with blocks(hf, sequence):
            losses.append(loss(hf, rows))
    return tried[int(np.argmin(losses))], losses


def fast(hf, rows):
    ev = evaluator(hf, rows)
    tried = sequences(ev.num_units)
    losses = ev.score(sequences=tried)
    return tried[losses.argmin()], losses


if __name__ == "__main__":
    main("duplicate", loop, fast)
