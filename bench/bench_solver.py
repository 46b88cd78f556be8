"""solve_subset against brute force, side by side in one run, and how far it gets.

    python -m pytest bench/bench_solver.py --benchmark-enable     timings by pytest-benchmark
    python bench/bench_solver.py [--limit 30] [--quick]           times, sizes and bounds
    python bench/bench_solver.py --ablation                       times without parts of the solver

Both of the last write their results with `--out bench/results/solver.json`.

Two brute forces are timed, both over all C(32, 8) = 1.05e7 subsets: the plain one multiplies blocks
of membership vectors with H; the other splits the variables into halves so that one matrix product
gives the energies of all pairs of half-subsets, which is about the least that NumPy can do per
subset.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import math
import statistics
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from make_matrices import fisher_like, wishart
from record import save

from fastprune import solve_subset
from fastprune.solver import oracle

_native = pytest.importorskip("fastprune._native", reason="the extension is not built")

SEEDS = range(5)


def brute_force(h: np.ndarray, k: int, num_states: int) -> list[tuple[float, tuple[int, ...]]]:
    """Every subset in blocks of membership vectors."""
    size = len(h)
    subsets = itertools.combinations(range(size), k)
    best: list[tuple[float, tuple[int, ...]]] = []
    while True:
        flat = itertools.chain.from_iterable(itertools.islice(subsets, 1 << 17))
        index = np.fromiter(flat, dtype=np.int64).reshape(-1, k)
        if not len(index):
            return best
        z = np.zeros((len(index), size))
        np.put_along_axis(z, index, 1.0, axis=1)
        energy = ((z @ h) * z).sum(axis=1)
        lowest = np.argpartition(energy, min(num_states, len(energy)) - 1)[:num_states]
        best = heapq.nsmallest(
            num_states, [*best, *((energy[r], tuple(index[r].tolist())) for r in lowest)]
        )


def brute_force_halves(
    h: np.ndarray, k: int, num_states: int
) -> list[tuple[float, tuple[int, ...]]]:
    """Every subset as a pair of half-subsets: E = E_low + E_high + 2 z_low' H z_high, a matrix
    product per size."""
    size = len(h)
    half = size // 2
    z = ((np.arange(2**half)[:, None] >> np.arange(half)) & 1).astype(float)
    own = [((z @ h[s, s]) * z).sum(axis=1) for s in (slice(half), slice(half, size))]
    count = z.sum(axis=1)
    best: list[tuple[float, tuple[int, ...]]] = []
    for low_size in range(max(0, k - half), min(k, half) + 1):
        low, high = np.flatnonzero(count == low_size), np.flatnonzero(count == k - low_size)
        for rows in np.array_split(low, max(1, len(low) * len(high) >> 20)):
            energy = 2 * z[rows] @ h[:half, half:] @ z[high].T
            energy += own[0][rows][:, None]
            energy += own[1][high]
            energy = energy.ravel()
            lowest = np.argpartition(energy, min(num_states, len(energy)) - 1)[:num_states]
            for at in lowest:
                a, b = divmod(int(at), len(high))
                members = [*np.flatnonzero(z[rows[a]]), *(half + np.flatnonzero(z[high[b]]))]
                best.append((energy[at], tuple(map(int, members))))
        best = heapq.nsmallest(num_states, best)
    return best


def enumerate_native(h, k, num_states):
    return _native.solve_subset(h, np.zeros(len(h)), k, num_states, enumerate_up_to=math.inf)


def fallback(h, k, num_states):
    return oracle.solve(h, np.zeros(len(h)), k, num_states, None)


METHODS = {
    "solve_subset": solve_subset,
    "its enumeration": enumerate_native,
    "its NumPy fallback": fallback,
    "NumPy brute force, halves": brute_force_halves,
    "NumPy brute force": brute_force,
}


def subsets_of(answer) -> list[tuple[int, ...]]:
    if isinstance(answer, list):
        return [subset for _, subset in answer]
    subsets = answer[0] if isinstance(answer, tuple) else answer.subsets
    return [tuple(s) for s in subsets]


@pytest.mark.parametrize("method", METHODS)
def test_100_states_of_32_choose_8(benchmark, method):
    h = fisher_like(32)
    rounds = 1 if method == "NumPy brute force" else 5
    answer = benchmark.pedantic(METHODS[method], args=(h, 8, 100), rounds=rounds, iterations=1)
    assert subsets_of(answer) == solve_subset(h, 8, 100).subsets


@pytest.mark.parametrize(("size", "k"), [(32, 16), (40, 16), (64, 24)])
@pytest.mark.parametrize("make", [fisher_like, wishart], ids=lambda f: f.__name__)
def test_proven_optimum(benchmark, make, size, k):
    r = benchmark.pedantic(solve_subset, args=(make(size), k), rounds=5, iterations=1)
    assert r.proven


def pairwise_bound(h: np.ndarray, k: int) -> float:
    """Each member pays its diagonal and its k - 1 smallest couplings; the k cheapest members."""
    couplings = np.sort(h + np.diag(np.full(len(h), np.inf)), axis=1)[:, : k - 1].sum(axis=1)
    return float(np.sort(h.diagonal() + couplings)[:k].sum())


def relaxation_bound(h: np.ndarray, k: int, diagonal: np.ndarray) -> float:
    """The bound of the continuous relaxation after moving `diagonal` to the linear part."""
    size = len(h)
    y = np.full((1, size), k / size)
    lower = np.full(1, -np.inf)
    for _ in range(100):
        everything = np.ones((1, size), dtype=bool)
        lower, _ = oracle.descend(
            y, everything, np.array([k]), lower, 2 * (h - np.diag(diagonal)), diagonal, math.inf
        )
    return float(lower[0])


def eigenvalue_shift(h: np.ndarray, _weight: np.ndarray) -> np.ndarray:
    """The largest multiple of the identity that keeps H convex on the directions that sum to
    zero."""
    size = len(h)
    basis = np.linalg.svd(np.ones((1, size)))[2][1:]
    return np.full(size, np.linalg.eigvalsh(basis @ h @ basis.T)[0] - 1e-12)


def seconds(function, *args, rounds=1):
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        answer = function(*args)
        times.append(time.perf_counter() - start)
    return statistics.median(times), answer


MATRICES = (("Fisher-like", fisher_like), ("Wishart", wishart))


def times_of_methods() -> list[dict[str, Any]]:
    """Each way to 100 states of 32 variables, 8 chosen."""
    h = fisher_like(32)
    times, answers = {}, {}
    for name, method in METHODS.items():
        times[name], answers[name] = seconds(
            method, h, 8, 100, rounds=1 if name == "NumPy brute force" else 7
        )
    for answer in answers.values():
        assert subsets_of(answer) == subsets_of(answers["solve_subset"])
    return [
        {"method": name, "seconds": time, "slower": time / times["solve_subset"]}
        for name, time in times.items()
    ]


def times_of_sizes(limit: float, quick: bool) -> Iterator[dict[str, Any]]:
    """The solver on both kinds of matrices, for the best state and for 100."""
    sizes = [(32, 16), (40, 16), (64, 24), (64, 32)] + [(128, 32), (128, 64)] * (not quick)
    for size, k in sizes:
        for name, make in MATRICES:
            for states in (1, 100):
                runs = []
                for seed in SEEDS if size < 128 else range(2):
                    h = make(size, seed=seed)
                    t, r = seconds(
                        lambda h=h, k=k, m=states: solve_subset(h, k, m, time_limit=limit)
                    )
                    runs.append((t, r.proven, r.gap / abs(r.energies[-1])))
                times, proven, gaps = zip(*runs)
                yield {
                    "matrix": name,
                    "size": size,
                    "k": k,
                    "states": states,
                    "proven": sum(proven),
                    "seeds": len(runs),
                    "limit": limit,
                    "median_s": statistics.median(times),
                    "worst_s": max(times),
                    "worst_gap": float(max(gaps)),
                }


def distances_of_bounds(limit: float) -> Iterator[dict[str, Any]]:
    """Each bound's distance below the optimum at the root, and the NumPy search with it."""
    best_diagonal = oracle.best_diagonal
    for size, k in [(32, 16), (40, 16), (64, 24)]:
        for name, make in MATRICES:
            matrices = [make(size, seed=seed) for seed in SEEDS]
            optima = [solve_subset(h, k).energies[0] for h in matrices]
            row = {"matrix": name, "size": size, "k": k, "limit": limit}
            gaps = [1 - pairwise_bound(h, k) / e for h, e in zip(matrices, optima)]
            yield {**row, "bound": "pairwise", "gap": statistics.median(gaps)}
            choices = {
                "convex as it is": lambda h, weight: np.zeros(len(weight)),
                "eigenvalue shift": eigenvalue_shift,
                "best diagonal": best_diagonal,
            }
            for label, choice in choices.items():
                gaps = [
                    1 - relaxation_bound(h, k, choice(h, np.ones(size))) / e
                    for h, e in zip(matrices, optima)
                ]
                with patch.object(oracle, "best_diagonal", choice):
                    runs = [seconds(oracle.solve, h, np.zeros(size), k, 1, limit) for h in matrices]
                yield {
                    **row,
                    "bound": label,
                    "gap": statistics.median(gaps),
                    "seconds": statistics.median(t for t, _ in runs),
                    "all_proven": all(proven for _, (_, _, proven, _) in runs),
                }


