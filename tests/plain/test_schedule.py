"""Schedules: as many unit runs as there are new prefixes, steps that really produce every mask,
states retained."""

import itertools
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

import fastprune as fp
from fastprune.plan.bands import visits_of
from fastprune.plan.retention import Prefixes
from fastprune.plan.schedule import make_schedule, max_slots, plan_call
from fastprune.plan.trie import kept_units, make_trie
from fastprune.testing import SyntheticEvaluator


def count_prefixes(masks) -> int:
    """Distinct non-empty prefixes of the sequences of kept units, one by one."""
    prefixes = set()
    for mask in masks:
        kept = tuple(np.flatnonzero(mask))
        prefixes.update(kept[: i + 1] for i in range(len(kept)))
    return len(prefixes)


def execute(
    schedule, trie, cache: set | None = None, capacity: int = 0
) -> dict[int, tuple[int, ...]]:
    """Run the steps on tuples of units in place of states; the sequence that each end was reached
    by.

    cache: the prefixes that earlier schedules retained, which this one changes.
    """
    cache = set() if cache is None else cache
    assert set(schedule.cached) == cache
    cache -= set(schedule.evicted)
    slots: list[tuple[int, ...] | None] = [None] * schedule.num_slots
    finished, runs = {}, 0
    for number, step in enumerate(schedule.steps):
        kind, index = step.source
        if kind == "root":
            assert number == 0  # the embeddings are not kept: only the first step may read them
            state = ()
        elif kind == "slot":
            state = slots[index]
            assert state is not None, "reads a slot that holds nothing"
            if step.last_use:
                slots[index] = None
        else:
            assert kind == "cached"
            state = schedule.cached[index]
            assert state in cache, "reads a state that is gone"
            if step.last_use:
                cache.remove(state)
        retained = dict(step.retained)
        for count, unit in enumerate(step.units, start=1):
            state = (*state, unit)
            runs += 1
            if count in retained:
                assert retained[count] == state
                assert state not in cache
                cache.add(state)
                assert len(cache) <= capacity
        if step.end >= 0:
            assert step.end not in finished
            finished[step.end] = state
        if step.target >= 0:
            assert slots[step.target] is None, "overwrites a state that is still needed"
            slots[step.target] = state
    assert slots == [None] * schedule.num_slots, "holds a state that nobody reads"
    assert runs == schedule.unit_runs == trie.wanted_runs
    assert set(schedule.held.prefixes) == cache
    assert len(schedule.held.likelihood) == len(cache) == len(schedule.held.prefixes)
    return finished


def random_fields():
    rng = np.random.default_rng(0)
    for num_units in (1, 2, 5, 8, 9, 17, 33):
        for count in (1, 2, 7, 40, 150):
            for share in (0.1, 0.5, 0.9):
                yield rng.random((count, num_units)) < share
    for num_units in (4, 7):
        yield np.array(list(itertools.product([False, True], repeat=num_units)))
        yield np.zeros((3, num_units), dtype=bool)
        yield np.ones((3, num_units), dtype=bool)
        yield np.tri(num_units, dtype=bool)
        yield np.triu(np.ones((num_units, num_units), dtype=bool))
        yield np.zeros((0, num_units), dtype=bool)
    yield np.zeros((2, 0), dtype=bool)


@pytest.mark.parametrize(
    "masks", list(random_fields()), ids=lambda masks: "x".join(map(str, masks.shape))
)
def test_steps_produce_every_mask_with_the_least_work(masks):
    original = masks.copy()
    trie = make_trie(kept_units(masks))
    schedule = make_schedule(trie)
    assert np.array_equal(masks, original)
    assert trie.unit_runs == count_prefixes(masks) == schedule.unit_runs
    assert trie.naive_unit_runs == masks.sum()
    assert len(set(trie.sequences)) == len(trie.sequences) == len({m.tobytes() for m in masks})
    assert [trie.sequences[i] for i in trie.index] == [
        tuple(np.flatnonzero(mask)) for mask in masks
    ]

    assert execute(schedule, trie) == dict(enumerate(trie.sequences))
    assert schedule.num_slots <= max_slots(masks.shape[1], len(trie.sequences))
    targets = {step.target for step in schedule.steps if step.target >= 0}
    assert targets == set(range(schedule.num_slots))


def test_slots_of_all_masks_grow_with_depth_only():
    """All 2^n masks need about n slots, not one for each of the 2^n states."""
    for num_units in (3, 6, 10):
        masks = np.array(list(itertools.product([False, True], repeat=num_units)))
        assert make_schedule(make_trie(kept_units(masks))).num_slots <= num_units + 1


