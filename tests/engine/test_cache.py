"""The prefix cache: states that outlive a call never change a bit, stay within their budget, and
save what they can."""

import weakref

import numpy as np
import pytest
import torch
from families import build, random_rows, some_masks
from helpers import make_tasks

import fastprune as fp
from fastprune.engine.cache import DiskTier, Frontier, HostTier, PrefixCache, TieredStates
from fastprune.models import Head
from fastprune.models.surgery import without
from fastprune.plan.retention import Prefixes
from fastprune.workers.processes import Processes

LENGTHS = [93, 9, 47, 93, 46, 9, 91]


def objective(kind: str, vocab_size: int):
    if kind == "tasks":
        return fp.TaskMargin(
            make_tasks(vocab_size, [(11, [1, 4, 7]), (5, [2, 2]), (13, [3, 1, 1, 6])])
        )
    batch = fp.TokenBatch.from_ids(random_rows(vocab_size, LENGTHS))
    return fp.Perplexity(batch) if kind == "text" else fp.KLDivergence(batch)


def state_bytes(hf, batch) -> int:
    """About the bytes of one prefix's states over the whole batch: float32, with padding."""
    return batch.num_rows * int(batch.row_lengths.max()) * hf.config.hidden_size * 4


def count_prefixes(masks: np.ndarray) -> int:
    """Distinct non-empty prefixes of the sequences of kept units: the least unit runs."""
    kept = [tuple(np.flatnonzero(mask)) for mask in masks]
    return len({sequence[:i] for sequence in kept for i in range(1, len(sequence) + 1)})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "granularity", "kind", "backend"),
    [
        ("llama", "block", "text", "generic"),
        ("llama", "block", "text", "fused"),
        ("llama", "sublayer", "tasks", "fused"),
        ("gemma2-eager", "block", "tasks", "generic"),
        (
            "gpt-neox",
            "sublayer",
            "kl",
            "generic",
        ),  # the state between halves of a parallel block is three tensors
        ("qwen3-moe", "block", "text", "generic"),
    ],
)
@pytest.mark.parametrize("states", [None, 2, 9])
def test_warm_cold_half_evicted_and_on_disk_give_the_same_bits(
    tmp_path, family, granularity, kind, backend, states
):
    hf = build(family)
    target = objective(kind, hf.config.vocab_size)
    halves = 3 if family == "gpt-neox" else 1
    budget = None if states is None else states * halves * state_bytes(hf, target.batch)

    def make(**options):
        return fp.Evaluator(hf, target, backend, granularity=granularity, **options)

    cold = make(cache_bytes=0)
    masks = some_masks(cold.num_units, 20, seed=7)
    expected = cold.score(masks)
    warm, disk = make(cache_bytes=budget), make(cache_bytes=budget, cache_dir=tmp_path)
    for ev in (warm, disk):
        for group in np.array_split(np.arange(len(masks)), 4):
            assert ev.score(masks[group]).tobytes() == expected[group].tobytes()
        order = np.random.default_rng(8).permutation(len(masks))
        assert ev.score(masks[order]).tobytes() == expected[order].tobytes()
        assert ev.score_samples(masks, [1]).tobytes() == cold.score_samples(masks, [1]).tobytes()
        assert ev.stats.cache_hits["device"] > 0
        assert ev.stats.unit_runs < ev.stats.asked_unit_runs
    dense = np.ones((int(kind == "kl"), cold.num_units), dtype=bool)
    least = count_prefixes(np.concatenate([masks, dense]))
    assert disk.stats.unit_runs == least
    if states is None:
        assert warm.stats.unit_runs == least
    else:
        assert 0 < warm.stats.cache_bytes <= budget
        assert warm.stats.unit_runs > least
        assert disk.stats.cache_hits["disk"] > 0
    assert list(tmp_path.iterdir()) == []  # nothing is left there, whatever becomes of the process


