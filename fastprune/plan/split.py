"""Work for each worker: chunks first, and parts of the trie if workers outnumber chunks.

All targets of a continuation are in one chunk, so workers need nothing from one another. With a
chunk for every worker, no prefix runs twice. A trie is cut between neighbours of its sorted
sequences. Each part is a range of sequences, and runs again only the path to its first node.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .trie import Trie, shared_length

SLACK = 1 / 8  # share of a part's work by which a cut may move, to neighbours that share less


def owners(loads: Sequence[int], looks: Sequence[int], workers: int) -> np.ndarray:
    """Assign each chunk to a worker.

    The heaviest chunk comes first. Each goes to the worker with the least load, in its look and in
    total, so that every look of a race is shared out as evenly as the whole. Owners do not depend
    on the request, so a worker's prefix cache stays useful.

    Args:
        loads: The tokens of each chunk.
        looks: The look of a race to which each chunk belongs.
        workers: The number of workers.

    Returns:
        The worker of each chunk, int64[C].

    Examples:
        >>> from fastprune.plan.split import owners
        >>> owners([5, 4, 3, 2], looks=[0, 0, 0, 0], workers=2)
        array([0, 1, 1, 0])
    """
    weights, look_of = np.asarray(loads, dtype=np.int64), np.asarray(looks, dtype=np.int64)
    owner, total = np.zeros(len(weights), dtype=np.int64), np.zeros(workers, dtype=np.int64)
    for look in np.unique(look_of):
        in_look = np.zeros(workers, dtype=np.int64)
        chunks = np.flatnonzero(look_of == look)
        for chunk in chunks[np.argsort(-weights[chunks], kind="stable")].tolist():
            worker = int(np.argmin(in_look + total))
            owner[chunk] = worker
            in_look[worker] += weights[chunk]
            total[worker] += weights[chunk]
    return owner


def teams(loads: Sequence[int], owner: Sequence[int], workers: int) -> list[list[int]]:
    """List the workers of each requested chunk.

    A chunk's owner runs it alone. If workers outnumber chunks, each chunk has a team, larger for a
    heavier chunk. The same chunks have the same teams in every call.

    Args:
        loads: The tokens of each requested chunk.
        owner: The owner of each requested chunk.
        workers: The number of workers.

    Examples:
        >>> from fastprune.plan.split import teams
        >>> teams([6, 2], owner=[1, 0], workers=4)
        [[1, 2, 3], [0]]
    """
    weights = np.asarray(loads, dtype=np.float64)
    if not 0 < len(weights) < workers:
        return [[int(worker)] for worker in owner]
    sizes = np.ones(len(weights), dtype=np.int64)
    for _ in range(workers - len(weights)):
        sizes[np.argmax(weights / sizes)] += 1  # joins the team with the most tokens a worker
    team_of: list[list[int]] = [[] for _ in sizes]
    free = list(range(workers))
    for team, worker in zip(team_of, owner):
        if worker in free:
            free.remove(worker)
            team.append(int(worker))
    for team, size in zip(team_of, sizes.tolist()):
        while len(team) < size:
            team.append(free.pop(0))
    return team_of


def cut(trie: Trie, parts: int, head: float = 0.0) -> list[range]:
    """Cut a trie into ranges of sequences with about the same work.

    A range runs all nodes on the way to its sequences, so nodes that it shares with the range
    before run twice. A cut is therefore made near its due place, between neighbours that share
    little.

    Args:
        trie: The trie.
        parts: The most ranges.
        head: The cost of a sequence besides its nodes, in unit runs.

    Returns:
        Ranges of the sequences, in order, none of them empty.
    """
    pairs = zip(((), *trie.sequences), trie.sequences)
    # the units that each sequence shares with the one before, and its further units, int64[M]:
    # in the drawn trie 0 3 1 and 3 1 2
    shared = np.array([shared_length(*pair) for pair in pairs], dtype=np.int64)
    own = trie.depth[trie.ends] - shared
    work = np.concatenate([[0.0], np.cumsum(own + head)])  # in the drawn trie 0 3 4 6
    ranges, start = [], 0
    for parts_left in range(parts, 1, -1):
        if start == len(own):
            break
        due = (work[-1] - work[start]) / parts_left
        first = int(np.searchsorted(work, work[start] + (1 - SLACK) * due))
        last = int(np.searchsorted(work, work[start] + (1 + SLACK) * due, side="right"))
        places = np.arange(max(start + 1, first), max(start + 2, last))
        places = places[places < len(own)]
        if not len(places):
            break
        stop = int(
            places[np.lexsort((np.abs(work[places] - work[start] - due), shared[places]))[0]]
        )
        ranges.append(range(start, stop))
        start = stop
    return [*ranges, range(start, len(own))] if start < len(own) else ranges
