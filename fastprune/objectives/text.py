"""Objectives on text: perplexity per token, word and byte."""

from __future__ import annotations

import hashlib
import math

import numpy as np

from ..data import TokenBatch
from ..errors import InputError
from .base import Objective, check_batch


class Perplexity(Objective):
    """The perplexity of text per token.

    The loss is the mean over target tokens of -log p(x_t | x_<t), in nats. The metric is its
    exponential. A sample is a row, with the mean over its own targets as its loss.

    Args:
        batch: Plain text.

    Raises:
        InputError: The value is no TokenBatch, or holds questions.

    Examples:
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
        self.batch = check_batch(batch, type(self))
        if self.batch.row_is_tree.any():
            raise InputError(
                "Perplexity takes plain text; for questions use TaskMargin, TaskLikelihood or "
                "TaskAccuracy"
            )
        self._average(self.batch.target_counts)

    @classmethod
    def metric(cls, loss: float) -> float:
        """Compute the perplexity, the exponential of a loss.

        Args:
            loss: The loss of one mask, in nats.

        Returns:
            The perplexity; infinity from a loss of 700 on.

        Examples:
            >>> import fastprune as fp
            >>> round(fp.Perplexity.metric(1.5), 3)
            4.482
        """
        return math.exp(loss) if not loss >= 700 else math.inf

    @classmethod
    def slope(cls, loss: float) -> float:
        """Compute the derivative of the perplexity, which is the perplexity itself.

        Args:
            loss: The loss of one mask, in nats.

        Returns:
            The change of the perplexity for one unit of loss, at this loss.

        Examples:
            >>> import fastprune as fp
            >>> fp.Perplexity.slope(0.0)
            1.0
        """
        return cls.metric(loss)


class _TextPerplexity(Perplexity):
    """Perplexity per unit of text, which models with different tokenizers share."""

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
    """The perplexity of text per word.

    The loss is the sum over targets of -log p, divided by the words of their text. The metric is
    its exponential, word_perplexity of lm-evaluation-harness. A word is a run of characters without
    white space. Words do not depend on a tokenizer, so models with different tokenizers can be
    compared on the same text. A sample is a window.

    Args:
        batch: Text from `load_text`, which counts words and bytes.

    Raises:
        InputError: The batch holds questions, or was made from token ids.

    Examples:
        >>> import fastprune as fp
        >>> from fastprune import demo
        >>> tokenizer = fp.load_model("demo").tokenizer
        >>> text = fp.load_text(demo.TEXT, tokenizer, num_samples=4, seq_len=64)
        >>> fp.WordPerplexity(text)
        WordPerplexity(4 samples, 256 tokens)
    """

    name = "word_perplexity"
    meaning = "the exponential of the negative log-likelihood of the text per word"
    metric_name = "perplexity per word"
    counts = "row_words"


class BytePerplexity(_TextPerplexity):
    """The perplexity of text per byte.

    The loss is the sum over targets of -log p, divided by the UTF-8 bytes of their text. The metric
    is its exponential, byte_perplexity of lm-evaluation-harness. A sample is a window.

    Args:
        batch: Text from `load_text`, which counts words and bytes.

    Raises:
        InputError: The batch holds questions, or was made from token ids.

    Examples:
        >>> import fastprune as fp
        >>> from fastprune import demo
        >>> tokenizer = fp.load_model("demo").tokenizer
        >>> text = fp.load_text(demo.TEXT, tokenizer, num_samples=4, seq_len=64)
        >>> fp.BytePerplexity(text)
        BytePerplexity(4 samples, 256 tokens)
    """

    name = "byte_perplexity"
    meaning = "the exponential of the negative log-likelihood of the text per byte of UTF-8"
    metric_name = "perplexity per byte"
    digits = 4
    counts = "row_bytes"
