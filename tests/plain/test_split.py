"""A call split over workers: every sum once, even shares, and little sharing lost where the trie
is cut."""

from itertools import takewhile

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastprune.plan.split import cut, owners, teams
from fastprune.plan.trie import kept_units, make_trie


def random_masks(kind: str) -> np.ndarray:
    """500 masks of 32 units."""
    rng = np.random.default_rng(0)
    if kind == "7 removed":
        return np.array(
            [~np.isin(np.arange(32), rng.choice(32, 7, replace=False)) for _ in range(500)]
        )
    return rng.random((500, 32)) < float(kind)


@pytest.mark.parametrize("head", [0, 1, 5])
@pytest.mark.parametrize("kind", ["0.5", "0.8", "7 removed"])
def test_500_masks_on_64_workers_lose_less_than_a_tenth_of_their_sharing(kind, head):
    trie = make_trie(kept_units(random_masks(kind)))
    parts = cut(trie, 64, head)
    runs = [make_trie(trie.sequences[part.start : part.stop]).unit_runs for part in parts]
    assert len(parts) == 64
    assert sum(runs) < 1.1 * trie.unit_runs
    work = [made + head * len(part) for made, part in zip(runs, parts)]
    assert max(work) < 1.25 * np.mean(work)


sequences = st.lists(st.lists(st.integers(0, 4), max_size=6).map(tuple), min_size=1, max_size=30)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # on a busy machine
@given(sequences, st.integers(1, 12), st.integers(0, 3))
def test_ranges_hold_every_sequence_once_and_repeat_only_the_path_to_their_first(
    asked, parts, head
):
    trie = make_trie(asked)
    ranges = cut(trie, parts, head)
    assert [i for part in ranges for i in part] == list(range(len(trie.sequences)))
    assert all(ranges)
    assert len(ranges) <= parts
    runs = sum(make_trie(trie.sequences[part.start : part.stop]).unit_runs for part in ranges)
    pairs = [zip(*trie.sequences[part.start - 1 : part.start + 1]) for part in ranges[1:]]
    repeated = sum(len(list(takewhile(lambda units: units[0] == units[1], pair))) for pair in pairs)
    assert runs == trie.unit_runs + repeated


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # on a busy machine
@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(1, 100)), min_size=1, max_size=40),
    st.integers(1, 9),
)
def test_looks_and_the_whole_are_shared_out(chunks, workers):
    looks, loads = map(np.array, zip(*sorted(chunks)))
    owner = owners(loads, looks, workers)
    total = np.bincount(owner, loads, minlength=workers)
    assert total.max() <= total.mean() + (np.unique(looks).size + 1) * loads.max()
    if (looks == looks[0]).all():
        assert total.max() - total.min() <= loads.max()


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # on a busy machine
@given(st.lists(st.integers(1, 100), min_size=1, max_size=12), st.integers(1, 20))
def test_no_worker_is_idle_and_none_has_two_chunks_where_there_are_more_workers(loads, workers):
    owner = owners(loads, [0] * len(loads), workers)
    found = teams(loads, owner, workers)
    assert all(int(worker) in team for worker, team in zip(owner, found))
    if len(loads) < workers:
        assert sorted(worker for team in found for worker in team) == list(range(workers))
    else:
        assert all(len(team) == 1 for team in found)
    assert found == teams(loads, owner, workers)


def test_equal_chunks_are_dealt_evenly():
    assert np.bincount(owners([5] * 12, [0] * 4 + [1] * 8, 4)).tolist() == [3, 3, 3, 3]
