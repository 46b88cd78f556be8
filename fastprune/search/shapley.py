"""Shapley values: the mean gain of a unit's presence over random networks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import numpy as np

from ..masks import from_removed
from .one_shot import lowest
from .registry import Allowed, Count, algorithm
from .sizes import as_removed
from .task import Removed, Search


@algorithm
def shapley(
    search: Search,
    networks: Count = 10,
    share: Annotated[float, Allowed(least=0, most=1)] = 0.5,
    redraw: bool = False,
) -> Removed:
    """Remove the k units of least value: mean loss of random networks without, less with, a unit.

    For each calibration sample, `networks` random networks are drawn, which keep int(share U) of
    the units. Each is scored on that sample alone. The value of a unit is the mean loss of the
    networks without it, less the mean loss of the networks with it. The k units of least value are
    removed. With `redraw`, one unit is removed at a time, and the values of the others are
    estimated again.

    A protected unit is in every network. Non-finite losses do not count. A unit that
    breaks the loss alone comes last. The result is the method's choice.

    Source: Siddiqui et al. (arXiv 2407.16286), with the objective as the score.
    Cost: networks (times k with redraw), each on one sample of its own, + 1.
    Options:
        networks: networks drawn for each sample.
        share: share of the units that a network keeps; the paper has 0.5 and 0.9.
        redraw: estimate the values again after each removal.
    """
    passes = search.num_remove if redraw else 1
    search.plan([networks] * (search.evaluator.num_samples * passes) + [1])
    removed: Removed = ()
    while redraw and len(removed) < search.num_remove:
        values = shapley_values(search, networks, share, removed)
        removed = as_removed([*removed, search.candidates[int(values.argmin())]])
    if len(removed) < search.num_remove:
        removed = lowest(search, shapley_values(search, networks, share))
    return removed


def shapley_values(
    search: Search, networks: int, share: float, removed: Sequence[int] = ()
) -> np.ndarray:
    """Estimate the value of each candidate, float64[candidates].

    The value is +inf for units that were removed before, that break the loss alone, or that every
    drawn network kept.
    """
    units = [unit for unit in search.candidates if unit not in removed]
    present_units = search.num_units - len(removed)
    absent = present_units - max(1, int(share * present_units))
    absent = min(max(1, absent), len(units), present_units - 1)
    lacking = np.zeros((0, search.num_units), dtype=bool)
    losses = np.zeros(0)
    for sample in range(search.evaluator.num_samples if absent > 0 else 0):
        subsets = [
            as_removed([*removed, *search.rng.choice(units, absent, replace=False)])
            for _ in range(networks)
        ]
        losses = np.append(losses, search.score_samples(subsets, np.array([sample])))
        lacking = np.concatenate([lacking, ~from_removed(subsets, search.num_units)])
    finite = np.isfinite(losses)
    values = np.full(search.num_units, np.inf)
    values[units] = 0.0
    for unit in units:
        without, present = losses[finite & lacking[:, unit]], losses[finite & ~lacking[:, unit]]
        if len(without) and len(present):
            values[unit] = without.mean() - present.mean()
        elif finite.all() and not len(without):
            values[unit] = np.inf
    if not finite.all():
        alone = search.score([as_removed([*removed, unit]) for unit in units])
        values[[unit for unit, loss in zip(units, alone) if not np.isfinite(loss)]] = np.inf
    return values[search.candidates]
