"""The search of csrc/solver in simple form, in NumPy.

It replaces a missing compiled solver, and tests it. It works on batches of nodes, so that NumPy's
calls pay off.

Legend: h [N, N] and g [N], the quadratic and linear terms; k, the size of subsets; q, the number of
ones that the open variables of a node still need; y [N], a point of the relaxation.
"""

from __future__ import annotations

import bisect
import itertools
import math
import time
from collections.abc import Iterable

import numpy as np

ENUMERATE_UP_TO = 200_000
_BATCH = 256
_DESCENT_STEPS = 80


class _Best:
    """The lowest subsets so far, ranked by exact energy, then lexicographically."""

    def __init__(self, h: np.ndarray, g: np.ndarray, capacity: int):
        self.h, self.g, self.capacity = h, g, capacity
        self.ranked: list[tuple[float, tuple[int, ...]]] = []
        self.margin = 1e-11 * (np.abs(h).sum() + np.abs(g).sum())

    def cutoff(self) -> float:
        """The approximate energy above which a subset cannot rank."""
        return self.ranked[-1][0] + self.margin if len(self.ranked) == self.capacity else math.inf

    def offer(self, members: Iterable) -> None:
        s = sorted(int(i) for i in members)
        block = self.h[np.ix_(s, s)]
        # fsum rounds the exact sum once, so the energy depends on the set alone
        terms = itertools.chain(self.g[s], block.diagonal(), 2 * block[np.tril_indices(len(s), -1)])
        entry = (math.fsum(terms), tuple(s))
        at = bisect.bisect_left(self.ranked, entry)
        if at == len(self.ranked) or self.ranked[at] != entry:
            self.ranked.insert(at, entry)
            del self.ranked[self.capacity :]


def solve(
    h: np.ndarray, g: np.ndarray, k: int, num_states: int, time_limit: float | None
) -> tuple[list[tuple[int, ...]], np.ndarray, bool, float]:
    """Solve for checked arguments.

    Returns:
        The subsets, energies, proof and gap of `SubsetSolution`.
    """
    deadline = math.inf if time_limit is None else time.monotonic() + time_limit
    best = _Best(h, g, num_states)
    if math.comb(len(g), k) <= ENUMERATE_UP_TO:
        _enumerate(best, k)
        bound = math.inf
    else:
        _local_search(best, k)
        bound = _branch_and_bound(best, k, deadline)
    energies = np.array([energy for energy, _ in best.ranked])
    energies.flags.writeable = False
    proven = bool(bound > best.cutoff())
    gap = 0.0 if proven else max(0.0, float(energies[-1] - bound))
    return [subset for _, subset in best.ranked], energies, proven, gap


def _enumerate(best: _Best, k: int) -> None:
    size = len(best.g)
    subsets = itertools.combinations(range(size), k)
    while chunk := list(itertools.islice(subsets, 16384)):
        index = np.array(chunk, dtype=np.intp).reshape(len(chunk), k)
        z = np.zeros((len(chunk), size))
        np.put_along_axis(z, index, 1.0, axis=1)
        energy = ((z @ best.h + best.g) * z).sum(axis=1)
        if best.capacity < len(chunk):
            kth = np.partition(energy, best.capacity - 1)[best.capacity - 1]
            index = index[energy <= min(best.cutoff(), kth + best.margin)]
        for members in index:
            best.offer(members)


def _local_search(best: _Best, k: int) -> None:
    """Improve greedy and seeded random starts by exchanges; then fill `best` with any subsets."""
    h, g = best.h, best.g
    size = len(g)
    rng = np.random.default_rng(0)
    unary = g + h.diagonal()
    coupling = 2 * h
    np.fill_diagonal(coupling, 0.0)
    for start in range(16):
        inside = np.zeros(size, dtype=bool)
        if start == 0:
            for _ in range(k):
                inside[np.where(inside, np.inf, unary + coupling @ inside).argmin()] = True
        else:
            inside[rng.permutation(size)[:k]] = True
        while True:
            best.offer(np.flatnonzero(inside))
            field = unary + coupling @ inside
            into, out = np.flatnonzero(~inside), np.flatnonzero(inside)
            change = field[into] - field[out][:, None] - coupling[np.ix_(out, into)]
            a, b = np.unravel_index(change.argmin(), change.shape)
            if change[a, b] >= -best.margin:
                break
            inside[out[a]], inside[into[b]] = False, True
    subsets = itertools.combinations(range(size), k)
    while len(best.ranked) < best.capacity:
        best.offer(next(subsets))


