"""The cost of a call: unit runs against an independent count, the head's tiles, and running out of
memory."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch
import transformers as tf
from families import LLAMA_LIKE, build, random_rows, some_masks
from helpers import make_tasks, smallest_budget
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastprune as fp
from fastprune.models import FusedRunner, GenericRunner, Head
from fastprune.models.device import is_out_of_memory
from fastprune.plan.layout import Layout

LENGTHS = [93, 9, 47, 93, 46, 9, 91]


@pytest.fixture(scope="module")
def hf():
    return build("llama")


@pytest.fixture
def model(hf):
    return fp.Model(hf)  # a new one for each test: some spy on it


@pytest.fixture(params=["generic", "fused"])
def backend(request):
    return request.param


@pytest.fixture(scope="module")
def batch(hf):
    return fp.TokenBatch.from_ids(random_rows(hf.config.vocab_size, LENGTHS))


def count_prefixes(masks: np.ndarray) -> int:
    """Distinct non-empty prefixes of the sequences of kept units."""
    kept = [tuple(np.flatnonzero(mask)) for mask in masks]
    return len({sequence[: i + 1] for sequence in kept for i in range(len(sequence))})


def fields(num_units: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    singles = ~np.eye(num_units, dtype=bool)
    pairs = np.array(
        [
            [i not in pair for i in range(num_units)]
            for pair in itertools.combinations(range(num_units), 2)
        ]
    )
    scattered = rng.random((40, num_units)) < 0.6
    scattered[:, 0] |= ~scattered.any(axis=1)
    return {
        "singles": singles,
        "pairs": pairs,
        "random": scattered,
        "one unit each": ~singles,
        "prefixes of each other": np.tri(num_units, dtype=bool),
        "duplicates": np.repeat(scattered[:7], 5, axis=0)[rng.permutation(35)],
        "the dense model": np.ones((3, num_units), dtype=bool),
        "nothing kept": np.zeros((2, num_units), dtype=bool),
        "no masks": np.zeros((0, num_units), dtype=bool),
    }


def runner_of(ev) -> type:
    return GenericRunner if ev.backend == "generic" else FusedRunner


def spy_on_the_head(monkeypatch, ev, most: int | None = None) -> list[int]:
    """Notes how many positions go through the head together; more than `most` are too many for the
    memory."""
    seen = []
    for name, own, at in (("nll", Head.nll, 0), ("kl", Head.kl, 1)):

        def spy(self, *args, own=own, at=at):
            seen.append(len(args[at]))
            if most is not None and len(args[at]) > most:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return own(self, *args)

        monkeypatch.setattr(Head, name, spy)
    return seen


def targets_of_chunks(ev) -> list[np.ndarray]:
    """The targets of each chunk."""
    row = ev.objective.batch.continuation_row[ev.objective.batch.target_continuation]
    return [np.flatnonzero(np.isin(row, chunk)) for chunk in ev.layout.chunks]


def spy_on_runs(monkeypatch, ev, batch) -> list[Fraction]:
    """Notes, for every unit that is run, which share of the batch's tokens it ran on.

    Rows of a batch are of different lengths, and padding does not count.
    """
    shares, run, read = [], runner_of(ev).run, {}
    for chunk in ev.layout.chunks:
        lengths = batch.row_lengths[list(chunk)]
        shape = len(lengths), int(lengths.max())
        assert read.setdefault(shape, int(lengths.sum())) == lengths.sum()

    def spy(self, unit, state, *args, **kwargs):
        hidden = state if isinstance(state, torch.Tensor) else state.hidden
        shares.append(Fraction(read[tuple(hidden.shape[:2])], batch.num_tokens))
        return run(self, unit, state, *args, **kwargs)

    monkeypatch.setattr(runner_of(ev), "run", spy)
    return shares


@pytest.mark.slow
@pytest.mark.parametrize("memory_bytes", [None, 1])
@pytest.mark.parametrize("granularity", ["block", "sublayer"])
def test_unit_runs_are_distinct_prefixes(
    monkeypatch, model, batch, backend, granularity, memory_bytes
):
    def make(memory_bytes):
        return fp.Evaluator(
            model,
            fp.Perplexity(batch),
            backend,
            granularity=granularity,
            memory_bytes=memory_bytes,
            cache_bytes=0,
        )

    memory_bytes = memory_bytes and smallest_budget(make)
    ev = make(memory_bytes)
    shares = spy_on_runs(monkeypatch, ev, batch)
    expected = dict.fromkeys(("masks", "unit_runs", "naive_unit_runs", "head_runs"), 0)
    for name, masks in fields(ev.num_units).items():
        shares.clear()
        assert ev.score(masks).shape == (len(masks),)
        expected["masks"] += len(masks)
        expected["unit_runs"] += count_prefixes(masks)
        expected["naive_unit_runs"] += int(masks.sum())
        expected["head_runs"] += len({mask.tobytes() for mask in masks})
        assert {key: getattr(ev.stats, key) for key in expected} == expected, name
        assert sum(shares) == count_prefixes(masks), name  # what was really run
    assert ev.stats.seconds > 0


def test_some_samples_cost_the_chunks_that_hold_them(monkeypatch, model, batch, backend):
    def make(memory_bytes):
        return fp.Evaluator(
            model, fp.Perplexity(batch), backend, memory_bytes=memory_bytes, cache_bytes=0
        )

    ev = make(smallest_budget(make))
    masks = some_masks(ev.num_units, 20, seed=3)
    shares = spy_on_runs(monkeypatch, ev, batch)
    ev.score_samples(masks, samples=[1])
    assert 0 < sum(shares) < count_prefixes(masks)
    assert ev.stats.unit_runs == pytest.approx(float(sum(shares)))


def test_evopress_reads_exactly_its_tokens(hf):
    """Its naive count times the tokens of the calibration set is that of the authors' code."""
    batch = fp.TokenBatch.from_ids(random_rows(hf.config.vocab_size, [100] * 4))
    layout = Layout(((0,), (1,), (2,), (3,)), 64, batch.content_hash)
    ev = fp.Evaluator(hf, fp.Perplexity(batch), layout=layout)
    tokens = {"initial_tokens": 100, "first_tokens": 140, "final_tokens": 250}
    result = fp.run_search(ev, "evopress", 2, initial=6, offspring=5, generations=2, **tokens)
    kept = ev.num_units - 2
    read = 6 * 100 + 2 * (5 * 140 + 3 * 250)
    expected = kept * (read + batch.num_tokens)  # the last parent is scored on all
    assert result.cost.naive_unit_runs * batch.num_tokens == pytest.approx(expected, rel=1e-12)
    assert result.cost.unit_runs <= result.cost.naive_unit_runs


