"""Evaluator: the facade that searches and other tools call."""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from .costs import UnitCosts, unit_costs
from .engine import probes
from .engine.calls import Calls, MakeRuns
from .engine.local import LocalRuns
from .engine.looks import race_sequences
from .engine.memory import MemoryLimit
from .engine.parts import Part, check_samples, choose, tokens_of_samples
from .engine.runs import Runs
from .engine.store import SumStore
from .errors import InputError
from .models import Granularity, Library, Model, Runner, surgery
from .models.unwrap import unwrap
from .objectives import Objective
from .plan.cost import Stats
from .plan.layout import Layout
from .plan.progress import ProgressCallback
from .plan.racing import Race, check_race
from .plan.trie import Units, units_of
from .validate import (
    check_bytes,
    check_callable,
    check_folder,
    check_kind,
    check_one_of,
)
from .workers.processes import Processes, Workers, check_workers
from .workers.remote import RemoteRuns

if TYPE_CHECKING:
    from numpy.typing import ArrayLike
    from torch import nn

Sequences = Iterable[Iterable[int]]  # of unit indices
Backend = Literal["auto", "generic", "fused"]
BACKENDS = get_args(Backend)


class Evaluator:
    """Scores depth masks of one model under one objective.

    model: a Model from load_model, or a transformers model in memory. objective: Perplexity,
    TaskMargin, TaskLikelihood, TaskAccuracy, KLDivergence, Agreement, CosineDistance or
    NormalizedMSE.
    backend: "generic" runs any family by transformers' own code, "fused" the Llama-like ones on
    fused operators, "auto" the fused path if it is faster; `self.backend` says which one runs.
    granularity: "block", or "sublayer" (unit 2i is block i's attention, 2i + 1 its mlp).
    memory_bytes: byte budget of the activations of a call (4 GiB on a CPU, 16 GiB on a GPU by
    default); it decides how many tokens run at once. cache_bytes: budget of the prefix cache,
    states that outlive a call: the next call runs only units that no call before has run, as far as
    the cache reaches. By default a quarter of the memory free before each call; on a GPU, all of
    the device but a reserve of memory_bytes, then a quarter of the host. 0 for none. cache_dir: a
    folder on a fast disk for states that do not fit, in a file deleted with the process, up to a
    quarter of its free bytes.
    store: file of finished sums (or a SumStore): its sums are not computed again, whichever
    objective measured the same on the same tokens (margin and accuracy do), and new sums are kept
    chunk by chunk.
    workers: that many processes of this machine, each with a model of its own, or started
    `Workers`, run a call together; None for this process alone. Each runs with as many threads as
    this process, and a score has the bits that it has here. memory_bytes is then of each worker,
    cache_bytes of all of a machine.
    progress: called with a `ProgressEvent` while masks are scored.
    layout: how the calibration set is cut, `layout` of another evaluator, so that scores have its
    bits under another budget; None: as fits memory_bytes.

    A mask's score does not depend, to the bit, on other masks, in the same call or before. Threads
    may share an evaluator or a model: their calls take turns.

    The model is scored as it is at each call: one that has changed is verified and opened again
    (`Model.version` says which changes are seen). The version before is kept beside it, and its
    states have half of the cache, so that a restored model runs no prefix again; they are evicted
    first when memory runs out. Workers keep the last version only. If the fused path no longer
    applies, "auto" continues with the generic one and warns once.

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
        backend: Backend = "auto",
        *,
        granularity: Granularity = "block",
        memory_bytes: int | None = None,
        cache_bytes: int | None = None,
        cache_dir: str | os.PathLike | None = None,
        store: str | os.PathLike | SumStore | None = None,
        workers: int | Workers | None = None,
        progress: ProgressCallback | None = None,
        layout: Layout | None = None,
    ):
        check_kind("objective", objective, Objective, "one such as Perplexity(batch)")
        check_one_of("backend", backend, BACKENDS)
        memory_bytes = check_bytes("memory_bytes", memory_bytes, 1)
        cache_bytes = check_bytes("cache_bytes", cache_bytes, 0)
        if progress is not None:
            check_callable("progress", progress, "a function of a ProgressEvent")
        if layout is not None:
            check_kind("layout", layout, Layout, "a Layout, such as another evaluator's")
        if workers is not None and not isinstance(workers, Workers):
            check_workers(workers)
        self.model = model if isinstance(model, Model) else Model(unwrap(model))
        self.objective = objective
        self.granularity = granularity
        self.progress = progress
        self._dense: tuple[int, float] | None = None  # version of the model, and its loss
        if store is not None and not isinstance(store, SumStore):
            store = SumStore(store)
        if workers is not None and not isinstance(workers, Workers):
            workers = Processes(workers)
        folder = None if cache_dir is None else _make_folder(Path(cache_dir))
        with self.model.lock:
            self._calls = Calls(
                self.model,
                objective.batch,
                objective.measure,
                granularity,
                backend,
                memory_bytes,
                layout,
                _runs_maker(self.model, backend, memory_bytes, cache_bytes, folder, workers),
                store,
                needs_digest=workers is not None,
            )
            runs = self._calls.opened.runs
            if isinstance(runs, RemoteRuns):  # a worker that cannot help says so now
                with self.model.evaluation():
                    runs.open(self._calls.problem)

    def __repr__(self) -> str:
        units = f"{self.num_units} {'blocks' if self.granularity == 'block' else 'sublayers'}"
        what = f"{self.model.name!r}, {self.objective.name}, {units}, {self.num_samples} samples"
        return f"Evaluator({what}, {self.backend})"

    @property
    def backend(self) -> str:
        """The path that runs the units: "generic", or "fused" with its operators."""
        return self._calls.opened.runner.path_name

    @property
    def num_units(self) -> int:
        return self._calls.opened.limit.num_units

    @property
    def layout(self) -> Layout:
        """How the calibration set is cut: plain integers, which can be written down
        (`Layout.to_json`) and given again.

        Another one after memory ran out.
        """
        return self._calls.problem.layout

    @property
    def num_samples(self) -> int:
        return self.objective.num_samples

    @cached_property
    def sample_tokens(self) -> np.ndarray:
        """Tokens of each sample's row, int64[S], all read to score a mask on that sample."""
        return tokens_of_samples(self.objective, self._calls.problem.batch)

    @property
    def stats(self) -> Stats:
        """The cost of all calls so far."""
        return self._calls.stats

    @property
    def cuts_samples(self) -> bool:
        """Whether `score` takes `tokens=`: samples are rows of text, not questions."""
        return self.objective.cuts_samples

    @cached_property
    def unit_names(self) -> list[str]:
        return self.model.unit_names(self.granularity)

    @property
    def dense_loss(self) -> float:
        """The loss of the whole model, computed when it is first asked for, and again when the
        model has changed."""
        with self.model.lock:
            version = self.model.version
            if self._dense is None or self._dense[0] != version:
                loss = float(self.score(np.ones((1, self.num_units), dtype=bool))[0])
                self._dense = self._calls.opened.version, loss
            return self._dense[1]

    def score(
        self,
        masks: ArrayLike | None = None,
        *,
        sequences: Sequences | None = None,
        samples: ArrayLike | None = None,
        tokens: int | None = None,
    ) -> np.ndarray:
        """Score masks, or sequences of units. Lower is better.

        A sequence may leave out, repeat and reorder units. One that ascends is a mask, and has its
        score. Sequences share their prefixes as masks do.

        Args:
            masks: bool or 0/1 [N, U], True = kept.
            sequences: N collections of unit indices, such as [(0, 1, 1, 2), (0, 2, 1)], instead of
                masks.
            samples: Distinct indices of samples. Only their chunks run: each row alone, or with the
                other short rows of its chunk. The loss is then weighted by the targets of these
                samples. Default: all.
            tokens: Cut the last of the samples so that exactly this number of tokens is read. The
                part that remains runs alone, with bits of its own; it is left out where it holds no
                target. Not for questions.

        Returns:
            The loss of each, float64[N]. A loss that is not finite is returned as it is.

        Raises:
            InputError: For masks of another shape or value, for a unit out of range, for one that
                keeps nothing where the family cannot run without blocks, for samples out of range
                or repeated, and for tokens that end outside the last sample.

        Examples:
            >>> import fastprune as fp
            >>> batch = fp.TokenBatch.from_ids([[5, 6, 7, 8, 9], [10, 11, 12], [13, 14, 15]])
            >>> ev = fp.Evaluator(fp.load_model("demo"), fp.Perplexity(batch))
            >>> ev.score(sequences=[(0, 1, 1, 2), (0, 2, 1)], samples=[2, 0], tokens=5).shape
            (2,)
        """
        checked = self._check(masks, sequences)
        if samples is None and tokens is None:
            with self.model.lock:
                return self._losses(checked)
        chosen = check_samples(samples, self.num_samples, distinct=True)
        with self.model.lock:
            choice = choose(self.objective, self._calls.problem.chunks, chosen, tokens)
            if len(choice.samples) == self.num_samples and choice.cut_targets is None:
                return self._losses(checked)
            sums, index = self._sums(checked, choice.part)
            losses = self.objective.partial_loss(sums[:, 0], choice.samples, choice.cut_targets)
            return losses[index]

    def sums(
        self, masks: ArrayLike | None = None, *, sequences: Sequences | None = None
    ) -> np.ndarray:
        """The sums of the objective's measure on each continuation of its batch, float64[N, V, C]:
        the sums over its targets of each of the measure's V values (`measures.MEASURES`), before
        the objective weighs them. Takes masks or sequences, and raises InputError, as `score`
        does."""
        checked = self._check(masks, sequences)
        with self.model.lock:
            sums, index = self._sums(checked)
            return sums[index]

    def score_samples(
        self,
        masks: ArrayLike | None = None,
        samples: ArrayLike | None = None,
        *,
        sequences: Sequences | None = None,
    ) -> np.ndarray:
        """The loss of each mask on each sample (row of text, or question), float64[N, S].

        samples: indices of the samples that are wanted, in the order of the columns; default all.
        Only their chunks run, as in `score`, and every number has the same bits as with all. Takes
        sequences instead of masks, and raises InputError, as `score` does; samples may repeat.
        """
        chosen = check_samples(samples, self.num_samples, distinct=False)
        part = Part(np.isin(self.objective.sample, chosen))
        checked = self._check(masks, sequences)
        with self.model.lock:
            sums, index = self._sums(checked, part)
            return self.objective.sample_losses(sums[:, 0])[:, chosen][index]

    @property
    def num_looks(self) -> int:
        """Looks of a race over this calibration set; 1: it is too small to race on, and is scored
        whole."""
        return int(self.layout.looks(self.objective.batch).max()) + 1

    def race(
        self,
        masks: ArrayLike | None = None,
        keep: int = 1,
        confidence: float = 0.99,
        tolerance: float = 0.0,
        *,
        sequences: Sequences | None = None,
    ) -> Race:
        """Find the `keep` masks of lowest loss; clearly worse masks leave before the last samples.

        All masks are scored on the first look: a sixteenth of the samples, but at least 8, and up
        to 16 if they are short. Masks that `keep` others surely beat (`plan.racing.beaten`) leave.
        The others go on to the next look, which adds two fifths to the samples seen, and so on to
        the last, whose losses are exact: the bits that `score` gives. Sets of fewer than 32 samples
        are scored whole.

        The evaluator keeps what every look finds, in a sixteenth of memory_bytes at most. A later
        race or score of the same masks runs only the samples that are missing.

        Args:
            masks: bool or 0/1 [N, U], True = kept.
            sequences: N collections of unit indices, instead of masks, as in `score`.
            keep: Masks to keep, from 1 to the number of different masks.
            confidence: Probability of keeping the `keep` best, in (0, 1). It assumes that a paired
                mean difference, corrected for skewness to first order, is t distributed, and that
                of the samples not seen at most one in 200 (at least one) is an outlier, none larger
                than the range of the losses seen.
            tolerance: A mask may also leave when it could be better by no more than this loss.

        Returns:
            The masks kept, best first, with their exact losses and the cost of the race.

        Raises:
            InputError: For masks as in `score`, and for keep, confidence or tolerance out of range.

        Examples:
            >>> import fastprune as fp
            >>> batch = fp.TokenBatch.from_ids([[5, 6, 7, 8, 9], [10, 11, 12]])
            >>> ev = fp.Evaluator(fp.load_model("demo"), fp.Perplexity(batch))
            >>> ev.race(fp.from_removed([(3,), (3, 7), (5,)], ev.num_units), keep=2).indices.shape
            (2,)
        """
        asked = self._check(masks, sequences)
        distinct = list(dict.fromkeys(asked))
        check_race(keep, len(distinct), confidence, tolerance)
        with self.model.lock:
            before = self.stats
            self._calls.ask(asked)
            settings = keep, confidence, tolerance
            alive, losses = race_sequences(
                self._calls, self.objective, distinct, *settings, self.progress
            )
            order = np.argsort(np.where(np.isfinite(losses), losses, np.inf), kind="stable")[:keep]
            first = {sequence: i for i, sequence in reversed(list(enumerate(asked)))}
            return Race(
                indices=np.array([first[distinct[i]] for i in alive[order]], dtype=np.int64),
                losses=losses[order],
                decided_early=len(distinct) - len(alive),
                cost=self.stats - before,
            )

    def replace_one(self) -> np.ndarray:
        """The loss of the whole model with each variant of a `Library` in its block's place,
        float64[blocks, names]: the columns are `Library.variant_names`, nan if a block has no
        variant of that name."""
        library = check_kind("model", self.model, Library, "a Library, for replace_one")
        return library.table(self.score(sequences=library.replacements()))

    def similarity(self) -> np.ndarray:
        """float64[U + 1, U + 1]: mean over tokens of the cosine between the states before each unit
        of the dense model, and after the last (before the final norm)."""
        return probes.similarity(self.model, self.objective.batch, self.granularity)

    def angular_distance(self) -> np.ndarray:
        """float64[U + 1, U + 1]: the mean angle, in half turns, between the same states, at the
        last token of each sequence only (Gromov et al., arXiv 2403.17887)."""
        return probes.angular_distance(self.model, self.objective.batch, self.granularity)

    def unit_gradients(self) -> np.ndarray:
        """float64[S, U]: dL_s/da_i at a = 1 for each sample; a_i scales unit i's residual branches.

        For blocks, a_i scales both branches (CBO, arXiv 2602.00161). Raises InputError for an
        objective without a gradient (TaskAccuracy, and objectives that compare with the dense
        model, whose gradient vanishes there).
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

    def unit_costs(
        self, kind: str = "params", batch_size: int = 1, seq_len: int | None = None
    ) -> UnitCosts:
        """The cost of the model and of each unit, of a kind that `fp.Budget` names; "latency_ms" is
        measured on rows of these sizes."""
        return unit_costs(self.model, self.granularity, kind, batch_size, seq_len)

    def _check(self, masks: ArrayLike | None, sequences: Sequences | None) -> list[Units]:
        """The units that run of each mask or sequence, in order."""
        checked = units_of(masks, sequences, self.num_units, self.model.num_variants)
        if not all(checked) and not surgery.runs_without_blocks(self.model):
            raise InputError(
                f"a mask keeps nothing, and the family {self.model.family!r} cannot run without "
                f"blocks"
            )
        return checked

    def _sums(
        self, sequences: list[Units], part: Part | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The sums of the distinct sequences on each continuation, [M, V, C], and the place among
        them of each sequence, int64[N]."""
        trie = self._calls.ask(sequences, part)
        return self._calls.run(trie, self.progress, part), trie.index

    def _losses(self, sequences: list[Units]) -> np.ndarray:
        """The loss of each sequence, float64[N]; at once of as many as have room for their sums."""
        trie = self._calls.ask(sequences)
        together = self._calls.opened.limit.most_sums
        parts = [trie] if len(trie.sequences) <= together else trie.parts(together)
        losses = [self.objective.loss(self._calls.run(some, self.progress)[:, 0]) for some in parts]
        return np.concatenate(losses)[trie.index]


def _runs_maker(
    model: Model,
    backend: str,
    memory_bytes: int | None,
    cache_bytes: int | None,
    cache_dir: Path | None,
    workers: Workers | None,
) -> MakeRuns:
    """A function that makes the runs of one version of the model: here, or on workers."""

    def make(runner: Runner, limit: MemoryLimit) -> Runs:
        if workers is None:
            return LocalRuns(model, runner, limit, cache_bytes, cache_dir)
        return RemoteRuns(workers, model, backend, memory_bytes, cache_bytes, cache_dir)

    return make


def _make_folder(folder: Path) -> Path:
    """The folder, made if it is missing. Raises InputError if no file can be made in it."""
    check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return folder
