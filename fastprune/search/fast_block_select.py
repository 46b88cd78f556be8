"""Fast-Block-Select: exchanges of runs between removed and kept units."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from .one_shot import lowest
from .registry import Count, algorithm
from .sizes import as_removed
from .task import Removed, Search


@algorithm(studied=True)
def fast_block_select(
    search: Search, max_run: Count = 4, pool: Count = 5, rounds: Count = 20
) -> None:
    """Exchange runs of adjacent removed and kept units while that lowers the loss.

    The search begins with one_shot's subset. Let d_i be loss({i}), P the removed and A the kept
    units. For each run length r = 1..max_run, the runs of r adjacent units inside P are ranked by
    highest sum of d_i, those inside A by lowest. All exchanges between the best `pool` of both are
    scored, all lengths in one batch. Exchanges that lower the loss of P are applied, best first,
    unless they touch a unit that has moved in this round. This repeats until P does not change, or
    for `rounds` rounds.

    Source: MI-PRUN (arXiv 2601.07212), with the loss in place of its mutual information.
    Cost: U + 1 + at most rounds (max_run pool^2 + 1).
    Options:
        max_run: longest run of units exchanged.
        pool: best runs of each length and side; all pairs of them are scored.
        rounds: most rounds.
    """
    singles = search.score([(unit,) for unit in search.candidates])
    loss_of = dict(zip(search.candidates, singles.tolist()))
    removed = lowest(search, singles)
    for _ in range(rounds):
        exchanges = _exchanges(search, removed, loss_of, max_run, pool)
        current, *losses = search.score(
            [removed, *(_exchange(removed, *runs) for runs in exchanges)]
        )
        changed = removed
        moved: set[int] = set()
        for i in np.argsort(losses, kind="stable"):
            touched = {*exchanges[i][0], *exchanges[i][1]}
            if losses[i] < current and not touched & moved:
                changed = _exchange(changed, *exchanges[i])
                moved |= touched
        if changed == removed:
            return
        removed = changed
    search.score([removed])  # several exchanges may have been applied at once


def _exchanges(
    search: Search, removed: Removed, loss_of: dict[int, float], max_run: int, pool: int
) -> list[tuple[Removed, Removed]]:
    """Pairs (run to put back, run to remove) of the best runs of each length, by rank."""
    kept = [unit for unit in search.candidates if unit not in removed]
    exchanges: list[tuple[Removed, Removed]] = []
    for length in range(1, max_run + 1):
        costly = sorted(
            _runs(removed, length), key=lambda run: (-sum(loss_of[unit] for unit in run), run)
        )
        cheap = sorted(
            _runs(kept, length), key=lambda run: (sum(loss_of[unit] for unit in run), run)
        )
        exchanges += itertools.product(costly[:pool], cheap[:pool])
    return exchanges


def _runs(units: Sequence[int], length: int) -> list[Removed]:
    """All runs of `length` adjacent units inside `units`, ascending."""
    inside = set(units)
    spans = (tuple(range(start, start + length)) for start in units)
    return [span for span in spans if inside.issuperset(span)]


def _exchange(removed: Removed, back: Removed, out: Removed) -> Removed:
    return as_removed({*removed} - {*back} | {*out})