def test_a_search_runs_each_prefix_once():
    hf = build("llama")
    target = objective("text", hf.config.vocab_size)
    ev, none = fp.Evaluator(hf, target), fp.Evaluator(hf, target, cache_bytes=0)
    found, without = (fp.run_search(each, "greedy", 3) for each in (ev, none))
    assert found.history == without.history
    masks = fp.from_removed([removed for removed, _ in found.history], 5)
    assert found.cost.unit_runs == count_prefixes(masks) < without.cost.unit_runs


def test_changed_weights_and_switches_empty_it():
    hf = build("llama")
    target = objective("text", hf.config.vocab_size)
    ev = fp.Evaluator(hf, target)
    masks = some_masks(5, 20, seed=3)
    ev.score(masks)
    with torch.no_grad():
        hf.model.layers[0].mlp.down_proj.weight *= 1.5
    assert (
        ev.score(masks).tobytes() == fp.Evaluator(hf, target, cache_bytes=0).score(masks).tobytes()
    )
    hf.model.layers[0].mlp.down_proj.weight.data.mul_(1.5)  # counts no version
    assert (
        ev.score(masks).tobytes() == fp.Evaluator(hf, target, cache_bytes=0).score(masks).tobytes()
    )
    runs = ev.stats.unit_runs
    torch.set_float32_matmul_precision("high")
    try:
        ev.score(masks)
        assert ev.stats.unit_runs - runs == ev.stats.asked_unit_runs / 4
    finally:
        torch.set_float32_matmul_precision("highest")


def test_a_call_that_is_broken_off_leaves_only_whole_states():
    hf = build("llama")
    target = objective("text", hf.config.vocab_size)
    masks = some_masks(5, 20, seed=10)
    expected = fp.Evaluator(hf, target, cache_bytes=0).score(masks)
    for stop in range(1, 12):
        ev = fp.Evaluator(hf, target, cache_bytes=6 * state_bytes(hf, target.batch))
        ev.score(masks[:4])
        calls = []

        def interrupt(event, stop=stop, calls=calls):
            calls.append(event.done)
            if len(calls) == stop:
                raise KeyboardInterrupt

        ev.progress = interrupt
        with pytest.raises(KeyboardInterrupt):
            ev.score(masks)
        ev.progress = None
        assert ev.score(masks).tobytes() == expected.tobytes()


def test_out_of_memory_gives_up_states_before_bits(monkeypatch):
    hf = build("llama")
    target = objective("text", hf.config.vocab_size)
    masks = some_masks(5, 20, seed=11)
    expected = fp.Evaluator(hf, target, backend="generic", cache_bytes=0).score(masks)
    ev = fp.Evaluator(hf, target, backend="generic")
    ev.score(masks[:10])
    nll, failures = Head.nll, [1]

    def fails_once(self, states, tile):
        if failures:
            failures.pop()
            raise torch.OutOfMemoryError("CUDA out of memory")
        return nll(self, states, tile)

    monkeypatch.setattr(Head, "nll", fails_once)
    with pytest.warns(RuntimeWarning, match="out of memory: going on with a smaller prefix cache"):
        assert ev.score(masks).tobytes() == expected.tobytes()
    assert ev.stats.masks == 10 + len(masks)


def test_a_disk_that_fills_up_is_given_up_with_one_warning(tmp_path, monkeypatch):
    hf = build("llama")
    target = objective("text", hf.config.vocab_size)
    masks = some_masks(5, 20, seed=12)
    expected = fp.Evaluator(hf, target, cache_bytes=0).score(masks)
    put, left = DiskTier.put, [None] * 3

    def fills_up(self, state):
        if not left:
            raise OSError(28, "No space left on device")
        left.pop()
        return put(self, state)

    monkeypatch.setattr(DiskTier, "put", fills_up)
    ev = fp.Evaluator(
        hf, target, cache_bytes=2 * state_bytes(hf, target.batch), cache_dir=tmp_path / "made"
    )
    groups = np.array_split(np.arange(len(masks)), 4)
    with pytest.warns(
        RuntimeWarning, match="no more states are kept there: .*No space left"
    ) as warned:
        found = [ev.score(masks[group]) for group in groups]
    assert len(warned) == 1
    assert np.concatenate(found).tobytes() == expected.tobytes()


