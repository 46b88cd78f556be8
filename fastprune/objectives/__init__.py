"""Objectives: sums over continuations -> losses -> metrics. Read `base` first."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from .base import Difference, Objective
from .dense import Agreement, CosineDistance, KLDivergence, NormalizedMSE
from .tasks import TaskAccuracy, TaskLikelihood, TaskMargin
from .text import BytePerplexity, Perplexity, WordPerplexity

__all__ = [
    "OBJECTIVES",
    "Agreement",
    "BytePerplexity",
    "CosineDistance",
    "Difference",
    "KLDivergence",
    "NormalizedMSE",
    "Objective",
    "Perplexity",
    "TaskAccuracy",
    "TaskLikelihood",
    "TaskMargin",
    "WordPerplexity",
    "format_size",
    "no_judge",
    "objective_class",
]

OBJECTIVES = {
    objective.name: objective
    for objective in (
        Perplexity,
        TaskMargin,
        TaskLikelihood,
        TaskAccuracy,
        KLDivergence,
        Agreement,
        CosineDistance,
        NormalizedMSE,
        WordPerplexity,
        BytePerplexity,
    )
}


def objective_class(name: str) -> type[Objective]:
    """The objective of this name; for a foreign name, `Objective`, whose metric is the loss."""
    return OBJECTIVES.get(name, Objective)


def no_judge(described: Mapping[str, Any], dense_loss: float) -> str:
    """Why an objective judges no mask on its data, as a sentence; '' if it does judge.

    A whole model less than two standard errors above chance says nothing about masks.

    Args:
        described: `Objective.describe()`, or its entries name, chance and num_samples.
        dense_loss: of the whole model. The error of a share of questions p is
            sqrt(p (1 - p) / (S - 1)).

    Examples:
        >>> from fastprune.objectives import no_judge
        >>> no_judge({"name": "accuracy", "chance": 25.0, "num_samples": 40}, 0.775)
        'accuracy is no judge: whole model 22.5 ± 6.7 %, not two errors above chance (25.0 %)'
    """
    chance, samples = described["chance"], described["num_samples"]
    if chance is None or not 0 <= dense_loss <= 1:
        return ""
    objective = objective_class(described["name"])
    error = math.sqrt(dense_loss * (1 - dense_loss) / (samples - 1)) if samples > 1 else math.inf
    above = objective.metric(dense_loss) - chance
    if above > 0 and above >= 2 * abs(objective.slope(dense_loss)) * error:
        return ""
    whole = objective.format(dense_loss, error, named=False)
    return (
        f"{objective.metric_name} is no judge: whole model {whole}, not two errors above chance "
        f"({chance:.1f} {objective.unit})"
    )


def format_size(num_samples: int, num_tokens: int) -> str:
    """How much data an objective is calibrated on, in words."""
    return f"{num_samples} samples, {num_tokens:,} tokens"
