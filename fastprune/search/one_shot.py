"""One-shot searches: each unit is judged alone, by the loss without it or by its gradients."""

from __future__ import annotations

from typing import Annotated

import numpy as np

from .registry import Allowed, algorithm
from .task import Removed, Search


@algorithm(races=True, studied=True, limits=True, weighs=True)
def one_shot(search: Search) -> Removed:
    """Remove the k units whose removal alone hurts least: the k lowest d_i = loss({i}).

    Under a budget of units that save unlike amounts, units are ordered by the increase of the loss
    relative to their saving. They are removed until the budget is met. Units that it does not need
    are put back, the worst first.

    Source: Shortened LLaMA (arXiv 2402.02834).
    Cost: U + 1.
    """
    search.plan([len(search.candidates), 1])
    singles = search.extend([((), unit) for unit in search.candidates], max(1, search.num_remove))
    return search.fill((), (unit for (unit,) in singles))


@algorithm(needs_gradients=True, needs_weights=True)
def taylor(search: Search, power: Annotated[int, Allowed(least=1, most=2)] = 1) -> Removed:
    """Remove the k units of lowest Taylor importance: the sum over a unit's weights of |w dL/dw|.

    L is the loss of the whole model over the calibration set. Gradients are summed over it before
    the absolute value is taken. The authors' code averages over batches, which weighs a smaller
    last batch too much. With one batch, their default, both agree. Biases do not count. A unit
    whose importance is not finite comes last. The objective must have a gradient.

    Source: Shortened LLaMA (arXiv 2402.02834).
    Cost: 1 (and one forward and backward pass of the whole model, with a gradient of every weight).
    Options:
        power: 2 sums squares.
    """
    search.plan([1])
    salience = search.evaluator.unit_salience(power)[search.candidates]
    return lowest(search, np.where(np.isfinite(salience), salience, np.inf))


def lowest(search: Search, values: np.ndarray) -> Removed:
    """Make a complete subset of the candidates with the lowest values [candidates].

    Ties go to the lowest index.
    """
    return search.fill((), (search.candidates[i] for i in values.argsort(kind="stable")))