def test_tiers_return_the_bits_they_were_given(tmp_path):
    cpu = torch.device("cpu")
    for tier in (HostTier(cpu), DiskTier(tmp_path, cpu)):
        for dtype in (torch.bfloat16, torch.float32):
            states = [torch.randn(3, 2, 5, 7).to(dtype)[i % 3] for i in range(6)]
            handles = [tier.put(state) for state in states]
            tier.drop(handles[1])
            handles[1] = tier.put(states[1])
            for handle, state in zip(handles, states):
                found = tier.get(handle)
                assert found.dtype == dtype
                assert torch.equal(found, state)
            for handle in handles:
                tier.drop(handle)


def test_states_on_the_host_are_cut_from_few_pieces_of_pinned_memory():
    pieces = []

    def pin(size):
        pieces.append(size)
        return torch.empty(size, dtype=torch.uint8)

    tier = HostTier(torch.device("cpu"), pin)
    assert pieces == []  # nothing is pinned before a state comes
    states = [
        torch.randn(1 + i % 3, 700, 1001, generator=torch.Generator().manual_seed(i))
        for i in range(18)  # 101 MB, 2.8 to 8.4 MB each, none a multiple of the alignment
    ]
    handles = [tier.put(state) for state in states]
    assert pieces == [64 << 20, 64 << 20]
    assert all(map(torch.equal, map(tier.get, handles), states))
    for handle in handles:
        tier.drop(handle)
    half = [state.bfloat16().repeat(2, 1, 1) for state in states]
    handles = [tier.put(state) for state in half]  # as many bytes in another dtype and shape
    assert all(map(torch.equal, map(tier.get, handles), half))
    assert len(pieces) == 2
    tier.put(torch.zeros(50_000_000))  # larger than a piece of its turn
    assert pieces[2:] == [256 << 20]
    addresses = [tier.get(handle).data_ptr() for handle in handles]
    assert all(address % 64 == 0 for address in addresses)


def test_a_cleared_tier_frees_its_memory(tmp_path):
    """The states of another problem have other sizes, so that they would not reuse a place."""
    pieces = []

    def pin(size):
        piece = torch.empty(size, dtype=torch.uint8)
        pieces.append(weakref.ref(piece.untyped_storage()))
        return piece

    cpu = torch.device("cpu")
    for tier in (HostTier(cpu, pin), DiskTier(tmp_path, cpu)):
        for size in (5, 7):
            states = [torch.randn(size) for _ in range(3)]
            handles = [tier.put(state) for state in states]
            assert all(map(torch.equal, map(tier.get, handles), states))
            handles.clear()
            tier.clear()
            assert not any(piece() for piece in pieces)


def test_processes_with_a_gpu_each_share_the_host_only(monkeypatch):
    """With 800 states of room free on a GPU and 8,000 on the host, of which the cache may take a
    quarter."""
    room = {"cuda": 800, "cpu": 8000}
    monkeypatch.setattr("fastprune.engine.cache.available_bytes", lambda device: room[device.type])
    cache = PrefixCache(None, None, torch.device("cuda"))
    cache.start(1)
    found = []
    for cache.per_machine, cache.per_device in ((1, 1), (4, 1), (4, 2)):
        cache.resize()
        found.append(cache.capacity)
    assert found == [200 + 2000, 200 + 500, 100 + 500]


