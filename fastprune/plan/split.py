"""Work for each worker: chunks first, and parts of the trie if workers outnumber chunks. Pure
integers and NumPy.

A continuation lies in one chunk, so that a worker's sums need nothing from another's, and as long
as there is a chunk for every worker no prefix is run twice. A trie is cut between neighbours of its
sorted sequences: each part is a range of them, and runs again only the path to its first node.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .trie import Trie, shared_length

# a cut may move by this share of a part's work, to a place at which neighbours share less
SLACK = 1 / 8


def owners(loads: Sequence[int], looks: Sequence[int], workers: int) -> np.ndarray:
    """The worker of each chunk, int64[C], the same whatever is asked, so that its prefix cache
    stays of use.

    loads: tokens of each chunk. looks: of a race, which one each chunk belongs to. Heavy chunks
    first, each to the worker that has least, of its look and of all together: every look of a race
    is shared out as well as the whole.
    """
    weights, of = np.asarray(loads, dtype=np.int64), np.asarray(looks, dtype=np.int64)
    owner, total = np.zeros(len(weights), dtype=np.int64), np.zeros(workers, dtype=np.int64)
    for look in np.unique(of):
        of_look = np.zeros(workers, dtype=np.int64)
        chunks = np.flatnonzero(of == look)
        for chunk in chunks[np.argsort(-weights[chunks], kind="stable")].tolist():
            worker = int(np.argmin(of_look + total))
            owner[chunk] = worker
            of_look[worker] += weights[chunk]
            total[worker] += weights[chunk]
    return owner


def teams(loads: Sequence[int], owner: Sequence[int], workers: int) -> list[list[int]]:
    """The workers of each chunk of a call: its owner alone, or, of fewer chunks than workers, a
    team by its weight.

    loads, owner: of the requested chunks. The same chunks have the same teams in every call.
    """
    weights = np.asarray(loads, dtype=np.float64)
    if not 0 < len(weights) < workers:
        return [[int(worker)] for worker in owner]
    sizes = np.ones(len(weights), dtype=np.int64)
    for _ in range(
        workers - len(weights)
    ):  # the next worker joins the team with most tokens a worker
        sizes[np.argmax(weights / sizes)] += 1
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
    """At most `parts` ranges of the trie's sequences, of about the same work, in order; none of
    them empty.

    head: the cost of a sequence besides its nodes, in unit runs. A range runs the nodes on the way
    to its sequences, those that it shares with the range before once more; so a cut is made near
    its due place, between neighbours that share little.
    """
    shared, own = _shared(trie)
    work = np.concatenate([[0.0], np.cumsum(own + head)])
    ranges, start = [], 0
    for left in range(parts, 1, -1):
        if start == len(own):
            break
        due = (work[-1] - work[start]) / left
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


def _shared(trie: Trie) -> tuple[np.ndarray, np.ndarray]:
    """The number of units that each sequence shares with the one before, and of those that it has
    beyond these: int64[M]. In the drawn trie 0, 3, 1 and 3, 1, 2."""
    pairs = zip(((), *trie.sequences), trie.sequences)
    shared = np.array([shared_length(*pair) for pair in pairs], dtype=np.int64)
    return shared, trie.depth[trie.ends] - shared
