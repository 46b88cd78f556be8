"""Objectives that compare with the whole model: distributions, choices of tokens, final states."""

from __future__ import annotations

import dataclasses
import itertools
from typing import ClassVar, Literal, get_args

import numpy as np

from ..data import Tasks, TokenBatch
from ..errors import InputError
from ..validate import check_one_of
from .base import Objective, Share, check_batch

Decoding = Literal["sampling", "greedy"]
Positions = Literal["targets", "all"]
MOMENTS = 3  # |h - h'|^2, |h'|^2, |h|^2; final states h of the whole model, h' of the masked one


class KLDivergence(Objective):
    """The KL divergence of the masked model's predictions from the whole model's, in nats.

    The loss is the mean over positions of KL(p || q) = sum_v p(v) (log p(v) - log q(v)), for p of
    the whole and q of the masked model. A sample is a row. The objective is EvoPress's (arXiv
    2410.14649).

    Args:
        batch: Text, or Tasks.
        positions: "targets" counts the positions that predict a target, as EvoPress does. "all"
            counts every position of a row of text, the last one too, as FinerCut's code does.

    Raises:
        InputError: The batch is of another kind, positions has another value, or positions="all"
            is given for questions.

    Examples:
        >>> import numpy as np
        >>> import fastprune as fp
        >>> batch = fp.TokenBatch.from_ids([[5, 6, 7], [5, 8]])  # 3 targets, 5 tokens
        >>> fp.KLDivergence(batch).loss(np.array([[0.5, 0.25]]))
        array([0.25])
        >>> fp.KLDivergence(batch, positions="all").loss(np.array([[0.5, 0.25]]))
        array([0.15])
    """

    name = "kl"
    meaning = (
        "mean divergence of the next-token distribution from that of the whole model; "
        "0 if nothing is removed"
    )
    metric_name = "KL divergence"
    unit = "nats"
    measure = "kl"
    compares_with_dense = True
    differentiable = False  # the gradient vanishes at the whole model, whose divergence is least
    settings: ClassVar = {"positions": get_args(Positions)}

    def __init__(self, batch: TokenBatch | Tasks, positions: Positions = "targets"):
        questions = isinstance(batch, Tasks)
        batch = check_batch(batch.batch if isinstance(batch, Tasks) else batch, type(self))
        check_one_of("positions", positions, get_args(Positions))
        if positions == "all" and (questions or batch.row_is_tree.any()):
            raise InputError('positions="all" takes plain text, not questions')
        self.positions = positions
        self.batch = _positions_as_targets(batch, every=positions == "all")
        self._average(self.batch.target_counts)


class Agreement(Share, KLDivergence):
    """The share of the masked model's draft tokens that the whole model rejects.

    Self-speculative decoding looks for the draft that agrees most (arXiv 2309.08168). The metric is
    the acceptance in %. Positions and samples are those of KLDivergence. At each position the
    tokens before it are the text's own.

    Args:
        batch: Text, or Tasks.
        decoding: "sampling" accepts a token drawn from the draft's distribution q with
            probability sum_v min(p(v), q(v)), for p of the whole model (Leviathan et al., arXiv
            2211.17192). "greedy" accepts the draft's most likely token if the whole model's is
            the same.

    Raises:
        InputError: The batch is of another kind, or decoding has another value.

    Examples:
        >>> import numpy as np
        >>> import fastprune as fp
        >>> batch = fp.TokenBatch.from_ids([[5, 6, 7], [5, 8]])
        >>> objective = fp.Agreement(batch)
        >>> objective.format(objective.loss(np.array([[0.5, 0.25]]))[0])
        'acceptance 75.0 %'
    """

    name = "agreement"
    meaning = (
        "the share of tokens, drafted without the removed units, that the whole model accepts; "
        "100 if nothing is removed"
    )
    metric_name = "acceptance"
    settings: ClassVar = {"decoding": get_args(Decoding)}

    def __init__(self, batch: TokenBatch | Tasks, decoding: Decoding = "sampling"):
        super().__init__(batch)
        check_one_of("decoding", decoding, self.settings["decoding"])
        self.decoding = decoding
        self.measure = "rejection" if decoding == "sampling" else "other_token"

    @property
    def content_hash(self) -> str:
        return f"{self.batch.content_hash}-{self.decoding}"


class _StateDistance(KLDivergence):
    """A distance of final states: position by position or, flattened, of a sample as one vector."""

    settings: ClassVar = {"flatten": (False, True)}

    def __init__(self, batch: TokenBatch | Tasks, flatten: bool = False):
        super().__init__(batch)
        self.flatten = flatten
        if flatten:
            self.measure = "moments"
            self.batch = _moments_as_targets(self.batch)
            self.sample = np.repeat(np.arange(self.batch.num_rows), MOMENTS)
            self.weight = np.ones(len(self.sample))
            self.sample_weight = np.full(self.batch.num_rows, 1 / self.batch.num_rows)

    def sample_losses(self, sums: np.ndarray) -> np.ndarray:
        if not self.flatten:
            return super().sample_losses(sums)
        moments = sums.reshape(len(sums), -1, MOMENTS)
        with np.errstate(divide="ignore", invalid="ignore"):  # samples that were not asked for
            return self._distance(*np.moveaxis(moments, -1, 0))

    @staticmethod
    def _distance(apart: np.ndarray, masked: np.ndarray, dense: np.ndarray) -> np.ndarray:
        """The distance, [N, S], from |h - h'|^2, |h'|^2 and |h|^2, [N, S] each."""
        raise NotImplementedError


