"""One-shot: every unit is judged alone."""

from __future__ import annotations

import numpy as np

from .draws import as_removed
from .registry import algorithm
from .run import Removed, Search


@algorithm(races=True, studied=True)
def one_shot(search: Search) -> None:
    """Remove the k units whose removal alone hurts least: the k lowest d_i = loss({i}).

    Source: Shortened LLaMA (arXiv 2402.02834).
    Cost: U + 1.
    """
    singles = search.select([(unit,) for unit in search.candidates], max(1, search.num_remove))
    search.score([as_removed(unit for (unit,) in singles[: search.num_remove])])


def lowest(search: Search, values: np.ndarray) -> Removed:
    """The full budget of the candidates whose values [candidates] are lowest; ties go to the lowest index."""
    return as_removed(search.candidates[i] for i in values.argsort(kind="stable")[: search.num_remove])
