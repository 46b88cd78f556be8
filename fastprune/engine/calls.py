"""Calls: the sums of sequences under the model as it is now. Read `runs` and `ledger` first.

`Calls` opens the model, and opens it again when its version has changed. A call takes known sums
from the store and lets the others run. When memory runs out, it begins again in smaller steps.

M distinct sequences of a call, V values of the measure, C continuations.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from ..data import TokenBatch
from ..errors import InputError
from ..models import GenericRunner, Model, Runner
from ..models.fused import why_not_fused
from ..plan.cost import Cost, Stats, whole
from ..plan.layout import Cut
from ..plan.progress import ProgressCallback, event_reporter
from ..plan.trie import Trie, Units, make_trie
from .ledger import Ledger
from .local import open_for
from .memory import MAX_SEQUENCES, MemoryLimit, OutOfMemory
from .parts import Part
from .problem import Problem, numerics_of
from .runs import Held, Runs
from .store import SumStore
from .sums import SumMemory, Sums

MakeRuns = Callable[[Runner, MemoryLimit], Runs]


@dataclass
class Opened:
    """The objects of one version of the model.

    Attributes:
        version: The version.
        runner: Runs its units.
        limit: The limit of a call's memory.
        problem: Replaced when memory runs out, or when a switch of torch changes.
        runs: Runs the calls.
    """

    version: int
    runner: Runner
    limit: MemoryLimit
    problem: Problem
    runs: Runs


class Calls:
    """Runs the calls of one evaluator, one after the other. The caller holds `model.lock`.

    The objects of the previous version are kept beside the current ones, if its runs can wait. So a
    model that returns to that version runs nothing again.

    Args:
        model: The model. Each call reads its version, and opens it again if that has changed.
        batch: The calibration set.
        measure_name: A name of `measures.MEASURES`.
        granularity: "block" or "sublayer".
        backend: "auto", "generic" or "fused".
        memory_bytes: The limit of a call's activations; None for a default.
        layout: The first layout; "rows" or None for one that fits the limit.
        make_runs: Makes the `Runs` of one version of the model.
        store: Keeps finished sums; or None.
        needs_digest: Whether the runs need the model's digest. A store always does.

    Attributes:
        opened: The version of the model that the last call ran.
    """

    def __init__(
        self,
        model: Model,
        batch: TokenBatch,
        measure_name: str,
        granularity: str,
        backend: str,
        memory_bytes: int | None,
        layout: Cut,
        make_runs: MakeRuns,
        store: SumStore | None,
        needs_digest: bool,
    ):
        self._model, self._store = model, store
        self._open_for = partial(
            open_for, model, backend, batch, measure_name, granularity, memory_bytes
        )
        self._make_runs, self._needs_digest = make_runs, needs_digest or store is not None
        self._asked, self._token_cost = Cost(), Cost()  # unit runs of `Runs`, by token
        self._peak_bytes, self._held = 0, Held()
        self._idle: Opened | None = None  # the previous version
        self.opened = self._open(layout)
        self._memory = SumMemory(self.opened.limit.race_bytes)

    def _open(self, layout: Cut) -> Opened:
        """Open the model as it is now."""
        with self._model.held() as version:
            problem, runner, limit = self._open_for(layout)
            if self._needs_digest:
                problem = replace(problem, digest=self._model.digest)
            runs = self._make_runs(runner, limit)
        return Opened(version, runner, limit, problem, runs)

    @property
    def problem(self) -> Problem:
        return self.opened.problem

    @property
    def stats(self) -> Stats:
        """The cost of all calls so far."""
        cost = self._asked + self._token_cost.of_tokens(self.problem.num_tokens)
        return Stats(
            **vars(cost),
            peak_activation_bytes=self._peak_bytes,
            cache_bytes=self._held.cache_bytes,
            cache_hits=dict(self._held.cache_hits),
        )

    # -- a call ------------------------------------------------------------------------------------

    def ask(self, sequences: Iterable[Units], part: Part | None = None) -> Trie:
        """Make the trie of sequences, and count its masks as asked for.

        Args:
            sequences: Sequences of units.
            part: The part of the calibration set that will run; None for all of it.
        """
        trie, share = make_trie(sequences), self._share(part)
        self._asked += Cost(
            masks=len(trie.index),
            asked_unit_runs=whole(trie.unit_runs * share),
            naive_unit_runs=whole(trie.naive_unit_runs * share),
        )
        return trie

    def run(
        self,
        trie: Trie,
        progress: ProgressCallback | None,
        part: Part | None = None,
        keep: bool = False,
    ) -> np.ndarray:
        """Run the missing sums of a trie's distinct sequences.

        Args:
            trie: The trie of the sequences.
            progress: Called with events of unit runs.
            part: The part of the calibration set that runs; None for all of it.
            keep: Keep the sums in memory, for a later call with the same sequences.

        Returns:
            Sums over each continuation, float64[M, V, C], 0 outside of the part. A cut row adds one
            column.

        Raises:
            InputError: There are too many sequences.
        """
        longest = max(map(len, trie.sequences), default=0)
        limit = self.opened.limit
        together = limit.most_together(longest)
        if longest > limit.num_units and len(trie.sequences) > together:
            parts = trie.parts(together)
            return np.concatenate([self.run(some, progress, part, keep) for some in parts])
        if len(trie.sequences) > MAX_SEQUENCES:
            raise InputError(
                f"{len(trie.sequences)} distinct masks in one call; at most {MAX_SEQUENCES} are "
                "planned together"
            )
        started, hits = time.perf_counter(), 0
        try:
            with self._model.evaluation():
                ledger = None
                while ledger is None:
                    self._refresh()
                    ledger = self._complete(trie.sequences, progress, part, keep)
                    if ledger is None:  # the model changed, so the call's states are of no version
                        self.opened.runs.close()
            hits = int(np.count_nonzero(ledger.from_store[trie.index]))
            return ledger.sums
        finally:
            self._asked += Cost(store_hits=hits, seconds=time.perf_counter() - started)

    def _complete(
        self,
        sequences: tuple[Units, ...],
        progress: ProgressCallback | None,
        part: Part | None,
        keep: bool,
    ) -> Ledger | None:
        """Run a call, and return its ledger with every sum; None if the model has changed.

        When memory runs out, the call begins again in smaller steps.
        """
        report = event_reporter(progress)
        while True:
            problem, runs = self.opened.problem, self.opened.runs
            ledger = Ledger(problem, sequences, self._numbers(part), self._stores(keep))
            missing = ledger.missing()
            if not missing:
                return ledger if self._is_settled() else None
            before = runs.cost
            try:
                with closing(runs.run(problem, sequences, missing, report)) as parts:
                    for sums in parts:
                        if not self._is_settled():
                            return None
                        ledger.put(sums)
                return ledger
            except OutOfMemory as error:
                if not self._take_smaller_steps():
                    raise (error.__cause__ or error) from None
            finally:  # interrupted work counts, too
                self._token_cost += runs.cost - before
                self._held = runs.held
                self._peak_bytes = max(self._peak_bytes, self._held.peak_bytes)

    def _stores(self, keep: bool) -> list[tuple[Sums, int]]:
        """The stores of sums, the fastest first, each with its number of the problem."""
        stores: list[tuple[Sums, int]] = []
        if keep or self._memory:
            stores.append((self._memory, self.problem.number))
        if self._store is not None:
            stores.append((self._store, self._store.context(self.problem.context)))
        return stores

    def _numbers(self, part: Part | None) -> list[int]:
        """The numbers of the chunks that run for a part of the calibration set."""
        chunks = self.problem.chunks
        return list(range(len(chunks)) if part is None else part.numbers(chunks))

    def _share(self, part: Part | None) -> float:
        """The share of the tokens that run for a part of the calibration set."""
        if part is None:
            return 1
        read = sum(self.problem.chunks[number].num_read for number in self._numbers(part))
        return read / self.problem.num_tokens

    def _take_smaller_steps(self) -> bool:
        """Cut smaller chunks or tiles; False when both have their least size."""
        layout = self.opened.limit.smaller(self.problem.layout)
        if layout is None:
            return False
        self.opened.problem = replace(self.problem, layout=layout)
        tokens = max(chunk.num_tokens for chunk in self.problem.chunks)
        warnings.warn(
            f"out of memory: going on with chunks of {tokens} tokens and tiles of {layout.tile} "
            "positions; scores may differ in the last bits from those before",
            RuntimeWarning,
            stacklevel=6,
        )
        return True

    # -- versions of the model ---------------------------------------------------------------------

    def _is_settled(self) -> bool:
        """Whether the model still has the call's first version, with a GPU's values compared."""
        return self._model.settle_version() == self.opened.version

    def _refresh(self) -> None:
        """Open the model again if it has changed; reuse the previous version if it was restored."""
        version, opened = self._model.begin_version(), self.opened
        if version != opened.version:
            layout = opened.problem.layout
            if self._idle is not None and self._idle.version == version:
                self.opened, self._idle = self._idle, opened
                if self.problem.layout != layout:
                    self.opened.problem = replace(self.problem, layout=layout)
            else:
                self.opened = self._open(layout)
                if self._idle is not None:
                    self._idle.runs.close()
                self._idle = opened
            if not self.opened.runs.run_beside(self._idle.runs):
                self._idle.runs.close()
                self._idle = None
            self._warn_of_path(opened.runner)
        numerics = numerics_of(self._model, self.opened.runner)
        if numerics != self.problem.numerics:
            self.opened.problem = replace(self.problem, numerics=numerics)

    def _warn_of_path(self, before: Runner) -> None:
        """Warn if the fused path ran the previous version and cannot run this one."""
        generic = GenericRunner.path_name
        if before.path_name == generic or self.opened.runner.path_name != generic:
            return
        reason = why_not_fused(self._model)
        if reason is not None:  # or `open_runner` has warned
            warnings.warn(
                f"{self._model.name} has changed, and the fused path cannot run it: {reason}; "
                "going on with the generic one, which is slower",
                RuntimeWarning,
                stacklevel=6,
            )
