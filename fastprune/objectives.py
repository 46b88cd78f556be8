"""Objectives: which tokens count, which measure each has, and how the measurements reduce to a
loss.

An objective asks the engine for one number per target (`measure`): the negative log-likelihood of
the target token ("nll"), or how far its source is from the dense model's: in distribution ("kl",
"rejection"), in the most likely token ("other_token") or in state ("cosine", "nmse"). The engine
sums these over each continuation, float64[N, C], and all further steps here are small and plain
NumPy.

Searches minimise a loss; people read its metric. `Objective.format` is the one function that prints
a loss: under its metric, with the standard error and the unit. Text has "accuracy 54.0 ± 2.2 %";
cells of tables leave out the name, and the column has it, with the direction, as `header`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, get_args

import numpy as np

from .data import Tasks, TokenBatch
from .errors import InputError
from .validate import check_one_of

Normalization = Literal["mean", "sum"]
AccuracyNormalization = Literal["sum", "characters", "bytes", "mean"]
Weighting = Literal["question", "choices"]
Decoding = Literal["sampling", "greedy"]
Positions = Literal["targets", "all"]
MOMENTS = 3  # |h - h'|^2, |h'|^2, |h|^2 of final states, h the dense model's


class Objective:
    """A loss per sample, linear in the sums over continuations: L_s = sum over c in s of weight_c *
    sum_c.

    batch: the tokens. measure: a name of `measures.MEASURES`. sample int64[C]: the sample of each
    continuation, ascending. weight float64[C] as above. sample_weight float64[S]: the loss is the
    sum of sample_weight_s * L_s.
    data: "text" or "tasks", what its calibration file holds. compares_with_dense: whether the dense
    model is run once, to compare with. differentiable: whether it has a gradient at the dense model
    that says something. settings: the values that each of its own options may have.
    source: the origin of its data, in words, for those who read a study.
    metric_name, unit, higher_is_better: the quantity that users know the loss by, with its unit
    ("", "%" or "nats") and direction; `metric` computes it. meaning: of the metric, in words.
    digits: printed behind its point. chance: the metric's value of a model that guesses, or None if
    guessing has no value.
    """

    name: str
    data = "text"
    measure = "nll"
    compares_with_dense = False
    differentiable = True
    meaning = ""
    metric_name = "loss"
    unit = ""
    higher_is_better = False
    digits = 5
    chance: float | None = None
    settings: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    source = ""
    batch: TokenBatch
    sample: np.ndarray
    weight: np.ndarray
    sample_weight: np.ndarray

    @property
    def num_samples(self) -> int:
        return len(self.sample_weight)

    @classmethod
    def metric(cls, loss: float) -> float:
        """The value of the metric, in its unit.

        Args:
            loss: what `Evaluator.score` returns for one mask.

        Examples:
            >>> import fastprune as fp
            >>> fp.TaskAccuracy.metric(0.25), fp.Perplexity.metric(0.0)
            (75.0, 1.0)
        """
        return 0.0 - loss if cls.higher_is_better else loss

    @classmethod
    def slope(cls, loss: float) -> float:
        """The derivative of `metric` at a loss."""
        return -1.0 if cls.higher_is_better else 1.0

    @classmethod
    def format(cls, loss: float, error: float | None = None, named: bool = True) -> str:
        """A loss as users read it: the metric's name, value, standard error and unit.

        Args:
            loss: what `Evaluator.score` returns for one mask.
            error: the standard error of the loss. The metric's is |slope| times that (the delta
                method). None, infinity and NaN print no error.
            named: False leaves out the metric's name, for a table whose column has `header`.

        Examples:
            >>> import fastprune as fp
            >>> fp.TaskAccuracy.format(0.46, 0.022)
            'accuracy 54.0 ± 2.2 %'
            >>> fp.Perplexity.format(0.9523, named=False)
            '2.592'
        """
        name = f"{cls.metric_name} " * named
        if not math.isfinite(loss):
            return f"{name}{loss} (not finite)"
        text = cls._number(cls.metric(loss))
        if error is not None and math.isfinite(metric_error := abs(cls.slope(loss)) * error):
            text += f" ± {cls._number(metric_error)}"
        return f"{name}{text} {cls.unit}".rstrip()

    @classmethod
    def format_difference(cls, difference: Difference) -> str:
        """A difference of two masks' metrics, with its standard error.

        Examples:
            >>> import fastprune as fp
            >>> from fastprune.objectives import Difference
            >>> fp.TaskAccuracy.format_difference(Difference(-1.5, 1.0, num_samples=400))
            '-1.5 ± 1.0 points (not told apart; about 712 samples would tell)'
        """
        if not math.isfinite(difference.value):
            return "not finite"
        sign = "-" if difference.value < 0 else "+"
        text = f"{sign}{cls._number(abs(difference.value))}"
        if not math.isfinite(difference.error):
            return f"{text} {cls.difference_unit()}".rstrip()
        text = f"{text} ± {cls._number(difference.error)} {cls.difference_unit()}".rstrip()
        if difference.told_apart:
            return text
        needed = difference.samples_needed
        hint = "" if needed is None else f"; about {needed:,} samples would tell"
        return f"{text} (not told apart{hint})"

    @classmethod
    def header(cls) -> str:
        """The metric and its direction, for a column of a table or an axis of a figure."""
        unit = f", {cls.unit}" * bool(cls.unit)
        direction = "higher" if cls.higher_is_better else "lower"
        return f"{cls.metric_name}{unit} ({direction} is better)"

    @classmethod
    def record(cls, loss: float, prefix: str = "") -> dict[str, float]:
        """The loss and the metric, each under its own name, for a machine-readable file.

        Examples:
            >>> import fastprune as fp
            >>> fp.TaskAccuracy.record(0.25)
            {'loss': 0.25, 'accuracy': 75.0}
        """
        key = cls.metric_name.lower().replace(" ", "_").replace("-", "_")
        return {f"{prefix}loss": loss, f"{prefix}{key}": cls.metric(loss)}

    @classmethod
    def _number(cls, value: float) -> str:
        return f"{value:.{cls.digits}f}" if abs(value) < 1e6 else f"{value:.4g}"

    @classmethod
    def difference_unit(cls) -> str:
        """The unit of a difference of two metrics."""
        return "points" if cls.unit == "%" else cls.unit

    def __repr__(self) -> str:
        settings = "".join(f", {name}={getattr(self, name)!r}" for name in self.settings)
        return (
            f"{type(self).__name__}({self.num_samples} samples, {self.batch.num_tokens} "
            f"tokens{settings})"
        )

    def describe(self) -> dict[str, object]:
        """Plain values: name, settings, metric, calibration data, whether it compares with the
        dense model."""
        return {
            "name": self.name,
            "settings": {name: getattr(self, name) for name in self.settings},
            "metric": self.metric_name,
            "unit": self.unit,
            "higher_is_better": self.higher_is_better,
            "chance": self.chance,
            "meaning": self.meaning,
            "source": self.source,
            "num_samples": self.num_samples,
            "num_tokens": self.batch.num_tokens,
            "compares_with_dense": self.compares_with_dense,
        }

    @property
    def content_hash(self) -> str:
        """The hash of the calibration data; with `name` it determines the meaning of a score."""
        return self.batch.content_hash

    def sample_losses(self, sums: np.ndarray) -> np.ndarray:
        """Loss of each sample, float64[N, S], from sums over continuations, float64[N, C]."""
        return _sum_by_sample(sums * self.weight, self.sample)

    def loss(self, sums: np.ndarray) -> np.ndarray:
        """The loss of each mask, float64[N]."""
        return self.mean(self.sample_losses(sums))

    def mean(self, sample_losses: np.ndarray) -> np.ndarray:
        """The loss of each mask, float64[N], from the losses of all samples, float64[N, S]."""
        # one mask at a time: the order of summation must not depend on how many masks there are
        return np.array([np.sum(row * self.sample_weight) for row in sample_losses])

    @property
    def cuts_samples(self) -> bool:
        """Whether a sample can be read in part: a row of plain text, not a question."""
        batch = self.batch
        one_each = np.array_equal(batch.continuation_row, np.arange(batch.num_rows))
        return self.data == "text" and one_each and not batch.row_is_tree.any()

    def partial_loss(
        self, sums: np.ndarray, samples: np.ndarray, cut_targets: int | None = None
    ) -> np.ndarray:
        """The loss of each mask on some of the samples, float64[N], weighted by their own targets.

        Args:
            sums: Over all continuations, float64[N, C]; 0 for those of other samples. Where the
                last sample was cut, one column more holds the sum of its part.
            samples: int64[n], distinct.
            cut_targets: Targets in the part of the last sample that was read; None where it was
                read whole.

        Examples:
            >>> import numpy as np
            >>> import fastprune as fp
            >>> objective = fp.Perplexity(fp.TokenBatch.from_ids([[5, 6, 7], [5, 8], [5, 9, 6]]))
            >>> objective.partial_loss(np.array([[4.0, 5.0, 0.0]]), np.array([0, 1]))
            array([3.])
            >>> sums = np.array([[0.0, 5.0, 0.0, 1.0]])  # one target of the last row
            >>> objective.partial_loss(sums, np.array([1, 2]), cut_targets=1)
            array([3.])
        """
        num_continuations = len(self.sample)
        losses = self.sample_losses(sums[:, :num_continuations])[:, samples]
        weights = self.sample_weight[samples]
        if cut_targets is not None:
            row = samples[-1]
            share = cut_targets / self.batch.target_counts[row]
            losses[:, -1] = sums[:, num_continuations] * (self.weight[row] / share)
            weights[-1] *= share
        weights = weights / weights.sum()
        return np.array([np.sum(row * weights) for row in losses])

    def standard_error(self, sample_losses: np.ndarray) -> np.ndarray:
        """The standard error of each mask's loss over samples, float64[N].

        Samples count as drawn independently. Their weights w sum to 1, so that the loss is the mean
        L = sum of w_s L_s, and its error is sqrt(S / (S - 1) sum of w_s^2 (L_s - L)^2): the usual
        one for equal weights, and that of a ratio estimator for token counts.

        Args:
            sample_losses: of all samples, float64[N, S], as `Evaluator.score_samples` returns them.

        Returns:
            NaN for a single sample.

        Examples:
            >>> import numpy as np
            >>> import fastprune as fp
            >>> batch = fp.TokenBatch.from_ids([[5, 6, 7], [5, 8, 9]])
            >>> fp.Perplexity(batch).standard_error(np.array([[1.0, 3.0]]))
            array([1.])
        """
        if self.num_samples < 2:
            return np.full(len(sample_losses), np.nan)
        with np.errstate(invalid="ignore"):  # inf - inf: an infinite loss has no error
            rest = (sample_losses - self.mean(sample_losses)[:, None]) * self.sample_weight
        return np.sqrt((rest**2).sum(axis=1) * (self.num_samples / (self.num_samples - 1)))

    def _average(self, counts: np.ndarray) -> None:
        """Every sample averages over its own `counts` [S]; the loss averages over all of them
        together."""
        self.sample = np.arange(len(counts))
        self.weight = 1 / counts
        self.sample_weight = counts / counts.sum()

    def compare(self, sample_losses: np.ndarray, reference: np.ndarray) -> Difference:
        """How much a mask's metric is above another mask's on the same samples.

        The standard error is paired: of the differences by sample, after each loss is multiplied by
        the metric's slope at its own mask (the delta method).

        Args:
            sample_losses: of the mask on all samples, float64[S].
            reference: of the other mask, such as the whole model's, float64[S].
        """
        pair = np.stack([sample_losses, reference])
        losses = self.mean(pair)
        if not np.isfinite(losses).all():
            return Difference(math.nan, math.nan, self.num_samples)
        slopes = [self.slope(loss) for loss in losses.tolist()]
        value, base = (self.metric(loss) for loss in losses.tolist())
        errors = self.standard_error((pair[0] * slopes[0] - pair[1] * slopes[1])[None])
        return Difference(value - base, float(errors[0]), self.num_samples)


@dataclasses.dataclass(frozen=True)
class Difference:
    """How much the metric of one mask is above that of another, on the same samples.

    value, error: the difference and its paired standard error, in the metric's unit.
    num_samples: that both were measured on.

    >>> from fastprune.objectives import Difference
    >>> Difference(-1.5, 1.0, num_samples=400).told_apart
    False
    """

    value: float
    error: float
    num_samples: int

    @property
    def told_apart(self) -> bool:
        """Whether the difference is above two standard errors."""
        return abs(self.value) > 2 * self.error

    @property
    def samples_needed(self) -> int | None:
        """About how many such samples would make the difference two standard errors; None if no
        number would, or none is known."""
        if not self.value or not math.isfinite(self.value + self.error):
            return None
        needed = self.num_samples * (2 * self.error / abs(self.value)) ** 2
        return math.ceil(needed) if needed < 1e9 else None


class Perplexity(Objective):
    """Mean over target tokens of -log p(x_t | x_<t), in nats; perplexity is its exponential.

    A sample is a row; its loss is the mean over its own targets. Raises InputError for anything but
    a TokenBatch of plain text.

    >>> import numpy as np
    >>> import fastprune as fp
    >>> batch = fp.TokenBatch.from_ids([[5, 6, 7], [5, 8]])
    >>> fp.Perplexity(batch).loss(np.array([[1.5, 0.75]]))
    array([0.75])
    """

    name = "perplexity"
    meaning = "the exponential of the mean negative log-likelihood per token"
    metric_name = "perplexity"
    digits = 3

    def __init__(self, batch: TokenBatch):
        self.batch = _check_batch(batch, type(self))
        if self.batch.row_is_tree.any():
            raise InputError(
                "Perplexity takes plain text; for questions use TaskMargin, TaskLikelihood or "
                "TaskAccuracy"
            )
        self._average(self.batch.target_counts)

    @classmethod
    def metric(cls, loss: float) -> float:
        return math.exp(loss) if not loss >= 700 else math.inf

    @classmethod
    def slope(cls, loss: float) -> float:
        return cls.metric(loss)


class _TextPerplexity(Perplexity):
    """Perplexity per unit of text, which models of unlike tokenizers share."""

    cuts_samples = False  # a part of a row has no known share of its text
    counts: str  # the batch's attribute that counts the units of text of each row

    def __init__(self, batch: TokenBatch):
        super().__init__(batch)
        counts: np.ndarray | None = getattr(batch, self.counts)
        if counts is None:
            raise InputError(
                f"{type(self).__name__} takes text that load_text has read; token ids have no "
                f"known number of words and bytes"
            )
        if not counts.all():
            raise InputError(f"row {counts.argmin()} of the batch holds no text to count")
        self._average(counts)

    @property
    def content_hash(self) -> str:
        counts = np.asarray(self.sample_weight / self.weight, dtype="<f8").tobytes()
        return f"{self.batch.content_hash}-{hashlib.sha256(counts).hexdigest()[:16]}"


class WordPerplexity(_TextPerplexity):
    """Sum over targets of -log p, divided by the words of their text.

    The metric is its exponential, word_perplexity of lm-evaluation-harness. A word is a run of
    characters without white space. Words and bytes do not depend on a tokenizer, so models of
    unlike tokenizers can be compared on the same text. A sample is a window.

    Args:
        batch: Text from `load_text`, which counts words and bytes.

    Raises:
        InputError: The batch holds questions, or was made from token ids.

    Examples:
        >>> import fastprune as fp
        >>> from fastprune import demo
        >>> tokenizer = fp.load_model("demo").tokenizer
        >>> fp.WordPerplexity(fp.load_text(demo.TEXT, tokenizer, num_samples=4, seq_len=64))
        WordPerplexity(4 samples, 256 tokens)
    """

    name = "word_perplexity"
    meaning = "the exponential of the negative log-likelihood of the text per word"
    metric_name = "perplexity per word"
    counts = "row_words"


class BytePerplexity(_TextPerplexity):
    """Sum over targets of -log p, divided by the UTF-8 bytes of their text, as WordPerplexity.

    The metric is its exponential, byte_perplexity of lm-evaluation-harness.

    Args:
        batch: Text from `load_text`, which counts words and bytes.

    Raises:
        InputError: The batch holds questions, or was made from token ids.

    Examples:
        >>> import fastprune as fp
        >>> from fastprune import demo
        >>> tokenizer = fp.load_model("demo").tokenizer
        >>> fp.BytePerplexity(fp.load_text(demo.TEXT, tokenizer, num_samples=4, seq_len=64))
        BytePerplexity(4 samples, 256 tokens)
    """

    name = "byte_perplexity"
    meaning = "the exponential of the negative log-likelihood of the text per byte of UTF-8"
    metric_name = "perplexity per byte"
    digits = 4
    counts = "row_bytes"


class KLDivergence(Objective):
    """Mean over positions of KL(p || q) = sum_v p(v) (log p(v) - log q(v)), p the dense model, q
    the masked one.

    A sample is a row. The objective of EvoPress (arXiv 2410.14649).

    Args:
        batch: Text, or Tasks.
        positions: "targets" counts the positions that predict a target, as EvoPress does. "all"
            counts every position of a row of text, the last too, as FinerCut's code does.

    Raises:
        InputError: Another batch or value of positions, or positions="all" for questions.

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
        "0 where nothing is removed"
    )
    metric_name = "KL divergence"
    unit = "nats"
    measure = "kl"
    compares_with_dense = True
    differentiable = False  # the gradient vanishes at the dense model, whose divergence is least
    settings: ClassVar = {"positions": get_args(Positions)}

    def __init__(self, batch: TokenBatch | Tasks, positions: Positions = "targets"):
        questions = isinstance(batch, Tasks)
        batch = _check_batch(batch.batch if isinstance(batch, Tasks) else batch, type(self))
        check_one_of("positions", positions, get_args(Positions))
        if positions == "all" and (questions or batch.row_is_tree.any()):
            raise InputError('positions="all" takes plain text, not questions')
        self.positions = positions
        self.batch = _positions_as_targets(batch, every=positions == "all")
        self._average(self.batch.target_counts)


