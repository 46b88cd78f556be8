"""Parts of a calibration set: some of its samples, of which the last one may be cut.

S samples, C continuations.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from ..data import TokenBatch
from ..errors import InputError
from ..objectives import Objective
from ..validate import check_integer
from .chunks import Chunks


class Part(NamedTuple):
    """A part of a calibration set. Sums outside of it are 0.

    Attributes:
        wanted: Whether the chunk of each continuation runs, bool[C].
        cut: A row that runs alone, and the number of tokens to read of it. It adds one column of
            sums. None without such a row.
    """

    wanted: np.ndarray
    cut: tuple[int, int] | None = None

    def numbers(self, chunks: Chunks) -> Iterator[int]:
        """The numbers of the chunks that run."""
        for number, chunk in enumerate(chunks):
            if self.wanted[chunk.continuations].any():
                yield number
        if self.cut is not None:
            yield chunks.number_of(*self.cut)


class Choice(NamedTuple):
    """The samples of a partial loss.

    Attributes:
        samples: int64[n], ascending, with a cut one last.
        part: Their part of the calibration set.
        cut_targets: The number of targets in the cut sample's part; None without one.
    """

    samples: np.ndarray
    part: Part
    cut_targets: int | None = None


def choose(objective: Objective, chunks: Chunks, samples: np.ndarray, tokens: int | None) -> Choice:
    """Choose samples, and cut the last one so that exactly `tokens` tokens are read.

    A cut sample without a target in its part is left out.

    Args:
        objective: The objective.
        chunks: The chunks of its calibration set.
        samples: Indices of samples, int64[n].
        tokens: The number of tokens to read; None for all of these samples.

    Raises:
        InputError: The tokens do not end in the last sample, or hold no target.
    """
    cut = None if tokens is None else _cut_of(objective, samples, tokens)
    cut_targets = None
    if cut is not None:
        samples = samples[:-1]
        cut_targets = len(chunks[chunks.number_of(*cut)].target_token)
        if not cut_targets and not len(samples):
            raise InputError(f"tokens is {tokens}, but no target is among these of sample {cut[0]}")
        if not cut_targets:
            cut = cut_targets = None
    part = Part(np.isin(objective.sample, samples), cut)
    samples = np.sort(samples)  # their order decides no bit
    return Choice(samples if cut is None else np.append(samples, cut[0]), part, cut_targets)


def _cut_of(objective: Objective, samples: np.ndarray, tokens: int) -> tuple[int, int] | None:
    """The row of the last sample, and the number of tokens to read of it; None for all."""
    if not objective.cuts_samples:
        raise InputError(
            f"tokens cuts a row of text; the samples of {objective.name!r} are questions, which "
            "are read whole"
        )
    lengths = tokens_of_samples(objective, objective.batch)[samples]
    before, total = int(lengths[:-1].sum()), int(lengths.sum())
    of = "so that it cuts the last of the samples"
    rest = check_integer("tokens", tokens, before + 1, total, of) - before
    return None if rest == lengths[-1] else (int(samples[-1]), rest)


def check_samples(samples: ArrayLike | None, num_samples: int, distinct: bool) -> np.ndarray:
    """Convert indices of samples to int64[n]; None is all samples. Raises InputError."""
    if samples is None:
        return np.arange(num_samples)
    samples = np.asarray(samples)
    if samples.ndim != 1 or samples.dtype.kind not in "iu" or not samples.size:
        raise InputError("samples must be a list of sample indices that is not empty")
    wrong = samples[(samples < 0) | (samples >= num_samples)]
    if len(wrong):
        raise InputError(
            f"sample {wrong[0]} is out of range; the samples are 0 to {num_samples - 1}"
        )
    ordered = np.sort(samples)
    repeated = ordered[1:][ordered[1:] == ordered[:-1]]
    if distinct and len(repeated):
        raise InputError(f"sample {repeated[0]} is given twice; each counts once in a loss")
    return samples.astype(np.int64)


def tokens_of_samples(objective: Objective, batch: TokenBatch) -> np.ndarray:
    """Tokens that run for each sample, int64[S]; `batch` is the set as the model runs it."""
    # distinct pairs of sample and row
    pairs = np.unique(np.stack([objective.sample, batch.continuation_row]), axis=1)
    counts = np.bincount(pairs[0], batch.read_tokens[pairs[1]], minlength=objective.num_samples)
    return counts.astype(np.int64)
