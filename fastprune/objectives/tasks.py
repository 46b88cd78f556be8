"""Objectives on questions with choices: margin, likelihood, accuracy."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, get_args

import numpy as np

from ..data import Tasks, TokenBatch
from ..errors import InputError
from ..validate import check_one_of
from .base import Objective, Share

Normalization = Literal["mean", "sum"]
AccuracyNormalization = Literal["sum", "characters", "bytes", "mean"]
Weighting = Literal["question", "choices"]


class TaskMargin(Objective):
    """The margin of the right choice's log-likelihood over the wrong ones', in nats.

    The loss is minus the mean over questions of ll(correct) - mean over the wrong choices of ll
    (PuDDing, arXiv 2502.04348). ll of a choice adds log p of its tokens, given the prompt and the
    choice's earlier tokens. A sample is a question.

    Args:
        tasks: The questions.
        normalization: "mean" divides ll by the choice's number of tokens; "sum" does not.
        weighting: "question" gives every question the same weight. "choices" weighs a question of
            C choices by C - 1, as that paper's code does, which sums (C - 1) ll(correct) -
            sum ll(wrong). Both are means, and equal if all questions have equally many choices.

    Raises:
        InputError: The value is not Tasks, or an option has another value.

    Examples:
        >>> import numpy as np
        >>> import fastprune as fp
        >>> question = [([1, 2, 3], 2), ([1, 2, 4, 5], 2)]  # the second is right
        >>> batch, lengths = fp.TokenBatch.from_continuations([question]), np.array([3, 8])
        >>> tasks = fp.Tasks(batch, np.array([0, 0]), np.array([1]), lengths, lengths)
        >>> fp.TaskMargin(tasks).loss(np.array([[3.0, 4.0]]))
        array([-1.])
    """

    name = "margin"
    meaning = (
        "mean margin in log-likelihood of the right choice of a question over the wrong ones; "
        "above 0 if the right ones are likelier"
    )
    metric_name = "margin"
    unit = "nats"
    higher_is_better = True
    digits = 4
    data = "tasks"
    settings: ClassVar = {
        "normalization": get_args(Normalization),
        "weighting": get_args(Weighting),
    }

    def __init__(
        self,
        tasks: Tasks,
        normalization: Normalization = "mean",
        weighting: Weighting = "question",
    ):
        tasks = check_tasks(tasks, type(self))
        check_one_of("normalization", normalization, self.settings["normalization"])
        check_one_of("weighting", weighting, self.settings["weighting"])
        self.tasks, self.normalization, self.weighting = tasks, normalization, weighting
        self.batch, self.sample = tasks.batch, tasks.question
        wrong = np.bincount(tasks.question) - 1
        self.weight = -1 / wrong[tasks.question]
        self.weight[tasks.answer] = 1
        if normalization == "mean":
            self.weight = self.weight / self.batch.target_counts
        share = wrong if weighting == "choices" else np.ones(tasks.num_questions)
        self.sample_weight = share / share.sum()

    @property
    def content_hash(self) -> str:
        return f"{self.tasks.content_hash}-{self.normalization}-{self.weighting}"


class TaskLikelihood(Objective):
    """The log-likelihood of the right choice, in nats.

    The loss is minus the mean over questions of ll(correct), with ll as in TaskMargin. It is
    PuDDing's other loss (arXiv 2502.04348). Wrong choices do not run. A sample is a question.

    Args:
        tasks: The questions.
        normalization: "mean" divides ll by the choice's number of tokens; "sum" does not.

    Raises:
        InputError: The value is not Tasks, or normalization has another value.

    Examples:
        >>> import numpy as np
        >>> import fastprune as fp
        >>> question = [([1, 2, 3], 2), ([1, 2, 4, 5], 2)]  # the second is right
        >>> batch, lengths = fp.TokenBatch.from_continuations([question]), np.array([3, 8])
        >>> tasks = fp.Tasks(batch, np.array([0, 0]), np.array([1]), lengths, lengths)
        >>> fp.TaskLikelihood(tasks).loss(np.array([[4.0]]))
        array([2.])
    """

    name = "likelihood"
    meaning = "mean log-likelihood of the right choice of a question"
    metric_name = "log-likelihood"
    unit = "nats"
    higher_is_better = True
    digits = 4
    data = "tasks"
    settings: ClassVar = {"normalization": get_args(Normalization)}

    def __init__(self, tasks: Tasks, normalization: Normalization = "mean"):
        tasks = check_tasks(tasks, type(self))
        check_one_of("normalization", normalization, self.settings["normalization"])
        self.tasks, self.normalization = tasks, normalization
        self.batch = TokenBatch.from_continuations(
            [[_sequence(tasks.batch, answer)] for answer in tasks.answer]
        )
        self.sample = np.arange(tasks.num_questions)
        self.weight = (
            1 / self.batch.target_counts
            if normalization == "mean"
            else np.ones(tasks.num_questions)
        )
        self.sample_weight = np.full(tasks.num_questions, 1 / tasks.num_questions)

    @property
    def content_hash(self) -> str:
        return f"{self.batch.content_hash}-{self.normalization}"


class TaskAccuracy(Share):
    """The share of questions whose most likely choice is wrong: 1 - accuracy.

    Ties go to the lower index. A sample is a question, with the loss 0 or 1.

    Args:
        tasks: The questions.
        normalization: "sum" compares summed log-likelihoods (`acc` of lm-evaluation-harness).
            "characters" divides each by its choice's length in characters (`acc_norm`), "bytes" by
            its length in UTF-8 bytes (`acc_bytes`), both without the delimiter. "mean" divides by
            the choice's number of tokens.

    Raises:
        InputError: The value is not Tasks, or normalization has another value.

    Examples:
        >>> import numpy as np
        >>> import fastprune as fp
        >>> question = [([1, 2, 3], 2), ([1, 2, 4, 5], 2)]  # the second is right
        >>> batch, lengths = fp.TokenBatch.from_continuations([question]), np.array([3, 8])
        >>> tasks = fp.Tasks(batch, np.array([0, 0]), np.array([1]), lengths, lengths)
        >>> fp.TaskAccuracy(tasks).loss(np.array([[3.0, 4.0]]))
        array([1.])
        >>> fp.TaskAccuracy(tasks, "mean").loss(np.array([[3.0, 4.0]]))
        array([0.])
    """

    name = "accuracy"
    meaning = "the share of questions whose likeliest choice is right"
    metric_name = "accuracy"
    data = "tasks"
    settings: ClassVar = {"normalization": get_args(AccuracyNormalization)}
    differentiable = False

    def __init__(self, tasks: Tasks, normalization: AccuracyNormalization = "sum"):
        tasks = check_tasks(tasks, type(self))
        lengths: dict[str, Any] = {
            "sum": 1,
            "characters": tasks.choice_characters,
            "bytes": tasks.choice_bytes,
            "mean": tasks.batch.target_counts,
        }
        check_one_of("normalization", normalization, self.settings["normalization"])
        self.tasks, self.normalization = tasks, normalization
        self.batch, self.sample = tasks.batch, tasks.question
        self.weight = np.ones(len(tasks.question)) / lengths[normalization]
        self.sample_weight = np.full(tasks.num_questions, 1 / tasks.num_questions)
        self.chance = float(100 * np.mean(1 / np.bincount(tasks.question)))

    @property
    def content_hash(self) -> str:
        return f"{self.tasks.content_hash}-{self.normalization}"

    def sample_losses(self, sums: np.ndarray) -> np.ndarray:
        nll = sums * self.weight
        losses = np.empty((len(sums), self.num_samples))
        for s, choices in enumerate(np.split(np.arange(len(self.sample)), self._starts[1:])):
            best = nll[:, choices].argmin(axis=1)  # the first of equals
            losses[:, s] = choices[best] != self.tasks.answer[s]
        # a choice without a finite likelihood can neither win nor lose: the question has no answer
        losses[~np.isfinite(self._by_sample(nll))] = np.nan
        return losses


def _sequence(batch: TokenBatch, continuation: int) -> tuple[np.ndarray, int]:
    """The tokens of one continuation, trunk included, and the index of its first target."""
    row = batch.continuation_row[continuation]
    branch = continuation - np.searchsorted(batch.continuation_row, row) + 1
    inside = slice(batch.row_starts[row], batch.row_starts[row + 1])
    ids = batch.ids[inside][np.isin(batch.branch[inside], (0, branch))]
    return ids, len(ids) - int(batch.target_counts[continuation])


def check_tasks(tasks: object, objective: type) -> Tasks:
    if not isinstance(tasks, Tasks):
        raise InputError(
            f"{objective.__name__} takes Tasks (load_tasks), not {type(tasks).__name__}"
        )
    return tasks
