"""Similarity methods: they choose by the states of one dense forward pass, and score the result.

S_ij is the mean over calibration tokens of cosine(h_i, h_j). h_i is the state before unit i, and
h_U the state after the last unit, before the final norm.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from typing import Annotated

import numpy as np

from .enumeration import windows
from .registry import Allowed, CountOrAuto, algorithm
from .sizes import as_removed
from .task import Removed, Search

Variant = Annotated[str, Allowed(choices=("paper", "lorp"))]


@algorithm(needs_sklearn=True)
def lorp(search: Search, clusters: CountOrAuto = 0) -> Removed:
    """Cluster the units by the similarity of their inputs; remove the most redundant ones.

    RLS is -log2(mean_(i<j) S_ij) over h_0 .. h_(U-1). It decides the number of clusters: 2 if RLS
    >= 1.0, 3 if >= 0.7, else 4 (at most U). Spectral clustering on (S + 1) / 2 makes the clusters,
    in order of their first unit. The first and the last unit are protected. The redundancy r(l) is
    the mean of S_lm over the other members m of l's cluster, -inf for a single member. Each cluster
    queues its unprotected members by r, descending. Stage 1 removes the front of each queue, in
    order of depth, until k units are removed. Stage 2 repeats, until k units are removed: it takes
    the cluster with the highest mean pairwise S over its remaining members (-inf below two), and
    removes the front of its queue. If k leaves no other choice, the last unit is removed too, and
    then the first.

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
    return as_removed([*order, *last_resort][: search.num_remove])


@algorithm
def shortgpt(search: Search, variant: Variant = "paper") -> Removed:
    """Remove the k units of lowest Block Influence, BI_i = 1 - S_(i, i+1).

    The variant "lorp" spares the first and the last unit, as the baseline of that paper does: it
    protects block 0 and never scores the last. If k leaves no other choice, the last unit is
    removed too, and then the first.

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
    return as_removed(order[: search.num_remove])


@algorithm
def streamline(
    search: Search, variant: Annotated[str, Allowed(choices=("paper", "lorp", "gromov"))] = "paper"
) -> Removed:
    """Remove the window of k units, i .. i+k-1, whose ends are most alike: highest S_(i, i+k).

    No replacement layer is trained. The variant "lorp" takes the windows i = 1 .. U-k-1 only, as
    the baseline of that paper does, or all windows if these are none. The variant "gromov" takes
    the window with the lowest angular distance arccos(cosine) / pi, averaged over the last token of
    each sequence (arXiv 2403.17887). A window that touches a protected unit is not a candidate. If
    protection leaves no window, windows step over protected units.

    Source: LLM-Streamline (arXiv 2403.19135).
    Cost: 1 (and one forward pass with all states).
    Options:
        variant: paper; lorp: leave out windows that hold the first or the last unit; gromov:
            angular distance.
    """
    search.plan([1])
    allowed = windows(search.candidates, search.num_remove)
    if variant == "lorp":
        ends = {0, search.num_units - 1}
        allowed = [window for window in allowed if not ends & {*window}] or allowed
    similarity = (
        -_finite(search.evaluator.angular_distance())
        if variant == "gromov"
        else _similarity(search)
    )
    return max(allowed, key=lambda window: similarity[window[0], window[-1] + 1] if window else 1.0)


def redundancy_score(similarity: np.ndarray) -> float:
    """Compute RLS = -log2 of the mean of S over pairs; +inf if that mean is not above 0."""
    mean = similarity[np.triu_indices(len(similarity), 1)].mean()
    return float(-math.log2(mean)) if mean > 0 else math.inf


def cluster_units(similarity: np.ndarray, count: int) -> np.ndarray:
    """Cluster units spectrally on (S + 1) / 2.

    Returns:
        int[U], the label of each unit. Labels are in the order of each cluster's first unit.
    """
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
        warnings.simplefilter("ignore")  # equal states give fewer distinct points than clusters
        labels = clustering.fit_predict(affinity)
    first = {label: unit for unit, label in reversed(list(enumerate(labels)))}
    rank = {label: position for position, label in enumerate(sorted(first, key=first.__getitem__))}
    return np.array([rank[label] for label in labels])


def lorp_order(similarity: np.ndarray, labels: np.ndarray, candidates: Iterable[int]) -> list[int]:
    """Order the candidates as LoRP's two stages remove them."""
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
        remaining = [
            [unit for unit in cluster.tolist() if unit not in order] for cluster in members
        ]
        waiting = [c for c in range(len(queues)) if queues[c]]
        order.append(
            queues[max(waiting, key=lambda c: _mean_pair(similarity, remaining[c]))].pop(0)
        )
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
        raise ArithmeticError("the similarity of the whole model's states is not finite")
    return similarity
