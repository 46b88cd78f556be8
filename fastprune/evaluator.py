"""Evaluator: the facade that searches and other tools call."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .engine import probes
from .engine.engine import Engine, Progress
from .engine.store import SumStore
from .errors import InputError
from .masks import as_masks, check_sequences
from .models import Model
from .models.unwrap import unwrap
from .objectives import Objective
from .plan.layout import Layout, look_rows
from .plan.racing import Selection, race
from .plan.trie import Trie, Units, kept_units, make_trie
from .validate import check_bytes, check_folder
from .workers.processes import Processes, Workers, check_workers
from .workers.remote import Coordinator

if TYPE_CHECKING:
    from numpy.typing import ArrayLike
    from torch import nn

BACKENDS = ("auto", "generic", "fused")


@dataclass
class Stats:
    """What an evaluator's calls have cost so far.

    Runs are counted over the whole calibration set: one on half of its rows counts one half.

    >>> import fastprune as fp
    >>> batch = fp.TokenBatch.from_ids([[5, 6, 7, 8, 9], [10, 11, 12]])
    >>> ev = fp.Evaluator(fp.load_model("demo"), fp.Perplexity(batch))
    >>> _ = ev.score(fp.from_removed([(3,), (3, 7)], ev.num_units))
    >>> ev.stats.unit_runs, ev.stats.naive_unit_runs  # shared: 0, 1, 2, 4, 5, 6
    (15, 21)
    """

    masks: int = 0  # scores that were asked for
    unit_runs: float = (
        0  # unit runs that were made, the dense model's to compare with too, counted as they happen
    )
    unbounded_unit_runs: float = (
        0  # what these would have been, had the prefix cache room for every state
    )
    asked_unit_runs: float = (
        0  # distinct prefixes of each call: its unit runs, had nothing been known before
    )
    naive_unit_runs: float = 0  # unit runs of one forward pass per mask that was asked for
    head_runs: float = 0  # masks whose loss was computed
    store_hits: int = 0  # scores that were asked for and came from the store
    peak_activation_bytes: int = 0  # the most that was held at once, besides the prefix cache
    cache_bytes: int = 0  # what the prefix cache holds now
    cache_hits: dict[str, int] = field(
        default_factory=dict
    )  # states of chunks that it served, by tier
    weight_loads: int = 0  # blocks that were read from files, where weights are streamed
    weight_bytes: int = 0  # what was read for them
    seconds: float = 0.0  # spent scoring


class Evaluator:
    """Scores depth masks of one model under one objective.

    model: what load_model returns, or a transformers model in memory. objective: Perplexity,
    TaskMargin, TaskLikelihood, TaskAccuracy, KLDivergence, CosineDistance or NormalizedMSE.
    backend: "generic" runs any family by transformers' own code, "fused" the Llama-like ones on
    fused operators, "auto" the fused path where it is the faster; `self.backend` says which one
    runs.
    granularity: "block", or "sublayer" (unit 2i is block i's attention, 2i + 1 its mlp).
    memory_bytes: byte budget of the activations of a call (4 GiB on a CPU, 16 GiB on a GPU by
    default); it decides how many tokens run at once. cache_bytes: budget of the prefix cache,
    states that outlive a call: the next call runs only what no call before has run, as far as the
    cache goes. By default a quarter of the memory that is free before each call (on a GPU, of the
    device and of the host); 0 for none. cache_dir: a folder on a fast disk for states that do not
    fit, in a file that goes with the process, up to a quarter of what is free there.
    store: file of finished sums (or a SumStore): what is in it is not computed again, whichever
    objective had measured the same on the same tokens (margin and accuracy do), and what is
    finished is kept chunk by chunk.
    workers: that many processes of this machine, each with a model of its own, or `Workers` that
    are started already, run a call together; None for this process alone. Each runs with as many
    threads as this process, and a score has the bits that it has here. memory_bytes is then of each
    worker, cache_bytes of all of a machine.
    progress: called with (unit runs done, unit runs in all) while masks are scored.
    layout: how the calibration set is cut, `layout` of another evaluator, so that scores have its
    bits under another budget; None: as fits memory_bytes.

    A mask's score does not depend, to the bit, on what else is scored in the same call or was
    before. Threads may share an evaluator or a model: their calls take turns.

    Raises InputError for an argument of another kind or out of its range, for tokens that the model
    does not take, for a backend or a granularity that the family cannot run on, and for
    memory_bytes that a row does not fit into.

    >>> import fastprune as fp
    >>> batch = fp.TokenBatch.from_ids([[5, 6, 7, 8, 9], [10, 11, 12]])
    >>> ev = fp.Evaluator(fp.load_model("demo"), fp.Perplexity(batch))
    >>> ev.score(fp.from_removed([(3,), (3, 7)], ev.num_units)).shape
    (2,)
    """

    def __init__(
        self,
        model: Model | nn.Module,
        objective: Objective,
        backend: str = "auto",
        *,
        granularity: str = "block",
        memory_bytes: int | None = None,
        cache_bytes: int | None = None,
        cache_dir: str | os.PathLike | None = None,
        store: str | os.PathLike | SumStore | None = None,
        workers: int | Workers | None = None,
        progress: Progress | None = None,
        layout: Layout | None = None,
    ):
        if not isinstance(objective, Objective):
            raise InputError(
                f"objective must be one such as Perplexity(batch), not {type(objective).__name__}"
            )
        if backend not in BACKENDS:
            raise InputError(f"backend must be one of {', '.join(BACKENDS)}, not {backend!r}")
        memory_bytes = check_bytes("memory_bytes", memory_bytes, 1)
        cache_bytes = check_bytes("cache_bytes", cache_bytes, 0)
        if progress is not None and not callable(progress):
            raise InputError(
                f"progress must be a function of (unit runs done, in all), not {progress!r}"
            )
        if layout is not None and not isinstance(layout, Layout):
            raise InputError(
                f"layout must be a Layout, such as another evaluator's, not {type(layout).__name__}"
            )
        if workers is not None and not isinstance(workers, Workers):
            check_workers(workers)
        self.model = model if isinstance(model, Model) else Model(unwrap(model))
        self.objective = objective
        self.granularity = granularity
        self.progress = progress
        self.stats = Stats()
        self._dense: tuple[tuple, float] | None = None
        store = store if isinstance(store, SumStore) or store is None else SumStore(store)
        make: Callable[..., Engine] = Engine
        if workers is not None:
            workers = workers if isinstance(workers, Workers) else Processes(workers)
            make = functools.partial(Coordinator, workers)
        self._engine = make(
            self.model,
            objective.batch,
            objective.measure,
            granularity,
            memory_bytes=memory_bytes,
            backend=backend,
            store=store,
            cache_bytes=cache_bytes,
            cache_dir=None if cache_dir is None else _make_folder(Path(cache_dir)),
            layout=layout,
        )

    def __repr__(self) -> str:
        units = f"{self.num_units} {'blocks' if self.granularity == 'block' else 'sublayers'}"
        what = f"{self.model.name!r}, {self.objective.name}, {units}, {self.num_samples} samples"
        return f"Evaluator({what}, {self.backend})"

    @property
    def backend(self) -> str:
        """The path that runs the units: "generic", or "fused" with its operators."""
        return self._engine.runner.path_name

    @property
    def num_units(self) -> int:
        return self._engine.num_units

    @property
    def layout(self) -> Layout:
        """How the calibration set is cut: plain integers, which can be written down
        (`Layout.to_json`) and given again.

        Another one after memory ran out.
        """
        return self._engine.layout

    @property
    def num_samples(self) -> int:
        return self.objective.num_samples

    @cached_property
    def sample_tokens(self) -> np.ndarray:
        """Tokens of each sample's row, int64[S]: what scoring a mask on that sample reads."""
        batch = self.objective.batch
        pairs = np.unique(
            np.stack([self.objective.sample, batch.continuation_row]), axis=1
        )  # (sample, row), once each
        tokens = np.bincount(pairs[0], batch.row_lengths[pairs[1]], minlength=self.num_samples)
        return tokens.astype(np.int64)

    @property
    def sample_groups(self) -> list[np.ndarray]:
        """The samples whose rows run together, int64[n] each: one of a group costs as much as all
        of it.

        Groups hold random samples, sorted by length.
        """
        return [
            np.unique(self.objective.sample[chunk.continuations]) for chunk in self._engine.chunks
        ]

    @cached_property
    def unit_names(self) -> list[str]:
        return self.model.unit_names(self.granularity)

    @property
    def dense_loss(self) -> float:
        """The loss of the whole model, computed when it is first asked for, and again when the
        model has changed."""
        with self.model.turn:
            state = self.model.state
            if self._dense is None or self._dense[0] != state:
                self._dense = state, float(self.score(np.ones((1, self.num_units), dtype=bool))[0])
            return self._dense[1]

    def score(self, masks: ArrayLike) -> np.ndarray:
        """The loss of each mask, float64[N]; masks: bool or 0/1 [N, U], True = kept. Lower is
        better.

        A loss that is not finite is returned as it is. Raises InputError for masks of another shape
        or value, and for one that keeps nothing where the family cannot run without blocks.
        """
        with self.model.turn:
            return self._losses(self._check_masks(masks))

    def score_sequences(self, sequences: Iterable[Iterable[int]]) -> np.ndarray:
        """The loss of running these units in this order, float64[N]; a sequence may leave out,
        repeat and reorder.

        sequences: N collections of unit indices, such as [(0, 1, 1, 2), (0, 2, 1)]. One that
        ascends is a mask, and has its score. All share their prefixes as masks do. Raises
        InputError for an index out of range, and for an empty sequence where the family cannot run
        without blocks.

        >>> import fastprune as fp
        >>> batch = fp.TokenBatch.from_ids([[5, 6, 7, 8, 9], [10, 11, 12]])
        >>> ev = fp.Evaluator(fp.load_model("demo"), fp.Perplexity(batch))
        >>> ev.score_sequences([(0, 1, 1, 2), (0, 2, 1)]).shape
        (2,)
        """
        checked = check_sequences(sequences, self.num_units)
        self._check_not_empty(checked)
        together = self._engine.budget.most_together(max(map(len, checked), default=0))
        with self.model.turn:
            parts = [
                self._losses(checked[i : i + together]) for i in range(0, len(checked), together)
            ]
        return np.concatenate([np.empty(0), *parts])

    def sums(self, masks: ArrayLike) -> np.ndarray:
        """What the objective's measure gives on each continuation of its batch, float64[N, V, C]:
        the sums over its targets of each of the measure's V values (`measures.MEASURES`), before
        the objective weighs them. Raises InputError as `score` does."""
        with self.model.turn:
            trie = self._ask(self._check_masks(masks))
            return self._run(trie)[trie.index]

    def score_samples(self, masks: ArrayLike, samples: ArrayLike | None = None) -> np.ndarray:
        """The loss of each mask on each sample (row of text, or question), float64[N, S].

        samples: indices of the samples that are wanted, in the order of the columns; default all.
        Only the chunks that hold them are run, so a few samples cost less, and every number has the
        same bits as with all. Raises InputError as `score` does, and for samples that there are
        not.
        """
        samples = np.arange(self.num_samples) if samples is None else self._check_samples(samples)
        wanted = np.isin(self.objective.sample, samples)
        with self.model.turn:
            trie = self._ask(self._check_masks(masks), self._engine.share(wanted))
            sums = self._run(trie, wanted)[:, 0]
            return self.objective.sample_losses(sums)[:, samples][trie.index]

    @property
    def num_looks(self) -> int:
        """How many looks a race over this calibration set takes; 1: it is too small for one, and is
        scored whole."""
        return len(look_rows(self.objective.batch))

    def select(
        self, masks: ArrayLike, keep: int = 1, confidence: float = 0.99, tolerance: float = 0.0
    ) -> Selection:
        """The `keep` masks of lowest loss, found by a race: what is beaten beyond doubt is not run
        to the end.

        All masks are scored on a sixteenth of the samples, but on 8 at least, or up to 16 where
        they are short; those that are not beaten go on to the next look, which adds two fifths to
        what was seen, and so on to the last, where losses are exact, the same bits as `score`
        gives.
        confidence: probability, in all, of keeping the best ones, under the assumption that
        `racing.beaten` states, shared out evenly over looks and, at each, the masks that are left.
        tolerance: a mask may also leave when what it could be better by is no more than this,
        beyond doubt. Sets of fewer than 32 samples are scored whole.

        Raises InputError for keep below 1 or above the number of different masks, a confidence
        outside (0, 1), and a negative tolerance.
        """
        sequences = self._check_masks(masks)
        distinct = list(dict.fromkeys(sequences))
        check_race(keep, len(distinct), confidence, tolerance)
        looks = look_rows(self.objective.batch)
        with self.model.turn:
            runs, whole = self.stats.unit_runs, self._ask(sequences)
            chunks = None
            while (
                chunks is not self._engine.chunks
            ):  # where memory ran out, sums before and after differ in their bits
                chunks = self._engine.chunks
                alive, losses = self._race(distinct, looks, keep, confidence, tolerance)
            order = np.argsort(np.where(np.isfinite(losses), losses, np.inf), kind="stable")[:keep]
            first = {sequence: i for i, sequence in reversed(list(enumerate(sequences)))}
            made = self.stats.unit_runs - runs
            return Selection(
                indices=np.array([first[distinct[i]] for i in alive[order]], dtype=np.int64),
                losses=losses[order],
                decided_early=len(distinct) - len(alive),
                unit_runs=made,
                share=made / max(1, whole.unit_runs),
            )

    def similarity(self) -> np.ndarray:
        """float64[U + 1, U + 1]: mean over tokens of the cosine between the states before each unit
        of the dense model, and after the last (before the final norm)."""
        return probes.similarity(self.model, self.objective.batch, self.granularity)

    def angular_distance(self) -> np.ndarray:
        """float64[U + 1, U + 1]: the mean angle, in half turns, between the same states, at the
        last token of each sequence only (Gromov et al., arXiv 2403.17887)."""
        return probes.angular_distance(self.model, self.objective.batch, self.granularity)

    def unit_gradients(self) -> np.ndarray:
        """float64[S, U]: dL_s/da_i at a = 1 for each sample, where a_i scales unit i's residual
        branches.

        For blocks, a_i scales both branches (CBO, arXiv 2602.00161). Raises InputError for an
        objective without a gradient (TaskAccuracy, and what is compared with the dense model, whose
        gradient vanishes there).
        """
        return probes.unit_gradients(self.model, self.objective, self.granularity)

    def unit_salience(self, power: int = 1) -> np.ndarray:
        """float64[U]: the sum of |w dL/dw|^power over the weights w of each unit, L the loss of the
        dense model.

        A gradient of every weight is held (Shortened LLaMA, arXiv 2402.02834). Raises InputError
        for an objective without a gradient, as `unit_gradients` does, and for a power other than 1
        and 2.
        """
        if power not in (1, 2):
            raise InputError(f"power must be 1 or 2, not {power!r}")
        return probes.unit_salience(self.model, self.objective, self.granularity, power)

    def _check_masks(self, masks: ArrayLike) -> list[Units]:
        """The kept units of each mask."""
        sequences = kept_units(as_masks(masks, self.num_units))
        self._check_not_empty(sequences)
        return sequences

    def _check_not_empty(self, sequences: list[Units]) -> None:
        if not all(sequences) and not self.model.runs_without_blocks:
            raise InputError(
                f"a mask keeps nothing, and the family {self.model.family!r} cannot run without "
                f"blocks"
            )

    def _ask(self, sequences: list[Units], share: float = 1) -> Trie:
        """The trie of sequences; notes what was asked for, of a share of the calibration set."""
        trie = make_trie(sequences)
        self.stats.masks += len(sequences)
        self.stats.asked_unit_runs += _whole(trie.unit_runs * share)
        self.stats.naive_unit_runs += _whole(trie.naive_unit_runs * share)
        return trie

    def _losses(self, sequences: list[Units]) -> np.ndarray:
        """The loss of each sequence, float64[N]; of so many at once that their sums stay within the
        budget."""
        trie, together = self._ask(sequences), self._engine.budget.most_sums
        if len(trie.sequences) <= together:
            return self.objective.loss(self._run(trie)[:, 0])[trie.index]
        parts = (
            make_trie(trie.sequences[i : i + together])
            for i in range(0, len(trie.sequences), together)
        )
        return np.concatenate([self.objective.loss(self._run(part)[:, 0]) for part in parts])[
            trie.index
        ]

    def _run(self, trie: Trie, wanted: np.ndarray | None = None) -> np.ndarray:
        """Sums over continuations of the trie's distinct sequences, [M, V, C]; notes what it
        cost."""
        started, engine, rows = time.perf_counter(), self._engine, self.objective.batch.num_rows
        counts = engine.counts
        try:
            sums, known = engine.run(trie, self.progress, wanted)
        finally:  # work that was interrupted was work, too
            self.stats.unit_runs = _whole(counts.row_runs / rows)
            self.stats.head_runs = _whole(counts.row_heads / rows)
            self.stats.unbounded_unit_runs = _whole(counts.row_unbounded / rows)
            self.stats.peak_activation_bytes = counts.peak_activation_bytes
            self.stats.weight_loads, self.stats.weight_bytes = (
                counts.weight_loads,
                counts.weight_bytes,
            )
            self.stats.cache_bytes, self.stats.cache_hits = (
                engine.cache.bytes,
                dict(engine.cache.hits),
            )
            self.stats.seconds += time.perf_counter() - started
        self.stats.store_hits += int(known[trie.index].sum())
        return sums

    def _race(
        self,
        sequences: Sequence[Units],
        looks: Sequence[np.ndarray],
        keep: int,
        confidence: float,
        tolerance: float,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Which of the sequences reach the last look, int64[K], and their losses."""
        batch, objective = self.objective.batch, self.objective
        seen = np.zeros(batch.num_continuations, dtype=bool)
        sums = np.zeros((len(sequences), batch.num_continuations))

        def look(number: int, alive: np.ndarray) -> np.ndarray:
            wanted = np.isin(batch.continuation_row, looks[number])
            trie = make_trie(sequences[i] for i in alive)
            sums[alive] += self._run(trie, wanted)[trie.index, 0]
            seen[wanted] = True
            samples = np.unique(objective.sample[seen])
            losses = objective.sample_losses(sums[alive])[:, samples]
            return losses * objective.sample_weight[samples] * self.num_samples

        alive = race(
            len(sequences), len(looks), look, self.num_samples, keep, confidence, tolerance
        )
        return alive, objective.loss(sums[alive])

    def _check_samples(self, samples: ArrayLike) -> np.ndarray:
        samples = np.asarray(samples)
        if samples.ndim != 1 or samples.dtype.kind not in "iu" or not samples.size:
            raise InputError("samples must be a list of sample indices that is not empty")
        wrong = samples[(samples < 0) | (samples >= self.num_samples)]
        if len(wrong):
            raise InputError(
                f"sample {wrong[0]} is out of range; the samples are 0 to {self.num_samples - 1}"
            )
        return samples


def _make_folder(folder: Path) -> Path:
    """The folder, made where it is missing. Raises InputError where no file can be made in it."""
    check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def check_race(keep: int, count: int, confidence: float, tolerance: float) -> None:
    """Raise InputError for what is no race over so many different masks."""
    if isinstance(keep, bool) or not isinstance(keep, (int, np.integer)) or not 1 <= keep <= count:
        raise InputError(
            f"keep must be from 1 to {count}, the number of different masks, not {keep!r}"
        )
    if (
        isinstance(confidence, bool)
        or not isinstance(confidence, (int, float))
        or not 0 < confidence < 1
    ):
        raise InputError(f"confidence must be between 0 and 1, such as 0.99, not {confidence!r}")
    if (
        isinstance(tolerance, bool)
        or not isinstance(tolerance, (int, float))
        or not 0 <= tolerance < float("inf")
    ):
        raise InputError(f"tolerance must be a number of at least 0, not {tolerance!r}")


def _whole(count: float) -> float:
    return int(count) if count == int(count) else count
