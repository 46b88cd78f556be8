"""Trie -> ordered steps on slots. Pure integers: what is run, from which state, and which states
are retained.

Chains of nodes (a single child, no end) become one `Step`. Steps are walked depth first, at every
branching the child that needs most slots last, when its parent's slot is already free (Sethi and
Ullman's order for register allocation): M sequences of at most L units then never need more than
min(L + 1, 1 + log2(M)) slots. Known states need no slot; they are read where they lie.

Where units are loaded band by band, the walk is cut into visits: all that is run while one band is
loaded, depth first as above. States that a later visit reads are the frontier: kept beside the
slots, and read as known states are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .retention import worth_retaining
from .trie import Trie, Units, levels

ROOT = -1


class Step(NamedTuple):
    """Take a state, run `units` on it in order, score it, keep it for later steps."""

    # slot to read; ROOT for the embeddings; -2 - k for state k of Schedule.known and .frontier in a
    # row
    source: int
    units: Units
    end: int  # which of the trie's sequences ends here, or -1
    target: int  # slot to keep the result in, or -1 if no later step reads it
    last_use: bool  # nobody reads `source` any more: its place is free once this step has begun
    retained: tuple[
        tuple[int, Units], ...
    ]  # (how many of `units` ran, prefix): states to retain beyond this call
    frontier: int = (
        -1
    )  # which of Schedule.frontier to keep the result as, or -1 if no later visit reads it


class Visit(NamedTuple):
    """Steps that run while one band is loaded: a part of Schedule.steps."""

    number: int  # the band, plus the number of bands for each time that all have gone by
    start: int
    stop: int


@dataclass(frozen=True)
class Schedule:
    """What the engine executes, for one batch of sequences.

    known: the prefixes whose states were retained before; dropped: those of them that are not
    needed and go first.
    num_slots: states that must be held at once, besides those and the one being computed.
    unit_runs: how many units all steps run. retained: the prefixes whose states are retained
    afterwards, most worth first; likelihood float64[R]: see `worth_retaining`. visits: the steps by
    visit, in ascending order; no slot is held from one to the next.
    frontier: the prefixes whose states go from a visit to later ones; frontier_peak: the most of
    these at once.
    """

    steps: tuple[Step, ...]
    known: tuple[Units, ...]
    dropped: tuple[Units, ...]
    num_slots: int
    unit_runs: int
    retained: tuple[Units, ...]
    likelihood: np.ndarray
    visits: tuple[Visit, ...]
    frontier: tuple[Units, ...]
    frontier_peak: int


def make_schedule(
    trie: Trie, likelihood: np.ndarray | None = None, capacity: int = 0, band_of: Sequence[int] = ()
) -> Schedule:
    """The steps that reach every end of a trie, by running its wanted nodes once each.

    capacity: states that may be retained beyond the call, never more at any time. likelihood
    float64[K]: of trie.known, as the last schedule left them. band_of: the band of each unit, from
    0 on; all one band by default.
    """
    likelihood = np.zeros(len(trie.known)) if likelihood is None else likelihood
    nodes, likelihood = worth_retaining(trie, likelihood, capacity)
    roots, frontier = _chains(trie, np.sort(nodes[trie.wanted[nodes]]), _visits(trie, band_of))
    steps: list[Step] = []
    visits, num_slots = [], 0
    for number in sorted(roots):
        found, slots = _order(roots[number])
        visits.append(Visit(number, len(steps), len(steps) + len(found)))
        steps += found
        num_slots = max(num_slots, slots)
    steps = _last_uses(steps) if len(visits) > 1 else steps
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
        visits=tuple(visits),
        frontier=tuple(trie.prefix(node) for node in frontier),
        frontier_peak=_frontier_peak(steps, len(trie.known)),
    )


def _visits(trie: Trie, band_of: Sequence[int]) -> np.ndarray:
    """The visit that each wanted node is run in, int64[n]: the first one of its unit's band that is
    not before its parent's. An ascending sequence needs each band once; one that goes back has them
    come round again."""
    num_bands = max(band_of, default=0) + 1
    if num_bands == 1:
        return np.zeros(len(trie.unit), dtype=np.int64)
    band = np.append(np.asarray(band_of, dtype=np.int64), 0)[trie.unit]  # the root's unit is -1
    visit = band.copy()
    for level in levels(trie):
        parent = trie.parent[level]
        below = visit[parent] + (band[level] - band[parent]) % num_bands
        visit[level] = np.where(trie.wanted[parent], below, band[level])
    return visit


def _last_uses(steps: list[Step]) -> list[Step]:
    """The steps with the last use of what several visits read marked in the last of them only."""
    seen: set[int] = set()
    found = []
    for step in reversed(steps):
        if step.source < ROOT:
            step = step._replace(last_use=step.last_use and step.source not in seen)
            seen.add(step.source)
        found.append(step)
    return found[::-1]


def _frontier_peak(steps: list[Step], num_known: int) -> int:
    """The most frontier states that are held at once."""
    count = peak = 0
    for step in steps:
        count -= step.last_use and step.source <= -2 - num_known
        count += step.frontier >= 0
        peak = max(peak, count)
    return peak


def _within(
    steps: list[Step], known: Sequence[Units], retained: set[Units], capacity: int
) -> tuple[list[Step], set[Units], tuple[Units, ...]]:
    """The steps with what is retained beyond the call kept within the capacity at all times; the
    prefixes held afterwards; those known that go first.

    A known state that is not retained goes after its last use, one that is retained has none.
    """
    used = {-2 - step.source for step in steps if step.source < ROOT}
    held = {prefix for k, prefix in enumerate(known) if k in used or prefix in retained}
    dropped = tuple(prefix for prefix in known if prefix not in held)
    found = []
    for step in steps:
        if -2 - len(known) < step.source < ROOT and step.last_use:
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
    """Chains depth first with slots assigned, the neediest child of every one last; how many slots
    there are."""
    pending = list(roots)
    preorder = []
    while pending:
        chain = pending.pop()
        preorder.append(chain)
        pending.extend(chain.children)
    for chain in reversed(preorder):  # children before parents
        chain.children.sort(key=lambda child: child.need)
        # all but the last child are walked while this chain's own state is held; a known state has
        # its own place
        held = chain.source >= ROOT
        needs = [child.need + held for child in chain.children[:-1]] + [
            child.need for child in chain.children[-1:]
        ]
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
            steps.append(
                Step(
                    source, chain.units, chain.end, target, last_use, chain.retained, chain.frontier
                )
            )
        work.extend(
            (child, target, i == last) for i, child in reversed(list(enumerate(chain.children)))
        )
    return steps, num_slots


def max_slots(longest: int, count: int) -> int:
    """The most slots that a schedule can need for `count` sequences of at most `longest` units."""
    return min(longest + 1, max(count, 1).bit_length())


class _Chain:
    """Nodes that are run one after the other: their units, the sequence that ends after them, what
    follows."""

    __slots__ = ("children", "end", "frontier", "need", "retained", "source", "units")

    def __init__(
        self, source: int, units: Units, end: int, retained: tuple[tuple[int, Units], ...] = ()
    ):
        self.source, self.units, self.end, self.retained = source, units, end, retained
        self.children: list[_Chain] = []
        self.need = 0
        self.frontier = -1


def _chains(
    trie: Trie, retained: np.ndarray, visit: np.ndarray
) -> tuple[dict[int, list[_Chain]], list[int]]:
    """The wanted nodes as chains, below the roots of each visit: the embeddings, known or frontier
    states; and the nodes of the frontier. retained: ascending nodes of them. visit: see
    `_visits`."""
    end_of = np.full(len(trie.unit), -1, dtype=np.int64)
    end_of[trie.ends] = np.arange(len(trie.ends))
    nodes = np.flatnonzero(trie.wanted)
    parents = trie.parent[nodes]
    branches = np.bincount(parents, minlength=len(trie.unit)) > 1
    goes_on = (
        trie.wanted[parents] & (parents == nodes - 1) & ~branches[parents] & (end_of[parents] < 0)
    )
    goes_on &= visit[parents] == visit[nodes]
    first = np.flatnonzero(~goes_on)
    last = np.append(first[1:], len(nodes))[: len(first)] - 1
    cuts = (
        np.searchsorted(retained, nodes[first]),
        np.searchsorted(retained, nodes[last], side="right"),
    )
    units, ends = trie.unit[nodes].tolist(), end_of[nodes[last]].tolist()

    place_of = {int(node): -2 - k for k, node in enumerate(trie.known_nodes)}
    below: dict[int, _Chain] = {}  # by its last node
    tops: dict[tuple[int, int], _Chain] = {}  # by node and visit
    roots: dict[int, list[_Chain]] = {}
    frontier: list[int] = []

    def root(node: int, number: int, end: int = -1) -> _Chain:
        if (node, number) not in tops:
            chain = tops[node, number] = _Chain(place_of.get(node, ROOT), (), end)
            roots.setdefault(number, []).append(chain)
        return tops[node, number]

    for node in trie.ends[~trie.wanted[trie.ends]].tolist():  # nothing is run for these
        root(node, 0, int(end_of[node]))
    rows = (
        first.tolist(),
        last.tolist(),
        nodes[first].tolist(),
        nodes[last].tolist(),
        parents[first].tolist(),
    )
    for i, (start, stop, head, tail, parent) in enumerate(zip(*rows)):
        kept = tuple(
            (int(node) - head + 1, trie.prefix(node)) for node in retained[cuts[0][i] : cuts[1][i]]
        )
        chain = below[tail] = _Chain(ROOT, tuple(units[start : stop + 1]), ends[i], kept)
        above = below.get(parent)
        if above is None or visit[parent] != visit[head]:
            if above is not None and above.frontier < 0:
                above.frontier = len(frontier)
                place_of[parent] = -2 - len(trie.known) - len(frontier)
                frontier.append(parent)
            above = root(parent, int(visit[head]))
        above.children.append(chain)
    for found in roots.values():
        found.sort(
            key=lambda chain: chain.source != ROOT
        )  # the embeddings first, while they are at hand
    return roots, frontier
