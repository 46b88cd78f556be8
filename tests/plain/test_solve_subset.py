"""solve_subset against brute force, its fallback, and wrong arguments."""

import itertools
import math
import os
import signal
import threading
import time
import warnings

import numpy as np
import pytest

from fastprune import InputError, SubsetSolution, solve_subset
from fastprune.solver import oracle, subset

try:
    from fastprune import _native
except ImportError:
    _native = None

native_only = pytest.mark.skipif(_native is None, reason="needs the compiled solver")


def fisher(n, rng):
    """Low rank plus diagonal, columns of different size."""
    rows = rng.standard_normal((3, n)) * rng.lognormal(0.0, 0.5, n)
    return rows.T @ rows + np.diag(rng.uniform(0.1, 1.0, n))


def gaussian(n, rng):
    a = rng.standard_normal((n + 3, n))
    return a.T @ a / (n + 3)


def indefinite(n, rng):
    a = rng.standard_normal((n, n))
    return a + a.T


def integer(n, rng):
    """Small integers: exact energies, many of them equal."""
    a = rng.integers(-2, 3, (n, n))
    return np.tril(a) + np.tril(a, -1).T


FAMILIES = [fisher, gaussian, indefinite, integer]


def brute_force(h, g):
    """For every k: all subsets by energy, then lexicographically, as (energies, membership [C(n,
    k), n])."""
    n = len(h)
    # Variable 0 in the highest bit, bits inverted: row order is then the order of the sorted
    # tuples.
    z = 1 - (np.arange(2**n)[:, None] >> np.arange(n - 1, -1, -1)) % 2
    zf = z.astype(float)
    energy = ((zf @ h + g) * zf).sum(axis=1)
    sizes = z.sum(axis=1)
    for k in range(n + 1):
        rows = np.flatnonzero(sizes == k)
        order = rows[np.argsort(energy[rows], kind="stable")]
        yield k, energy[order], z[order]


def fsum_energy(h, g, subset):
    return math.fsum([*(h[i, j] for i in subset for j in subset), *(g[i] for i in subset)])


def assert_best(r, energies, members, num_states):
    assert r.proven
    assert r.gap == 0.0
    assert len(r.subsets) == len(r.energies) == min(num_states, len(energies))
    assert r.subsets == [tuple(np.flatnonzero(z).tolist()) for z in members[: len(r.subsets)]]
    np.testing.assert_allclose(r.energies, energies[: len(r.energies)], rtol=1e-9, atol=1e-9)


@native_only
@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("n", range(1, 19))
def test_equals_brute_force(n, family):
    rng = np.random.default_rng(n)
    h = family(n, rng).astype(float)
    g = rng.integers(-2, 3, n).astype(float) if n % 2 else np.zeros(n)
    for k, energies, members in brute_force(h, g):
        for num_states in (1, 20, 300):
            assert_best(solve_subset(h, k, num_states, linear=g), energies, members, num_states)


@native_only
@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.__name__)
def test_search_equals_brute_force_where_enumeration_would_do(family):
    rng = np.random.default_rng(7)
    n = 14
    h = family(n, rng).astype(float)
    g = rng.integers(-4, 5, n) / 4
    for k, energies, members in brute_force(h, g):
        for num_states in {1, min(50, math.comb(n, k)), math.comb(n, k)}:
            subsets, found, proven, gap, _ = _native.solve_subset(
                h, g, k, num_states, enumerate_up_to=0.0
            )
            r = SubsetSolution([tuple(s) for s in subsets], found, proven, gap)
            assert_best(r, energies, members, num_states)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.__name__)
def test_fallback_equals_brute_force(family, monkeypatch):
    monkeypatch.setattr(subset, "_extension", lambda: None)
    monkeypatch.setattr(subset, "_warn_of_the_fallback", lambda: None)
    rng = np.random.default_rng(8)
    n = 12
    h = family(n, rng).astype(float)
    for k, energies, members in brute_force(h, np.zeros(n)):
        for limit in (200_000, 1):
            monkeypatch.setattr(oracle, "ENUMERATE_UP_TO", limit)
            for num_states in (1, 30, 1000):
                assert_best(solve_subset(h, k, num_states), energies, members, num_states)


