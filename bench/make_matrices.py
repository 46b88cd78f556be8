"""Benchmark matrices for the subset solver.

    python bench/make_matrices.py --out matrices.npz

writes the matrices of `FAMILIES` at the sizes of `--sizes`, one array per key `family-N`. Every
matrix is H = A^T A / n in float64 for some A [n, N], so it is symmetric and positive semidefinite
up to rounding, and is fixed by its family, size and seed. `from_gradients` does the same for
per-sample gradients from elsewhere.
"""

import argparse
from collections.abc import Callable, Sequence

import numpy as np


def from_gradients(gradients: np.ndarray) -> np.ndarray:
    """H = A^T A / n for per-sample gradients A [n, N] of any real dtype."""
    a = np.asarray(gradients, dtype=np.float64)
    return a.T @ a / a.shape[0]


def fisher_like(num_variables: int, num_samples: int = 2048, seed: int = 0) -> np.ndarray:
    """Gradients with strong common directions, noise, and columns of different size.

    The common part has standard deviations 1/r along r = 1..8 random directions, the noise 0.5 per
    entry, and the columns log-normal scales (sigma 0.5): a decaying spectrum over a floor, as block
    gradients show.
    """
    rng = np.random.default_rng(seed)
    rank = 8
    common = rng.standard_normal((num_samples, rank)) / np.arange(1, rank + 1)
    a = common @ rng.standard_normal((rank, num_variables))
    a += 0.5 * rng.standard_normal((num_samples, num_variables))
    return from_gradients(a * rng.lognormal(0.0, 0.5, num_variables))


def wishart(num_variables: int, num_samples: int | None = None, seed: int = 0) -> np.ndarray:
    """No structure at all: independent standard normal entries, by default n = 2 N samples."""
    rng = np.random.default_rng(seed)
    return from_gradients(rng.standard_normal((num_samples or 2 * num_variables, num_variables)))


FAMILIES: dict[str, Callable[[int], np.ndarray]] = {"fisher": fisher_like, "wishart": wishart}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True, help="file to write (.npz)")
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[32, 40, 64], help="numbers of variables"
    )
    args = parser.parse_args(argv)
    np.savez(
        args.out, **{f"{name}-{n}": make(n) for name, make in FAMILIES.items() for n in args.sizes}
    )


if __name__ == "__main__":
    main()
