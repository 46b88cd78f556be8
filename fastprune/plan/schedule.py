"""Schedules: a trie as ordered steps on slots, in integers.

Nodes in a row, without a branch or an end between them, become one `Step`. Steps run depth first.
At every branch, the child that needs most slots comes last, when its parent's slot is already free
(Sethi and Ullman's order for register allocation). M sequences of at most L units then never need
more than min(L + 1, 1 + log2(M)) slots. Cached states need no slot; the cache holds them.

If weights take turns, the walk is cut into visits: the steps that run while some units are loaded,
depth first as above. States that a later visit reads form the frontier. They wait beside the slots,
and are read as cached states are.

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

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np

from .retention import FADE, Prefixes, worth_retaining
from .trie import Trie, Units, make_trie

# the visit that each node is run in, int64[n], not before its parent's
VisitsOf = Callable[[Trie], np.ndarray]
FREED_SHARE = 16  # a small call that fills the cache evicts 1 / FREED_SHARE of its states


class Source(NamedTuple):
    """The place of the state from which a step starts.

    Attributes:
        kind: "root" for the embeddings, "slot" for a state of the same walk, "cached" for one of
            Schedule.cached, "frontier" for one of Schedule.frontier.
        index: The number of the slot, cached prefix or frontier prefix; 0 for the root.
    """

    kind: Literal["root", "slot", "cached", "frontier"]
    index: int = 0  # type: ignore[assignment]  # hides tuple.index


ROOT = Source("root")


class Retained(NamedTuple):
    """A state on a step's way that the cache keeps.

    Attributes:
        runs: The number of the step's units that have run by then.
        prefix: The prefix whose state it is.
    """

    runs: int
    prefix: Units


class Step(NamedTuple):
    """Take a state, run `units` on it in order, score it, keep it for later steps.

    Attributes:
        source: The state from which the step starts.
        units: The units that run, in order; none if the source itself is kept or scored.
        end: The number of the sequence that ends here, or -1.
        target: The slot of the result, or -1 if no later step reads it.
        last_use: Whether no later step reads `source`, so that its place is free once this step
            begins.
        retained: States on the way that outlive the call.
        frontier: The number of the result in Schedule.frontier, or -1 if no later visit reads it.
    """

    source: Source
    units: Units
    end: int
    target: int
    last_use: bool
    retained: tuple[Retained, ...] = ()
    frontier: int = -1


class Visit(NamedTuple):
    """Schedule.steps[start:stop], which run while their units' weights are loaded.

    Attributes:
        number: Visits of several schedules that have the same one run together.
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
        steps: The steps, in the order in which they run.
        cached: The prefixes whose states the cache holds before the call.
        evicted: Cached prefixes that this call does not use; evicted before it starts.
        num_slots: The number of slots. Cached states, frontier states and the state that runs need
            none.
        unit_runs: Units that all steps run.
        held: The R prefixes whose states the cache holds after the call, with their likelihoods
            (see `worth_retaining`). If some prefixes were evicted, most worth first.
        visits: The steps by visit, ascending. No slot is held from one visit to the next.
        frontier: The prefixes whose states wait for later visits.
        frontier_peak: The most frontier states at once.
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


def plan_call(
    sequences: Sequence[Units], held: Prefixes, capacity: int, visits_of: VisitsOf | None = None
) -> Schedule:
    """Plan one call on a chunk.

    While the cache has room for all states of the sequences, planning takes time in proportion to
    the sequences, not to the cache. A small call that finds the cache full frees more than it
    needs, so that the next calls find room.

    Args:
        sequences: The sequences whose sums are missing.
        held: The prefixes whose states the cache holds.
        capacity: The most states that the cache may hold at any time.
        visits_of: See `make_schedule`.

    Returns:
        The schedule.

    Examples:
        >>> from fastprune.plan.schedule import plan_call
        >>> from fastprune.plan.retention import Prefixes
        >>> schedule = plan_call([(0, 1, 3)], Prefixes([(0, 1), (2,)]), capacity=8)
        >>> schedule.unit_runs, schedule.held.prefixes
        (1, ((0, 1), (2,), (0, 1, 3)))
    """
    most_runs, freed = sum(map(len, sequences)), capacity // FREED_SHARE
    if len(held) + most_runs <= capacity:
        on_the_way = held.on_the_way(sequences)
        is_one = len(sequences) == 1 and visits_of is None
        if is_one and sequences[0] not in ((), *on_the_way.prefixes[-1:]):
            schedule = _plan_one(sequences[0], on_the_way)
        else:
            trie = make_trie(sequences, on_the_way.prefixes)
            schedule = make_schedule(trie, on_the_way.likelihood, capacity, visits_of)
        return replace(schedule, held=held.followed_by(schedule.held))
    trie = make_trie(sequences, held.prefixes)
    room = capacity - freed if most_runs <= freed else capacity
    return make_schedule(trie, held.likelihood, room, visits_of)


