"""The choice of k of N blocks as a constrained binary optimisation, solved to proven optimality.

To second order, removing the blocks S changes a model's loss by E(z) = z^T H z + g^T z (CBO, arXiv
2602.00161). z marks the members of S, H is the Fisher matrix A^T A / n of per-sample gradients
A [n, N], and g is the mean gradient. `solve_subset` returns the subsets of lowest energy in order.
The compiled solver (csrc/solver) does the work; without it the same search runs in NumPy
(`oracle`), slower.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from fastprune.errors import InputError, shown
from fastprune.validate import check_integer, is_number

from . import oracle

MAX_VARIABLES = 128


@dataclass(frozen=True)
class SubsetSolution:
    """The subsets of lowest energy.

    Attributes:
        subsets: Sorted tuples of k indices, by energy; equal energies in lexicographic order.
        energies: float64[len(subsets)], in the units of H, each correctly rounded, read-only.
        proven: Whether it is proven that no other subset ranks before or between these.
        gap: No other subset has an energy below energies[-1] - gap; 0 if proven.

    Examples:
        >>> import fastprune as fp
        >>> solution = fp.solve_subset([[1.0, 0.5], [0.5, 2.0]], k=1)
        >>> solution.subsets, solution.gap
        ([(0,)], 0.0)
    """

    subsets: list[tuple[int, ...]]
    energies: np.ndarray
    proven: bool
    gap: float


def solve_subset(
    H: ArrayLike,
    k: int,
    num_states: int = 1,
    linear: ArrayLike | None = None,
    time_limit: float | None = None,
) -> SubsetSolution:
    """Find the subsets of k indices with the lowest energy.

    The energy of a subset S is the sum over i, j in S of H_ij, plus the sum over i in S of
    linear_i. The problem is that of CBO (arXiv 2602.00161); docs/solver.md describes the method.

    Args:
        H: Real [N, N], N from 1 to 128, symmetric up to rounding; the mean with its transpose is
            used. Gradients give a positive semidefinite matrix. An indefinite one is solved with
            weaker bounds.
        k: The size of the subsets, 0 to N.
        num_states: The number of subsets, at least 1. All C(N, k) are returned if they are fewer.
        linear: Real [N], in the units of H; None for zero.
        time_limit: Seconds of wall time after which the best subsets so far are returned, with
            their proven gap. None searches until the result is proven.

    Returns:
        The subsets. A proven result does not depend on timing or on the number of threads.

    Raises:
        InputError: An argument has the wrong type or shape, or is outside its range. H or linear
            has no real dtype, or holds NaN or infinity. H is not symmetric.
        KeyboardInterrupt: The user interrupted; it is passed on within milliseconds.

    Examples:
        >>> import fastprune as fp
        >>> energy = [[1.0, 2.0, 0.0], [2.0, 1.0, 0.0], [0.0, 0.0, 3.0]]
        >>> solution = fp.solve_subset(energy, k=2, num_states=2)
        >>> solution.subsets, solution.energies.tolist(), solution.proven
        ([(0, 2), (1, 2)], [4.0, 4.0], True)
    """
    h = _real_array("H", H, 2)
    size = h.shape[0]
    if h.shape[1] != size or not 1 <= size <= MAX_VARIABLES:
        raise InputError(
            f"H: expected shape [N, N] with N in 1..{MAX_VARIABLES}, got {list(h.shape)}"
        )
    g = np.zeros(size) if linear is None else _real_array("linear", linear, 1)
    if g.shape != (size,):
        raise InputError(f"linear: expected shape [{size}] to match H, got {list(g.shape)}")
    with np.errstate(over="ignore"):
        if not np.isfinite(2 * np.abs(h).sum() + np.abs(g).sum()):
            raise InputError("H, linear: expected entries whose sum does not overflow float64")
    # a Gram matrix computed in float32 and stored wider is symmetric to float32 rounding only
    is_half = getattr(H, "dtype", None) == np.float16
    epsilon = float(np.finfo(np.float16 if is_half else np.float32).eps)
    asymmetry = np.abs(h - h.T).max()
    if asymmetry > 64 * epsilon * np.abs(h).max():
        raise InputError(f"H: expected a symmetric matrix, got entries {asymmetry:.3g} apart")
    h = 0.5 * (h + h.T)

    k = check_integer("k", k, 0, size, of="the number of variables")
    num_states = min(check_integer("num_states", num_states, least=1), math.comb(size, k))
    if time_limit is not None and not (is_number(time_limit) and time_limit > 0):
        raise InputError(
            f"time_limit must be a positive number of seconds, or None, not {shown(time_limit)}",
            argument="time_limit",
        )

    native = _extension()
    if native is None:
        _warn_of_the_fallback()
        return SubsetSolution(*oracle.solve(h, g, k, num_states, time_limit))
    limit = 0.0 if time_limit is None else float(time_limit)
    subsets, energies, proven, gap, _ = native.solve_subset(h, g, k, num_states, limit)
    return SubsetSolution([tuple(s) for s in subsets], energies, proven, gap)


def _extension() -> Any:
    """The compiled solver, or None.

    It is imported late: it loads OpenMP, which reads its environment variables at that moment.
    """
    try:
        from fastprune import _native
    except ImportError:
        return None
    return _native


@cache  # once in a process
def _warn_of_the_fallback() -> None:
    warnings.warn(
        "fastprune was installed without its compiled solver; solve_subset falls back to NumPy, "
        "which is slower",
        RuntimeWarning,
        stacklevel=3,
    )


def _real_array(name: str, value: ArrayLike, ndim: int) -> np.ndarray:
    try:
        array = np.asarray(value)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{name}: expected an array of real numbers, got {type(value).__name__}"
        ) from error
    if array.dtype.kind not in "fiu":
        raise InputError(f"{name}: expected a real dtype, got {array.dtype}")
    if array.ndim != ndim:
        raise InputError(f"{name}: expected {ndim} dimension{'s' * (ndim > 1)}, got {array.ndim}")
    array = np.ascontiguousarray(array, dtype=np.float64)
    if not np.isfinite(array).all():
        raise InputError(f"{name}: expected finite entries, got NaN or infinity")
    return array