class _Share(Objective):
    """The loss is a share of failures; its metric is the share of successes in %."""

    unit = "%"
    higher_is_better = True
    digits = 1

    @classmethod
    def metric(cls, loss: float) -> float:
        return 100 * (1 - loss)

    @classmethod
    def slope(cls, loss: float) -> float:
        return -100.0


class Agreement(_Share, KLDivergence):
    """The share of the masked model's draft tokens that the whole model does not accept.

    Positions and samples are those of KLDivergence, each with the text's own tokens before it.

    decoding="sampling": a token drawn from the draft's distribution q is accepted with probability
    sum_v min(p(v), q(v)), p the whole model's (Leviathan et al., arXiv 2211.17192). "greedy": a
    draft's most likely token is accepted if the whole model's is the same. Self-speculative
    decoding looks for the draft that agrees most (arXiv 2309.08168). The metric is the acceptance
    in %. Raises InputError as KLDivergence does, and for another decoding.

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
    """A distance of final states, position by position, or flattened: of a sample's states as one
    vector."""

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
        """The distance from |h - h'|^2, |h'|^2 and |h|^2, [N, S] each."""
        raise NotImplementedError


class CosineDistance(_StateDistance):
    """Mean over positions of 1 - cosine between the masked model's final state and the dense one's.

    Final states are those that the head reads, after the final norm. Positions and samples as in
    KLDivergence. Among the measures by which Puzzletron ranks blocks (NVIDIA ModelOpt); with
    flatten=True, as its code has it, all states of a sample are one vector, the last position too,
    and every sample counts alike. Raises InputError as KLDivergence does.

    >>> import numpy as np
    >>> import fastprune as fp
    >>> batch = fp.TokenBatch.from_ids([[5, 6, 7], [5, 8]])
    >>> fp.CosineDistance(batch).loss(np.array([[0.5, 0.25]]))
    array([0.25])
    """

    name = "cosine"
    meaning = (
        "mean of 1 - cosine between the final states and those of the whole model; 0 where "
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
    """Mean over positions of |h - h'|^2 / |h|^2, h the dense model's final state and h' the masked
    one's.

    Final states, positions and samples as in CosineDistance. Every position counts alike. With
    flatten=True a sample's loss is the sum over all its positions of the one by that of the other,
    as in Puzzletron (NVIDIA ModelOpt), and every sample counts alike. Nemotron Elastic (arXiv
    2511.16664) does so with the models' predictions in the place of states. Raises InputError as
    KLDivergence does.

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
        "0 where nothing is removed"
    )
    metric_name = "normalized MSE"
    unit = ""
    measure = "nmse"

    @staticmethod
    def _distance(apart: np.ndarray, masked: np.ndarray, dense: np.ndarray) -> np.ndarray:
        return apart / dense