@pytest.mark.parametrize("seed", range(3))
def test_order_of_the_masks_does_not_change_the_schedule(seed):
    rng = np.random.default_rng(seed)
    masks = rng.random((60, 12)) < 0.6
    one, other = make_trie(kept_units(masks)), make_trie(kept_units(masks[rng.permutation(60)]))
    assert make_schedule(one).steps == make_schedule(other).steps
    assert one.sequences == other.sequences


def test_ten_thousand_masks_of_eighty_units():
    masks = np.random.default_rng(1).random((10_000, 80)) < 0.9
    trie = make_trie(kept_units(masks))
    assert trie.unit_runs == count_prefixes(masks)
    schedule = make_schedule(trie, capacity=50)
    assert schedule.num_slots <= max_slots(80, len(trie.sequences)) <= 14
    assert len(schedule.held.prefixes) == 50


@pytest.mark.parametrize("seed", range(4))
def test_sequences_that_repeat_and_reorder(seed):
    rng = np.random.default_rng(seed)
    sequences = [tuple(rng.integers(0, 4, rng.integers(0, 9)).tolist()) for _ in range(120)]
    trie = make_trie(sequences)
    prefixes = {sequence[: i + 1] for sequence in sequences for i in range(len(sequence))}
    assert trie.unit_runs == len(prefixes)
    assert trie.naive_unit_runs == sum(map(len, sequences))
    assert [trie.sequences[i] for i in trie.index] == sequences
    schedule = make_schedule(trie)
    assert execute(schedule, trie) == dict(enumerate(trie.sequences))
    assert schedule.num_slots <= max_slots(8, len(trie.sequences))


def prefixes_of(sequence) -> list[tuple[int, ...]]:
    return [tuple(sequence[:i]) for i in range(1, len(sequence) + 1)]


def reference_trie(requests, cached) -> dict[str, list]:
    """A trie's fields from their definitions, by sets of prefixes.

    Nodes ascend as their prefixes do: a parent comes before its children, and a whole subtree
    before the next sibling.
    """
    prefixes = sorted({p for s in [*requests, *cached] for p in prefixes_of(s)} | {()})
    sequences = sorted(set(requests))
    asked = {prefix for sequence in sequences for prefix in prefixes_of(sequence)}
    wanted = set()
    for sequence in sequences:
        deepest = max([0, *(len(p) for p in prefixes_of(sequence) if p in cached)])
        wanted.update(prefixes_of(sequence)[deepest:])
    return {
        "sequences": sequences,
        "index": [sequences.index(sequence) for sequence in requests],
        "prefixes": prefixes,
        "unit": [prefix[-1] if prefix else -1 for prefix in prefixes],
        "parent": [prefixes.index(prefix[:-1]) if prefix else -1 for prefix in prefixes],
        "depth": list(map(len, prefixes)),
        "ends": [prefixes.index(sequence) for sequence in sequences],
        "cached_nodes": [prefixes.index(prefix) for prefix in cached],
        "asked": [prefix in asked for prefix in prefixes],
        "wanted": [prefix in wanted for prefix in prefixes],
        "counts": [len(asked), len(wanted), sum(map(len, requests))],
    }


def fields_of(trie) -> dict[str, list]:
    names = ("index", "unit", "parent", "depth", "ends", "cached_nodes", "asked", "wanted")
    return {
        "sequences": list(trie.sequences),
        "prefixes": [trie.prefix(node) for node in range(len(trie.unit))],
        "counts": [trie.unit_runs, trie.wanted_runs, trie.naive_unit_runs],
        **{name: getattr(trie, name).tolist() for name in names},
    }


def test_nodes_are_the_prefixes_and_wanted_ones_are_below_the_cached():
    rng = np.random.default_rng(0)
    for _ in range(300):
        units = rng.integers(1, 7)
        requests = [
            tuple(rng.integers(0, units, rng.integers(0, 6)).tolist())
            for _ in range(rng.integers(0, 12))
        ]
        pool = [prefix for sequence in [*requests, (0, 0, 1)] for prefix in prefixes_of(sequence)]
        cached = list(
            dict.fromkeys(pool[i] for i in rng.permutation(len(pool))[: rng.integers(0, 5)])
        )
        assert fields_of(make_trie(requests, cached)) == reference_trie(requests, cached)


@pytest.mark.parametrize("capacity", [0, 1, 3, 8, 1000])
def test_calls_one_after_the_other_reach_every_end_within_the_capacity(capacity):
    rng = np.random.default_rng(capacity)
    for _ in range(60):
        known, likelihood, cache, ever = (), None, set(), set()
        for _ in range(6):
            asked = [
                tuple(rng.integers(0, 5, rng.integers(0, 6)).tolist())
                for _ in range(rng.integers(0, 12))
            ]
            trie = make_trie(asked, known)
            schedule = make_schedule(trie, likelihood, capacity)
            assert execute(schedule, trie, cache, capacity) == dict(enumerate(trie.sequences))
            assert schedule.num_slots <= max_slots(5, len(trie.sequences))
            new = {prefix for sequence in asked for prefix in prefixes_of(sequence)} - ever
            ever |= new
            if capacity == 1000:
                assert schedule.unit_runs == len(new)
            known, likelihood = schedule.held.prefixes, schedule.held.likelihood


