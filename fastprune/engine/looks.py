"""Looks of a race: calls on growing parts of the calibration set. `plan.racing` has the rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ..objectives import Objective
from ..plan.progress import ProgressCallback, ProgressEvent, reporting
from ..plan.racing import race
from ..plan.trie import Units, make_trie
from .calls import Calls
from .parts import Part


def race_sequences(
    calls: Calls,
    objective: Objective,
    sequences: Sequence[Units],
    keep: int,
    confidence: float,
    tolerance: float,
    progress: ProgressCallback | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Race sequences, and return those that reach the last look.

    When memory runs out, the race begins again, because sums of two layouts differ in their bits.

    Args:
        calls: Runs the looks.
        objective: The objective.
        sequences: N sequences of units.
        keep: The number of sequences to keep.
        confidence: The probability that the race keeps the right ones.
        tolerance: A difference in loss that does not matter.
        progress: Called with events of unit runs.

    Returns:
        The places of the sequences that reach the last look, int64[K], and their losses.
    """
    settings = keep, confidence, tolerance
    while True:
        problem = calls.problem
        alive, losses = _race(calls, objective, sequences, settings, progress)
        if problem is calls.problem:
            return alive, losses


def _race(
    calls: Calls,
    objective: Objective,
    sequences: Sequence[Units],
    settings: tuple[int, float, float],
    progress: ProgressCallback | None,
) -> tuple[np.ndarray, np.ndarray]:
    batch, num_samples = objective.batch, objective.num_samples
    looks = calls.problem.layout.looks(batch)[batch.continuation_row]  # of each continuation
    num_looks = int(looks.max()) + 1
    sums = np.zeros((len(sequences), batch.num_continuations))

    def look(number: int, alive: np.ndarray) -> np.ndarray:
        trie = make_trie(sequences[i] for i in alive)
        before, now = (looks < number).mean(), (looks == number).mean()

        def describe(event: ProgressEvent) -> ProgressEvent:
            share = before + now * (event.share or 0)
            return replace(event, share=share, candidates=len(alive))

        with reporting(describe):
            latest = calls.run(trie, progress, Part(looks == number), keep=True)
        sums[alive] += latest[trie.index, 0]
        samples = np.unique(objective.sample[looks <= number])
        losses = objective.sample_losses(sums[alive])[:, samples]
        return losses * objective.sample_weight[samples] * num_samples

    alive = race(len(sequences), num_looks, look, num_samples, *settings)
    return alive, objective.loss(sums[alive])
