"""Evaluator: the facade that searches and other tools call."""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike
from torch import nn

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
from .plan.layout import Cut, Layout
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

Sequences = Iterable[Iterable[int]]  # of unit indices
Backend = Literal["auto", "generic", "fused"]
BACKENDS = get_args(Backend)


class Evaluator:
    """Scores depth masks of one model under one objective.

    To the bit, a mask's score does not depend on other masks, in the same call or before. Threads
    may share an evaluator or a model: their calls take turns.

    Each call scores the model as it is. A model that has changed is verified and opened again
    (`Model.version` lists the changes it sees). The version before is kept with half of the
    cache, so that a restored model runs no prefix again. Its states are evicted first when memory
    runs out. Workers keep the last version only. If the fused path no longer applies, "auto"
    continues with the generic path and warns once.

    Args:
        model: A Model from `load_model`, or a transformers model in memory.
        objective: The objective, such as Perplexity or TaskAccuracy.
        backend: "generic" runs any family by transformers' own code. "fused" runs the Llama-like
            families on fused operators. "auto" takes the fused path if it is faster.
        granularity: "block", or "sublayer": unit 2i is the attention of block i, unit 2i + 1 its
            MLP.
        memory_bytes: The limit on the activations of a call, in bytes; by default 4 GiB on a CPU,
            16 GiB on a GPU. It decides how many tokens run at once. With workers, the limit is for
            each of them.
        cache_bytes: The limit on the prefix cache, in bytes; 0 for none. Its states outlive a call,
            so that later calls run only new units. By default a quarter of the free memory
            at each call; on a GPU, the device's memory except a reserve of memory_bytes, then a
            quarter of the host's. With workers, the limit is for all of a machine.
        cache_dir: A folder on a fast disk for states that do not fit, in a file deleted
            with the process. It takes at most a quarter of the disk's free bytes.
        store: The file of a store of finished sums, or a SumStore. Known sums are not computed
            again, also those of another objective that measured the same on the same tokens. New
            sums are added chunk by chunk.
        workers: The number of processes of this machine that run a call together, or started
            `Workers`; None for this process alone. Each has a model of its own, and as many threads
            as this process. Scores keep their bits.
        progress: Called with a `ProgressEvent` while masks are scored.
        layout: The `layout` of another evaluator, to get its bits under another memory limit; or
            "rows" to run each row alone, for calls on few samples. By default short rows run
            together, as memory_bytes allows; then a call on one sample runs all rows beside it.

    Raises:
        InputError: An argument is of another kind or out of its range, the model does not take the
            tokens, the family cannot run on the backend or in this granularity, or a row does not
            fit into memory_bytes.

    Examples:
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
        layout: Cut = None,
    ):
        check_kind("objective", objective, Objective, "one such as Perplexity(batch)")
        check_one_of("backend", backend, BACKENDS)
        memory_bytes = check_bytes("memory_bytes", memory_bytes, 1)
        cache_bytes = check_bytes("cache_bytes", cache_bytes, 0)
        if progress is not None:
            check_callable("progress", progress, "a function of a ProgressEvent")
        if layout not in (None, "rows"):
            check_kind("layout", layout, Layout, "a Layout, such as another evaluator's, or 'rows'")
        if workers is not None and not isinstance(workers, Workers):
            check_workers(workers)
        self.model = model if isinstance(model, Model) else Model(unwrap(model))
        self.objective = objective
        self.granularity = granularity
        self.progress = progress
        self._dense: tuple[int, float] | None = None  # the model's version, and its loss
        if store is not None and not isinstance(store, SumStore):
            store = SumStore(store)
        if workers is not None and not isinstance(workers, Workers):
            workers = Processes(workers)
        folder = None if cache_dir is None else check_folder(Path(cache_dir))
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
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
            if isinstance(runs, RemoteRuns):  # so that a worker refuses now, not at the first call
                with self.model.evaluation():
                    runs.open(self._calls.problem)

    def __repr__(self) -> str:
        units = f"{self.num_units} {'blocks' if self.granularity == 'block' else 'sublayers'}"
        data = f"{self.objective.name}, {units}, {self.num_samples} samples"
        return f"Evaluator({self.model.name!r}, {data}, {self.backend})"

    @property
    def backend(self) -> str:
        """The path that runs the units: "generic", or "fused" with its operators."""
        return self._calls.opened.runner.path_name

    @property
    def num_units(self) -> int:
        """U, the number of prunable units."""
        return self._calls.opened.limit.num_units

    @property
    def layout(self) -> Layout:
        """The cut of the calibration set into chunks and tiles, as plain integers.

        `Layout.to_json` writes it, and another evaluator takes it. It changes when memory runs out.
        """
        return self._calls.problem.layout

    @property
    def num_samples(self) -> int:
        """S, the number of samples: rows of text, or questions."""
        return self.objective.num_samples

    @cached_property
    def sample_tokens(self) -> np.ndarray:
        """The tokens of each sample's row, int64[S]. Scoring a mask on the sample reads all."""
        return tokens_of_samples(self.objective, self._calls.problem.batch)

    @property
    def stats(self) -> Stats:
        """The cost of all calls so far."""
        return self._calls.stats

    @property
    def cuts_samples(self) -> bool:
        """Whether `score` takes `tokens=`: true for rows of text, false for questions."""
        return self.objective.cuts_samples

    @cached_property
    def unit_names(self) -> list[str]:
        """The name of each unit, in order."""
        return self.model.unit_names(self.granularity)

    @property
    def dense_loss(self) -> float:
        """The loss of the whole model, computed once for each version of the model."""
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
            masks: Bool or 0/1 [N, U], True for a kept unit.
            sequences: Instead of masks, N collections of unit indices in running order, such as
                [(0, 1, 1, 2), (0, 2, 1)].
            samples: Distinct indices of samples; by default all. Only their chunks run: each row
                alone, or with the other short rows of its chunk. The loss is weighted by the
                targets of these samples.
            tokens: Cut the last of the samples so that the call reads exactly this number of
                tokens. The remaining part runs alone, with bits of its own. A part without targets
                is left out. Questions cannot be cut.

        Returns:
            The loss of each mask, float64[N]. A non-finite loss is returned unchanged.

        Raises:
            InputError: Masks have another shape or value, a unit is out of range, a mask keeps no
                unit and the family cannot run without blocks, samples are out of range or repeated,
                or tokens end outside the last sample.

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
        """Sum the objective's measure over the targets of each continuation, without its weights.

        Args:
            masks: Bool or 0/1 [N, U], True for a kept unit.
            sequences: Instead of masks, as in `score`.

        Returns:
            float64[N, V, C], for the V values of the measure (`measures.MEASURES`) and C
            continuations.

        Raises:
            InputError: As in `score`.

        Examples:
            >>> import fastprune as fp
            >>> batch = fp.TokenBatch.from_ids([[5, 6, 7, 8, 9], [10, 11, 12]])
            >>> ev = fp.Evaluator(fp.load_model("demo"), fp.Perplexity(batch))
            >>> ev.sums(fp.from_removed([(3,)], ev.num_units)).shape
            (1, 1, 2)
        """
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
        """Score each mask on each sample: a row of text, or a question.

        Args:
            masks: Bool or 0/1 [N, U], True for a kept unit.
            samples: Indices of the n samples, in the order of the columns; by default all. They may
                repeat. Only their chunks run, and losses have the same bits as with all samples.
            sequences: Instead of masks, as in `score`.

        Returns:
            float64[N, n].

        Raises:
            InputError: As in `score`.

        Examples:
            >>> import fastprune as fp
            >>> batch = fp.TokenBatch.from_ids([[5, 6, 7, 8, 9], [10, 11, 12]])
            >>> ev = fp.Evaluator(fp.load_model("demo"), fp.Perplexity(batch))
            >>> ev.score_samples(fp.from_removed([(3,)], ev.num_units)).shape
            (1, 2)
        """
        chosen = check_samples(samples, self.num_samples, distinct=False)
        part = Part(np.isin(self.objective.sample, chosen))
        checked = self._check(masks, sequences)
        with self.model.lock:
            sums, index = self._sums(checked, part)
            return self.objective.sample_losses(sums[:, 0])[:, chosen][index]

    @property
    def num_looks(self) -> int:
        """The number of looks of a race; 1 if the calibration set is too small to race."""
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

        The first look scores all masks on a sixteenth of the samples, but at least 8, and up to 16
        if they are short. Masks that `keep` others surely beat (`plan.racing.beaten`) leave. Each
        later look adds two fifths to the samples seen. The losses after the last look are exact,
        with the bits of `score`. Sets of fewer than 32 samples are scored whole.

        The evaluator keeps the sums of every look, in at most a sixteenth of memory_bytes. A later
        race or score of the same masks runs only the missing samples.

        Args:
            masks: Bool or 0/1 [N, U], True for a kept unit.
            keep: The number of masks to keep, at most the number of different masks.
            confidence: The probability of keeping the `keep` best, in (0, 1). It assumes that
                paired mean differences, corrected for skewness to first order, are t distributed.
                It also assumes that at most one unseen sample in 200 (at least one) is an outlier,
                none larger than the range of the losses so far.
            tolerance: A mask may also leave if it could be better by no more than this loss.
            sequences: Instead of masks, as in `score`.

        Returns:
            The kept masks, best first, with their exact losses and the cost of the race.

        Raises:
            InputError: Masks are wrong as in `score`, or keep, confidence or tolerance is out of
                range.

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
            alive, losses = race_sequences(
                self._calls, self.objective, distinct, keep, confidence, tolerance, self.progress
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
        """Score the whole model with each variant of a `Library` in its block's place.

        Returns:
            float64[blocks, names], with `Library.variant_names` as columns; nan if a block has no
            variant of that name.

        Raises:
            InputError: The model is no Library.

        Examples:
            >>> import fastprune as fp
            >>> library = fp.Library(fp.load_model("demo"))
            >>> _ = library.add(3, "no attention")
            >>> batch = fp.TokenBatch.from_ids([[5, 6, 7, 8, 9], [10, 11, 12]])
            >>> fp.Evaluator(library, fp.Perplexity(batch)).replace_one().shape
            (12, 1)
        """
        library = check_kind("model", self.model, Library, "a Library, for replace_one")
        return library.table(self.score(sequences=library.replacements()))

    def similarity(self) -> np.ndarray:
        """Measure the cosines between the states of the whole model.

        Returns:
            float64[U + 1, U + 1], the mean over tokens of the cosine between two states: those
            before each unit, then the one after the last unit, before the final norm.

        Examples:
            >>> import fastprune as fp
            >>> batch = fp.TokenBatch.from_ids([[5, 6, 7, 8, 9], [10, 11, 12]])
            >>> ev = fp.Evaluator(fp.load_model("demo"), fp.Perplexity(batch))
            >>> ev.similarity().shape
            (13, 13)
        """
        return probes.similarity(self.model, self.objective.batch, self.granularity)

    def angular_distance(self) -> np.ndarray:
        """Measure the angles between the states of `similarity`, at last tokens only.

        Gromov et al. (arXiv 2403.17887) choose blocks by these angles.

        Returns:
            float64[U + 1, U + 1], the mean angle over the last token of each sequence, in half
            turns.

        Examples:
            >>> import fastprune as fp
            >>> batch = fp.TokenBatch.from_ids([[5, 6, 7, 8, 9], [10, 11, 12]])
            >>> ev = fp.Evaluator(fp.load_model("demo"), fp.Perplexity(batch))
            >>> ev.angular_distance().shape
            (13, 13)
        """
        return probes.angular_distance(self.model, self.objective.batch, self.granularity)

    def unit_gradients(self) -> np.ndarray:
        """Compute the gradient of each sample's loss by the scale of each unit (CBO).

        The scale a_i = 1 multiplies the residual branches of unit i: both branches of a block
        (arXiv 2602.00161).

        Returns:
            float64[S, U], dL_s/da_i.

        Raises:
            InputError: The objective has no useful gradient: TaskAccuracy, and objectives that
                compare with the whole model, at which their gradient vanishes.

        Examples:
            >>> import fastprune as fp
            >>> batch = fp.TokenBatch.from_ids([[5, 6, 7, 8, 9], [10, 11, 12]])
            >>> ev = fp.Evaluator(fp.load_model("demo"), fp.Perplexity(batch))
            >>> ev.unit_gradients().shape
            (2, 12)
        """
        return probes.unit_gradients(self.model, self.objective, self.granularity)

    def unit_salience(self, power: int = 1) -> np.ndarray:
        """Sum |w dL/dw|^power over the weights w of each unit, for the loss L of the whole model.

        The call holds a gradient of every weight (Shortened LLaMA, arXiv 2402.02834).

        Args:
            power: 1 or 2.

        Returns:
            float64[U].

        Raises:
            InputError: power has another value, or the objective has no useful gradient, as in
                `unit_gradients`.

        Examples:
            >>> import fastprune as fp
            >>> batch = fp.TokenBatch.from_ids([[5, 6, 7, 8, 9], [10, 11, 12]])
            >>> ev = fp.Evaluator(fp.load_model("demo"), fp.Perplexity(batch))
            >>> ev.unit_salience().shape
            (12,)
        """
        if power not in (1, 2):
            raise InputError(f"power must be 1 or 2, not {power!r}")
        return probes.unit_salience(self.model, self.objective, self.granularity, power)

    def unit_costs(
        self, kind: str = "params", batch_size: int = 1, seq_len: int | None = None
    ) -> UnitCosts:
        """Compute the cost of the model and of each unit.

        Args:
            kind: A kind of cost of `fp.Budget`: "params", "bytes", "kv_bytes" or "latency_ms".
            batch_size: Rows of the pass that "latency_ms" times.
            seq_len: Tokens of each of these rows; None for 512, or fewer if the model takes fewer.

        Returns:
            The costs: `total` of the model, and `after(removed)` without some units.

        Raises:
            InputError: The kind is unknown, or cannot be computed for this model.

        Examples:
            >>> import fastprune as fp
            >>> batch = fp.TokenBatch.from_ids([[5, 6, 7, 8, 9], [10, 11, 12]])
            >>> ev = fp.Evaluator(fp.load_model("demo"), fp.Perplexity(batch))
            >>> costs = ev.unit_costs("params")
            >>> costs.after([3]) < costs.total
            True
        """
        return unit_costs(self.model, self.granularity, kind, batch_size, seq_len)

    def _check(self, masks: ArrayLike | None, sequences: Sequences | None) -> list[Units]:
        """Check masks or sequences, and list the units that each of them runs, in order."""
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
        """The sums of the distinct sequences, [M, V, C], and the index of each, int64[N]."""
        trie = self._calls.ask(sequences, part)
        return self._calls.run(trie, self.progress, part), trie.index

    def _losses(self, sequences: list[Units]) -> np.ndarray:
        """The loss of each sequence, float64[N], in parts that have room for their sums."""
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
    """Make the function that makes the runs of one version of the model: here, or on workers."""

    def make(runner: Runner, limit: MemoryLimit) -> Runs:
        if workers is None:
            return LocalRuns(model, runner, limit, cache_bytes, cache_dir)
        return RemoteRuns(workers, model, backend, memory_bytes, cache_bytes, cache_dir)

    return make