# -- memory ----------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operator returns, in elements and in bytes."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return result


def memory_cases():
    torch.manual_seed(1)  # a vocabulary whose logits outweigh the states
    hf = tf.LlamaForCausalLM(tf.LlamaConfig(**LLAMA_LIKE | {"vocab_size": 1009})).eval()
    rows = random_rows(hf.config.vocab_size, [61, 57, 63, 40, 61, 33])
    tasks = make_tasks(hf.config.vocab_size, [(31, [5, 9]), (27, [3, 3, 17])] * 2)
    batch = fp.TokenBatch.from_ids(rows)
    return hf, {
        "nll": fp.Perplexity(batch),
        "kl": fp.KLDivergence(batch),
        "tasks": fp.TaskMargin(tasks),
    }


@pytest.mark.parametrize("kind", ["nll", "kl", "tasks"])
def test_the_head_sees_a_tile_and_nothing_exceeds_the_budget(monkeypatch, kind, backend):
    hf, objectives = memory_cases()
    model, target = fp.Model(hf), objectives[kind]

    def make(memory_bytes):
        return fp.Evaluator(model, target, backend, memory_bytes=memory_bytes, cache_bytes=0)

    budget = smallest_budget(make)
    ev = make(budget)
    masks = some_masks(ev.num_units, 20, seed=4)
    weights = {parameter.untyped_storage().nbytes() for parameter in hf.parameters()}
    positions = spy_on_the_head(monkeypatch, ev)
    with Largest() as largest:
        scores = ev.score(masks)
    sources = len(np.unique(target.batch.target_source))
    in_chunks = [
        len(np.unique(target.batch.target_source[targets])) for targets in targets_of_chunks(ev)
    ]
    assert max(positions) < max(in_chunks) <= sources
    masks_run = len({mask.tobytes() for mask in masks})
    assert sum(positions) == sources * masks_run  # only positions that count
    assert largest.bytes <= max(budget, *weights)
    assert largest.bytes < sources * model.vocab_size * 4
    assert 0 < ev.stats.peak_activation_bytes <= budget
    np.testing.assert_allclose(scores, make(None).score(masks), rtol=1e-5, atol=1e-6)


def test_a_larger_budget_runs_larger_chunks(model, batch, backend):
    def make(memory_bytes):
        return fp.Evaluator(
            model, fp.Perplexity(batch), backend, memory_bytes=memory_bytes, cache_bytes=0
        )

    least = smallest_budget(make)
    counts = [len(make(least * factor).layout.chunks) for factor in (1, 3, 100)]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[-1]