class CosineDistance(_StateDistance):
    """The cosine distance between the final states of the masked and the whole model.

    The loss is the mean over positions of 1 - cosine. Final states are those that the head reads,
    after the final norm. Positions and samples are those of KLDivergence. Puzzletron (NVIDIA
    ModelOpt) ranks blocks by this measure, among others.

    Args:
        batch: Text, or Tasks.
        flatten: Take all states of a sample as one vector, the last position included, and weigh
            samples equally, as Puzzletron's code does.

    Raises:
        InputError: The batch is of another kind.

    Examples:
        >>> import numpy as np
        >>> import fastprune as fp
        >>> batch = fp.TokenBatch.from_ids([[5, 6, 7], [5, 8]])
        >>> fp.CosineDistance(batch).loss(np.array([[0.5, 0.25]]))
        array([0.25])
    """

    name = "cosine"
    meaning = (
        "mean of 1 - cosine between the final states and those of the whole model; 0 if "
        "nothing is removed"
    )
    metric_name = "cosine distance"
    unit = ""
    measure = "cosine"

    @staticmethod
    def _distance(apart: np.ndarray, masked: np.ndarray, dense: np.ndarray) -> np.ndarray:
        # 1 - (|h|^2 + |h'|^2 - |h - h'|^2) / (2 |h| |h'|), exactly 0 if h' = h
        lengths = np.sqrt(masked), np.sqrt(dense)
        return (apart - (lengths[0] - lengths[1]) ** 2) / (2 * lengths[0] * lengths[1])


class NormalizedMSE(_StateDistance):
    """The normalized squared distance between the final states of the masked and the whole model.

    The loss is the mean over positions of |h - h'|^2 / |h|^2, for the final states h of the whole
    and h' of the masked model. Every position counts alike. Final states, positions and samples are
    those of CosineDistance.

    Args:
        batch: Text, or Tasks.
        flatten: Divide sums over all positions of a sample, instead of each position, and weigh
            samples equally, as Puzzletron does (NVIDIA ModelOpt). Nemotron Elastic (arXiv
            2511.16664) does so with predictions instead of states.

    Raises:
        InputError: The batch is of another kind.

    Examples:
        >>> import numpy as np
        >>> import fastprune as fp
        >>> batch = fp.TokenBatch.from_ids([[5, 6, 7], [5, 8]])
        >>> fp.NormalizedMSE(batch).loss(np.array([[0.5, 0.25]]))
        array([0.25])
    """

    name = "nmse"
    meaning = (
        "mean squared distance of the final states from those of the whole model, by the square "
        "of their length; "
        "0 if nothing is removed"
    )
    metric_name = "normalized MSE"
    unit = ""
    measure = "nmse"

    @staticmethod
    def _distance(apart: np.ndarray, masked: np.ndarray, dense: np.ndarray) -> np.ndarray:
        return apart / dense


def _positions_as_targets(batch: TokenBatch, every: bool = False) -> TokenBatch:
    """The same rows, in which each predicting position counts once, towards its own row.

    With `every`, each position counts, also the last one of a row.
    """
    source, first = np.unique(batch.target_source, return_index=True)
    tokens = batch.target_token[first]
    if every:
        source = np.arange(batch.num_tokens)
        tokens = np.zeros_like(source)  # the last position of a row has no next token
    rows = np.arange(batch.num_rows)
    return dataclasses.replace(
        batch,
        target_source=source,
        target_token=tokens,
        target_continuation=np.searchsorted(batch.row_starts, source, side="right") - 1,
        continuation_row=rows,
    )


def _moments_as_targets(batch: TokenBatch) -> TokenBatch:
    """The same rows, in which every position is a target for each moment of its row.

    A row has a continuation for each moment. The token of a target is the number of the moment:

        row of 2 tokens:   source 0 1 0 1 0 1   token 0 0 1 1 2 2   continuation 0 0 1 1 2 2
    """
    lengths = np.diff(batch.row_starts)
    spans = [np.arange(*span) for span in itertools.pairwise(batch.row_starts)]
    moments = np.tile(np.arange(MOMENTS), batch.num_rows)
    return dataclasses.replace(
        batch,
        target_source=np.concatenate([np.tile(span, MOMENTS) for span in spans]),
        target_token=np.repeat(moments, np.repeat(lengths, MOMENTS)),
        target_continuation=np.repeat(np.arange(len(moments)), np.repeat(lengths, MOMENTS)),
        continuation_row=np.repeat(np.arange(batch.num_rows), MOMENTS),
    )
