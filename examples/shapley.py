"""Monte-Carlo Shapley values of blocks (Siddiqui et al., arXiv 2407.16286): along random orders,
blocks are removed one after the other, and each is charged what its removal adds to the loss."""

import numpy as np
from shared import evaluator, loss, main, without

import fastprune as fp

PERMUTATIONS, DEPTH, REMOVE = 6, 4, 3


def orders(num_blocks: int) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.permutation(num_blocks)[:DEPTH].tolist() for _ in range(PERMUTATIONS)]


def cheapest(values: list[list[float]]) -> list[int]:
    """The blocks of the lowest mean charge; those that were never charged stay."""
    means = [np.mean(charges) if charges else np.inf for charges in values]
    return np.argsort(means, kind="stable")[:REMOVE].tolist()


def loop(hf, rows):
    values, losses = [[] for _ in hf.model.layers], []
    whole = loss(hf, rows)
    for order in orders(len(values)):
        before = whole
        for depth, block in enumerate(order, 1):
            with without(hf, order[:depth]):
                after = loss(hf, rows)
            values[block].append(after - before)
            losses.append(after)
            before = after
    return cheapest(values), losses


def fast(hf, rows):
    ev = evaluator(hf, rows)
    values, drawn = [[] for _ in range(ev.num_units)], orders(ev.num_units)
    prefixes = [order[:depth] for order in drawn for depth in range(1, DEPTH + 1)]
    losses = ev.score(fp.from_removed([[], *prefixes], ev.num_units))
    for order, along in zip(drawn, losses[1:].reshape(PERMUTATIONS, DEPTH)):
        for block, charge in zip(order, np.diff(along, prepend=losses[0])):
            values[block].append(charge)
    return cheapest(values), losses[1:]


if __name__ == "__main__":
    main("shapley", loop, fast)
