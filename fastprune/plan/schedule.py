"""Trie -> ordered steps on slots. Pure integers: which units run, from which state, and which
states are retained.

Nodes in a row, without a branch or an end between them, become one `Step`. Steps are walked depth
first, at every branching the child that needs most slots last, when its parent's slot is already
free (Sethi and Ullman's order for register allocation): M sequences of at most L units then never
need more than min(L + 1, 1 + log2(M)) slots. Cached states need no slot; the cache holds them.

If units are loaded band by band, the walk is cut into visits: the steps that run while one band
is loaded, depth first as above. States that a later visit reads are the frontier: kept beside the
slots, and read as cached states are.

The trie drawn in `trie` needs one slot. Its chains are [1], [2, 3], [4] and [5, 6]:

    source  units  end  target  last_use
    root    ()      -1    0     yes         the embeddings, in slot 0
    slot 0  (0,)    -1    0     yes         node 1 branches: its state waits in slot 0
    slot 0  (2, 3)   2   -1     no          (0, 2, 3) ends; the other child of node 1 comes last
    slot 0  (1, 2)   0    0     yes         (0, 1, 2) ends; slot 0 is free again, and used again
    slot 0  (3,)     1   -1     yes         (0, 1, 2, 3) ends

If (0, 1) is cached, [3] takes the place of [2, 3], and its source is cached state 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np

from .retention import FADE, Prefixes, worth_retaining
from .trie import Trie, Units, levels, make_trie

FREED_SHARE = 16  # a small call that fills the cache evicts 1 / FREED_SHARE of its states


class Source(NamedTuple):
    """The place of the state that a step starts from.

    Attributes:
        kind: "root" for the embeddings, "slot" for a state of the same walk, "cached" for one of
            Schedule.cached, "frontier" for one of Schedule.frontier.
        index: The number of the slot, cached prefix or frontier prefix; 0 for the root.
    """

    kind: Literal["root", "slot", "cached", "frontier"]
    index: int = 0  # type: ignore[assignment]  # in place of tuple.index


ROOT = Source("root")


class Retained(NamedTuple):
    """A state on a step's way that the cache holds: of `prefix`, after `runs` of the step's
    units."""

    runs: int
    prefix: Units


class Step(NamedTuple):
    """Take a state, run `units` on it in order, score it, keep it for later steps.

    Attributes:
        source: The state to start from.
        units: The units to run, in order; none if the source itself is kept or scored.
        end: The number of the sequence that ends here, or -1.
        target: The slot to keep the result in, or -1 if no later step reads it.
        last_use: Whether no later step reads `source`: its place is free once this step begins.
        retained: States on the way that outlive the call.
        frontier: The number in Schedule.frontier to keep the result as, or -1 if no later visit
            reads it.
    """

    source: Source
    units: Units
    end: int
    target: int
    last_use: bool
    retained: tuple[Retained, ...] = ()
    frontier: int = -1


class Visit(NamedTuple):
    """Schedule.steps[start:stop], which run while one band is loaded.

    Attributes:
        number: The band, plus the number of bands for each round that all have had before.
        start: The first step.
        stop: The step after the last one.
    """

    number: int
    start: int
    stop: int


@dataclass(frozen=True)
class Schedule:
    """The steps that the engine runs on a chunk, for one batch of sequences.

    Attributes:
        steps: In the order in which they run.
        cached: The prefixes whose states the cache holds before.
        evicted: Cached prefixes that this call does not use; evicted before it starts.
        num_slots: States held at once, besides cached and frontier states and the one that runs.
        unit_runs: Units that all steps run.
        held: The prefixes whose states the cache holds afterwards.
        visits: The steps by visit, ascending; no slot is held from one to the next.
        frontier: The prefixes whose states wait for later visits.
        frontier_peak: The most of these at once.
    """

    steps: tuple[Step, ...]
    cached: tuple[Units, ...]
    evicted: tuple[Units, ...]
    num_slots: int
    unit_runs: int
    held: Prefixes
    visits: tuple[Visit, ...]
    frontier: tuple[Units, ...]
    frontier_peak: int

    @property
    def retained(self) -> tuple[Units, ...]:
        """The R prefixes of `held`; if some were evicted, most worth first."""
        return self.held.prefixes

    @property
    def likelihood(self) -> np.ndarray:
        """float64[R], of these: see `worth_retaining`."""
        return self.held.likelihood


def plan_call(
    sequences: Sequence[Units], held: Prefixes, capacity: int, band_of: Sequence[int] = ()
) -> Schedule:
    """Plan one call on a chunk.

    The work follows the sequences, not the cache, while the cache has room for all of their states.
    A call of few units that finds it full frees more than it needs, so that the next ones find
    room.

    Args:
        sequences: The ones whose sums are missing.
        held: The prefixes whose states the cache holds.
        capacity: The most states that the cache may hold at any time.
        band_of: See `make_schedule`.

    Returns:
        The schedule.

    Examples:
        >>> from fastprune.plan.schedule import plan_call
        >>> from fastprune.plan.retention import Prefixes
        >>> schedule = plan_call([(0, 1, 3)], Prefixes([(0, 1), (2,)]), capacity=8)
        >>> schedule.unit_runs, schedule.retained
        (1, ((0, 1), (2,), (0, 1, 3)))
    """
    most_runs, freed = sum(map(len, sequences)), capacity // FREED_SHARE
    if len(held) + most_runs <= capacity:
        begun = held.on_the_way(sequences)
        is_one = len(sequences) == 1 and not any(band_of)
        if is_one and sequences[0] not in ((), *begun.prefixes[-1:]):
            schedule = _plan_one(sequences[0], begun)
        else:
            trie = make_trie(sequences, begun.prefixes)
            schedule = make_schedule(trie, begun.likelihood, capacity, band_of)
        return replace(schedule, held=held.followed_by(schedule.held))
    trie = make_trie(sequences, held.prefixes)
    room = capacity - freed if most_runs <= freed else capacity
    return make_schedule(trie, held.likelihood, room, band_of)


def _plan_one(sequence: Units, begun: Prefixes) -> Schedule:
    """The schedule that `make_schedule` gives for one sequence, with room for all of its states.

    A search that scores one mask at a time plans a hundred times faster without a trie.

    begun: the cached prefixes of the sequence, ascending, none of them all of it.
    """
    cached = begun.prefixes
    start, last = len(cached[-1]) if cached else 0, len(cached) - 1
    counts = range(start + 1, len(sequence) + 1)
    new = [Retained(count - start, sequence[:count]) for count in counts]
    likelihood = [FADE * value + 1 for value in begun.likelihood.tolist()] + [1.0] * len(new)
    prefixes = [*cached, *(state.prefix for state in new)]
    above = [0, *map(len, prefixes)]
    worth = [value * (len(p) - a) for value, p, a in zip(likelihood, prefixes, above)]
    order = sorted(range(len(prefixes)), key=worth.__getitem__, reverse=True)  # stable
    run = Step(Source("cached", last), sequence[start:], 0, -1, False, tuple(new))
    steps: tuple[Step, ...] = (run,)
    if not cached:
        run = run._replace(source=Source("slot", 0), last_use=True)
        steps = (Step(ROOT, (), -1, 0, True), run)
    return Schedule(
        steps=steps,
        cached=cached,
        evicted=(),
        num_slots=len(steps) - 1,
        unit_runs=len(new),
        held=Prefixes([prefixes[i] for i in order], [likelihood[i] for i in order]),
        visits=(Visit(0, 0, len(steps)),),
        frontier=(),
        frontier_peak=0,
    )


def make_schedule(
    trie: Trie, likelihood: np.ndarray | None = None, capacity: int = 0, band_of: Sequence[int] = ()
) -> Schedule:
    """Plan the steps that reach every end of a trie, by running its wanted nodes once each.

    Args:
        trie: The sequences and the cached prefixes.
        likelihood: float64[K], of trie.cached, as the last schedule left them.
        capacity: The most states that the cache may hold at any time.
        band_of: The band of each unit, from 0 on; all one band by default.

    Returns:
        The schedule, the same for equal tries.

    Examples:
        >>> from fastprune.plan.schedule import make_schedule
        >>> from fastprune.plan.trie import make_trie
        >>> schedule = make_schedule(make_trie([(0, 1, 2, 3), (0, 2, 3), (0, 1, 2)]))
        >>> [(*step.source, step.units, step.end) for step in schedule.steps[1:3]]
        [('slot', 0, (0,), -1), ('slot', 0, (2, 3), 2)]
        >>> schedule.num_slots, schedule.unit_runs
        (1, 6)
    """
    likelihood = np.zeros(len(trie.cached)) if likelihood is None else likelihood
    nodes, likelihood = worth_retaining(trie, likelihood, capacity)
    chains = _chains(trie, np.sort(nodes[trie.wanted[nodes]]), _visits(trie, band_of))
    steps: list[Step] = []
    visits, num_slots = [], 0
    for number in sorted(chains.roots):
        of_visit, slots = _order(chains.roots[number])
        visits.append(Visit(number, len(steps), len(steps) + len(of_visit)))
        steps += of_visit
        num_slots = max(num_slots, slots)
    steps = _last_uses(steps) if len(visits) > 1 else steps
    prefixes = [trie.prefix(node) for node in nodes.tolist()]
    steps, held, evicted = _within(steps, trie.cached, {*prefixes}, capacity)
    kept = [i for i, prefix in enumerate(prefixes) if prefix in held]
    return Schedule(
        steps=tuple(steps),
        cached=trie.cached,
        evicted=evicted,
        num_slots=num_slots,
        unit_runs=trie.wanted_runs,
        held=Prefixes([prefixes[i] for i in kept], likelihood[kept]),
        visits=tuple(visits),
        frontier=tuple(trie.prefix(node) for node in chains.frontier),
        frontier_peak=_frontier_peak(steps),
    )


def _visits(trie: Trie, band_of: Sequence[int]) -> np.ndarray:
    """The visit that each wanted node is run in, int64[n]: the first one of its unit's band not
    before its parent's.

    An ascending sequence needs each band once. One that turns back waits for the next round: with
    three bands, a unit of band 0 after one of band 2, in visit 2, runs in visit
    2 + (0 - 2) % 3 = 3.
    """
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
    """The steps with the last use of states that several visits read marked in the last of them
    only."""
    read_later: set[Source] = set()
    marked = []
    for step in reversed(steps):
        if step.source.kind in ("cached", "frontier"):
            step = step._replace(last_use=step.last_use and step.source not in read_later)
            read_later.add(step.source)
        marked.append(step)
    return marked[::-1]


def _frontier_peak(steps: list[Step]) -> int:
    """The most frontier states held at once."""
    count = peak = 0
    for step in steps:
        count -= step.last_use and step.source.kind == "frontier"
        count += step.frontier >= 0
        peak = max(peak, count)
    return peak


def _within(
    steps: list[Step], cached: Sequence[Units], retained: set[Units], capacity: int
) -> tuple[list[Step], set[Units], tuple[Units, ...]]:
    """The steps with the cache held within the capacity at all times; the prefixes that it holds
    afterwards; the cached ones evicted before.

    A cached state is evicted with its last use, unless it is retained: then it has none.
    """
    used = {step.source.index for step in steps if step.source.kind == "cached"}
    held = {prefix for i, prefix in enumerate(cached) if i in used or prefix in retained}
    evicted = tuple(prefix for prefix in cached if prefix not in held)
    bounded = []
    for step in steps:
        if step.source.kind == "cached" and step.last_use:
            prefix = cached[step.source.index]
            if prefix in retained:
                step = step._replace(last_use=False)
            else:
                held.remove(prefix)
        room = max(0, capacity - len(held))
        if len(step.retained) > room:
            step = step._replace(retained=step.retained[:room])
        held.update(state.prefix for state in step.retained)
        bounded.append(step)
    return bounded, held, evicted


def _order(roots: list[_Chain]) -> tuple[list[Step], int]:
    """Chains depth first with slots assigned, the neediest child of every one last; the number of
    slots."""
    pending = list(roots)
    preorder = []
    while pending:
        chain = pending.pop()
        preorder.append(chain)
        pending.extend(chain.children)
    for chain in reversed(preorder):  # children before parents
        chain.children.sort(key=lambda child: child.need)
        # all but the last child are walked while a slot holds this chain's own state; children that
        # need 1 and 2 slots make it need max(1 + 1, 2) = 2
        needs_slot = not chain.is_held
        needs = [child.need + needs_slot for child in chain.children[:-1]] + [
            child.need for child in chain.children[-1:]
        ]
        chain.need = max([needs_slot if chain.children else 0, *needs])
    steps: list[Step] = []
    free: list[int] = []
    num_slots = 0
    work = [(root, root.source, True) for root in reversed(roots)]
    while work:
        chain, source, last_use = work.pop()
        if source.kind == "slot" and last_use:
            free.append(source.index)
        result, last = source, len(chain.children) - 1
        if chain.is_held:  # its children read it from the cache or the frontier
            if chain.end >= 0:
                steps.append(Step(source, (), chain.end, -1, not chain.children))
        else:
            target = -1
            if chain.children:
                target = free.pop() if free else num_slots
                num_slots = max(num_slots, target + 1)
                result = Source("slot", target)
            steps.append(
                Step(
                    source, chain.units, chain.end, target, last_use, chain.retained, chain.frontier
                )
            )
        work.extend(
            (child, result, i == last) for i, child in reversed(list(enumerate(chain.children)))
        )
    return steps, num_slots


def max_slots(longest: int, count: int) -> int:
    """The most slots that a schedule can need for `count` sequences of at most `longest` units."""
    return min(longest + 1, max(count, 1).bit_length())


class _Chain:
    """Nodes that run one after the other: their units, the sequence that ends after them, and the
    chains that follow.

    A root has no units; its source is the embeddings, or a cached or frontier state. The others
    start at the end of their parent, and have ROOT as a source until `_order` gives them a slot.
    """

    __slots__ = ("children", "end", "frontier", "need", "retained", "source", "units")

    def __init__(self, source: Source, units: Units, end: int, retained: tuple[Retained, ...] = ()):
        self.source, self.units, self.end, self.retained = source, units, end, retained
        self.children: list[_Chain] = []
        self.need = 0
        self.frontier = -1

    @property
    def is_held(self) -> bool:
        """Whether the state is held outside the slots."""
        return self.source != ROOT


class _Chains(NamedTuple):
    """The wanted nodes as chains.

    Attributes:
        roots: By visit, the chains that the others are below.
        frontier: The nodes whose states wait for later visits.
    """

    roots: dict[int, list[_Chain]]
    frontier: list[int]


def _chains(trie: Trie, retained: np.ndarray, visit: np.ndarray) -> _Chains:
    """Cut the wanted nodes into chains. retained: the ones of them that outlive the call,
    ascending. visit: see `_visits`."""
    end_of = np.full(len(trie.unit), -1, dtype=np.int64)
    end_of[trie.ends] = np.arange(len(trie.ends))
    # a node continues the chain of the node before if the latter is its parent and ends nothing,
    # has no other child and runs in the same visit; in the drawn trie 3 alone does, after 2, and 6
    # after 5
    nodes = np.flatnonzero(trie.wanted)  # 1 2 3 4 5 6
    parents = trie.parent[nodes]
    branches = np.bincount(parents, minlength=len(trie.unit)) > 1  # of node 1
    continues = (
        trie.wanted[parents] & (parents == nodes - 1) & ~branches[parents] & (end_of[parents] < 0)
    )
    continues &= visit[parents] == visit[nodes]
    first = np.flatnonzero(~continues)  # 0 1 3 4, places in nodes: chains [1] [2, 3] [4] [5, 6]
    last = np.append(first[1:], len(nodes))[: len(first)] - 1  # 0 2 3 5
    # retained[low:high] are a chain's; with 3 and 5 retained, 0:0, 0:1, 1:1 and 1:2
    low = np.searchsorted(retained, nodes[first])
    high = np.searchsorted(retained, nodes[last], side="right")
    units = trie.unit[nodes].tolist()

    source_of = {int(node): Source("cached", i) for i, node in enumerate(trie.cached_nodes)}
    chain_to: dict[int, _Chain] = {}  # by its last node
    tops: dict[tuple[int, int], _Chain] = {}  # by node and visit
    roots: dict[int, list[_Chain]] = {}
    frontier: list[int] = []

    def root(node: int, number: int, end: int = -1) -> _Chain:
        if (node, number) not in tops:
            chain = tops[node, number] = _Chain(source_of.get(node, ROOT), (), end)
            roots.setdefault(number, []).append(chain)
        return tops[node, number]

    for node in trie.ends[~trie.wanted[trie.ends]].tolist():  # no unit runs for these
        root(node, 0, int(end_of[node]))
    columns = (first, last, nodes[first], nodes[last], parents[first], low, high)
    for start, stop, head, tail, parent, begin, end in zip(*(c.tolist() for c in columns)):
        states = tuple(
            Retained(node - head + 1, trie.prefix(node)) for node in retained[begin:end].tolist()
        )
        chain = _Chain(ROOT, tuple(units[start : stop + 1]), int(end_of[tail]), states)
        chain_to[tail] = chain
        above = chain_to.get(parent)
        if above is None or visit[parent] != visit[head]:
            if above is not None and above.frontier < 0:
                above.frontier = len(frontier)
                source_of[parent] = Source("frontier", len(frontier))
                frontier.append(parent)
            above = root(parent, int(visit[head]))
        above.children.append(chain)
    for chains in roots.values():
        chains.sort(key=lambda chain: chain.source != ROOT)  # the embeddings are at hand first only
    return _Chains(roots, frontier)
