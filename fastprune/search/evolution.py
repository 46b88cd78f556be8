"""Evolutionary searches: a genetic algorithm guided by the prior, and EvoPress."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Annotated

from ..errors import InputError
from . import draws
from .prior import Prior
from .registry import Allowed, Count, CountOrAuto, Share, algorithm
from .sizes import as_removed
from .task import Removed, Search


@algorithm(races=True, studied=True, limits=True)
def genetic(
    search: Search,
    population: Count = 16,
    elitism: Share = 0.2,
    mutation: Share = 0.15,
    generations: Count = 10,
    tournament: Count = 3,
) -> None:
    """Breed a population of subsets, drawing units by the losses of single removals.

    The prior is w_i = softmax(-z_i), for z_i the standardised loss({i}). The first generation is
    one_shot's subset, and k draws without replacement by w for each other member.
    In each later generation, the elites pass unchanged. A child has two parents, each the best of a
    tournament. It keeps their intersection, and fills up from the rest of their union by w. A
    mutated child swaps one removed unit for one drawn by w. Duplicates within a generation are
    redrawn. If breeding gives no new subset, the prior draws the rest. With racing, a race ranks
    the better half of a generation, and the others follow without an order. Under a budget of units
    that save unlike amounts, z_i standardises the increase of the loss relative to the saving of i.
    Units are drawn until the budget is met, and units that it does not need are put back.

    Source: Kim et al. (arXiv 2604.24938).
    Cost: U + at most population + (generations - 1) (population - elites).
    Options:
        population: subsets of each generation.
        elitism: share of the population that passes unchanged (rounded to whole subsets).
        mutation: probability that a child is mutated.
        generations: generations in all, the first included.
        tournament: subsets from which each parent is the best.
    """
    children = population - round(elitism * population)
    search.plan([len(search.candidates), population, *[children] * (generations - 1)])
    prior = Prior(search)
    first = prior.one_shot()
    members = _ranked(search, [first, *draws.distinct(prior.subset, population - 1, known=[first])])
    elites = round(elitism * population)
    for _ in range(generations - 1):
        following = members[:elites]
        following += draws.distinct(
            functools.partial(_child, search, prior, members, tournament, mutation),
            population - len(following),
            known=following,
        )
        following += draws.distinct(prior.subset, population - len(following), known=following)
        members = _ranked(search, following)


def _ranked(search: Search, members: list[Removed]) -> list[Removed]:
    """Rank members, best first; ties go to the lowest indices.

    With racing, only the better half is ranked.
    """
    ranked = len(members) if search.racing is None else -(-len(members) // 2)
    kept = search.select(members, ranked)
    return kept + sorted({*members} - {*kept})


def _child(
    search: Search, prior: Prior, members: list[Removed], tournament: int, mutation: float
) -> Removed:
    """Breed a child of two members, which are ranked best first."""
    size = min(tournament, len(members))
    one, other = (
        {*members[search.rng.choice(len(members), size, replace=False).min()]} for _ in range(2)
    )
    child = one & other
    rest = sorted(one ^ other)
    child = {*search.fill(sorted(child), prior.draw(rest, len(rest)))}
    kept = [unit for unit in search.candidates if unit not in child]
    if search.rng.random() < mutation and child and kept:
        swapped = search.rng.choice(sorted(child))
        child.remove(swapped)  # it returns if the other units are not enough
        return search.fill(sorted(child), [*prior.draw(kept, len(kept)), swapped])
    return as_removed(child)


def _halves_to_remove(
    candidates: Sequence[int], num_remove: int, granularity: str, flips: str, **options: object
) -> None:
    if granularity == "sublayer" and flips == "published" and num_remove % 2:
        raise InputError(
            f"num_remove must be even, not {num_remove}, or set the option flips=free: evopress "
            f"removes as many attentions as MLPs",
            argument="num_remove",
        )


@algorithm(check_size=_halves_to_remove, races=True, limits=True)
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
    flips: Annotated[str, Allowed(choices=("published", "free"))] = "published",
) -> Removed:
    """Mutate one parent; select among its children on few, then on many fresh tokens.

    The best of `initial` uniform subsets is the first parent. Each generation makes `offspring`
    distinct children, each by n = min(U{1..max_swaps}, U{1..max_swaps}) flips. The best
    first_survivors on first_tokens meet their parent on final_tokens, and the best of these is the
    next parent. The original fitness is KL.

    A flip draws a type, attention or MLP, with equal odds. It swaps a removed and a kept unit of
    that type. A later flip may undo an earlier one. With sublayers, half of the removed units are
    attentions, from the first subset on. With blocks, flips that draw the MLP are discarded, so
    that Binomial(n, 1/2) flips remain. A child that equals its parent is drawn again. A type whose
    units are all removed, or all kept, is not flipped. With flips=free, a child swaps n pairs of
    different units of any type, and sublayers are removed in any mix.

    Under a budget of units that save unlike amounts, first subsets remove units in a uniform order
    until the budget is met, with any number of attentions. After the flips, uniformly drawn units
    are removed until the budget is met, and units that it does not need are put back.

    Every step draws fresh samples, one by one without repetition, until they hold its tokens. The
    last sample is cut to fit, unless it is a question. If the calibration set has too few tokens, a
    step takes all of it. Its fitness is then the loss itself, which enters the history, and a later
    step of the same kind costs nothing. Scores on a share of the samples do not enter the history.
    The last parent is scored on all samples. With racing, one race over the whole calibration set
    replaces both steps.

    Source: EvoPress (arXiv 2410.14649).
    Cost: initial + generations (offspring + first_survivors + 1) on shares of the calibration set,
        + 1 on all of it.
    Options:
        initial: random subsets of which the best is the first parent.
        initial_tokens: tokens on which they are compared.
        offspring: children of each generation (fewer if there are not as many subsets).
        max_swaps: most units that a child swaps.
        first_survivors: children that pass the first step.
        first_tokens: tokens of the first step.
        final_tokens: tokens of the second step.
        generations: generations; 0 for int(k (U - k) / 1.5), with U units that may be removed
            (for sublayers k/2 and U/2).
        flips: published, or free: of any type, and always of different units.
    """
    k, size = search.num_remove, float(len(search.candidates))
    if flips == "published" and search.evaluator.granularity == "sublayer":
        # attentions, MLPs
        types = [[unit for unit in search.candidates if unit % 2 == half] for half in (0, 1)]
        if search.limit is None:
            first = draws.distinct(lambda: _balanced(search, types), initial)
        else:
            first = draws.uniform(search, initial)
        k, size = k // 2, size / 2
    else:
        # a block's attention and MLP are removed together: the second type has nothing to flip
        types = [search.candidates, []]
        first = draws.uniform(search, initial)
    number = generations or int(k * (size - k) / 1.5)
    steps = [offspring, first_survivors + 1] if search.racing is None else [offspring + 1]
    search.plan([initial, *steps * number, 1])
    (parent,) = _select(search, first, initial_tokens, 1)

    def child() -> Removed:
        count = search.rng.integers(1, max_swaps + 1, 2).min()
        return search.repaired(
            draws.swapped(search, parent, count)
            if flips == "free"
            else _flipped(search, parent, count, types)
        )

    for _ in range(number):
        children = draws.distinct(child, offspring, known=[parent])
        if search.racing is None and children:
            children = _select(search, children, first_tokens, first_survivors)
        (parent,) = _select(search, [*children, parent], final_tokens, 1)
    return parent


def _balanced(search: Search, types: Sequence[Sequence[int]]) -> Removed:
    """Draw equally many units of each type, uniformly.

    Raises:
        InputError: Protection leaves too few units of a type.
    """
    share = search.num_remove // len(types)
    for units, name in zip(types, ("attentions", "MLPs")):
        if len(units) < share:
            raise InputError(
                f"evopress removes as many attentions as MLPs, but only {len(units)} {name} are "
                f"not protected, "
                f"below {share}: lower num_remove, protect fewer, or set its option flips=free"
            )
    return as_removed(
        unit for units in types for unit in search.rng.choice(units, share, replace=False)
    )


def _flipped(search: Search, subset: Removed, count: int, types: list[list[int]]) -> Removed:
    """Make `count` flips, one after the other, each within one of the two types.

    A type without units has no flips.
    """
    removed = {*subset}
    for _ in range(count):
        units = types[search.rng.integers(2)]
        out, into = (
            [unit for unit in units if unit in removed],
            [unit for unit in units if unit not in removed],
        )
        if out and into:
            removed.remove(search.rng.choice(out))
            removed.add(search.rng.choice(into))
    return as_removed(removed)


def _select(search: Search, subsets: list[Removed], tokens: int, survivors: int) -> list[Removed]:
    """Select the subsets of lowest loss on fresh samples of `tokens` tokens.

    Ties go to the first.
    """
    if search.racing is not None:
        return search.select(subsets, survivors)
    fitness = search.score_on_tokens(subsets, tokens)
    return [subsets[i] for i in fitness.argsort(kind="stable")[:survivors]]