def tied(size: int, seed: int) -> np.ndarray:
    """A Fisher-like matrix in which every variable stands four times: exchangeable ones, and so
    ties."""
    return np.kron(fisher_like(size // 4, seed=seed), np.ones((4, 4)))


PARTS = "exact_sums", "symmetry", "subtree_diagonals"
LEFT_OUT_OF = (
    ("Fisher-like", fisher_like, 40, 16, 100, SEEDS),
    ("Fisher-like", fisher_like, 64, 24, 1, SEEDS),
    ("Wishart", wishart, 40, 16, 100, SEEDS),
    ("Wishart", wishart, 64, 24, 1, SEEDS),
    ("Every variable four times", tied, 40, 16, 20, SEEDS),
    ("Fisher-like", fisher_like, 128, 32, 1, [0]),
    ("Fisher-like", fisher_like, 128, 32, 1, [1]),
)


def times_without_parts(limit: float, quick: bool) -> Iterator[dict[str, Any]]:
    """Nodes and processor seconds, on one thread, summed over the seeds, without each part of the
    solver in turn."""
    for name, make, size, k, states, seeds in LEFT_OUT_OF:
        if quick and size == 128:
            continue
        matrices = [make(size, seed=seed) for seed in seeds]
        with_all = None
        for part in (None, *PARTS):
            settings = {} if part is None else {part: False}
            start, answers = time.process_time(), []
            for h in matrices:
                zero = np.zeros(size)
                answers.append(
                    _native.solve_subset(
                        h, zero, k, states, time_limit=limit, threads=1, **settings
                    )
                )
            spent = time.process_time() - start
            found = [(subsets, energies.tolist()) for subsets, energies, *_ in answers]
            with_all = with_all or found
            proven, nodes = (sum(answer[at] for answer in answers) for at in (2, 4))
            yield {
                "matrix": name,
                "size": size,
                "k": k,
                "states": states,
                "seeds": list(seeds),
                "without": part,
                "proven": proven,
                "nodes": nodes,
                "cpu_s": spent,
                "same_bits": found == with_all,
            }


def printed(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows, each printed once it is there."""
    found = []
    for row in rows:
        found.append(row)
        print(json.dumps(row), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--limit", type=float, default=30.0, help="seconds per solve")
    parser.add_argument("--quick", action="store_true", help="leave out 128 variables")
    parser.add_argument("--ablation", action="store_true", help="leave out parts of the solver")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if given.ablation:
        rows = printed(times_without_parts(given.limit, given.quick))
        save(given.out, {"rows": rows}, part="without parts")
        return
    tables = {
        "methods": printed(times_of_methods()),
        "sizes": printed(times_of_sizes(given.limit, given.quick)),
        "bounds": printed(distances_of_bounds(given.limit)),
    }
    save(given.out, tables, part="times")


if __name__ == "__main__":
    main()
