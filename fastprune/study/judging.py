"""How chosen masks compare under an objective: paired differences, and data that searches saw."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ..data import TokenBatch
from ..objectives import Difference, Objective

WINDOW = 32  # tokens; two rows that share so many in a row hold the same text
_PRIME = np.uint64(0x9E3779B97F4A7C15)


def compare_masks(
    objective: Objective, removed: Sequence[tuple[int, ...]], sample_losses: np.ndarray
) -> list[dict]:
    """Each mask's loss with its standard error, and its paired differences in the metric.

    Args:
        objective: The judge.
        removed: The units that each mask removes; the last one is the whole model.
        sample_losses: Of these masks on all samples, float64[N, S].

    Returns:
        For each mask: `removed`, `loss`, `standard_error`, and the differences `to_whole` and
        `to_best` (`Difference`, as dicts). The best is the mask of lowest loss among those that
        remove as many units.
    """
    losses = objective.mean(sample_losses)
    errors = objective.standard_error(sample_losses)
    entries = []
    for i, units in enumerate(removed):
        alike = [j for j, other in enumerate(removed) if len(other) == len(units)]
        best = min(alike, key=lambda j: (not np.isfinite(losses[j]), losses[j]))
        to_whole, to_best = (
            dataclasses.asdict(objective.compare(sample_losses[i], sample_losses[reference]))
            for reference in (-1, best)
        )
        entries.append(
            {
                "removed": list(units),
                "loss": float(losses[i]),
                "standard_error": float(errors[i]),
                "to_whole": to_whole,
                "to_best": to_best,
            }
        )
    return entries


def shared_rows(judge: TokenBatch, calibration: Iterable[TokenBatch]) -> int:
    """The number of a judge's rows that share a window of tokens with calibration data.

    A window is 32 tokens in a row, or the whole row if it is shorter.

    Examples:
        >>> import fastprune as fp
        >>> from fastprune.study.judging import shared_rows
        >>> seen, new = fp.TokenBatch.from_ids([[5, 6, 7]]), fp.TokenBatch.from_ids([[5, 6, 8]])
        >>> shared_rows(seen, [seen]), shared_rows(new, [seen])
        (1, 0)
    """
    lengths = np.minimum(judge.row_lengths, WINDOW)
    shared = np.zeros(judge.num_rows, dtype=bool)
    for batch in calibration:
        for length in np.unique(lengths).tolist():
            seen = np.unique(np.concatenate(_windows(batch, length, range(batch.num_rows))))
            rows = np.flatnonzero(lengths == length)
            for row, hashes in zip(rows, _windows(judge, length, rows.tolist()), strict=True):
                shared[row] |= bool(np.isin(hashes, seen).any())
    return int(shared.sum())


def _windows(batch: TokenBatch, length: int, rows: Iterable[int]) -> list[np.ndarray]:
    """A 64-bit hash of each window of `length` tokens, uint64, by row."""
    ids = batch.ids.astype(np.uint64) + np.uint64(1)
    hashes = np.zeros(max(0, len(ids) - length + 1), dtype=np.uint64)
    for place in range(length):  # a polynomial modulo 2^64
        hashes = hashes * _PRIME + ids[place : place + len(hashes)]
    starts, stops = batch.row_starts[:-1], batch.row_starts[1:]
    return [hashes[starts[row] : max(starts[row], stops[row] - length + 1)] for row in rows]


def judgement(
    study: Mapping[str, Any], model: str, label: str, removed: Sequence[int]
) -> Mapping[str, Any]:
    """The entry of `compare_masks` for a mask that a study chose, or for the whole model."""
    entries = study["judgements"][model][label]
    return next(entry for entry in entries if entry["removed"] == list(removed))


def format_judged(objective: type[Objective], entry: Mapping[str, Any]) -> str:
    """A judged mask's metric with its standard error, without the metric's name."""
    return objective.format(float(entry["loss"]), float(entry["standard_error"]), named=False)


def to_difference(record: Mapping[str, Any]) -> Difference:
    """A `Difference` from its record, whose values may be texts if they are not finite."""
    values = float(record["value"]), float(record["error"])
    return Difference(*values, int(record["num_samples"]))
