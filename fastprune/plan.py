"""Sequences of units -> trie -> ordered steps. Pure integers: no model, no torch.

The hidden state after a unit depends only on the units that ran so far and their order, so a batch of masks is a trie
over sequences of kept units. The trie knows sequences, not masks: a unit that is repeated, or run in another order, is
one more sequence. Every node is one unit run; the number of nodes is the least work that any exact
evaluator can do. `make_plan` compresses chains (nodes with a single child and no end of their own) into one
`Step`, and orders the steps so that few states are alive at once.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

ROOT = -1


class Step(NamedTuple):
    """Take the state in slot `source`, run `units` on it in order, score it, keep it in slot `target`."""

    source: int  # slot to read; ROOT for the embeddings
    units: tuple[int, ...]
    end: int  # which of Plan.sequences ends here, or -1
    target: int  # slot to keep the result in, or -1 if no later step reads it
    last_use: bool  # no later step reads `source`: its slot is free once this step has begun


@dataclass(frozen=True)
class Plan:
    """What the engine executes for one batch of sequences.

    sequences: the M distinct ones, sorted. index: int64[N], which of them each that was asked for is.
    layer_runs: distinct trie nodes. naive_layer_runs: unit runs of one forward pass for each that was asked for.
    num_slots: states that must be held at once (besides the one being computed).
    """

    sequences: tuple[tuple[int, ...], ...]
    index: np.ndarray
    steps: tuple[Step, ...]
    num_slots: int
    layer_runs: int
    naive_layer_runs: int


def make_plan(sequences: Iterable[tuple[int, ...]]) -> Plan:
    """Plan the evaluation of sequences of unit indices.

    States alive: at every branching the child that needs most slots is walked last, when its parent's slot is
    already free (Sethi and Ullman's order for register allocation). A trie of M sequences then never needs more than
    min(longest + 1, 1 + log2(M)) slots.
    """
    asked = list(sequences)
    distinct, index, shared = _sort_distinct(asked)
    steps, num_slots = _schedule(_compress(distinct, shared))
    return Plan(
        sequences=distinct,
        index=index,
        steps=steps,
        num_slots=num_slots,
        layer_runs=sum(len(step.units) for step in steps),
        naive_layer_runs=sum(map(len, asked)),
    )


def kept_units(masks: np.ndarray) -> list[tuple[int, ...]]:
    """The sequence of kept units of each mask bool[N, U]."""
    rows, units = np.nonzero(masks)
    bounds = np.searchsorted(rows, np.arange(len(masks) + 1)).tolist()
    units = units.tolist()
    return [tuple(units[start:stop]) for start, stop in itertools.pairwise(bounds)]


def max_slots(longest: int, count: int) -> int:
    """The most slots that a plan can need for `count` sequences of at most `longest` units."""
    return min(longest + 1, max(count, 1).bit_length())


def _sort_distinct(asked: list[tuple[int, ...]]) -> tuple[tuple[tuple[int, ...], ...], np.ndarray, list[int]]:
    """The distinct sequences, sorted; which of them each asked one is; units that each shares with the one before.

    In this order, sequences that share a prefix are neighbours, and one comes before those that extend it.
    """
    lengths = np.array([len(sequence) for sequence in asked], dtype=np.int64)
    table = np.zeros((len(asked), int(lengths.max(initial=0)) + 1), dtype=np.uint16)  # 0 is the end, unit i is i + 1
    units = np.fromiter(itertools.chain.from_iterable(asked), dtype=np.int64, count=int(lengths.sum()))
    table[np.arange(table.shape[1]) < lengths[:, None]] = units + 1
    order = np.lexsort(table.T[::-1])
    differs = table[order[1:]] != table[order[:-1]]
    new = np.concatenate([np.ones(min(len(asked), 1), dtype=bool), differs.any(axis=1)])
    index = np.empty(len(asked), dtype=np.int64)
    index[order] = np.cumsum(new) - 1
    shared = differs[new[1:]].argmax(axis=1).tolist()
    return tuple(asked[i] for i in order[new]), index, [0, *shared][: new.sum()]


class _Node:
    """A node of the compressed trie: the chain of units from its parent, the sequence that ends here, its children."""

    __slots__ = ("children", "depth", "end", "need", "units")

    def __init__(self, units: tuple[int, ...], depth: int, end: int):
        self.units, self.depth, self.end = units, depth, end
        self.children: list[_Node] = []
        self.need = 0


def _compress(sequences: tuple[tuple[int, ...], ...], shared: list[int]) -> _Node:
    """The compressed trie of sorted distinct sequences, `shared` of whose units are those of the one before."""
    root = _Node((), 0, -1)
    path = [root]  # nodes from the root to the sequence before, by depth (number of units)
    for number, (units, common) in enumerate(zip(sequences, shared, strict=True)):
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
        if len(units) == parent.depth:
            parent.end = number
        else:
            leaf = _Node(units[parent.depth :], len(units), number)
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
        steps.append(Step(source, node.units, node.end, target, last_use))
        last = len(node.children) - 1
        work.extend((child, target, i == last) for i, child in reversed(list(enumerate(node.children))))
    return tuple(steps), num_slots