def fail_above(ev, monkeypatch, rows: int, error: Exception) -> list[int]:
    """Makes every unit run on more than `rows` rows raise an error; the list fills with the rows of
    each run."""
    seen, run = [], runner_of(ev).run

    def limited(self, unit, state, *args, **kwargs):
        seen.append(len(state))
        if len(state) > rows:
            raise error
        return run(self, unit, state, *args, **kwargs)

    monkeypatch.setattr(runner_of(ev), "run", limited)
    return seen


@pytest.mark.parametrize(
    ("message", "is_memory"),
    [
        ("CUDA error: out of memory\nCUDA kernel errors might be reported later", True),  # pinned
        ("HIP error: out of memory", True),
        ("Triton Error [CUDA]: out of memory", True),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("CUDA error: HIPBLAS_STATUS_ALLOC_FAILED when calling `hipblasCreate(handle)`", True),
        ("CUDA error: an illegal memory access was encountered", False),
        ("Triton Error [CUDA]: misaligned address", False),
        ("out of resource: shared memory, Required: 300000", False),
    ],
)
def test_messages_that_say_that_memory_ran_out(message, is_memory):
    assert is_out_of_memory(RuntimeError(message)) == is_memory


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory"),
    MemoryError(),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: not enough memory: you tried to "
        "allocate"
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("kind", ["nll", "kl"])
def test_out_of_memory_makes_smaller_chunks(hf, model, monkeypatch, kind, error, backend):
    batch = fp.TokenBatch.from_ids(random_rows(hf.config.vocab_size, [19] * 9 + [8] * 3))
    objective = fp.Perplexity(batch) if kind == "nll" else fp.KLDivergence(batch)
    expected = fp.Evaluator(hf, objective)
    masks = some_masks(expected.num_units, 20, seed=5)
    expected = expected.score(masks)
    ev = fp.Evaluator(model, objective, backend, cache_bytes=0)
    seen = fail_above(ev, monkeypatch, 2, error)
    with pytest.warns(RuntimeWarning, match="out of memory"):
        found = ev.score(masks)
    assert max(seen) > 2
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    dense = ev.num_units if kind == "kl" else 0  # the dense model's states, made once
    once = ev.stats.unit_runs
    assert once > count_prefixes(masks) + dense  # what had to be repeated was run, too
    assert ev.stats.masks == len(masks)
    seen.clear()
    assert (
        ev.score(masks).tobytes() == found.tobytes()
    )  # the smaller chunks stay, so that the bits do
    again = ev.stats.unit_runs - once  # of thirteenths, which floats round
    assert again == pytest.approx(count_prefixes(masks), rel=1e-12)
    assert max(seen) <= 2


def test_out_of_memory_in_the_head_makes_smaller_tiles(hf, model, monkeypatch, backend):
    objective = fp.Perplexity(fp.TokenBatch.from_ids(random_rows(hf.config.vocab_size, [90, 90])))
    ev = fp.Evaluator(model, objective, backend)
    masks = some_masks(ev.num_units, 20, seed=6)
    expected = ev.score(masks)
    seen = spy_on_the_head(monkeypatch, ev, most=16)
    with pytest.warns(RuntimeWarning, match="tiles of"):
        found = ev.score(masks)
    assert max(seen) > 16
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_out_of_memory_with_single_rows_is_raised(model, batch, monkeypatch):
    ev = fp.Evaluator(model, fp.Perplexity(batch))
    fail_above(ev, monkeypatch, 0, torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.warns(RuntimeWarning, match="out of memory"), pytest.raises(torch.OutOfMemoryError):
        ev.score(np.ones(ev.num_units, dtype=bool))


def test_other_errors_are_not_taken_for_memory(model, batch, monkeypatch):
    ev = fp.Evaluator(model, fp.Perplexity(batch))
    seen = fail_above(ev, monkeypatch, 0, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="shapes"):
        ev.score(np.ones(ev.num_units, dtype=bool))
    assert len(seen) == 1


@pytest.mark.parametrize("roomy", [False, True])
def test_the_dense_head_runs_once_where_the_budget_has_room(
    model, batch, monkeypatch, backend, roomy
):
    objective = fp.KLDivergence(batch)

    def make(memory_bytes):
        return fp.Evaluator(model, objective, backend, memory_bytes=memory_bytes, cache_bytes=0)

    ev = make(10**9 if roomy else smallest_budget(make))
    masks, seen = some_masks(ev.num_units, 20, seed=6), []
    dense_head = Head.dense

    def spy(self, dense, keep):
        assert keep == roomy
        seen.append(len(dense))
        return dense_head(self, dense, keep)

    monkeypatch.setattr(Head, "dense", spy)
    ev.score(masks[:10])
    ev.score(masks[10:])  # what one call has computed serves the next
    sources = len(np.unique(batch.target_source))
    assert sum(seen) == sources * (1 if roomy else ev.stats.head_runs)
    assert ev.stats.peak_activation_bytes <= (10**9 if roomy else smallest_budget(make))