def test_a_gpu_holds_states_in_all_but_a_reserve(monkeypatch):
    """With 1,600 bytes free on the GPU and 8,000 on the host. States are pinned on the host only
    when a chunk's room on the device is full."""
    room = {"cuda": 1600, "cpu": 8000}
    monkeypatch.setattr("fastprune.engine.cache.available_bytes", lambda device: room[device.type])

    def capacity(limit, reserve, per_device=1):
        cache = PrefixCache(limit, None, torch.device("cuda"), reserve)
        cache.per_device = per_device
        cache.start(1)
        cache.resize()
        return cache.capacity

    assert capacity(None, 500) == 1600 - 100 - 500 + 2000
    assert capacity(None, 500, per_device=2) == 800 - 50 - 500 + 2000
    assert capacity(None, 1500) == 400 + 2000  # a quarter at least
    assert capacity(900, 500) == 900

    state = torch.zeros(25)
    cache = PrefixCache(10 * state.nbytes, None, torch.device("cuda"), 500)
    cache.start(state.nbytes)
    cache.resize()
    for i in range(10):
        cache.insert(0, {(i,): state})
        cache.get(0, (i,))
    assert cache.hits == {"device": 10, "host": 0}


def test_gpus_are_shared_by_turns(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    shared = {}
    for count in (1, 4, 5, 8, 9):
        workers = object.__new__(Processes)  # none is started
        workers.count = workers.per_machine = count
        shared[count] = (
            workers.per_device(torch.device("cuda")),
            workers.per_device(torch.device("cpu")),
        )
    assert shared == {1: (1, 1), 4: (1, 4), 5: (2, 5), 8: (2, 8), 9: (3, 9)}


def test_a_disk_that_failed_is_not_offered_again(tmp_path, monkeypatch):
    frontier, state = Frontier(tmp_path, torch.device("cpu")), torch.randn(2, 3)
    frontier.start(0)
    assert frontier.slower_bytes > 0

    def fails(self, state):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(DiskTier, "put", fails)
    with pytest.warns(RuntimeWarning, match="no more states are kept there: .*Input/output error"):
        frontier.put(0, (1,), state)
    assert torch.equal(frontier.get(0, (1,)), state)
    frontier.start(0)
    assert frontier.slower_bytes == 0
    frontier.put(0, (1,), state)  # to memory, without a word
    assert frontier.bytes == state.nbytes


def test_a_cache_without_room_holds_nothing():
    cache = PrefixCache(0, None, torch.device("cpu"))
    cache.start(100)
    cache.resize()
    assert cache.capacity == 0
    cache.insert(0, {(1,): torch.zeros(25)})
    assert cache.bytes == 0


def test_every_chunk_has_room_for_the_capacity_and_gets_it_back_by_eviction(tmp_path):
    """With three prefixes in memory for each of two chunks, and more on the disk."""
    state = torch.randn(25)
    cache = PrefixCache(3 * 2 * state.nbytes, tmp_path, torch.device("cpu"))
    cache.start(2 * state.nbytes)
    cache.insert(0, {(9,): state})  # before there is room
    assert cache.bytes == 0
    cache.resize()
    assert [cache.takes(0, count) for count in (3, 4)] == [True, False]  # in memory
    prefixes = [(i,) for i in range(5)]
    for chunk in (0, 1):
        cache.insert(chunk, {prefix: state + prefix[0] + chunk for prefix in prefixes})
        cache.commit(chunk, Prefixes(prefixes, np.arange(5.0)))
    assert cache.bytes == 10 * state.nbytes
    for chunk in (0, 1):
        for prefix in prefixes:
            assert torch.equal(cache.get(chunk, prefix), state + prefix[0] + chunk)
    assert cache.hits == {"device": 6, "disk": 4}
    assert not cache.takes(0, 1)
    cache.evict(0, [(0,), (7,)])
    assert cache.takes(0, 1)
    cache.insert(0, {(5,): state})
    assert torch.equal(cache.get(0, (5,)), state)
    assert cache.hits == {"device": 7, "disk": 4}
    # (8,) found no room
    cache.commit(0, Prefixes([*prefixes[1:], (5,), (8,)], np.arange(6.0)))
    assert cache.match(0).prefixes == (*prefixes[1:], (5,))
    assert cache.match(0).likelihood.tolist() == [0, 1, 2, 3, 4]
    cache.forget(0)
    assert cache.match(0).prefixes == ()
    assert cache.match(1).prefixes == tuple(prefixes)
    assert cache.bytes == 5 * state.nbytes
    cache.clear()
    assert cache.bytes == 0


def test_a_tier_that_is_full_or_fails_leaves_the_state_to_the_next(tmp_path, monkeypatch):
    room = {"device": 0, "disk": 1}

    class Bounded(TieredStates):
        def has_room(self, tier, chunk, size):
            return room[tier]

    states, state = Bounded(tmp_path, torch.device("cpu")), torch.randn(2, 3)
    assert states.put(0, (0,), state) == "disk"
    assert states.share_of("disk", 1) > 0

    def fails(self, state):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(DiskTier, "put", fails)
    with pytest.warns(RuntimeWarning, match="no more states are kept there"):
        assert states.put(0, (1,), state) is None
    assert states.put(0, (1,), state) is None  # without a word
    assert states.share_of("disk", 1) == 0
    room["device"] = 1
    assert states.put(0, (2,), state) == "device"
    assert states.held_bytes == {"device": state.nbytes, "disk": state.nbytes}
    assert all(torch.equal(states.get(0, (i,)), state) for i in (0, 2))
    assert states.hits == {"device": 1, "disk": 1}
    for prefix in list(states.held(0)):
        states.drop(0, prefix)
    assert states.held_bytes == {"device": 0, "disk": 0}


def test_the_measure_greedy_counts_tokens_that_are_not_the_most_likely():
    hf = build("llama")
    batch = fp.TokenBatch.from_ids(random_rows(hf.config.vocab_size, LENGTHS))
    masks = some_masks(5, 20, seed=13)[:6]

    class Greedy(fp.Perplexity):
        measure = "greedy"

    for backend in ("generic", "fused"):
        ev = fp.Evaluator(hf, Greedy(batch), backend)
        sums = ev.sums(masks)
        assert sums.shape == (len(masks), 2, batch.num_rows)
        assert (
            ev.score(masks).tobytes()
            == fp.Evaluator(hf, fp.Perplexity(batch), backend).score(masks).tobytes()
        )
        for mask, of_mask in zip(masks, sums[:, 1]):
            model = without(fp.Model(hf), np.flatnonzero(~mask).tolist())
            for row, misses in enumerate(of_mask):
                ids = torch.tensor(batch.ids[batch.row_starts[row] : batch.row_starts[row + 1]])[
                    None
                ]
                with torch.no_grad():
                    likely = model(input_ids=ids, use_cache=False).logits[0, :-1].argmax(dim=-1)
                assert misses == (likely != ids[0, 1:]).sum()


def test_a_folder_that_vanishes_costs_speed_only(tmp_path):
    """The folder of the prefix cache, between two calls, and that of states that wait for a band
    of weights."""
    hf = build("llama")
    target = objective("text", hf.config.vocab_size)
    masks = some_masks(5, 20, seed=12)
    expected = fp.Evaluator(hf, target, cache_bytes=0).score(masks)
    folder = tmp_path / "made"
    ev = fp.Evaluator(hf, target, cache_bytes=2 * state_bytes(hf, target.batch), cache_dir=folder)
    ev.score(masks[:5])
    frontier = Frontier(folder, torch.device("cpu"))
    folder.rmdir()
    with pytest.warns(RuntimeWarning, match="made: no more states are kept there: ") as warned:
        found = [ev.score(masks[part]) for part in (slice(0, 10), slice(10, 20))]
    assert len(warned) == 1
    assert np.concatenate(found).tobytes() == expected.tobytes()
    with pytest.warns(RuntimeWarning, match="made: no more states are kept there: ") as warned:
        frontier.start(0)
    frontier.start(0)
    assert frontier.slower_bytes == 0
    assert len(warned) == 1
