"""Masks -> trie -> ordered steps. Pure integers: no model, no torch.

The hidden state after unit i depends only on which of the units 0..i were kept, so a batch of masks is a trie
over sequences of kept units. Every node is one unit run; the number of nodes is the least work that any exact
evaluator can do. `make_plan` compresses chains (nodes with a single child and no mask of their own) into one
`Step`, and orders the steps so that few states are alive at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

ROOT = -1


class Step(NamedTuple):
    """Take the state in slot `source`, run `units` on it in order, score it, keep it in slot `target`."""

    source: int  # slot to read; ROOT for the embeddings
    units: tuple[int, ...]
    mask: int  # row of Plan.masks whose final state this is, or -1
    target: int  # slot to keep the result in, or -1 if no later step reads it
    last_use: bool  # no later step reads `source`: its slot is free once this step has begun


@dataclass(frozen=True)
class Plan:
    """What the engine executes for one batch of masks.

    masks: bool[M, U], the distinct masks. index: int64[N], the row of `masks` for each mask that was asked.
    layer_runs: distinct trie nodes. naive_layer_runs: unit runs of one forward pass per mask that was asked.
    num_slots: states that must be held at once (besides the one being computed).
    """

    masks: np.ndarray
    index: np.ndarray
    steps: tuple[Step, ...]
    num_slots: int
    layer_runs: int
    naive_layer_runs: int


def make_plan(masks: np.ndarray) -> Plan:
    """Plan the evaluation of masks bool[N, U].

    States alive: at every branching the child that needs most slots is walked last, when its parent's slot is
    already free (Sethi and Ullman's order for register allocation). A trie of M masks then never needs more than
    min(U + 1, 1 + log2(M)) slots.
    """
    distinct, index = _sort_distinct(masks)
    nodes = _compress(distinct)
    steps, num_slots = _schedule(nodes)
    return Plan(
        masks=distinct,
        index=index,
        steps=steps,
        num_slots=num_slots,
        layer_runs=sum(len(step.units) for step in steps),
        naive_layer_runs=int(masks.sum()),
    )


def max_slots(num_units: int, num_masks: int) -> int:
    """The most slots that a plan for this many masks can need."""
    return min(num_units + 1, max(num_masks, 1).bit_length())


def _sort_distinct(masks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct masks in lexicographic order, False first, and where each asked mask went.

    In this order, masks that share a prefix are neighbours, and a mask comes before those that extend it.
    """
    num_masks, num_units = masks.shape
    packed = np.packbits(masks, axis=1)  # big-endian bits: byte order is lexicographic order
    keys = np.ascontiguousarray(packed).view(f"V{packed.shape[1]}").ravel() if num_units else packed
    if num_masks == 0 or num_units == 0:
        return masks[: min(1, num_masks)], np.zeros(num_masks, dtype=np.int64)
    order = np.lexsort(packed.T[::-1])
    ordered = keys[order]
    new = np.concatenate([[True], ordered[1:] != ordered[:-1]])
    index = np.empty(num_masks, dtype=np.int64)
    index[order] = np.cumsum(new) - 1
    return masks[order[new]], index


class _Node:
    """A node of the compressed trie: the chain of units from its parent, the mask that ends here, its children."""

    __slots__ = ("children", "depth", "mask", "need", "units")

    def __init__(self, units: tuple[int, ...], depth: int, mask: int):
        self.units, self.depth, self.mask = units, depth, mask
        self.children: list[_Node] = []
        self.need = 0


def _compress(masks: np.ndarray) -> _Node:
    """The compressed trie of sorted distinct masks, built from the longest common prefixes of neighbours."""
    root = _Node((), 0, -1)
    if len(masks) == 0:
        return root
    rows, units = np.nonzero(masks)
    starts = np.searchsorted(rows, np.arange(len(masks) + 1)).tolist()
    units = units.tolist()
    # kept units shared with the mask before: those ahead of the first difference
    if len(masks) > 1:
        first_difference = (masks[1:] != masks[:-1]).argmax(axis=1)
        ahead = np.arange(masks.shape[1]) < first_difference[:, None]
        shared = [0, *np.count_nonzero(masks[1:] & ahead, axis=1).tolist()]
    else:
        shared = [0]

    path = [root]  # nodes from the root to the mask before, by depth (number of kept units)
    for row, common in enumerate(shared):
        kept = units[starts[row] : starts[row + 1]]
        below = None
        while path[-1].depth > common:
            below = path.pop()
        parent = path[-1]
        if parent.depth < common:  # the branching is inside the chain to `below`: split it there
            split = _Node(below.units[: common - parent.depth], common, -1)
            below.units = below.units[common - parent.depth :]
            parent.children[-1] = split
            split.children.append(below)
            path.append(split)
            parent = split
        if len(kept) == parent.depth:
            parent.mask = row
        else:
            leaf = _Node(tuple(kept[parent.depth :]), len(kept), row)
            parent.children.append(leaf)
            path.append(leaf)
    return root


def _schedule(root: _Node) -> tuple[tuple[Step, ...], int]:
    """Depth-first steps with slots assigned, the neediest child of every node last."""
    preorder, pending = [], [root]
    while pending:
        node = pending.pop()
        preorder.append(node)
        pending.extend(node.children)
    for node in reversed(preorder):  # children before parents
        node.children.sort(key=lambda child: child.need)
        # all but the last child are walked while this node's own state is held
        node.need = max(1 if node.children else 0, *(child.need + 1 for child in node.children[:-1]), 0)
        if node.children:
            node.need = max(node.need, node.children[-1].need)

    steps: list[Step] = []
    free: list[int] = []
    num_slots = 0
    work = [(root, ROOT, True)]
    while work:
        node, source, last_use = work.pop()
        if source != ROOT and last_use:
            free.append(source)
        target = -1
        if node.children:
            target = free.pop() if free else num_slots
            num_slots = max(num_slots, target + 1)
        steps.append(Step(source, node.units, node.mask, target, last_use))
        last = len(node.children) - 1
        work.extend((child, target, i == last) for i, child in reversed(list(enumerate(node.children))))
    return tuple(steps), num_slots
