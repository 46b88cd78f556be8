"""Evolutionary searches: a genetic algorithm guided by the prior, and EvoPress."""

from __future__ import annotations

import numpy as np

from . import draws
from .prior import Prior
from .registry import Count, CountOrAuto, Share, algorithm
from .run import Removed, Search


@algorithm
def genetic(
    search: Search,
    population: Count = 16,
    elitism: Share = 0.2,
    mutation: Share = 0.15,
    generations: Count = 10,
    tournament: Count = 3,
) -> None:
    """Breed a population of subsets; new units come by the prior w_i = softmax(-z_i), z_i the standardised loss({i}).

    First generation: one_shot's subset, and k draws without replacement by w for each of the rest. Then, each
    generation: the elites pass unchanged. Of two parents, each the best of a tournament, a child keeps the
    intersection and fills up from the rest of the union by w; a mutated child swaps one removed unit for one drawn
    by w. Duplicates within a generation are redrawn; where breeding finds nothing new, the prior fills up.

    Source: the study (arXiv 2604.24938).
    Cost: U + at most population + (generations - 1) (population - elites).
    Options:
        population: subsets of each generation.
        elitism: share of the population that passes unchanged (rounded to whole subsets).
        mutation: probability that a child is mutated.
        generations: generations in all, the first included.
        tournament: subsets from which each parent is the best.
    """
    prior = Prior(search)
    first = prior.one_shot()
    members = _ranked(search, [first, *draws.distinct(prior.subset, population - 1, known=[first])])
    elites = round(elitism * population)
    for _ in range(generations - 1):
        following = members[:elites]
        following += draws.distinct(
            lambda parents=members: _child(search, prior, parents, tournament, mutation),
            population - len(following),
            known=following,
        )
        following += draws.distinct(prior.subset, population - len(following), known=following)
        members = _ranked(search, following)


def _ranked(search: Search, members: list[Removed]) -> list[Removed]:
    """Best first; ties go to the lowest indices."""
    losses = dict(zip(members, search.score(members).tolist()))
    return sorted(members, key=lambda subset: (losses[subset], subset))


def _child(search: Search, prior: Prior, members: list[Removed], tournament: int, mutation: float) -> Removed:
    """A child of two of the members, which are ranked best first."""
    size = min(tournament, len(members))
    one, other = ({*members[search.rng.choice(len(members), size, replace=False).min()]} for _ in range(2))
    child = one & other
    child |= {*prior.draw(sorted(one ^ other), search.num_remove - len(child))}
    kept = [unit for unit in search.candidates if unit not in child]
    if search.rng.random() < mutation and child and kept:
        child.remove(search.rng.choice(sorted(child)))
        child |= {*prior.draw(kept, 1)}
    return draws.as_removed(child)


@algorithm
def evopress(
    search: Search,
    initial: Count = 64,
    initial_tokens: Count = 2048,
    offspring: Count = 32,
    max_swaps: Count = 3,
    first_survivors: Count = 2,
    first_tokens: Count = 2048,
    final_tokens: Count = 32768,
    generations: CountOrAuto = 0,
) -> None:
    """Mutate one parent; select among its children in two steps, on few and then on many fresh tokens.

    The best of `initial` uniform subsets is the first parent. Each generation makes `offspring` distinct children,
    each by min(U{1..max_swaps}, U{1..max_swaps}) swaps of a removed and a kept unit. The best first_survivors on
    first_tokens meet their parent on final_tokens, and the best is the next parent. The original fitness is KL.

    Every step draws whole samples afresh, without repetition, until they hold its tokens. Where the calibration set
    holds fewer, it takes all: the fitness is then the loss itself, a later step of the same kind costs nothing, and
    the scores enter the history. Scores on a share of the samples do not. The last parent is scored on all.

    Source: EvoPress (arXiv 2410.14649).
    Cost: initial + generations (offspring + first_survivors + 1) on shares of the calibration set, + 1 on all of it.
    Options:
        initial: random subsets of which the best is the first parent.
        initial_tokens: tokens on which they are compared.
        offspring: children of each generation (fewer where there are not as many).
        max_swaps: most units that a child swaps.
        first_survivors: children that pass the first step.
        first_tokens: tokens of the first step.
        final_tokens: tokens of the second step.
        generations: generations; 0 for int(k (U - k) / 1.5), U counting the units that may go.
    """
    k = search.num_remove
    (parent,) = _select(search, draws.uniform(search, initial), initial_tokens, 1)
    for _ in range(generations or int(k * (len(search.candidates) - k) / 1.5)):
        children = draws.distinct(
            lambda subset=parent: draws.swapped(search, subset, search.rng.integers(1, max_swaps + 1, 2).min()),
            offspring,
            known=[parent],
        )
        survivors = _select(search, children, first_tokens, first_survivors) if children else []
        (parent,) = _select(search, [*survivors, parent], final_tokens, 1)
    search.score([parent])


def _select(search: Search, subsets: list[Removed], tokens: int, survivors: int) -> list[Removed]:
    """The subsets of lowest mean loss on fresh samples of at least `tokens` tokens; ties go to the first."""
    order = search.rng.permutation(search.evaluator.num_samples)
    held = np.cumsum(search.evaluator.sample_tokens[order])
    samples = np.sort(order[: np.searchsorted(held, tokens) + 1])
    fitness = search.score_samples(subsets, samples)
    return [subsets[i] for i in fitness.argsort(kind="stable")[:survivors]]
