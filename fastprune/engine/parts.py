"""Parts of a calibration set: some of its samples, the last one perhaps cut.

S samples, C continuations.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ..errors import InputError
from ..validate import check_integer
from .chunks import Chunks

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from ..data import TokenBatch
    from ..objectives import Objective


class Part(NamedTuple):
    """The continuations of a calibration set whose chunks run; sums of all others are 0.

    wanted: bool[C]. cut: a row that runs besides, alone, and how many of its tokens are read. Its
    sums take one column more.
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
    """Samples that a loss is asked on.

    samples: int64[n], ascending, the cut one last. part: theirs. cut_targets: targets in the part
    of the last sample that is read; None if it is read whole.
    """

    samples: np.ndarray
    part: Part
    cut_targets: int | None = None


def choose(objective: Objective, chunks: Chunks, samples: np.ndarray, tokens: int | None) -> Choice:
    """The samples to read, the last of them cut so that exactly these tokens are read.

    A cut sample without a target in its part is left out. Raises InputError for tokens that end
    outside the last sample, or hold no target.
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
    """The row of the last sample with its tokens that are read; None if it is read whole."""
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
    """Indices of samples, all of them for None, int64[n]. Raises InputError for others."""
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
    """Tokens that run for each sample, int64[S]. batch: the objective's, as the model runs it."""
    # (sample, row), once each
    pairs = np.unique(np.stack([objective.sample, batch.continuation_row]), axis=1)
    counts = np.bincount(pairs[0], batch.read_tokens[pairs[1]], minlength=objective.num_samples)
    return counts.astype(np.int64)
