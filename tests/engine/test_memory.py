"""The byte budget holds as the kernel measures it: growth of a process's resident memory."""

import ctypes
import gc
import multiprocessing
import re
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers as tf

import fastprune as fp
from fastprune.engine.openings import Openings

CLEAR_REFS = Path(
    "/proc/self/clear_refs"
)  # writing 5 resets the peak that /proc/self/status reports
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # of mallopt


def memory(field: str) -> int:
    return int(re.search(field + r":\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) << 10


def grown(work) -> int:
    """Bytes by which the memory of this process is larger than now while work() runs, at the most.

    What is free now goes back to the kernel first: work() would take it without growing."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    CLEAR_REFS.write_text("5")
    before = memory("VmRSS")
    work()
    return memory("VmHWM") - before


def random_masks(count: int, blocks: int) -> np.ndarray:
    masks = np.random.default_rng(0).random((count, blocks)) < 0.5
    masks[:, blocks // 2] |= ~masks.any(axis=1)
    return masks


@pytest.fixture(scope="module")
def measure():
    """measured(), in a process of its own: the heap of this one has holes, which other tests have
    left."""
    if not CLEAR_REFS.exists():
        pytest.skip("the kernel keeps no peak that can be reset")
    with ProcessPoolExecutor(
        1, multiprocessing.get_context("spawn"), initializer=give_back
    ) as pool:
        yield lambda budgets, **shape: pool.submit(measured, budgets, **shape).result()


def give_back() -> None:
    """From now on, blocks of 128 KiB and more go back to the kernel when they are freed."""
    libc = ctypes.CDLL(None)
    assert libc.mallopt(MMAP_THRESHOLD, 1 << 17)
    assert libc.mallopt(TRIM_THRESHOLD, 1 << 17)
    torch.set_num_threads(1)


def measured(
    budgets: dict[str, tuple[int | None, int]], *, blocks: int, inner: int, rows: int, masks: int
) -> dict:
    """The peak that is told and the growth of memory, by name, when random masks are scored under
    (memory_bytes, cache_bytes)."""
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=503,
        hidden_size=64,
        intermediate_size=inner,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = fp.Model(tf.AutoModelForCausalLM.from_config(config).eval())
    ids = np.random.default_rng(0).integers(0, 503, (rows, 67))

    def score(batch, some, memory_bytes, cache_bytes):
        ev = fp.Evaluator(
            model, fp.Perplexity(batch), memory_bytes=memory_bytes, cache_bytes=cache_bytes
        )
        losses = ev.score(some)
        assert np.isfinite(losses).all()
        assert len(np.unique(losses)) > len(some) // 2
        return ev.stats.peak_activation_bytes

    # what libraries load or keep when they are first used
    score(fp.TokenBatch.from_ids(ids[:1]), random_masks(3, blocks), None, 0)
    found, batch, some = {}, fp.TokenBatch.from_ids(ids), random_masks(masks, blocks)
    for name, budget in budgets.items():
        peaks = []
        growth = grown(lambda: peaks.append(score(batch, some, *budget)))  # noqa: B023  (called at once)
        found[name] = {"peak": peaks[0], "growth": growth}
    assert (
        0.95 <= grown(lambda: torch.ones(4 << 20)) / (16 << 20) <= 1.05
    )  # the meter sees what is allocated
    return found


@pytest.mark.slow
def test_a_thousand_random_masks_in_64_mib(measure):
    """A state weighs 0.13 MiB here: keeping that of every mask, or of every node of the trie, would
    take 2 or 9 times the budget."""
    budget = 64 << 20
    found = measure({"small": (budget, 0)}, blocks=16, inner=64, rows=8, masks=1000)["small"]
    assert 1 << 20 < found["growth"] <= budget
    assert 1 << 20 < found["peak"] <= budget


@pytest.mark.slow
def test_a_small_budget_makes_small_chunks(measure):
    """The same work without the budget takes more than it: the budget is what keeps memory down."""
    budget = 5 << 20
    found = measure(
        {"free": (None, 0), "small": (budget, 0)}, blocks=4, inner=3072, rows=32, masks=4
    )
    assert found["free"]["growth"] > budget
    assert found["free"]["peak"] > budget
    assert found["small"]["growth"] <= budget
    assert found["small"]["peak"] <= budget


def test_the_prefix_cache_adds_its_budget_and_no_more(measure):
    """Every node of the trie would take 7 times both budgets together."""
    budget, cache = 10 << 20, 8 << 20
    found = measure({"cached": (budget, cache)}, blocks=16, inner=64, rows=8, masks=200)["cached"]
    assert found["growth"] <= budget + cache
    assert found["growth"] >= cache // 2  # it is used


def test_kept_openings_stay_within_their_bytes():
    """Units may add values to an opening, which count each time it is kept."""

    class Runner:
        def open(self, *inputs):
            return torch.zeros(10), [{}]

    openings, chunk = Openings(Runner(), 100), SimpleNamespace(ids=0, positions=0, branch=0)
    for _ in range(3):
        _, (arguments,) = openings.open(0, chunk)
        arguments["added"] = torch.zeros(100)
        openings.weigh(0)
        assert openings.bytes == 0
        assert openings.open(0, chunk)[1] == [{}]  # it was not kept