@pytest.mark.parametrize("capacity", [0, 1, 8, 40, 1000])
def test_calls_planned_by_what_they_ask_reach_every_end_within_the_capacity(capacity):
    rng = np.random.default_rng(capacity)
    for _ in range(20):
        held, cache, ever = Prefixes(), set(), set()
        for _ in range(12):
            asked = sorted(
                {
                    tuple(rng.integers(0, 4, rng.integers(0, 6)).tolist())
                    for _ in range(rng.integers(1, 5))
                }
            )
            relevant = {p for s in asked for p in prefixes_of(s)} & cache
            schedule = plan_call(asked, held, capacity)
            bystanders = cache - set(schedule.cached)
            cache -= bystanders
            trie = make_trie(asked, schedule.cached)
            assert relevant <= set(schedule.cached)
            after = set(schedule.held.prefixes)
            assert bystanders <= after
            schedule_alone = replace(
                schedule, held=Prefixes([p for p in schedule.held.prefixes if p not in bystanders])
            )
            assert execute(schedule_alone, trie, cache, capacity) == dict(enumerate(asked))
            cache |= bystanders
            assert cache == after
            assert len(cache) <= capacity
            new = {prefix for sequence in asked for prefix in prefixes_of(sequence)} - ever
            ever |= new
            if capacity == 1000:
                assert schedule.unit_runs == len(new)
                assert not schedule.evicted
            held = schedule.held


def test_likelihoods_are_those_of_plans_over_the_whole_cache():
    rng = np.random.default_rng(5)
    held, known, likelihood = Prefixes(), (), None
    for _ in range(30):
        asked = [tuple(rng.integers(0, 3, 5).tolist()) for _ in range(2)]
        held = plan_call(sorted(set(asked)), held, 10**4).held
        whole = make_schedule(make_trie(asked, known), likelihood, 10**4)
        known, likelihood = whole.held.prefixes, whole.held.likelihood
        found = dict(zip(held.prefixes, held.likelihood))
        assert found == pytest.approx(dict(zip(known, likelihood)), rel=1e-12)


def test_one_sequence_is_planned_as_its_trie_is():
    rng = np.random.default_rng(6)
    for num_units in (1, 3, 8):
        held = Prefixes()
        for _ in range(60):
            units = rng.integers(0, num_units, rng.integers(0, 9)).tolist()
            sequence = tuple(sorted(set(units)) if rng.random() < 0.5 else units)
            begun = held.on_the_way([sequence])
            trie = make_trie([sequence], begun.prefixes)
            whole = make_schedule(trie, begun.likelihood, 10**4)
            expected = replace(whole, held=held.followed_by(whole.held))
            schedule = plan_call([sequence], held, 10**4)
            assert replace(schedule, held=held) == replace(expected, held=held)
            assert schedule.held.prefixes == expected.held.prefixes
            assert schedule.held.likelihood.tolist() == expected.held.likelihood.tolist()
            held = schedule.held


def test_a_small_call_on_a_full_cache_frees_room_for_the_next_ones():
    full = Prefixes([(unit,) for unit in range(160)], np.ones(160))
    schedule = plan_call([(200, 201)], full, capacity=160)
    assert len(schedule.held.prefixes) == 150  # a sixteenth is free
    assert len(plan_call([(200, 202)], schedule.held, capacity=160).held.prefixes) == 151
    many = [(unit, 0) for unit in range(200, 300)]
    assert len(plan_call(many, full, capacity=160).held.prefixes) == 160


