"""Objectives: the tokens that count, the measure of each, and the reduction to a loss.

An objective asks the engine for one number per target, its `measure`. "nll" is the negative
log-likelihood of the target token. The other measures compare with the whole model: in distribution
("kl", "rejection"), in the most likely token ("other_token") or in final state ("cosine", "nmse").
The engine sums them over each continuation, float64[N, C]. All further steps are plain NumPy, here.

Searches minimise a loss; people read its metric. `Objective.format` is the one function that prints
a loss: under its metric, with standard error and unit, as in "accuracy 54.0 ± 2.2 %". Cells of
tables leave out the name, since the column has it, with the direction (`header`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from ..data import TokenBatch
from ..errors import InputError


class Objective:
    """A loss per sample s, linear in the sums over its continuations c.

    L_s is the sum over c of weight_c * sum_c. The loss is the sum over s of sample_weight_s * L_s.

    Attributes:
        batch: The tokens.
        measure: A name of `measures.MEASURES`.
        sample: int64[C], the sample of each continuation, ascending.
        weight: float64[C], the weight of each continuation.
        sample_weight: float64[S], the weight of each sample.
        data: The content of its calibration file, "text" or "tasks".
        compares_with_dense: Whether the whole model runs once, to compare with.
        differentiable: Whether the loss has a useful gradient at the whole model.
        settings: The allowed values of each option of the objective.
        source: The origin of the data in words, for readers of a study.
        metric_name: The name by which users know the loss; `metric` computes it.
        unit: The unit of the metric: "", "%" or "nats".
        higher_is_better: The direction of the metric.
        meaning: The meaning of the metric, in words.
        digits: The number of printed decimals.
        chance: The metric of a model that guesses; None if it has none.
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
        """Compute the metric from a loss.

        Args:
            loss: The loss of one mask, as `Evaluator.score` returns it.

        Returns:
            The value of the metric, in its unit.

        Examples:
            >>> import fastprune as fp
            >>> fp.TaskAccuracy.metric(0.25), fp.Perplexity.metric(0.0)
            (75.0, 1.0)
        """
        return 0.0 - loss if cls.higher_is_better else loss

    @classmethod
    def slope(cls, loss: float) -> float:
        """Compute the derivative of `metric`, by which a standard error is carried over.

        Args:
            loss: The loss of one mask.

        Returns:
            The change of the metric for one unit of loss, at this loss.

        Examples:
            >>> import fastprune as fp
            >>> fp.TaskAccuracy.slope(0.25), fp.Perplexity.slope(0.0)
            (-100.0, 1.0)
        """
        return -1.0 if cls.higher_is_better else 1.0

    @classmethod
    def format(cls, loss: float, error: float | None = None, named: bool = True) -> str:
        """Print a loss as users read it: the metric's name, value, standard error and unit.

        Args:
            loss: The loss of one mask, as `Evaluator.score` returns it.
            error: The standard error of the loss. The error of the metric is |slope| times it (the
                delta method). None, infinity and NaN print no error.
            named: False leaves out the metric's name, for a table whose column has `header`.

        Returns:
            The text.

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
        """Print a difference of two masks' metrics, with its standard error.

        Args:
            difference: The difference, as `compare` returns it.

        Returns:
            The text. A difference within two standard errors is called "not told apart".

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
        """The metric with its direction, for a column of a table or an axis of a figure."""
        unit = f", {cls.unit}" * bool(cls.unit)
        direction = "higher" if cls.higher_is_better else "lower"
        return f"{cls.metric_name}{unit} ({direction} is better)"

    @classmethod
    def record(cls, loss: float, prefix: str = "") -> dict[str, float]:
        """Make a record of the loss and the metric, for a machine-readable file.

        Args:
            loss: The loss.
            prefix: Put before both names.

        Returns:
            The loss under "loss", and the metric under its own name.

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
        """Describe the objective in plain values: name, settings, metric and calibration data."""
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
        """The hash of the calibration data and settings, as text.

        Two objectives of one `name` and one hash compute the same loss for every mask.

        Examples:
            >>> import fastprune as fp
            >>> one, same = (fp.TokenBatch.from_ids([[5, 6, 7]]) for _ in range(2))
            >>> fp.Perplexity(one).content_hash == fp.Perplexity(same).content_hash
            True
        """
        return self.batch.content_hash

    def sample_losses(self, sums: np.ndarray) -> np.ndarray:
        """The loss of each sample, float64[N, S], from sums over continuations, float64[N, C]."""
        return self._by_sample(sums * self.weight)

    def _by_sample(self, values: np.ndarray) -> np.ndarray:
        """Sum values [N, C] over the continuations of each sample, [N, S]."""
        return np.add.reduceat(values, self._starts, axis=1)

    @cached_property
    def _starts(self) -> np.ndarray:
        """The first continuation of each sample, int64[S]."""
        return np.flatnonzero(np.diff(self.sample, prepend=-1))

    def loss(self, sums: np.ndarray) -> np.ndarray:
        """The loss of each mask, float64[N], from sums over continuations, float64[N, C]."""
        return self.mean(self.sample_losses(sums))

    def mean(self, sample_losses: np.ndarray) -> np.ndarray:
        """The loss of each mask, float64[N], from the losses of all samples, float64[N, S]."""
        # one mask at a time: the order of summation must not depend on the number of masks
        return np.array([np.sum(row * self.sample_weight) for row in sample_losses])

    @property
    def cuts_samples(self) -> bool:
        """Whether a part of a sample can be scored: of a row of plain text, not of a question."""
        batch = self.batch
        one_each = np.array_equal(batch.continuation_row, np.arange(batch.num_rows))
        return self.data == "text" and one_each and not batch.row_is_tree.any()

    def partial_loss(
        self, sums: np.ndarray, samples: np.ndarray, cut_targets: int | None = None
    ) -> np.ndarray:
        """The loss of each mask on some of the samples, weighted by the targets of these samples.

        Args:
            sums: float64[N, C], sums over continuations, 0 for those of other samples. If the last
                sample was cut, one more column holds the sum of its part.
            samples: int64[n], distinct.
            cut_targets: Targets in the part of the last sample that was read; None if it was read
                whole.

        Returns:
            float64[N].

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

        Samples count as drawn independently. Their weights w sum to 1, so the loss is the mean
        L = sum of w_s L_s, with the error sqrt(S / (S - 1) sum of w_s^2 (L_s - L)^2). For equal
        weights this is the usual error, and for token counts that of a ratio estimator.

        Args:
            sample_losses: float64[N, S], of all samples, as `Evaluator.score_samples` returns them.

        Returns:
            float64[N]; NaN for a single sample.

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
            deviations = (sample_losses - self.mean(sample_losses)[:, None]) * self.sample_weight
        return np.sqrt((deviations**2).sum(axis=1) * (self.num_samples / (self.num_samples - 1)))

    def _average(self, counts: np.ndarray) -> None:
        """Set the weights so that the loss averages over all counts [S] together.

        Each sample averages over its own count.
        """
        self.sample = np.arange(len(counts))
        self.weight = 1 / counts
        self.sample_weight = counts / counts.sum()

    def compare(self, sample_losses: np.ndarray, reference: np.ndarray) -> Difference:
        """Compare the metrics of two masks on the same samples.

        The standard error is paired: it is taken over the differences by sample, after each loss is
        multiplied by the metric's slope at its own mask (the delta method).

        Args:
            sample_losses: float64[S], of the mask on all samples.
            reference: float64[S], of the other mask, such as the whole model.

        Returns:
            The metric of the mask less that of the other, with its error.

        Examples:
            >>> import numpy as np
            >>> import fastprune as fp
            >>> objective = fp.Perplexity(fp.TokenBatch.from_ids([[5, 6, 7], [5, 8, 9]]))
            >>> objective.compare(np.array([1.0, 1.0]), np.array([0.0, 0.0])).told_apart
            True
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
    """The metric of one mask less that of another, on the same samples.

    Attributes:
        value: The difference, in the metric's unit.
        error: Its paired standard error, in the same unit.
        num_samples: The number of samples on which both masks were measured.

    Examples:
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
        """The approximate number of samples that would make the difference two standard errors.

        None if no number would, or if the difference or its error is not known.
        """
        if not self.value or not math.isfinite(self.value + self.error):
            return None
        needed = self.num_samples * (2 * self.error / abs(self.value)) ** 2
        return math.ceil(needed) if needed < 1e9 else None


class Share(Objective):
    """An objective whose loss is a share of failures; its metric is the share of successes in %."""

    unit = "%"
    higher_is_better = True
    digits = 1

    @classmethod
    def metric(cls, loss: float) -> float:
        """Compute the share of successes.

        Args:
            loss: The share of failures, 0 to 1.

        Returns:
            The share of successes in %.

        Examples:
            >>> import fastprune as fp
            >>> fp.TaskAccuracy.metric(0.25)
            75.0
        """
        return 100 * (1 - loss)

    @classmethod
    def slope(cls, loss: float) -> float:
        """Compute the derivative of `metric`, which is the same at every loss.

        Args:
            loss: The share of failures.

        Returns:
            -100.

        Examples:
            >>> import fastprune as fp
            >>> fp.TaskAccuracy.slope(0.25)
            -100.0
        """
        return -100.0


def check_batch(batch: object, objective: type) -> TokenBatch:
    if not isinstance(batch, TokenBatch):
        raise InputError(
            f"{objective.__name__} takes a TokenBatch (load_text, TokenBatch.from_ids), not "
            f"{type(batch).__name__}"
        )
    return batch