def best_diagonal(h: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Maximise weight.d such that h - Diag(d) stays positive semidefinite.

    Only directions whose entries sum to zero count.
    """
    size = len(weight)
    largest_row = np.abs(h).sum(axis=1).max()
    if largest_row == 0:
        return np.zeros(size)
    lifted = h + 10 * largest_row / size

    def log_det(d: np.ndarray) -> float:
        try:
            return 2 * np.log(np.linalg.cholesky(lifted - np.diag(d)).diagonal()).sum()
        except np.linalg.LinAlgError:
            return -math.inf

    d, shift = np.zeros(size), 1e-3 * largest_row
    while log_det(d) == -math.inf:
        d[:] = -shift
        shift *= 4
    final = 1e-4 * (weight @ np.abs(h).sum(axis=1)) / size
    barrier = max(weight.sum() / np.linalg.inv(lifted - np.diag(d)).trace(), final)
    for _ in range(80):
        inverse = np.linalg.inv(lifted - np.diag(d))
        residual = weight / barrier - inverse.diagonal()
        step = np.linalg.solve(inverse**2, residual)
        if residual @ step < 0.1:
            if barrier <= final:
                break
            barrier = max(0.1 * barrier, final)
            continue
        merit = weight @ d / barrier + log_det(d)
        length = 1.0
        while (
            length > 1e-6
            and not weight @ (d + length * step) / barrier + log_det(d + length * step) > merit
        ):
            length /= 2
        if length <= 1e-6:
            break
        d = d + length * step
    return d - 1e-11 * largest_row


def _branch_and_bound(best: _Best, k: int, deadline: float) -> float:
    """Search depth first, a batch of nodes at a time.

    Returns:
        The least bound of the open nodes; inf if the search is complete.
    """
    h, g = best.h, best.g
    size = len(g)
    diagonal = best_diagonal(h, np.ones(size))
    twice = 2 * (h - np.diag(diagonal))
    lin = g + diagonal
    curvature = twice.diagonal()

    # a node a row: the open variables, the point y, and a proven lower bound
    opened = np.ones((1, size), dtype=bool)
    points = np.full((1, size), k / size)
    lowers = np.full(1, -np.inf)
    while len(lowers):
        if time.monotonic() > deadline and np.isfinite(lowers).all():
            return float(lowers.min())
        rows = slice(max(0, len(lowers) - _BATCH), None)
        is_open, y, lower = opened[rows], points[rows], lowers[rows]
        opened, points, lowers = opened[: rows.start], points[: rows.start], lowers[: rows.start]

        q = k - ((y == 1.0) & ~is_open).sum(axis=1)
        free = is_open.sum(axis=1)
        decided = (q == 0) | (q == free)
        for r in np.flatnonzero(decided):
            z = np.where(is_open[r], q[r] > 0, y[r] == 1.0)
            best.offer(np.flatnonzero(z))
        keep = ~decided & (q >= 0) & (q <= free) & (lower <= best.cutoff())
        is_open, y, lower, q = is_open[keep], y[keep], lower[keep], q[keep]
        if not len(q):
            continue

        lower, reduced = descend(y, is_open, q, lower, twice, lin, best.cutoff())
        keep = lower <= best.cutoff()
        is_open, y, lower, reduced = is_open[keep], y[keep], lower[keep], reduced[keep]
        fraction = np.minimum(y, 1 - y)
        # branch on a fractional, steep variable, else on the integral one closest to changing
        score = np.where(fraction > 1e-9, np.sqrt(fraction) * curvature, -np.abs(reduced))
        branch = np.where(is_open, score, -np.inf).argmax(axis=1)
        near = y[np.arange(len(y)), branch] >= 0.5
        children = [_child(is_open, y, branch, value) for value in (~near, near)]
        order = np.argsort(-lower, kind="stable")
        opened = np.concatenate([opened, *(c[0][order] for c in children)])
        points = np.concatenate([points, *(c[1][order] for c in children)])
        lowers = np.concatenate([lowers, lower[order], lower[order]])
    return math.inf


def descend(
    y: np.ndarray,
    is_open: np.ndarray,
    q: np.ndarray,
    lower: np.ndarray,
    twice: np.ndarray,
    lin: np.ndarray,
    cutoff: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Descend in pairs of coordinates, in every row of y in place.

    Returns:
        The bounds, and the reduced costs.
    """
    every = np.arange(len(y))
    gradient = y @ twice + lin
    for step in range(1, _DESCENT_STEPS + 1):
        up = np.where(is_open & (y < 1), gradient, np.inf)
        down = np.where(is_open & (y > 0), gradient, -np.inf)
        i, j = up.argmin(axis=1), down.argmax(axis=1)
        low, high = up[every, i], down[every, j]
        if step % 10 == 0:
            tau = 0.5 * (low + high)
            reduced = gradient - tau[:, None]
            bound = q * tau + (np.where(is_open, np.minimum(reduced, 0), gradient * y)).sum(axis=1)
            bound -= 0.5 * (y * (gradient - lin)).sum(axis=1)
            lower = np.maximum(lower, bound)
            value = 0.5 * (y * (gradient + lin)).sum(axis=1)
            if ((lower > cutoff) | (value <= cutoff)).all():
                break
        violation = np.maximum(high - low, 0.0)
        bend = twice[i, i] + twice[j, j] - 2 * twice[i, j]
        room = np.minimum(1 - y[every, i], y[every, j])
        move = np.minimum(violation / np.maximum(bend, 1e-300), room)
        y[every, i] += move
        y[every, j] -= move
        gradient += move[:, None] * (twice[i] - twice[j])
    return lower, reduced


def _child(
    is_open: np.ndarray, y: np.ndarray, branch: np.ndarray, value: int
) -> tuple[np.ndarray, np.ndarray]:
    """Fix one variable in each row.

    The amount that this adds or frees is spread over the open variables, in proportion to their
    room.
    """
    every = np.arange(len(y))
    is_open, y = is_open.copy(), y.copy()
    freed = y[every, branch] - value  # negative if the variable takes more
    y[every, branch] = value
    is_open[every, branch] = False
    room = np.where(is_open, np.where(freed[:, None] > 0, 1 - y, y), 0.0)
    total = room.sum(axis=1)
    share = np.divide(freed, total, out=np.zeros_like(freed), where=total > 0)
    y += share[:, None] * room
    return is_open, np.where(is_open, np.clip(y, 0.0, 1.0), y)
