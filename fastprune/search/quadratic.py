"""Searches that minimise a quadratic model of the loss exactly: CBO, and a fitted surrogate."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Annotated

import numpy as np

from ..errors import InputError
from ..masks import from_removed
from ..solver import MAX_VARIABLES, solve_subset
from . import draws
from .prior import LinearMean, Prior, penalised
from .registry import Allowed, Count, algorithm
from .task import Removed, Search


def _solvable(
    candidates: Sequence[int], num_remove: int, granularity: str, **options: object
) -> None:
    count = len(candidates)
    if count > MAX_VARIABLES:
        raise InputError(
            f"cbo and surrogate solve for at most {MAX_VARIABLES} units exactly, but {count} "
            f"may be removed: "
            f"protect {count - MAX_VARIABLES}, prune blocks where these are sublayers, or "
            f"use another algorithm"
        )


@algorithm(check_size=_solvable, needs_gradients=True, studied=True)
def cbo(
    search: Search, num_states: Count = 10, rescore: bool = True, first_order: bool = False
) -> None:
    """Remove the k units of lowest energy z^T H z, H the Fisher matrix of branch scales.

    z_i is 1 if unit i is removed. a_i = 1 scales the residual branches of unit i. A[s, i] =
    dL_s/da_i is the gradient of sample s, and H = A^T A / n over the n samples. The num_states
    subsets of k units with the lowest energy are found exactly. With rescore=True the objective
    decides among them. Samples whose gradient is not finite are left out. The objective must have a
    gradient.

    Source: CBO (arXiv 2602.00161).
    Cost: num_states with rescore, else 1 (and one forward and backward pass of the whole model).
    Options:
        num_states: scored subsets (fewer if there are not as many).
        rescore: score them all; otherwise only the lowest.
        first_order: add -g^T z to the energy, for the mean gradient g.
    """
    search.plan([num_states if rescore else 1])
    gradients = search.evaluator.unit_gradients()[:, search.candidates]  # [n, candidates]
    gradients = gradients[np.isfinite(gradients).all(axis=1)]
    if not len(gradients):
        raise ArithmeticError("no calibration sample has a finite gradient")
    fisher = gradients.T @ gradients / len(gradients)
    linear = -gradients.mean(axis=0) if first_order else None
    states = solve_subset(fisher, search.num_remove, num_states if rescore else 1, linear).subsets
    search.score([tuple(search.candidates[i] for i in state) for state in states])


@algorithm(check_size=_solvable, needs_sklearn=True, races=True)
def surrogate(
    search: Search,
    initial: Annotated[int, Allowed(least=2)] = 128,  # the leave-one-out error needs two
    proposals: Count = 32,
    patience: Count = 3,
) -> None:
    """Fit a ridge quadratic model to the losses so far and score its best unseen subsets.

    This repeats until no better subset appears. The model of a subset's loss is a + b sum d_i +
    sum_i u_i z_i + sum_(i<j) v_ij z_i z_j, with z_i = 1 for removed units and d_i = loss({i}).
    Least squares give a and b, then ridge regression u and v, with its strength by leave-one-out
    error. The model is fitted to the scored subsets of the full budget: at first one_shot's, and
    equal shares of subsets drawn by the prior of `genetic` and uniformly. The solver of cbo finds
    the model's best unseen subsets exactly. The model proposes, and exact scores decide. A loss
    that is not finite counts as the worst finite one. With racing, a race finds the best quarter of
    each round's proposals, and the model is fitted to these only.

    Source: this project.
    Cost: U + initial + proposals for each round, at least `patience` rounds.
    Options:
        initial: subsets scored before the first fit (at most a quarter of all, or 4).
        proposals: subsets scored in each round.
        patience: rounds in a row without a better subset that end the search.
    """
    prior = Prior(search)
    total = math.comb(len(search.candidates), search.num_remove)
    initial = min(initial, max(4, total // 4))
    subsets = [prior.one_shot()]
    subsets += draws.distinct(prior.subset, initial // 2, known=subsets)
    subsets += [subset for subset in draws.uniform(search, initial) if subset not in subsets][
        : initial - len(subsets)
    ]
    best, stale, proposed = search.score(subsets).min(), 0, {*subsets}
    while stale < patience:
        unseen = _propose(search, prior, subsets, proposals, proposed)
        if not unseen:
            return
        proposed.update(unseen)
        if search.racing is not None:
            unseen = search.select(unseen, -(-len(unseen) // 4))
        lowest = search.score(unseen).min()
        subsets += unseen
        stale = 0 if lowest < best else stale + 1
        best = min(best, lowest)


def _propose(
    search: Search, prior: Prior, subsets: list[Removed], count: int, known: set[Removed]
) -> list[Removed]:
    """Find the `count` best unknown subsets under the model fitted to `subsets`."""
    total = math.comb(len(search.candidates), search.num_remove)
    if total == len(known):
        return []
    energy, linear = _fit(search, prior, subsets)
    states = count
    while True:
        solution = solve_subset(energy, search.num_remove, states, linear).subsets
        ranked = [tuple(search.candidates[i] for i in state) for state in solution]
        unseen = [subset for subset in ranked if subset not in known]
        if len(unseen) >= count or states >= total:
            return unseen[:count]
        states = min(2 * states, total)


def _fit(search: Search, prior: Prior, subsets: list[Removed]) -> tuple[np.ndarray, np.ndarray]:
    """Fit the quadratic model, without its constant.

    Returns:
        The energies [n, n] and linear terms [n] of the n candidates.
    """
    from sklearn.linear_model import RidgeCV

    size = len(search.candidates)
    pairs = np.array(list(itertools.combinations(range(size), 2)), dtype=int).reshape(-1, 2)
    removed = 1.0 - from_removed(subsets, search.num_units)[:, search.candidates]
    features = np.hstack([removed, removed[:, pairs[:, 0]] * removed[:, pairs[:, 1]]])
    losses = penalised(search.score(subsets))
    mean = LinearMean(prior, subsets, losses)
    ridge = RidgeCV(alphas=np.logspace(-6, 3, 19))
    ridge.fit(features, losses - mean(subsets))
    energy = np.zeros((size, size))
    energy[pairs[:, 0], pairs[:, 1]] = energy[pairs[:, 1], pairs[:, 0]] = ridge.coef_[size:] / 2
    return energy, ridge.coef_[:size] + mean.slope * prior.sums(
        [(unit,) for unit in search.candidates]
    )
