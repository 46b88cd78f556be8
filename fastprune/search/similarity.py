"""Similarity methods: chosen from the states of one dense forward pass; no mask is scored but the
result.

S_ij is the mean over calibration tokens of cosine(h_i, h_j), h_i the state before unit i, h_U the
state after the last unit, before the final norm.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from typing import Annotated

import numpy as np

from .draws import as_removed
from .enumeration import windows
from .registry import Allowed, CountOrAuto, algorithm
from .run import Removed, Search

Variant = Annotated[str, Allowed(choices=("paper", "lorp"))]


@algorithm(needs_sklearn=True)
def lorp(search: Search, clusters: CountOrAuto = 0) -> Removed:
    """Cluster the units by the similarity of their inputs; remove the most redundant ones.

    Over h_0 .. h_(U-1): RLS = -log2(mean_(i<j) S_ij); the number of clusters is given, or 2 if RLS
    >= 1.0, 3 if >= 0.7, else 4 (at most U). Spectral clustering on (S + 1) / 2, clusters in order
    of their first unit. The first and the last unit are protected. r(l) = mean of S_lm over the
    other members of l's cluster, -inf for a single member. Each cluster's queue holds its members
    that are not protected by r descending. Stage 1 takes the front of each queue, in order of
    depth, until k are removed. Stage 2, until k: the front of the queue of the cluster with the
    highest mean pairwise S over its members not removed (-inf below two). Where k leaves no other
    choice, the last unit goes too, and then the first.

    Source: LoRP (arXiv 2605.27786).
    Cost: 1 (and one forward pass with all states).
    Options:
        clusters: number of clusters; 0 lets RLS decide.
    """
    search.plan([1])
    states = _similarity(search)[:-1, :-1]
    count = min(clusters or clusters_for(redundancy_score(states)), len(states))
    labels = cluster_units(states, count)
    spared = {0, search.num_units - 1}
    order = lorp_order(states, labels, [unit for unit in search.candidates if unit not in spared])
    last_resort = [unit for unit in (search.num_units - 1, 0) if unit in search.candidates]
    return _scored(search, [*order, *last_resort][: search.num_remove])


@algorithm
def shortgpt(search: Search, variant: Variant = "paper") -> Removed:
    """Remove the k units of lowest Block Influence, BI_i = 1 - S_(i, i+1).

    The variant "lorp" spares the first and the last unit, as the baseline of that paper does: it
    protects block 0 and never scores the last. Where k leaves no other choice, the last goes too,
    and then the first.

    Source: ShortGPT (arXiv 2403.03853).
    Cost: 1 (and one forward pass with all states).
    Options:
        variant: paper, or lorp: spare the first and the last unit.
    """
    search.plan([1])
    influence = 1 - np.diagonal(_similarity(search), offset=1)
    last_resort = {search.num_units - 1: 1, 0: 2} if variant == "lorp" else {}
    order = sorted(
        search.candidates, key=lambda unit: (last_resort.get(unit, 0), influence[unit], unit)
    )
    return _scored(search, order[: search.num_remove])


@algorithm
def streamline(
    search: Search, variant: Annotated[str, Allowed(choices=("paper", "lorp", "gromov"))] = "paper"
) -> Removed:
    """Remove the window of k units, i .. i+k-1, whose ends are most alike: highest S_(i, i+k).

    No replacement layer is trained. The variant "lorp" takes the windows i = 1 .. U-k-1 only, as
    the baseline of that paper does; where there is none of them, all. The variant "gromov" takes
    the window with the lowest angular distance arccos(cosine) / pi, the mean over the last token of
    each sequence (arXiv 2403.17887). A window that touches a protected unit is not a candidate;
    where protection leaves none at all, a window steps over what is protected.

    Source: LLM-Streamline (arXiv 2403.19135).
    Cost: 1 (and one forward pass with all states).
    Options:
        variant: paper; lorp: leave out windows that hold the first or the last unit; gromov:
            angular distance.
    """
    search.plan([1])
    found = windows(search.candidates, search.num_remove)
    if variant == "lorp":
        found = [window for window in found if not {0, search.num_units - 1} & {*window}] or found
    similarity = (
        -_finite(search.evaluator.angular_distance())
        if variant == "gromov"
        else _similarity(search)
    )
    best = max(found, key=lambda window: similarity[window[0], window[-1] + 1] if window else 1.0)
    return _scored(search, best)


def _scored(search: Search, units: Iterable[int]) -> Removed:
    subset = as_removed(units)
    search.score([subset])
    return subset


def redundancy_score(similarity: np.ndarray) -> float:
    """RLS = -log2 of the mean of S over pairs; +inf if that mean is not above 0."""
    mean = similarity[np.triu_indices(len(similarity), 1)].mean()
    return float(-math.log2(mean)) if mean > 0 else math.inf


def cluster_units(similarity: np.ndarray, count: int) -> np.ndarray:
    """Labels int[U] of spectral clustering on (S + 1) / 2; label c has the c-th first unit."""
    size = len(similarity)
    if count >= size:
        return np.arange(size)
    if count == 1:
        return np.zeros(size, dtype=int)
    affinity = (similarity + 1) / 2
    np.fill_diagonal(affinity, 1.0)
    from sklearn.cluster import SpectralClustering

    clustering = SpectralClustering(
        n_clusters=count, affinity="precomputed", assign_labels="kmeans", random_state=0
    )
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # fewer distinct points than clusters, as with equal states, is no fault here
        labels = clustering.fit_predict(affinity)
    first = {label: unit for unit, label in reversed(list(enumerate(labels)))}
    rank = {label: position for position, label in enumerate(sorted(first, key=first.__getitem__))}
    return np.array([rank[label] for label in labels])


def lorp_order(similarity: np.ndarray, labels: np.ndarray, candidates: Iterable[int]) -> list[int]:
    """The candidates in the order in which LoRP's two stages remove them."""
    candidates = set(candidates)
    members = [np.flatnonzero(labels == label) for label in range(labels.max() + 1)]
    queues = []
    for cluster in members:
        others = np.where(np.eye(len(cluster)), 0.0, similarity[np.ix_(cluster, cluster)])
        likeness = (
            others.sum(axis=1) / (len(cluster) - 1) if len(cluster) > 1 else np.array([-np.inf])
        )
        queues.append(
            [
                unit
                for unit in cluster[np.argsort(-likeness, kind="stable")].tolist()
                if unit in candidates
            ]
        )
    order = [queue.pop(0) for queue in queues if queue]
    while any(queues):
        left = [[unit for unit in cluster.tolist() if unit not in order] for cluster in members]
        waiting = [c for c in range(len(queues)) if queues[c]]
        order.append(queues[max(waiting, key=lambda c: _mean_pair(similarity, left[c]))].pop(0))
    return order


def _mean_pair(similarity: np.ndarray, units: list[int]) -> float:
    if len(units) < 2:
        return -math.inf
    return float(similarity[np.ix_(units, units)][np.triu_indices(len(units), 1)].mean())


def clusters_for(score: float) -> int:
    return 2 if score >= 1.0 else 3 if score >= 0.7 else 4


def _similarity(search: Search) -> np.ndarray:
    return _finite(search.evaluator.similarity())


def _finite(similarity: np.ndarray) -> np.ndarray:
    if not np.isfinite(similarity).all():
        raise ArithmeticError("the similarity of the dense model's states is not finite")
    return similarity
