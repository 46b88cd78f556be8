"""Trie -> ordered steps on slots. Pure integers: what is run, from which state, and which states are retained.

Chains of nodes (a single child, no end) become one `Step`. Steps are walked depth first, at every branching the child
that needs most slots last, when its parent's slot is already free (Sethi and Ullman's order for register allocation):
M sequences of at most L units then never need more than min(L + 1, 1 + log2(M)) slots. Known states need no slot; they
are read where they lie.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .retention import worth_retaining
from .trie import Trie, Units

ROOT = -1


class Step(NamedTuple):
    """Take a state, run `units` on it in order, score it, keep it for later steps."""

    source: int  # slot to read; ROOT for the embeddings; -2 - k for Schedule.known[k]
    units: Units
    end: int  # which of the trie's sequences ends here, or -1
    target: int  # slot to keep the result in, or -1 if no later step reads it
    last_use: bool  # nobody reads `source` any more: its place is free once this step has begun
    retained: tuple[tuple[int, Units], ...]  # (how many of `units` ran, prefix): states to retain beyond this call


@dataclass(frozen=True)
class Schedule:
    """What the engine executes, for one batch of sequences.

    known: the prefixes whose states were retained before; dropped: those of them that are not needed and go first.
    num_slots: states that must be held at once, besides those and the one being computed. unit_runs: how many units
    all steps run. retained: the prefixes whose states are retained afterwards, most worth first; likelihood float64[R]:
    see `worth_retaining`.
    """

    steps: tuple[Step, ...]
    known: tuple[Units, ...]
    dropped: tuple[Units, ...]
    num_slots: int
    unit_runs: int
    retained: tuple[Units, ...]
    likelihood: np.ndarray


def make_schedule(trie: Trie, likelihood: np.ndarray | None = None, capacity: int = 0) -> Schedule:
    """The steps that reach every end of a trie, by running its wanted nodes once each.

    capacity: states that may be retained beyond the call, never more at any time. likelihood float64[K]: of
    trie.known, as the last schedule left them.
    """
    likelihood = np.zeros(len(trie.known)) if likelihood is None else likelihood
    nodes, likelihood = worth_retaining(trie, likelihood, capacity)
    steps, num_slots = _order(_chains(trie, np.sort(nodes[trie.wanted[nodes]])))
    prefixes = [trie.prefix(node) for node in nodes.tolist()]
    steps, held, dropped = _within(steps, trie.known, {*prefixes}, capacity)
    left = [i for i, prefix in enumerate(prefixes) if prefix in held]
    return Schedule(
        steps=tuple(steps),
        known=trie.known,
        dropped=dropped,
        num_slots=num_slots,
        unit_runs=trie.wanted_runs,
        retained=tuple(prefixes[i] for i in left),
        likelihood=likelihood[left],
    )


def _within(steps: list[Step], known: Sequence[Units], retained: set[Units], capacity: int):
    """The steps with what is retained beyond the call kept within the capacity at all times; the prefixes held
    afterwards; those known that go first.

    A known state that is not retained goes after its last use, one that is retained has none.
    """
    held = {known[-2 - step.source] for step in steps if step.source < ROOT} | {p for p in known if p in retained}
    dropped = tuple(prefix for prefix in known if prefix not in held)
    found = []
    for step in steps:
        if step.source < ROOT and step.last_use:
            prefix = known[-2 - step.source]
            if prefix in retained:
                step = step._replace(last_use=False)
            else:
                held.remove(prefix)
        room = max(0, capacity - len(held))
        if len(step.retained) > room:
            step = step._replace(retained=step.retained[:room])
        held.update(prefix for _, prefix in step.retained)
        found.append(step)
    return found, held, dropped


def _order(roots: list[_Chain]) -> tuple[list[Step], int]:
    """Chains depth first with slots assigned, the neediest child of every one last; how many slots there are."""
    pending = list(roots)
    preorder = []
    while pending:
        chain = pending.pop()
        preorder.append(chain)
        pending.extend(chain.children)
    for chain in reversed(preorder):  # children before parents
        chain.children.sort(key=lambda child: child.need)
        # all but the last child are walked while this chain's own state is held; a known state has its own place
        held = chain.source >= ROOT
        needs = [child.need + held for child in chain.children[:-1]] + [child.need for child in chain.children[-1:]]
        chain.need = max([held if chain.children else 0, *needs])
    steps: list[Step] = []
    free: list[int] = []
    num_slots = 0
    work = [(root, root.source, True) for root in reversed(roots)]
    while work:
        chain, source, last_use = work.pop()
        if source >= 0 and last_use:
            free.append(source)
        target, last = -1, len(chain.children) - 1
        if not chain.units and source < ROOT:  # a known state: its children read it where it lies
            if chain.end >= 0:
                steps.append(Step(source, (), chain.end, -1, not chain.children, ()))
            target = source
        else:
            if chain.children:
                target = free.pop() if free else num_slots
                num_slots = max(num_slots, target + 1)
            steps.append(Step(source, chain.units, chain.end, target, last_use, chain.retained))
        work.extend((child, target, i == last) for i, child in reversed(list(enumerate(chain.children))))
    return steps, num_slots


def max_slots(longest: int, count: int) -> int:
    """The most slots that a schedule can need for `count` sequences of at most `longest` units."""
    return min(longest + 1, max(count, 1).bit_length())


class _Chain:
    """Nodes that are run one after the other: their units, the sequence that ends after them, what follows."""

    __slots__ = ("children", "end", "need", "retained", "source", "units")

    def __init__(self, source: int, units: Units, end: int, retained: tuple[tuple[int, Units], ...] = ()):
        self.source, self.units, self.end, self.retained = source, units, end, retained
        self.children: list[_Chain] = []
        self.need = 0


def _chains(trie: Trie, retained: np.ndarray) -> list[_Chain]:
    """The wanted nodes as chains, below roots: the embeddings, or known states. retained: ascending nodes of them."""
    end_of = np.full(len(trie.unit), -1, dtype=np.int64)
    end_of[trie.ends] = np.arange(len(trie.ends))
    nodes = np.flatnonzero(trie.wanted)
    parents = trie.parent[nodes]
    branches = np.bincount(parents, minlength=len(trie.unit)) > 1
    goes_on = trie.wanted[parents] & (parents == nodes - 1) & ~branches[parents] & (end_of[parents] < 0)
    first = np.flatnonzero(~goes_on)
    last = np.append(first[1:], len(nodes))[: len(first)] - 1
    cuts = np.searchsorted(retained, nodes[first]), np.searchsorted(retained, nodes[last], side="right")
    units, ends = trie.unit[nodes].tolist(), end_of[nodes[last]].tolist()

    place_of = {int(node): -2 - k for k, node in enumerate(trie.known_nodes)}
    below: dict[int, _Chain] = {}  # by its last node
    roots: list[_Chain] = []

    def root(node: int) -> _Chain:
        if node not in below:
            below[node] = _Chain(place_of.get(node, ROOT), (), int(end_of[node]))
            roots.append(below[node])
        return below[node]

    for node in trie.ends[~trie.wanted[trie.ends]].tolist():  # nothing is run for these
        root(node)
    rows = (first.tolist(), last.tolist(), nodes[first].tolist(), nodes[last].tolist(), parents[first].tolist())
    for i, (start, stop, head, tail, parent) in enumerate(zip(*rows)):
        kept = tuple((int(node) - head + 1, trie.prefix(node)) for node in retained[cuts[0][i] : cuts[1][i]])
        chain = below[tail] = _Chain(ROOT, tuple(units[start : stop + 1]), ends[i], kept)
        above = below[parent] if parent in below else root(parent)
        above.children.append(chain)
    roots.sort(key=lambda chain: chain.source != ROOT)  # the embeddings first, while they are at hand
    return roots
