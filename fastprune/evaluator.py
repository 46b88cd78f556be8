"""Evaluator: the facade that searches and other tools call."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import numpy as np

from .costs import UnitCosts, unit_costs
from .engine import probes
from .engine.ledger import Ledger
from .engine.local import LocalRuns, open_for
from .engine.memory import MAX_SEQUENCES, MemoryLimit, OutOfMemory
from .engine.problem import Problem, numerics_of
from .engine.runs import Cost, whole
from .engine.store import SumStore
from .engine.sums import SumMemory, Sums
from .errors import InputError
from .masks import as_masks, check_sequences
from .models import GenericRunner, Granularity, Library, Model, Runner, surgery
from .models.fused import why_not_fused
from .models.unwrap import unwrap
from .objectives import Objective
from .plan.layout import Layout
from .plan.progress import ProgressCallback, ProgressEvent, event_reporter, reporting
from .plan.racing import Race, check_race, race
from .plan.trie import Trie, Units, kept_units, make_trie
from .validate import (
    check_bytes,
    check_callable,
    check_folder,
    check_integer,
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


@dataclass
class Stats:
    """The cost of an evaluator's calls so far.

    Runs are counted over the whole calibration set: one on half of its tokens counts one half.

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
    asked_unit_runs: float = (
        0  # distinct prefixes of each call: its unit runs, had nothing been known before
    )
    naive_unit_runs: float = 0  # unit runs of one forward pass per mask that was asked for
    head_runs: float = 0  # masks whose loss was computed
    store_hits: int = 0  # scores that were asked for and came from the store
    peak_activation_bytes: int = 0  # the most held at once, besides the prefix cache
    cache_bytes: int = 0  # held by the prefix cache now
    cache_hits: dict[str, int] = field(
        default_factory=dict
    )  # states of chunks that it served, by tier
    weight_loads: int = 0  # blocks read from files, with streamed weights
    weight_bytes: int = 0  # read for them
    seconds: float = 0.0  # spent scoring


@dataclass
class _Opened:
    """All that belongs to one version of the model.

    problem: replaced by another when memory runs out or a switch of torch changes.
    """

    version: int
    runner: Runner
    limit: MemoryLimit
    problem: Problem
    runs: LocalRuns | RemoteRuns


class _Part(NamedTuple):
    """A part of the calibration set. wanted: bool[C], continuations whose chunks run. cut: a row
    that runs besides, alone, and how many of its tokens are read."""

    wanted: np.ndarray
    cut: tuple[int, int] | None = None


