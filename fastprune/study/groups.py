"""The best candidate for each group of samples, and the gain over the best one for all."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..errors import InputError, shown
from ..objectives import Difference
from ..validate import check_integer

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

LEAST_SAMPLES = 4  # of a group: two choose, and two judge, which a standard error needs


@dataclass(frozen=True)
class GroupWinner:
    """The best candidate for one group.

    Attributes:
        group: The group's label.
        candidate: Its row among the losses.
        gain: The loss of the best candidate for all, less this one's, on the group's judging
            samples, with the paired standard error.
    """

    group: Hashable
    candidate: int
    gain: Difference


@dataclass(frozen=True)
class Winners:
    """The best candidate for all samples, and the best one for each group.

    Attributes:
        best: The best candidate for all, a row of the losses.
        groups: A winner for each group, in the order in which their labels first occur.
        gain: The gain on all judging samples when each goes to its group's winner.

    Examples:
        >>> import numpy as np
        >>> import fastprune as fp
        >>> losses = np.array([[1.0, 1.0, 1.0, 1.0], [3.0, 3.0, 3.0, 3.0]])
        >>> fp.best_by_group(losses, ["a"] * 4).best
        0
    """

    best: int
    groups: list[GroupWinner]
    gain: Difference


def best_by_group(sample_losses: ArrayLike, groups: Iterable[Hashable], seed: int = 0) -> Winners:
    """Choose the best candidate for all samples and for each group, and measure the gain.

    A winner looks better than it is on the samples that chose it. So each group is cut into two
    random halves: the first chooses, by the lowest mean loss, and the second judges. A router that
    sends each sample to its group's candidate gains `Winners.gain` (PuDDing, arXiv 2502.04348;
    IG-Pruning, arXiv 2511.02213).

    Args:
        sample_losses: float64[N, S], as `Evaluator.score_samples` returns them. Samples count
            alike. A candidate without finite losses on the choosing samples never wins.
        groups: S labels, such as the domain of each text or the kind of each question.
        seed: Decides the halves.

    Returns:
        The candidates and their gains, in units of the loss; above 0 is better than one for all.

    Raises:
        InputError: The losses have another shape, the number of labels is not S, a group has fewer
            than 4 samples, or no candidate has finite losses.

    Examples:
        >>> import numpy as np
        >>> import fastprune as fp
        >>> losses = np.array([[0.0, 0.0, 0.0, 0.0, 5.0, 5.0, 5.0, 5.0], [2.0] * 8])
        >>> winners = fp.best_by_group(losses, ["a"] * 4 + ["b"] * 4)
        >>> winners.best, [(of.group, of.candidate, of.gain.value) for of in winners.groups]
        (1, [('a', 0, 2.0), ('b', 1, 0.0)])
    """
    losses, members = _check(sample_losses, groups)
    rng = np.random.default_rng(check_integer("seed", seed, least=0))
    chooses, judges = [], []
    for samples in members.values():
        order = rng.permutation(samples)
        chooses.append(order[: len(order) // 2])
        judges.append(order[len(order) // 2 :])
    best = _lowest(losses, np.concatenate(chooses))
    winners, gains = [], []
    for group, choosing, judging in zip(members, chooses, judges, strict=True):
        candidate = _lowest(losses, choosing)
        gains.append(_difference(losses[best, judging] - losses[candidate, judging]))
        winners.append(GroupWinner(group, candidate, gains[-1]))
    counts = np.array([gain.num_samples for gain in gains])
    shares = counts / counts.sum()
    error = np.sqrt(np.sum((shares * [gain.error for gain in gains]) ** 2))
    value = np.sum(shares * [gain.value for gain in gains])
    return Winners(best, winners, Difference(float(value), float(error), int(counts.sum())))


def _check(
    sample_losses: ArrayLike, groups: Iterable[Hashable]
) -> tuple[np.ndarray, dict[Hashable, list[int]]]:
    """The losses float64[N, S], and the samples of each group."""
    losses = np.asarray(sample_losses, dtype=np.float64)
    if losses.ndim != 2 or not losses.size:
        raise InputError(
            f"sample_losses must have shape [N, S], as score_samples gives it, not "
            f"{list(losses.shape)}"
        )
    members: dict[Hashable, list[int]] = {}
    for number, group in enumerate(groups):
        members.setdefault(group, []).append(number)
    labels = sum(map(len, members.values()))
    if labels != losses.shape[1]:
        raise InputError(f"groups has {labels} labels, but there are {losses.shape[1]} samples")
    for group, samples in members.items():
        if len(samples) < LEAST_SAMPLES:
            raise InputError(
                f"group {shown(group)} has {len(samples)} samples; at least {LEAST_SAMPLES} are "
                f"needed, half to choose and half to judge"
            )
    return losses, members


def _lowest(losses: np.ndarray, samples: np.ndarray) -> int:
    """The candidate of lowest mean loss on some samples; the first of equals."""
    means = losses[:, samples].mean(axis=1)
    if not np.isfinite(means).any():
        raise InputError("sample_losses: no candidate has finite losses")
    return int(np.argmin(np.where(np.isfinite(means), means, np.inf)))


def _difference(gains: np.ndarray) -> Difference:
    error = gains.std(ddof=1) / np.sqrt(len(gains))
    return Difference(float(gains.mean()), float(error), len(gains))