class TaskMargin(Objective):
    """Minus the mean likelihood margin: ll(correct) - mean over the wrong choices of ll (PuDDing,
    arXiv 2502.04348).

    ll of a choice is the mean (normalization="mean") or the sum ("sum") of log p over its tokens,
    given the prompt and the choice's earlier tokens. A sample is a question. Lower is better.

    weighting="question" gives every question the same weight; "choices" weighs one of C choices by
    C - 1, as that paper's code does by summing (C - 1) ll(correct) - sum ll(wrong). The sum is
    divided by the sum of C - 1, so that the loss is a mean, comparable with the other, and equal to
    it if all questions have as many choices.

    Raises InputError for anything but Tasks, and for another normalization or weighting.

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
        "above 0 where the right ones are likelier"
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
        tasks = _check_tasks(tasks, type(self))
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
    """Minus the mean over questions of ll(correct), ll as in TaskMargin (PuDDing's other loss,
    arXiv 2502.04348).

    Wrong choices are not run. A sample is a question. Raises InputError for anything but Tasks, and
    for another normalization.

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
        tasks = _check_tasks(tasks, type(self))
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


class TaskAccuracy(_Share):
    """1 - accuracy: the share of questions whose most likely choice is wrong; ties go to the lower
    index.

    normalization="sum" compares summed log-likelihoods (`acc` of lm-evaluation-harness);
    "characters" divides each by its choice's length in characters (`acc_norm`), "bytes" by that in
    UTF-8 bytes (`acc_bytes`), without the delimiter before it; "mean" by its number of tokens. A
    sample is a question (0 or 1). Raises InputError for anything but Tasks, and for another
    normalization.

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
        tasks = _check_tasks(tasks, type(self))
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
        starts = np.flatnonzero(np.diff(self.sample, prepend=-1))
        losses = np.empty((len(sums), self.num_samples))
        for s, choices in enumerate(np.split(np.arange(len(self.sample)), starts[1:])):
            best = nll[:, choices].argmin(axis=1)  # the first of equals
            losses[:, s] = choices[best] != self.tasks.answer[s]
        # a choice without a finite likelihood can neither win nor lose: the question has no answer
        losses[~np.isfinite(_sum_by_sample(nll, self.sample))] = np.nan
        return losses


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


def _sum_by_sample(values: np.ndarray, sample: np.ndarray) -> np.ndarray:
    """Sums of values [N, C] over the continuations of each sample, [N, S]."""
    starts = np.flatnonzero(np.diff(sample, prepend=-1))
    return np.add.reduceat(values, starts, axis=1)


def _sequence(batch: TokenBatch, continuation: int) -> tuple[np.ndarray, int]:
    """The tokens of one continuation, trunk included, and the index of its first target."""
    row = batch.continuation_row[continuation]
    number = continuation - np.searchsorted(batch.continuation_row, row) + 1  # of its branch
    inside = slice(batch.row_starts[row], batch.row_starts[row + 1])
    ids = batch.ids[inside][np.isin(batch.branch[inside], (0, number))]
    return ids, len(ids) - int(batch.target_counts[continuation])


def _positions_as_targets(batch: TokenBatch, every: bool = False) -> TokenBatch:
    """The same rows; every position that predicts something (every: each position) counts once,
    towards its own row."""
    source, first = np.unique(batch.target_source, return_index=True)
    tokens = batch.target_token[first]
    if every:
        source = np.arange(batch.num_tokens)
        tokens = np.zeros_like(source)  # a row's last position has none
    rows = np.arange(batch.num_rows)
    return dataclasses.replace(
        batch,
        target_source=source,
        target_token=tokens,
        target_continuation=np.searchsorted(batch.row_starts, source, side="right") - 1,
        continuation_row=rows,
    )


def _moments_as_targets(batch: TokenBatch) -> TokenBatch:
    """The same rows; every position is a target of each moment of its row.

    A row has a continuation for each moment, and the token of a target is the moment's number:

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


def _check_batch(batch: object, objective: type) -> TokenBatch:
    if not isinstance(batch, TokenBatch):
        raise InputError(
            f"{objective.__name__} takes a TokenBatch (load_text, TokenBatch.from_ids), not "
            f"{type(batch).__name__}"
        )
    return batch


def _check_tasks(tasks: object, objective: type) -> Tasks:
    if not isinstance(tasks, Tasks):
        raise InputError(
            f"{objective.__name__} takes Tasks (load_tasks), not {type(tasks).__name__}"
        )
    return tasks