class Evaluator:
    """Scores depth masks of one model under one objective.

    model: a Model from load_model, or a transformers model in memory. objective: Perplexity,
    TaskMargin, TaskLikelihood, TaskAccuracy, KLDivergence, CosineDistance or NormalizedMSE.
    backend: "generic" runs any family by transformers' own code, "fused" the Llama-like ones on
    fused operators, "auto" the fused path if it is faster; `self.backend` says which one runs.
    granularity: "block", or "sublayer" (unit 2i is block i's attention, 2i + 1 its mlp).
    memory_bytes: byte budget of the activations of a call (4 GiB on a CPU, 16 GiB on a GPU by
    default); it decides how many tokens run at once. cache_bytes: budget of the prefix cache,
    states that outlive a call: the next call runs only units that no call before has run, as far as
    the cache reaches. By default a quarter of the memory free before each call (on a GPU, of the
    device and of the host); 0 for none. cache_dir: a folder on a fast disk for states that do not
    fit, in a file deleted with the process, up to a quarter of its free bytes.
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
        self.stats = Stats()
        self._token_cost = Cost()  # of all calls; runs count single tokens
        self._dense: tuple[int, float] | None = None  # version of the model, and its loss
        self._store = store if isinstance(store, SumStore) or store is None else SumStore(store)
        self._workers: Workers | None = None
        if workers is not None:
            self._workers = workers if isinstance(workers, Workers) else Processes(workers)
        self._options = backend, memory_bytes
        self._caches = cache_bytes, None if cache_dir is None else _make_folder(Path(cache_dir))
        with self.model.lock:
            self._opened = self._open(layout)
            self._idle: _Opened | None = None  # of the version before
            self._memory = SumMemory(self._opened.limit.race_bytes)
            if isinstance(self._opened.runs, RemoteRuns):  # a worker that cannot help says so now
                with self.model.evaluation():
                    self._opened.runs.open(self._problem)

    def _open(self, layout: Layout | None) -> _Opened:
        """The model as it is now: the runner of its units, and its problem."""
        backend, memory_bytes = self._options
        batch, measure = self.objective.batch, self.objective.measure
        keyed = self._store is not None or self._workers is not None
        with self.model.held() as version:
            runner, limit, layout = open_for(
                self.model,
                backend,
                batch,
                measure,
                self.granularity,
                memory_bytes,
                layout,
            )
            digest = self.model.digest if keyed else None
            numerics = numerics_of(self.model, runner)
            runs: LocalRuns | RemoteRuns
            if self._workers is None:
                runs = LocalRuns(self.model, runner, limit, *self._caches)
            else:
                runs = RemoteRuns(self._workers, self.model, backend, memory_bytes, *self._caches)
        problem = Problem(batch, measure, self.granularity, layout, numerics, digest)
        return _Opened(version, runner, limit, problem, runs)

    @property
    def _problem(self) -> Problem:
        return self._opened.problem

    def __repr__(self) -> str:
        units = f"{self.num_units} {'blocks' if self.granularity == 'block' else 'sublayers'}"
        what = f"{self.model.name!r}, {self.objective.name}, {units}, {self.num_samples} samples"
        return f"Evaluator({what}, {self.backend})"

    @property
    def backend(self) -> str:
        """The path that runs the units: "generic", or "fused" with its operators."""
        return self._opened.runner.path_name

    @property
    def num_units(self) -> int:
        return self._opened.limit.num_units

    @property
    def layout(self) -> Layout:
        """How the calibration set is cut: plain integers, which can be written down
        (`Layout.to_json`) and given again.

        Another one after memory ran out.
        """
        return self._problem.layout

    @property
    def num_samples(self) -> int:
        return self.objective.num_samples

    @cached_property
    def sample_tokens(self) -> np.ndarray:
        """Tokens of each sample's row, int64[S], all read to score a mask on that sample."""
        batch = self.objective.batch
        pairs = np.unique(
            np.stack([self.objective.sample, batch.continuation_row]), axis=1
        )  # (sample, row), once each
        tokens = np.bincount(pairs[0], batch.row_lengths[pairs[1]], minlength=self.num_samples)
        return tokens.astype(np.int64)

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
                self._dense = self._opened.version, loss
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
        chosen = self._check_samples(samples, distinct=True)
        with self.model.lock:
            whole, cut = (chosen, None) if tokens is None else self._cut_last(chosen, tokens)
            if len(whole) == self.num_samples:
                return self._losses(checked)
            part = _Part(np.isin(self.objective.sample, whole), cut)
            trie = self._ask(checked, part)
            sums = self._run(trie, part)[:, 0]
            ordered = np.sort(whole)  # the order of the samples decides no bit
            if cut is None:
                return self.objective.partial_loss(sums, ordered)[trie.index]
            ordered = np.append(ordered, cut[0])
            return self.objective.partial_loss(sums, ordered, self._num_targets(cut))[trie.index]

    def sums(
        self, masks: ArrayLike | None = None, *, sequences: Sequences | None = None
    ) -> np.ndarray:
        """The sums of the objective's measure on each continuation of its batch, float64[N, V, C]:
        the sums over its targets of each of the measure's V values (`measures.MEASURES`), before
        the objective weighs them. Takes masks or sequences, and raises InputError, as `score`
        does."""
        checked = self._check(masks, sequences)
        with self.model.lock:
            trie = self._ask(checked)
            return self._run(trie)[trie.index]

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
        chosen = self._check_samples(samples)
        part = _Part(np.isin(self.objective.sample, chosen))
        checked = self._check(masks, sequences)
        with self.model.lock:
            trie = self._ask(checked, part)
            sums = self._run(trie, part)[:, 0]
            return self.objective.sample_losses(sums)[:, chosen][trie.index]

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
            runs, whole = self.stats.unit_runs, self._ask(asked)
            problem = None
            while (
                problem is not self._problem
            ):  # memory ran out: sums before and after differ in their bits
                problem = self._problem
                alive, losses = self._race(distinct, keep, confidence, tolerance)
            order = np.argsort(np.where(np.isfinite(losses), losses, np.inf), kind="stable")[:keep]
            first = {sequence: i for i, sequence in reversed(list(enumerate(asked)))}
            unit_runs = self.stats.unit_runs - runs
            return Race(
                indices=np.array([first[distinct[i]] for i in alive[order]], dtype=np.int64),
                losses=losses[order],
                decided_early=len(distinct) - len(alive),
                unit_runs=unit_runs,
                share=unit_runs / max(1, whole.unit_runs),
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
        if (masks is None) == (sequences is None):
            raise InputError("give either masks or sequences=, one of them")
        if sequences is None:
            checked = kept_units(as_masks(masks, self.num_units))
        else:
            checked = check_sequences(sequences, self.num_units + self.model.num_variants)
        if not all(checked) and not surgery.runs_without_blocks(self.model):
            raise InputError(
                f"a mask keeps nothing, and the family {self.model.family!r} cannot run without "
                f"blocks"
            )
        return checked

    def _ask(self, sequences: list[Units], part: _Part | None = None) -> Trie:
        """The trie of sequences; notes what was asked for, on a part of the calibration set."""
        trie, share = make_trie(sequences), self._share(part)
        self.stats.masks += len(sequences)
        self.stats.asked_unit_runs += whole(trie.unit_runs * share)
        self.stats.naive_unit_runs += whole(trie.naive_unit_runs * share)
        return trie

    def _losses(self, sequences: list[Units]) -> np.ndarray:
        """The loss of each sequence, float64[N]; of so many at once that their sums stay within the
        budget."""
        trie, together = self._ask(sequences), self._opened.limit.most_sums
        if len(trie.sequences) <= together:
            return self.objective.loss(self._run(trie)[:, 0])[trie.index]
        parts = (
            make_trie(trie.sequences[i : i + together])
            for i in range(0, len(trie.sequences), together)
        )
        return np.concatenate([self.objective.loss(self._run(part)[:, 0]) for part in parts])[
            trie.index
        ]

    def _run(
        self, trie: Trie, part: _Part | None = None, keeps: SumMemory | None = None
    ) -> np.ndarray:
        """Sums of the trie's distinct sequences over each continuation, [M, V, C].

        part: of the calibration set, which alone runs; sums outside of it are 0. Of a row that was
        cut, the sums stand in one column more. keeps: the memory that takes the sums.
        """
        longest = max(map(len, trie.sequences), default=0)
        together = self._opened.limit.most_together(longest)
        if longest > self.num_units and len(trie.sequences) > together:
            starts = range(0, len(trie.sequences), together)
            parts = (make_trie(trie.sequences[start : start + together]) for start in starts)
            return np.concatenate([self._run(some, part, keeps) for some in parts])
        if len(trie.sequences) > MAX_SEQUENCES:
            raise InputError(
                f"{len(trie.sequences)} distinct masks in one call; at most {MAX_SEQUENCES} are "
                "planned together"
            )
        started = time.perf_counter()
        try:
            with self.model.evaluation():
                ledger = None
                while ledger is None:
                    self._refresh()
                    ledger = self._complete(trie.sequences, part, keeps)
                    if ledger is None:  # the states that the call made are of no version
                        self._opened.runs.close()
        finally:
            self.stats.seconds += time.perf_counter() - started
        self.stats.store_hits += int(ledger.from_store[trie.index].sum())
        return ledger.sums

    def _refresh(self) -> None:
        """Open the model again if it has changed since the last call, or return to the version
        before if that was restored."""
        version, opened = self.model.begin_version(), self._opened
        if version != opened.version:
            layout = self._problem.layout
            if self._idle is not None and self._idle.version == version:
                self._opened, self._idle = self._idle, opened
                if self._problem.layout != layout:
                    self._opened.problem = self._problem.with_layout(layout)
            else:
                self._opened = self._open(layout)
                if self._idle is not None:
                    self._idle.runs.close()
                self._idle = opened
            self._share_caches()
            self._warn_of_path(opened.runner)
        numerics = numerics_of(self.model, self._opened.runner)
        if numerics != self._problem.numerics:
            self._opened.problem = replace(self._problem, numerics=numerics)

    def _share_caches(self) -> None:
        """Let the version before wait beside the one that runs."""
        runs, idle = self._opened.runs, self._idle
        if isinstance(runs, LocalRuns) and idle is not None and isinstance(idle.runs, LocalRuns):
            runs.run_beside(idle.runs)
        elif idle is not None:  # workers hold one model
            idle.runs.close()
            self._idle = None

    def _warn_of_path(self, before: Runner) -> None:
        """Warn if the fused path served the version before and cannot serve this one."""
        generic = GenericRunner.path_name
        if before.path_name == generic or self.backend != generic:
            return
        reason = why_not_fused(self.model)
        if reason is not None:  # or `open_runner` has warned
            warnings.warn(
                f"{self.model.name} has changed, and the fused path cannot run it: {reason}; going "
                "on with the generic one, which is slower",
                RuntimeWarning,
                stacklevel=6,
            )

    def _complete(
        self, sequences: tuple[Units, ...], part: _Part | None, keeps: SumMemory | None
    ) -> Ledger | None:
        """The ledger of a call, with every sum; None where the model turns out to have changed.
        Out of memory, the call begins again in smaller steps."""
        while True:
            problem, progress = self._problem, event_reporter(self.progress)
            stores: list[tuple[Sums, int]] = []
            if keeps is not None or self._memory:
                stores.append((self._memory, self._memory.context(problem)))
            if self._store is not None:
                stores.append((self._store, self._store.context(problem.context)))
            ledger = Ledger(problem, sequences, self._chunks_of(part), stores)
            missing = ledger.missing()
            if not missing:
                return ledger if self._is_settled() else None
            before = self._opened.runs.cost
            try:
                with closing(self._opened.runs.run(problem, sequences, missing, progress)) as parts:
                    for sums in parts:
                        if not self._is_settled():
                            return None
                        ledger.put(sums)
                return ledger
            except OutOfMemory as error:
                if not self._take_smaller_steps():
                    raise (error.__cause__ or error) from None
            finally:  # interrupted work is work, too
                self._note(self._opened.runs.cost - before)

    def _is_settled(self) -> bool:
        """Whether the model is of the version that the call began with, now that a GPU's values
        have come with the first sums."""
        return self.model.settle_version() == self._opened.version

    def _take_smaller_steps(self) -> bool:
        """Cut smaller chunks, or tiles; False when both are as small as can be."""
        layout = self._opened.limit.smaller(self._problem.layout)
        if layout is None:
            return False
        self._opened.problem = self._problem.with_layout(layout)
        tokens = max(chunk.num_tokens for chunk in self._problem.chunks)
        warnings.warn(
            f"out of memory: going on with chunks of {tokens} tokens and tiles of {layout.tile} "
            "positions; scores may differ in the last bits from those before",
            RuntimeWarning,
            stacklevel=5,
        )
        return True

    def _chunks_of(self, part: _Part | None) -> list[int]:
        """The numbers of the chunks that a part of the calibration set runs."""
        chunks = self._problem.chunks
        if part is None:
            return list(range(len(chunks)))
        numbers = [
            number for number, chunk in enumerate(chunks) if part.wanted[chunk.continuations].any()
        ]
        return numbers if part.cut is None else [*numbers, chunks.number_of(*part.cut)]

    def _share(self, part: _Part | None) -> float:
        """The share of the tokens that run for a part of the calibration set."""
        if part is None:
            return 1
        chunks = self._problem.chunks
        read = sum(chunks[number].num_read for number in self._chunks_of(part))
        return read / self.objective.batch.num_tokens

    def _num_targets(self, cut: tuple[int, int]) -> int:
        """The targets in a part of a row."""
        chunks = self._problem.chunks
        return len(chunks[chunks.number_of(*cut)].target_token)

    def _note(self, cost: Cost) -> None:
        """Add the cost of a call to the stats."""
        stats, held = self.stats, self._opened.runs.held
        self._token_cost += cost
        total = self._token_cost.of_tokens(self.objective.batch.num_tokens)
        stats.unit_runs, stats.head_runs = total.unit_runs, total.heads
        stats.weight_loads, stats.weight_bytes = total.weight_loads, total.weight_bytes
        stats.peak_activation_bytes = max(stats.peak_activation_bytes, held.peak_bytes)
        stats.cache_bytes, stats.cache_hits = held.cache_bytes, dict(held.cache_hits)

    def _race(
        self, sequences: Sequence[Units], keep: int, confidence: float, tolerance: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """Which of the sequences reach the last look, int64[K], and their losses."""
        batch, objective = self.objective.batch, self.objective
        looks = self.layout.looks(batch)[batch.continuation_row]  # of each continuation
        num_looks = int(looks.max()) + 1
        sums = np.zeros((len(sequences), batch.num_continuations))

        def look(number: int, alive: np.ndarray) -> np.ndarray:
            trie = make_trie(sequences[i] for i in alive)
            before, now = (looks < number).mean(), (looks == number).mean()

            def describe(event: ProgressEvent) -> ProgressEvent:
                share = before + now * (event.share or 0)
                return replace(event, share=share, candidates=len(alive))

            part = _Part(looks == number)
            with reporting(describe):
                sums[alive] += self._run(trie, part, self._memory)[trie.index, 0]
            samples = np.unique(objective.sample[looks <= number])
            losses = objective.sample_losses(sums[alive])[:, samples]
            return losses * objective.sample_weight[samples] * self.num_samples

        alive = race(len(sequences), num_looks, look, self.num_samples, keep, confidence, tolerance)
        return alive, objective.loss(sums[alive])

    def _check_samples(self, samples: ArrayLike | None, distinct: bool = False) -> np.ndarray:
        """The samples, all by default, int64[n]."""
        if samples is None:
            return np.arange(self.num_samples)
        samples = np.asarray(samples)
        if samples.ndim != 1 or samples.dtype.kind not in "iu" or not samples.size:
            raise InputError("samples must be a list of sample indices that is not empty")
        wrong = samples[(samples < 0) | (samples >= self.num_samples)]
        if len(wrong):
            raise InputError(
                f"sample {wrong[0]} is out of range; the samples are 0 to {self.num_samples - 1}"
            )
        ordered = np.sort(samples)
        repeated = ordered[1:][ordered[1:] == ordered[:-1]]
        if distinct and len(repeated):
            raise InputError(f"sample {repeated[0]} is given twice; each counts once in a loss")
        return samples.astype(np.int64)

    def _cut_last(
        self, samples: np.ndarray, tokens: int
    ) -> tuple[np.ndarray, tuple[int, int] | None]:
        """The samples that are read whole, and the row of the last with its tokens that are read.

        None in the place of these where the last is read whole, or holds no target in its part.
        """
        if not self.cuts_samples:
            raise InputError(
                f"tokens cuts a row of text; the samples of {self.objective.name!r} are questions, "
                "which are read whole"
            )
        lengths = self.sample_tokens[samples]
        before, total = int(lengths[:-1].sum()), int(lengths.sum())
        of = "so that it cuts the last of the samples"
        rest = check_integer("tokens", tokens, before + 1, total, of) - before
        if rest == lengths[-1]:
            return samples, None
        cut = int(samples[-1]), rest
        if self._num_targets(cut):
            return samples[:-1], cut
        if len(samples) == 1:
            raise InputError(f"tokens is {tokens}, but no target is among these of sample {cut[0]}")
        return samples[:-1], None


def _make_folder(folder: Path) -> Path:
    """The folder, made if it is missing. Raises InputError if no file can be made in it."""
    check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return folder
