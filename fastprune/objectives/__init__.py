"""Objectives turn sums over continuations into losses and metrics. Read `base` first."""

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
    """The objective of this name; for an unknown name `Objective`, whose metric is the loss."""
    return OBJECTIVES.get(name, Objective)


def no_judge(described: Mapping[str, Any], dense_loss: float) -> str:
    """Explain in a sentence why an objective cannot judge masks on its data; '' if it can.

    If the whole model is less than two standard errors above chance, its metric says nothing about
    masks.

    Args:
        described: `Objective.describe()`, or its entries name, chance and num_samples.
        dense_loss: The loss of the whole model, a share p of questions. The standard error of p
            is sqrt(p (1 - p) / (S - 1)) over S questions.

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
    metric = objective.format(dense_loss, error, named=False)
    return (
        f"{objective.metric_name} is no judge: whole model {metric}, not two errors above chance "
        f"({chance:.1f} {objective.unit})"
    )


def format_size(num_samples: int, num_tokens: int) -> str:
    """The size of calibration data, in words."""
    return f"{num_samples} samples, {num_tokens:,} tokens"
