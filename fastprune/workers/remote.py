"""An engine that shares out its calls over workers. Read `engine` first, then `split`, then this.

Every worker has an engine of its own on the same chunks. A call becomes, for each worker, which
sequences it is to run on which chunks (`split`); sums come back as they are finished, a chunk and
up to 64 masks at a time, and are put into their places. What a worker had not finished when it died
is given to its successor: a sum is the same whoever computes it.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..data import TokenBatch
from ..engine.engine import Engine, Progress
from ..engine.store import SumStore
from ..errors import InputError
from ..models import Model
from ..plan.layout import Layout, look_of
from ..plan.split import cut, owners, teams
from ..plan.trie import Trie, make_trie
from .processes import Workers
from .transfer import pack

MOST_DEATHS = 3  # of one worker in one call


@dataclass
class _Caches:
    """What the prefix caches of all workers hold, and have served, as far as they have said."""

    held: dict[int, int] = field(default_factory=dict)
    served: dict[int, dict[str, int]] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        return sum(self.held.values())

    @property
    def hits(self) -> dict[str, int]:
        tiers = sorted({tier for by_tier in self.served.values() for tier in by_tier})
        return {
            tier: sum(by_tier.get(tier, 0) for by_tier in self.served.values()) for tier in tiers
        }

    def start(self, state_bytes: int) -> None:
        self.held.clear()


@dataclass
class _Call:
    """The sequences of a call, their sums as far as they are known, and by chunk those that are
    left, bool[M].

    kept: what stands for sequences in requests, by their places in the trie: many workers are given
    the same.
    """

    trie: Trie
    keys: list[bytes]
    context: int | None
    sums: np.ndarray
    left: dict[int, np.ndarray]
    kept: dict[bytes, Any] = field(default_factory=dict)


class Coordinator(Engine):
    """An Engine whose units run on workers; its own model only says what there is, and is compared
    with theirs.

    memory_bytes bounds the activations of each worker, since chunks are cut by it; cache_bytes what
    the prefix caches of all workers of a machine hold together. peak_activation_bytes is that of
    the worker with the most. The store is opened here alone.

    Raises InputError where a worker would compute other bits: another kind of device, other
    software or switches, or a model that cannot be handed over. Its workers run with as many
    threads as this process does.
    """

    def __init__(
        self,
        workers: Workers,
        model: Model,
        batch: TokenBatch,
        measure: str,
        granularity: str,
        *,
        store: SumStore | None = None,
        cache_bytes: int | None = None,
        cache_dir: Path | None = None,
        layout: Layout | None = None,
        **given: Any,
    ):
        self.workers = workers
        super().__init__(
            model, batch, measure, granularity, store=store, cache_bytes=0, layout=layout, **given
        )
        self._given = {
            "batch": replace(batch),  # without what it has worked out so far
            "measure": measure,
            "granularity": granularity,
            **given,
            "cache_bytes": None if cache_bytes is None else cache_bytes // workers.per_machine,
            "cache_dir": cache_dir and cache_dir.absolute(),  # a worker may run elsewhere
        }
        self.cache: Any = _Caches()
        self._opened: tuple[tuple, str] = (), ""  # the model's state, and its hash
        self._model_given: tuple[str, tuple, object] | None = (
            None  # hash, how a worker comes by it, what must be held
        )
        self._head_share = self._cost_of_head()
        with self.model.evaluation(), workers.turn:  # in this order, as in a call
            self._number = next(workers.numbers)
            workers.alive[self._number] = self
            self._open()
        if model.weights is not None:
            model.weights.release()  # no unit is run here

    # -- what the workers hold ---------------------------------------------------------------------

    def _open(self) -> None:
        """Let every worker be ready, with this model and an engine as this one."""
        self.workers.settle()
        state = self.model.state
        if self._opened[0] != state:
            self._opened = state, self.model.weights_hash
        weights, engines = self._opened[1], self.workers.engines
        late = [
            worker
            for worker in range(self.workers.count)
            if engines[worker].get(self._number) != weights
        ]
        if not late:
            return
        description = self.workers.keep(self._description())
        for worker in late:
            self._tell_open(worker, description)
        deaths = 0
        while self.workers.busy:
            worker, kind, value, _, _ = self.workers.hear()
            if kind == "opened":
                self._note_opened(worker, value)
            elif (
                kind == "lost" and deaths < MOST_DEATHS
            ):  # perhaps long ago, while it had nothing to do
                deaths += 1
                self.workers.revive(worker)
                self._tell_open(worker, description)
            elif kind == "wrong":
                raise InputError(f"worker {worker}: {value}")
            elif kind in ("failed", "memory", "lost"):
                raise RuntimeError(f"worker {worker} could not open the model: {value}")

    def _description(self) -> dict[str, object]:
        """What an engine as this one is made of, and what must come of it."""
        engine = {**self._given, "layout": self.layout}
        sharing = self.workers.per_machine, self.workers.per_device(self.model.device)
        return {"engine": engine, "sharing": sharing, **self._agreed()}

    def _agreed(self) -> dict[str, object]:
        """What every engine must have in common: chunks, tiles, and all that bits depend on."""
        return {
            "layout": self.layout,
            "numerics": self.numerics(),
            "threads": torch.get_num_threads(),
        }

    def _tell_open(self, worker: int, description: Any) -> None:
        state, weights = self._opened
        how = (
            None
            if weights in self.workers.models[worker]
            else self._model_for_workers(weights, state)
        )
        device = self.workers.device(worker, self.model.device)
        self.workers.engines[worker].pop(self._number, None)  # until it says that it has it
        self.workers.tell(
            worker,
            "open",
            self._number,
            weights,
            how,
            device,
            description,
            list(self.workers.alive),
        )

    def _note_opened(self, worker: int, models: list[str]) -> None:
        self.workers.models[worker] = set(models)
        self.workers.engines[worker][self._number] = self._opened[1]

    def _model_for_workers(self, weights: str, state: tuple) -> tuple:
        """How a worker comes by the model: as `load_model` did, or by its modules and its
        tensors."""
        if self._model_given is None or self._model_given[0] != weights:
            if self.model.opened is not None and self.model.opened[1] == state:
                self._model_given = weights, ("load", *self.model.opened[0]), None
            elif self.model.weights is not None:
                raise InputError(
                    f"{self.model.name}: has changed since it was opened, and its weights are in "
                    f"files"
                )
            else:
                modules, tensors = pack(self.model.given)
                at, token, held = self.workers.keep_tensors(tensors)
                self._model_given = weights, ("modules", modules, at, token), held
        return self._model_given[1]

    # -- a call ------------------------------------------------------------------------------------

    def _run(
        self, trie: Trie, progress: Progress, wanted: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        sums, keys, context, missing, known = self._begin(trie, wanted)
        left = {number: rows.copy() for number, rows in missing.items() if rows.any()}
        call, tries = _Call(trie, keys, context, sums, left), self._tries(trie, left)
        self._note_asked(tries)
        with self.workers.turn:
            try:
                self._open()
                self._share_out(call, self._parts(trie, tries), progress)
            except BaseException:
                self.workers.quiet()
                raise
        return sums, known

    def _tries(self, trie: Trie, left: Mapping[int, np.ndarray]) -> dict[int, Trie]:
        """The trie of what is left to run, by chunk."""
        made: dict[bytes, Trie] = {}
        for rows in left.values():
            if (key := rows.tobytes()) not in made:
                made[key] = (
                    trie if rows.all() else make_trie(itertools.compress(trie.sequences, rows))
                )
        return {number: made[rows.tobytes()] for number, rows in left.items()}

    def _note_asked(self, tries: Mapping[int, Trie]) -> None:
        """Count what a cache without bounds would leave to do, as one process counts it."""
        dense = [make_trie([tuple(range(self.num_units))])] * self.measure.needs_dense
        for number, asked in tries.items():
            for part in (*dense, asked):
                self.counts.row_unbounded += self._seen.add(number, part) * len(
                    self.chunks[number].rows
                )

    def _parts(self, trie: Trie, tries: Mapping[int, Trie]) -> dict[int, dict[int, np.ndarray]]:
        """By worker and chunk, which of the trie's sequences it runs there, int64[n]."""
        loads, owner = (
            [self.chunks[number].num_tokens for number in tries],
            [self._owner[number] for number in tries],
        )
        places = {sequence: place for place, sequence in enumerate(trie.sequences)}
        parts: dict[int, dict[int, np.ndarray]] = {}
        for (number, asked), team in zip(tries.items(), teams(loads, owner, self.workers.count)):
            rows = np.array([places[sequence] for sequence in asked.sequences], dtype=np.int64)
            for worker, part in zip(team, cut(asked, len(team), self._head_share)):
                parts.setdefault(worker, {})[number] = rows[part.start : part.stop]
        return parts

    def _share_out(
        self, call: _Call, parts: Mapping[int, Mapping[int, np.ndarray]], progress: Progress
    ) -> None:
        """Have the workers run their parts, and put what they find into its place."""
        deaths = dict.fromkeys(parts, 0)
        done: dict[
            int, tuple[int, int]
        ] = {}  # by worker, its unit runs so far and in all, as it has said last
        asked: dict[int, np.ndarray] = {}  # by worker, the places of its sequences
        for worker in parts:
            asked[worker] = self._tell(worker, call, parts[worker])
        while self.workers.busy:
            worker, kind, value, runs, heads = self.workers.hear()
            self.counts.row_runs += runs
            self.counts.row_heads += heads
            if kind == "sums":
                number, rows, found = value
                self._put(call, number, asked[worker][rows], found)
            elif kind == "progress":
                done[worker] = value
                if len(done) == len(parts):
                    progress(*map(sum, zip(*done.values())))
            elif kind == "done":
                peak, self.cache.held[worker], self.cache.served[worker], loads, read = value
                self.counts.peak_activation_bytes = max(self.counts.peak_activation_bytes, peak)
                self.counts.weight_loads += loads
                self.counts.weight_bytes += read
                if worker in done:
                    done[worker] = (done[worker][1],) * 2
            elif kind == "memory":
                raise MemoryError(f"worker {worker}: {value}")
            elif kind == "wrong":
                raise InputError(f"worker {worker}: {value}")
            elif kind == "failed":
                raise RuntimeError(f"worker {worker}: {value}")
            elif kind == "warning":
                warnings.warn(value, RuntimeWarning, stacklevel=5)
            elif kind == "lost":
                deaths[worker] += 1
                if deaths[worker] == MOST_DEATHS:
                    raise RuntimeError(
                        f"worker {worker} died {MOST_DEATHS} times in one call: {value}"
                    )
                warnings.warn(
                    f"worker {worker} died, its share is run again: {value}",
                    RuntimeWarning,
                    stacklevel=5,
                )
                self.workers.revive(worker)
                self._tell_open(worker, self.workers.keep(self._description()))
            elif kind == "opened":
                self._note_opened(worker, value)
                rest = {
                    number: rows[call.left[number][rows]] for number, rows in parts[worker].items()
                }
                rest = {number: rows for number, rows in rest.items() if len(rows)}
                if rest:
                    asked[worker] = self._tell(worker, call, rest)
        if done:
            progress(*map(sum, zip(*done.values())))

    def _tell(self, worker: int, call: _Call, part: Mapping[int, np.ndarray]) -> np.ndarray:
        """Have a worker run its part; the places in the trie of the sequences that it is given."""
        places = np.unique(np.concatenate([*part.values()]))
        if (key := places.tobytes()) not in call.kept:
            sequences = [call.trie.sequences[place] for place in places.tolist()]
            call.kept[key] = self.workers.keep({"sequences": sequences, **self._agreed()})
        wanted = {number: np.isin(places, rows) for number, rows in part.items()}
        self.workers.tell(worker, "run", self._number, call.kept[key], wanted)
        return places

    def _put(self, call: _Call, number: int, places: np.ndarray, found: np.ndarray) -> None:
        """Put the sums of some sequences on a chunk, [n, V, C], into their place, and into the
        store."""
        continuations = self.chunks[number].continuations
        call.sums[np.ix_(places, np.arange(found.shape[1]), continuations)] = found
        call.left[number][places] = False
        if self.store is not None and call.context is not None:
            finished = {
                call.keys[place]: call.sums[place, :, continuations] for place in places.tolist()
            }
            self.store.put(call.context, self.chunks[number].key, finished)

    def _cost_of_head(self) -> float:
        """What the head of one mask costs, in unit runs, by the numbers of weights and the
        positions that count."""
        units = (
            sum(p.numel() for layer in self.model.layers for p in layer.parameters())
            / self.num_units
        )
        embeddings: Any = self.model.hf.get_output_embeddings
        head = sum(p.numel() for p in embeddings().parameters())
        positions = len(np.unique(self.batch.target_source))  # that predict something
        return head / max(1, units) * positions / self.batch.num_tokens

    # -- chunks and memory -------------------------------------------------------------------------

    def _cut(self, layout: Layout) -> None:
        super()._cut(layout)
        looks = look_of(self.batch)[[rows[0] for rows in layout.chunks]]
        self._owner = owners(
            [chunk.num_tokens for chunk in self.chunks], looks.tolist(), self.workers.count
        )

    def _shrink_cache(self) -> bool:
        return False  # a worker that says it has no memory has given its cache up before