@native_only
@pytest.mark.parametrize(("n", "k", "num_states"), [(24, 9, 40), (32, 16, 3), (40, 16, 10)])
@pytest.mark.parametrize("family", [fisher, gaussian], ids=lambda f: f.__name__)
def test_fallback_equals_native(n, k, num_states, family, monkeypatch):
    rng = np.random.default_rng(n)
    h = family(n, rng)
    g = 0.1 * rng.standard_normal(n)
    native = solve_subset(h, k, num_states, linear=g)
    monkeypatch.setattr(subset, "_extension", lambda: None)
    monkeypatch.setattr(subset, "_warn_of_the_fallback", lambda: None)
    fallback = solve_subset(h, k, num_states, linear=g)
    assert native.proven
    assert fallback.proven
    assert native.subsets == fallback.subsets
    assert native.energies.tolist() == fallback.energies.tolist()  # to the last bit


def test_fallback_warns_once(monkeypatch):
    monkeypatch.setattr(subset, "_extension", lambda: None)
    subset._warn_of_the_fallback.cache_clear()
    with pytest.warns(RuntimeWarning, match="without its compiled solver"):
        solve_subset(np.eye(3), 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solve_subset(np.eye(3), 2)


def test_energies_are_correctly_rounded_sums():
    rng = np.random.default_rng(3)
    h = fisher(16, rng)
    h = 0.5 * (h + h.T)
    g = rng.standard_normal(16)
    r = solve_subset(h, 7, 10, linear=g)
    assert r.energies.tolist() == [fsum_energy(h, g, s) for s in r.subsets]
    assert r.energies.dtype == np.float64
    with pytest.raises(ValueError, match="read-only"):
        r.energies[0] = 0.0


def test_ties_come_in_lexicographic_order():
    r = solve_subset(np.zeros((6, 6)), 3, 20)
    assert r.subsets == list(itertools.combinations(range(6), 3))
    assert solve_subset(np.zeros((6, 6)), 3, 10**6).subsets == r.subsets


@native_only
@pytest.mark.parametrize(
    "h", [np.zeros((128, 128)), np.eye(128), np.ones((128, 128))], ids=["zeros", "eye", "ones"]
)
def test_ties_of_interchangeable_variables_are_proven(h):
    r = solve_subset(h, 60, 3, time_limit=60)
    assert r.proven
    assert r.subsets == [(*range(59), 59 + i) for i in range(3)]


@native_only
def test_repeated_and_threaded_solves_agree_to_the_bit():
    h = gaussian(36, np.random.default_rng(5))
    h = 0.5 * (h + h.T)
    g = np.zeros(36)
    results = [_native.solve_subset(h, g, 14, 100, threads=t) for t in (1, 2, 3, 2)]
    assert all(r[2] for r in results)
    for r in results[1:]:
        assert r[0] == results[0][0]
        assert r[1].tobytes() == results[0][1].tobytes()


@native_only
def test_scale_does_not_matter():
    h = fisher(34, np.random.default_rng(6))
    r = solve_subset(h, 12, 5)
    for exponent in (-900, 900):
        scaled = solve_subset(np.ldexp(h, exponent), 12, 5)
        assert scaled.subsets == r.subsets
        assert np.ldexp(scaled.energies, -exponent).tolist() == r.energies.tolist()


@native_only
def test_40_variables_are_proven():
    rng = np.random.default_rng(0)
    a = rng.standard_normal((2048, 8)) / np.arange(1, 9) @ rng.standard_normal((8, 40))
    a = (a + 0.5 * rng.standard_normal(a.shape)) * rng.lognormal(0.0, 0.5, 40)
    r = solve_subset(a.T @ a / 2048, 16, time_limit=60)
    assert r.proven
    assert r.gap == 0.0


def test_time_limit_returns_the_best_found_and_its_gap(monkeypatch):
    h = indefinite(100, np.random.default_rng(2))
    for native in {_native, None}:
        monkeypatch.setattr(subset, "_extension", lambda native=native: native)
        monkeypatch.setattr(subset, "_warn_of_the_fallback", lambda: None)
        start = time.monotonic()
        r = solve_subset(h, 40, 3, time_limit=0.2)
        assert time.monotonic() - start < 5
        assert not r.proven
        assert 0 < r.gap < math.inf
        assert len(set(r.subsets)) == 3
        assert r.energies.tolist() == sorted(r.energies)


@native_only
def test_gap_covers_the_optimum():
    h = gaussian(64, np.random.default_rng(4))
    early = solve_subset(h, 30, time_limit=1e-3)
    best = solve_subset(h, 30, time_limit=60)
    assert best.proven
    assert early.energies[-1] - early.gap <= best.energies[0] <= early.energies[0]


@native_only
def test_keyboard_interrupt_gets_through():
    h = indefinite(120, np.random.default_rng(2))
    before = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # shells start background jobs without it
    try:
        timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            solve_subset(h, 60, time_limit=60)
    finally:
        signal.signal(signal.SIGINT, before)


def test_accepts_other_real_dtypes_and_rounding_asymmetry():
    h = fisher(8, np.random.default_rng(1))
    assert solve_subset(h.astype(np.float32), 3).subsets == solve_subset(h, 3).subsets
    assert solve_subset((10 * h).round().astype(int).tolist(), 3).proven
    skewed = h.copy()
    skewed[0, 1] *= 1 + 1e-9
    assert solve_subset(skewed, 3).subsets == solve_subset(h, 3).subsets


H = np.eye(4)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"H": np.ones((3, 4))}, r"H: expected shape \[N, N\]"),
        ({"H": np.ones(4)}, "H: expected 2 dimensions, got 1"),
        ({"H": np.zeros((0, 0)), "k": 0}, "N in 1..128"),
        ({"H": np.eye(129)}, "N in 1..128"),
        ({"H": H.astype(complex)}, "H: expected a real dtype, got complex128"),
        ({"H": H.astype(bool)}, "H: expected a real dtype, got bool"),
        ({"H": [["a", "b"], ["c", "d"]]}, "H: expected a real dtype"),
        ({"H": [[1.0], [1.0, 2.0]]}, "H: expected an array"),
        ({"H": None}, "H: expected a real dtype"),
        ({"H": np.array([[1.0, 2.0], [3.0, 1.0]]), "k": 1}, "H: expected a symmetric matrix"),
        ({"H": np.diag([1.0, np.nan])}, "H: expected finite"),
        ({"H": np.diag([1.0, np.inf])}, "H: expected finite"),
        ({"H": np.full((4, 4), 1e308)}, "overflow"),
        ({"k": -1}, "k must be an integer from 0 to 4"),
        ({"k": 5}, "k must be an integer from 0 to 4"),
        ({"k": 1.0}, "k must be an integer from 0 to 4, the number of variables, not 1.0"),
        ({"k": True}, "k must be an integer from 0 to 4, the number of variables, not True"),
        ({"num_states": 0}, "num_states must be an integer of at least 1, not 0"),
        ({"num_states": "2"}, "num_states must be an integer of at least 1"),
        ({"linear": np.zeros(3)}, r"linear: expected shape \[4\]"),
        ({"linear": np.zeros((4, 1))}, "linear: expected 1 dimension, got 2"),
        ({"linear": [0.0, np.nan, 0.0, 0.0]}, "linear: expected finite"),
        ({"linear": "abcd"}, "linear: expected a real dtype"),
        ({"time_limit": 0}, "time_limit must be a positive"),
        ({"time_limit": -1.0}, "time_limit must be a positive"),
        ({"time_limit": math.nan}, "time_limit must be a positive"),
        ({"time_limit": "1"}, "time_limit must be a positive number of seconds"),
    ],
)
def test_wrong_arguments(kwargs, message):
    with pytest.raises(InputError, match=message) as caught:
        solve_subset(**{"H": H, "k": 2, **kwargs})
    assert "\n" not in str(caught.value)


def test_trivial_sizes():
    assert solve_subset(np.array([[2.0]]), 1).energies.tolist() == [2.0]
    assert solve_subset(np.eye(128), 0).subsets == [()]
    full = solve_subset(np.eye(128), 128, 5)
    assert full.subsets == [tuple(range(128))]
    assert full.energies.tolist() == [128.0]