def _plan_one(sequence: Units, begun: Prefixes) -> Schedule:
    """The schedule that `make_schedule` gives for one sequence, with room for all of its states.

    A search that scores one mask at a time plans a hundred times faster without a trie.

    Args:
        sequence: Units in order.
        begun: The cached prefixes of the sequence, ascending, none of them all of it.
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
    trie: Trie,
    likelihood: np.ndarray | None = None,
    capacity: int = 0,
    visits_of: VisitsOf | None = None,
) -> Schedule:
    """Plan the steps that reach every end of a trie and run each wanted node once.

    Args:
        trie: The sequences and the cached prefixes.
        likelihood: float64[K], the likelihood of each cached prefix before the call.
        capacity: The most states that the cache may hold at any time.
        visits_of: Cuts the walk into visits, one visit by default.

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
    visit = np.zeros(len(trie.unit), np.int64) if visits_of is None else visits_of(trie)
    roots, frontier = _chains(trie, np.sort(nodes[trie.wanted[nodes]]), visit)
    steps: list[Step] = []
    visits, num_slots = [], 0
    for number in sorted(roots):
        of_visit, slots = _order(roots[number])
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
        frontier=tuple(trie.prefix(node) for node in frontier),
        frontier_peak=_frontier_peak(steps),
    )


def _last_uses(steps: list[Step]) -> list[Step]:
    """Mark the last use of each cached and frontier state in the last visit that reads it."""
    read_later: set[Source] = set()
    marked = []
    for step in reversed(steps):
        if step.source.kind in ("cached", "frontier"):
            step = step._replace(last_use=step.last_use and step.source not in read_later)
            read_later.add(step.source)
        marked.append(step)
    return marked[::-1]


def _frontier_peak(steps: list[Step]) -> int:
    """The most frontier states at once."""
    count = peak = 0
    for step in steps:
        count -= step.last_use and step.source.kind == "frontier"
        count += step.frontier >= 0
        peak = max(peak, count)
    return peak


def _within(
    steps: list[Step], cached: Sequence[Units], retained: set[Units], capacity: int
) -> tuple[list[Step], set[Units], tuple[Units, ...]]:
    """Keep the cache within its capacity at all times.

    A cached state is evicted at its last use. A retained state has no last use.

    Returns:
        The steps; the prefixes that the cache holds after them; the cached prefixes that are
        evicted before them.
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
    """Order chains depth first, with the neediest child last, and assign slots.

    Returns:
        The steps, and the number of slots.
    """
    pending = list(roots)
    preorder = []
    while pending:
        chain = pending.pop()
        preorder.append(chain)
        pending.extend(chain.children)
    for chain in reversed(preorder):  # children before parents
        chain.children.sort(key=lambda child: child.need)
        # a slot holds this chain's own state while all children but the last run: children that
        # need 1 and 2 slots make the chain need max(1 + 1, 2) = 2
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
        if chain.is_held:  # its children read its state from the cache or the frontier
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
    """The most slots that a schedule of `count` sequences of at most `longest` units can need."""
    return min(longest + 1, max(count, 1).bit_length())


class _Chain:
    """Nodes that run one after the other: their units, their end, and the chains that follow.

    A root has no units. Its source is the embeddings, or a cached or frontier state. Other chains
    start at the end of their parent; their source is ROOT until `_order` gives them a slot.
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


def _chains(
    trie: Trie, retained: np.ndarray, visit: np.ndarray
) -> tuple[dict[int, list[_Chain]], list[int]]:
    """Cut the wanted nodes into chains.

    Args:
        trie: The trie.
        retained: The wanted nodes whose states outlive the call, ascending.
        visit: The visit of each node, see `VisitsOf`.

    Returns:
        The roots of each visit, and the nodes whose states wait for later visits.
    """
    end_of = np.full(len(trie.unit), -1, dtype=np.int64)
    end_of[trie.ends] = np.arange(len(trie.ends))
    # a node continues the chain of its parent if the parent is the node before, ends no sequence,
    # has no other child and runs in the same visit: in the drawn trie 3 after 2, and 6 after 5
    nodes = np.flatnonzero(trie.wanted)  # 1 2 3 4 5 6
    parents = trie.parent[nodes]
    branches = np.bincount(parents, minlength=len(trie.unit)) > 1  # true for node 1
    continues = (
        trie.wanted[parents] & (parents == nodes - 1) & ~branches[parents] & (end_of[parents] < 0)
    )
    continues &= visit[parents] == visit[nodes]
    # first and last index in `nodes` of each chain; [1] [2, 3] [4] [5, 6] in the drawn trie
    first = np.flatnonzero(~continues)  # 0 1 3 4
    last = np.append(first[1:], len(nodes))[: len(first)] - 1  # 0 2 3 5
    # retained[low:high] belong to a chain; with 3 and 5 retained: 0:0, 0:1, 1:1 and 1:2
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

    for node in trie.ends[~trie.wanted[trie.ends]].tolist():  # ends whose state is at hand
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
        chains.sort(key=lambda chain: chain.source != ROOT)  # slot 0 holds the embeddings at first
    return roots, frontier
