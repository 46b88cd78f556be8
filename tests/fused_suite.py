"""Properties of the fused path that hold whatever operators run it.

`engine/test_fused.py` runs them on torch's operators and on the compiled ones, and
`kernels/test_fused_model.py` on Triton's. Each has these fixtures: `scene`, `operators` (the name
of the set that the fused path takes), `family` and `granularity`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from engine.helpers import make_tasks
from families import random_rows, reference_losses, reference_model, reference_token_nll

import fastprune as fp

RELATIVE = 1e-5


@dataclass(frozen=True, eq=False)
class Scene:
    """Models, data and masks as large as the operators can run in a test.

    build: a model of a family, on the processor. lengths: of rows. questions: shapes for
    `make_tasks`. make_masks: bool[N, U] from the number of units. options: of evaluators.
    """

    build: Callable[[str], Any]
    lengths: Sequence[int]
    questions: Sequence[tuple[int, list[int]]]
    make_masks: Callable[[int], np.ndarray]
    options: dict[str, Any] = field(default_factory=dict)
    device: str = "cpu"

    def rows(self, hf) -> list[list[int]]:
        return random_rows(hf.config.vocab_size, self.lengths)

    def batch(self, hf) -> fp.TokenBatch:
        return fp.TokenBatch.from_ids(self.rows(hf))

    def evaluator(self, hf, objective, **options) -> fp.Evaluator:
        return fp.Evaluator(hf.to(self.device), objective, **self.options, **options)

    @functools.cache  # noqa: B019  (scenes are few, and live as long as their tests)
    def masks_and_losses(self, family: str, granularity: str) -> tuple[np.ndarray, np.ndarray]:
        """Masks, and their losses where blocks or sublayers are physically removed."""
        hf = self.build(family)
        units = hf.config.num_hidden_layers * (1 if granularity == "block" else 2)
        masks = self.make_masks(units)
        return masks, reference_losses(hf, masks, self.rows(hf), granularity)


class FusedProperties:
    def test_scores_equal_physical_removal(self, scene, operators, family, granularity):
        masks, expected = scene.masks_and_losses(family, granularity)
        hf = scene.build(family)
        ev = scene.evaluator(hf, fp.Perplexity(scene.batch(hf)), granularity=granularity)
        assert ev.backend == f"fused ({operators})"
        together = ev.score(masks)
        np.testing.assert_allclose(together, expected, rtol=RELATIVE)
        assert ev.score(masks[1])[0] == together[1]  # to the bit

    def test_choices_in_a_tree_equal_choices_run_alone(self, scene, operators, family):
        """Questions longer than the sliding window; many choices, so that a position predicts
        several tokens."""
        hf = scene.build(family)
        tasks = make_tasks(hf.config.vocab_size, scene.questions)
        mask = np.arange(hf.config.num_hidden_layers) != 1
        nll = losses_of_choices(reference_model(hf, mask), tasks.batch)
        found = scene.evaluator(hf, fp.TaskMargin(tasks)).score_samples(mask)[0]
        for question, margin in enumerate(found):
            choices = np.flatnonzero(tasks.question == question)
            wrong = [nll[c] for c in choices if c != tasks.answer[question]]
            expected = nll[tasks.answer[question]] - np.mean(wrong)
            assert margin == pytest.approx(expected, abs=RELATIVE * max(nll))

    @pytest.mark.parametrize("distance", [fp.KLDivergence, fp.Agreement])
    def test_distances_are_those_of_the_generic_path(self, scene, operators, family, distance):
        hf = scene.build(family)
        objective = distance(scene.batch(hf))
        masks = scene.make_masks(hf.config.num_hidden_layers)
        losses = scene.evaluator(hf, objective).score(masks)
        expected = fp.Evaluator(hf, objective, backend="generic").score(masks)
        np.testing.assert_allclose(losses, expected, rtol=RELATIVE, atol=1e-6)


def losses_of_choices(hf, batch: fp.TokenBatch) -> list[float]:
    """The mean loss of each choice of questions, run as a row of its own."""
    rows, lengths = [], []
    for continuation in range(batch.num_continuations):
        of = np.flatnonzero(batch.target_continuation == continuation)
        row = batch.continuation_row[continuation]
        inside = np.arange(batch.row_starts[row], batch.row_starts[row + 1])
        own = batch.branch[batch.target_source[of[-1]]]
        path = inside[(batch.branch[inside] == 0) | (batch.branch[inside] == own)]
        path = path[path <= batch.target_source[of[-1]]]
        rows.append([*batch.ids[path].tolist(), int(batch.target_token[of[-1]])])
        lengths.append(len(of))
    nll = reference_token_nll(hf, rows)
    return [float(of[-length:].mean()) for of, length in zip(nll, lengths)]
