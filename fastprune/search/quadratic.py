"""Searches that minimise a quadratic model of the loss over all subsets, exactly: CBO, and a fitted
surrogate."""

from __future__ import annotations

import itertools
import math
from typing import Annotated

import numpy as np

from ..errors import InputError
from ..masks import from_removed
from ..solver import MAX_VARIABLES, solve_subset
from . import draws
from .prior import LinearMean, Prior, penalised
from .registry import Allowed, Count, algorithm
from .run import Removed, Search


def _solvable(candidates: int, num_remove: int, granularity: str, **options: object) -> None:
    if candidates > MAX_VARIABLES:
        raise InputError(
            f"cbo and surrogate solve for at most {MAX_VARIABLES} units exactly, but {candidates} "
            f"may be removed: "
            f"protect {candidates - MAX_VARIABLES}, prune blocks where these are sublayers, or "
            f"use another algorithm"
        )


@algorithm(check_size=_solvable, needs_gradients=True, studied=True)
def cbo(
    search: Search, num_states: Count = 10, rescore: bool = True, first_order: bool = False
) -> None:
    """Remove the k units of lowest energy z^T H z, H the Fisher matrix of branch scales.

    z_i = 1 where unit i is removed. a_i scales unit i's residual branches, at 1. A[s, i] =
    dL_s/da_i per calibration sample; H = A^T A / n over the n samples. The num_states subsets |z| =
    k of lowest energy are found exactly, and with rescore=True the objective decides among them.
    Samples whose gradient is not finite are left out. Needs an objective with a gradient.

    Source: CBO (arXiv 2602.00161).
    Cost: num_states with rescore, else 1 (and one forward and backward pass of the dense model).
    Options:
        num_states: subsets that are scored (fewer where there are not as many).
        rescore: score them all; otherwise only the lowest.
        first_order: add -g^T z to the energy, g the mean gradient.
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
    initial: Annotated[
        int, Allowed(least=2)
    ] = 128,  # a single subset says nothing about leaving one out
    proposals: Count = 32,
    patience: Count = 3,
) -> None:
    """Fit a ridge quadratic model to the losses so far and score its best unseen subsets.

    This repeats until nothing better is found. The model of a subset's loss is a + b sum d_i +
    sum_i u_i z_i + sum_(i<j) v_ij z_i z_j, z_i = 1 where removed and d_i = loss({i}): a and b by
    least squares, then u and v by ridge regression, its strength by leave-one-out error.
    It is fitted to the subsets of the full budget scored so far: first one_shot's, and equal shares
    of subsets drawn by the prior of `genetic` and uniformly. Its best unseen subsets are found
    exactly, by the solver of cbo; the exact scores decide, the model only proposes. A loss that is
    not finite counts as the worst finite one. With racing, the best quarter of each round's
    proposals is found by a race, and only it is fitted to.

    Source: this project.
    Cost: U + initial + proposals for each round, at least `patience` rounds.
    Options:
        initial: subsets scored before the first fit (at most a quarter of all, or 4).
        proposals: subsets scored in each round.
        patience: rounds in a row without a better subset after which the search ends.
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
        found = _propose(search, prior, subsets, proposals, proposed)
        if not found:
            return
        proposed.update(found)
        if search.racing is not None:
            found = search.select(found, -(-len(found) // 4))
        lowest = search.score(found).min()
        subsets += found
        stale = 0 if lowest < best else stale + 1
        best = min(best, lowest)


def _propose(
    search: Search, prior: Prior, subsets: list[Removed], count: int, known: set[Removed]
) -> list[Removed]:
    """The `count` best unknown subsets under the model fitted to `subsets`."""
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
    """The quadratic model, without its constant: energies [n, n] and linear terms [n] of the n
    candidates."""
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
