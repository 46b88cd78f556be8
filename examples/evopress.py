"""EvoPress (arXiv 2410.14649): mutations of one parent are scored by KL to the dense model, on
growing shares.

All children run on few rows, the survivors and the parent on more. The search is the same function
for both; what a population costs is not.
"""

import numpy as np
import torch
from shared import main, without

import fastprune as fp

REMOVE, GENERATIONS, OFFSPRING = 4, 4, 16
SURVIVORS, SHARES = (4, 1), (0.125, 1.0)  # of each step, and on which share of the rows


def search(score, num_blocks: int, num_rows: int):
    """score(subsets, rows) -> one loss for each subset."""
    rng = np.random.default_rng(0)
    parent, losses = sorted(rng.choice(num_blocks, REMOVE, replace=False).tolist()), []
    for _ in range(GENERATIONS):
        members = [swapped(parent, num_blocks, rng) for _ in range(OFFSPRING)]
        for survivors, share in zip(SURVIVORS, SHARES):
            members += [parent] if survivors == 1 else []
            found = score(
                members, np.sort(rng.choice(num_rows, max(1, int(share * num_rows)), replace=False))
            )
            order = np.argsort(found, kind="stable")[:survivors]
            members = [members[i] for i in order]
        parent = members[0]
        losses.append(found[order[0]])
    return parent, losses


def swapped(parent, num_blocks: int, rng) -> list[int]:
    """The parent with one removed block put back and another one removed."""
    kept = [block for block in range(num_blocks) if block not in parent]
    back, gone = rng.choice(parent), rng.choice(kept)
    return sorted({*parent, int(gone)} - {int(back)})


@torch.no_grad()
def loop(hf, rows):
    dense = [
        hf(input_ids=row[None], use_cache=False).logits[0, :-1].log_softmax(-1) for row in rows
    ]  # all are held

    def score(subsets, numbers):
        found = []
        for subset in subsets:
            with without(hf, subset):
                kl = [
                    divergence(
                        dense[n], hf(input_ids=rows[n][None], use_cache=False).logits[0, :-1]
                    )
                    for n in numbers
                ]
            found.append(np.mean(kl))
        return np.array(found)

    return search(score, len(hf.model.layers), len(rows))


def divergence(dense, logits) -> float:
    logs = logits.log_softmax(-1)
    return torch.nn.functional.kl_div(logs, dense, log_target=True, reduction="sum").item() / len(
        logs
    )


def fast(hf, rows):
    batch = fp.TokenBatch.from_ids(rows)
    ev = fp.Evaluator(hf, fp.KLDivergence(batch), layout="rows")  # a step asks for few rows

    def score(subsets, numbers):
        return ev.score_samples(fp.from_removed(subsets, ev.num_units), numbers).mean(axis=1)

    return search(score, ev.num_units, ev.num_samples)


if __name__ == "__main__":
    main("evopress", loop, fast)
