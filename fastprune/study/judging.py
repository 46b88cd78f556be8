"""Comparisons of candidates under an objective, and checks that a judge's data are unseen."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ..data import TokenBatch
from ..masks import Candidate
from ..objectives import Difference, Objective
from ..search.sizes import Key

WINDOW = 32  # tokens; two rows that share such a window hold the same text
_PRIME = np.uint64(0x9E3779B97F4A7C15)


class Judged(NamedTuple):
    """A mask or sequence to judge.

    Attributes:
        candidate: The mask or sequence.
        size: The size of removal; candidates of one size are compared.
        is_control: Whether no search chose it.
    """

    candidate: Candidate
    size: Key
    is_control: bool = False

    @property
    def key(self) -> tuple[Candidate, Key]:
        """The candidate and its size, by which a study finds its judgements."""
        return self.candidate, self.size


@dataclass(frozen=True)
class Judgements:
    """The judgements of a model's candidates.

    Attributes:
        entries: By label, the entries of `compare_candidates`; the candidates are the same under
            every label.
        places: The place of each candidate in these lists, by `Judged.key`.
    """

    entries: Mapping[str, Sequence[Mapping[str, Any]]]
    places: Mapping[tuple[Candidate, Key], int]

    def losses(self, candidate: Candidate, size: Key) -> dict[str, float]:
        """By label, the loss of a candidate."""
        place = self.places[candidate, size]
        return {label: entries[place]["loss"] for label, entries in self.entries.items()}


WHOLE = Judged(Candidate(removed=()), 0)  # the whole model


def compare_candidates(
    objective: Objective, judged: Sequence[Judged], sample_losses: np.ndarray
) -> list[dict]:
    """Compute each candidate's loss with its standard error, and its differences to others.

    Differences are paired by sample, and in the objective's metric.

    Args:
        objective: The judge.
        judged: N candidates; the last one is the whole model.
        sample_losses: Their losses on all samples, float64[N, S].

    Returns:
        N dicts with `removed` or `sequence`, `size`, `is_control`, `loss`, `standard_error`, and
        the differences `to_whole` and `to_best` (the fields of a `Difference`). The best candidate
        has the lowest loss among those of its size that a search chose. If a search chose none of
        this size, it is the best control.

    Examples:
        >>> import numpy as np
        >>> import fastprune as fp
        >>> from fastprune.masks import Candidate
        >>> from fastprune.study.judging import WHOLE, Judged, compare_candidates
        >>> objective = fp.Perplexity(fp.TokenBatch.from_ids([[5, 6, 7], [5, 8, 9]]))
        >>> judged = [Judged(Candidate(removed=(3,)), 1), WHOLE]
        >>> sample_losses = np.array([[1.0, 3.0], [1.0, 2.0]])
        >>> [entry["loss"] for entry in compare_candidates(objective, judged, sample_losses)]
        [2.0, 1.5]
    """
    losses = objective.mean(sample_losses)
    errors = objective.standard_error(sample_losses)
    best: dict[Key, int] = {}  # the place of the best candidate of each size

    def rank(i: int) -> tuple[bool, bool, float]:
        return judged[i].is_control, not np.isfinite(losses[i]), losses[i]

    for i, of in enumerate(judged):
        if of.size not in best or rank(i) < rank(best[of.size]):
            best[of.size] = i

    def difference(i: int, reference: int) -> dict[str, Any]:
        return dataclasses.asdict(objective.compare(sample_losses[i], sample_losses[reference]))

    return [
        {
            **candidate.record,
            "size": size,
            "is_control": is_control,
            "loss": float(losses[i]),
            "standard_error": float(errors[i]),
            "to_whole": difference(i, -1),
            "to_best": difference(i, best[size]),
        }
        for i, (candidate, size, is_control) in enumerate(judged)
    ]


def shared_rows(
    judge: TokenBatch, calibration: Iterable[TokenBatch], questions: bool = False
) -> int:
    """Count a judge's rows that share a window of tokens with calibration data.

    A window is 32 tokens in a row, or the whole row if it is shorter. A question's row is compared
    by its prompt, which is the same whatever choices run behind it.

    Args:
        judge: The rows to look for.
        calibration: The data to look in.
        questions: Whether the judge's rows are questions.

    Returns:
        The number of rows.

    Examples:
        >>> import fastprune as fp
        >>> from fastprune.study.judging import shared_rows
        >>> seen, new = fp.TokenBatch.from_ids([[5, 6, 7]]), fp.TokenBatch.from_ids([[5, 6, 8]])
        >>> shared_rows(seen, [seen]), shared_rows(new, [seen])
        (1, 0)
    """
    stops = judge.row_starts[1:]
    if questions:  # the first target is predicted by the last token of the prompt
        stops = np.array([judge.target_source[t].min() + 1 for t in judge.targets_by_row])
    lengths = np.minimum(stops - judge.row_starts[:-1], WINDOW)
    data = list(calibration)
    shared = 0
    for length in np.unique(lengths).tolist():
        windows = [part for of in data for part in _windows(of, length, of.row_starts[1:])]
        seen = np.unique(np.concatenate([np.zeros(0, dtype=np.uint64), *windows]))
        own = _windows(judge, length, stops)
        rows = np.flatnonzero(lengths == length).tolist()
        shared += sum(bool(np.isin(own[row], seen).any()) for row in rows)
    return shared


def _windows(batch: TokenBatch, length: int, stops: np.ndarray) -> list[np.ndarray]:
    """A 64-bit hash of each window of `length` tokens before a row's stop, uint64, by row."""
    ids = batch.ids.astype(np.uint64) + np.uint64(1)
    hashes = np.zeros(max(0, len(ids) - length + 1), dtype=np.uint64)
    for place in range(length):  # a polynomial modulo 2^64
        hashes = hashes * _PRIME + ids[place : place + len(hashes)]
    ends = np.maximum(batch.row_starts[:-1], stops - length + 1)
    return [hashes[start:end] for start, end in zip(batch.row_starts[:-1], ends)]


def judgement(
    study: Mapping[str, Any], model: str, label: str, cell: Mapping[str, Any] | None = None
) -> Mapping[str, Any]:
    """The entry of `compare_candidates` for a cell or control; the whole model's if it is None."""
    return study["judgements"][model][label][-1 if cell is None else cell["judged"]]


def format_judged(objective: type[Objective], entry: Mapping[str, Any]) -> str:
    """A judged mask's metric with its standard error, without the metric's name."""
    return objective.format(float(entry["loss"]), float(entry["standard_error"]), named=False)


def format_to_whole(objective: type[Objective], entry: Mapping[str, Any]) -> str:
    """A judged mask's difference to the whole model; '' under an objective that measures just this
    difference."""
    if objective.compares_with_dense:
        return ""
    return objective.format_difference(to_difference(entry["to_whole"]))


def direction(objective: type[Objective]) -> str:
    """The direction of the metric in words."""
    return f"{'higher' if objective.higher_is_better else 'lower'} is better"


def to_difference(record: Mapping[str, Any]) -> Difference:
    """Read a `Difference` from its record. Values that are not finite may be texts there."""
    values = float(record["value"]), float(record["error"])
    return Difference(*values, int(record["num_samples"]))