class Recorder(SyntheticEvaluator):
    """Notes the sequences of every call."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.trace = []

    def score(self, masks, *, samples=None, tokens=None):
        if samples is None:  # else `score_samples` notes the call
            self.trace.append(kept_units(np.asarray(masks)))
        return super().score(masks, samples=samples, tokens=tokens)

    def score_samples(self, masks, samples=None):
        self.trace.append(kept_units(np.asarray(masks)))
        return super().score_samples(masks, samples)


def runs_over_a_search(trace, capacity: int) -> int:
    known, likelihood, runs = (), None, 0
    for asked in trace:
        schedule = make_schedule(make_trie(asked, known), likelihood, capacity)
        known, likelihood = schedule.held.prefixes, schedule.held.likelihood
        runs += schedule.unit_runs
    return runs


@pytest.mark.parametrize(
    ("algorithm", "options", "thousand", "hundred"),
    [
        ("greedy", {}, 0.95, 0.75),
        ("beam", {"beam_width": 5}, 0.8, 0.3),
        ("evopress", {"offspring": 32, "generations": 40}, 0.8, 0.3),
    ],
)
def test_a_search_of_32_blocks_costs_its_distinct_prefixes(
    algorithm, options, thousand, hundred, record_property
):
    """A cache of 1,000 or 100 states saves these shares of the unit runs that a cache without
    bounds saves over sharing within calls."""
    ev = Recorder(32, num_samples=64)
    fp.run_search(ev, algorithm, 7, **options)
    every = {prefix for asked in ev.trace for sequence in asked for prefix in prefixes_of(sequence)}
    within = runs_over_a_search(ev.trace, 0)
    assert runs_over_a_search(ev.trace, 10**6) == len(every)
    for capacity, share in ((1000, thousand), (100, hundred)):
        found = (within - runs_over_a_search(ev.trace, capacity)) / (within - len(every))
        record_property(f"{capacity} states", found)
        assert found >= share, capacity


def execute_by_bands(schedule, trie, band_of) -> dict[int, tuple[int, ...]]:
    """Run the steps on tuples of units, visit by visit: only units of the visit's band, no slot
    held between visits."""
    frontier: set = set()
    peak, finished, runs, num_bands = 0, {}, 0, max(band_of, default=0) + 1
    assert [visit.number for visit in schedule.visits] == sorted(
        {visit.number for visit in schedule.visits}
    )
    assert [v.start for v in schedule.visits] == [0, *(v.stop for v in schedule.visits)][:-1]
    for visit in schedule.visits:
        slots: list[tuple[int, ...] | None] = [None] * schedule.num_slots
        for step in schedule.steps[visit.start : visit.stop]:
            kind, index = step.source
            if kind == "root":
                state = ()
            elif kind == "slot":
                state = slots[index]
                if step.last_use:
                    slots[index] = None
            elif kind == "cached":
                state = schedule.cached[index]
            else:
                assert kind == "frontier"
                state = schedule.frontier[index]
                assert state in frontier, "reads a state that is not there"
                if step.last_use:
                    frontier.remove(state)
            for unit in step.units:
                assert band_of[unit] == visit.number % num_bands
                state = (*state, unit)
            runs += len(step.units)
            if step.end >= 0:
                finished[step.end] = state
            if step.target >= 0:
                slots[step.target] = state
            if step.frontier >= 0:
                assert schedule.frontier[step.frontier] == state
                frontier.add(state)
                peak = max(peak, len(frontier))
        assert slots == [None] * schedule.num_slots
    assert not frontier
    assert peak == schedule.frontier_peak
    assert runs == schedule.unit_runs
    return finished


def test_bands_run_every_node_once_and_ascending_sequences_in_one_round():
    rng = np.random.default_rng(3)
    for masks in random_fields():
        num_units = masks.shape[1]
        band_of = np.sort(rng.integers(0, rng.integers(1, 5), num_units))
        band_of = np.unique(band_of, return_inverse=True)[1].tolist()
        sequences = kept_units(masks)
        known = sorted(
            {s[: rng.integers(1, len(s) + 1)] for s in sequences if s and rng.random() < 0.2}
        )
        for prefixes in ([], known):
            trie = make_trie(sequences, prefixes)
            schedule = make_schedule(trie, visits_of=partial(visits_of, band_of=band_of))
            found = execute_by_bands(schedule, trie, band_of)
            assert [found[i] for i in range(len(trie.sequences))] == list(trie.sequences)
            assert all(visit.number <= max(band_of, default=0) for visit in schedule.visits)
            assert schedule.unit_runs == trie.wanted_runs


def test_bands_come_round_again_for_units_that_go_back():
    rng = np.random.default_rng(4)
    sequences = [tuple(rng.integers(0, 6, rng.integers(0, 9)).tolist()) for _ in range(60)]
    band_of = [0, 0, 1, 1, 2, 2]
    trie = make_trie(sequences)
    found = execute_by_bands(
        make_schedule(trie, visits_of=partial(visits_of, band_of=band_of)), trie, band_of
    )
    assert [found[i] for i in range(len(trie.sequences))] == list(trie.sequences)


def test_one_band_is_the_schedule_without_bands():
    for masks in random_fields():
        trie = make_trie(kept_units(masks))
        plain, banded = (
            make_schedule(trie, None, 3),
            make_schedule(trie, None, 3, partial(visits_of, band_of=[0] * masks.shape[1])),
        )
        assert plain.steps == banded.steps
        assert plain.frontier == banded.frontier == ()
        assert len(plain.visits) <= 1
