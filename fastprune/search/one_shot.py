"""One-shot: every unit is judged alone."""

from __future__ import annotations

from .registry import algorithm
from .run import Search


@algorithm
def one_shot(search: Search) -> None:
    """Remove the k units whose removal alone hurts least: the k lowest d_i = loss({i}).

    Source: Shortened LLaMA (arXiv 2402.02834).
    Cost: U + 1.
    """
    singles = search.score([(unit,) for unit in search.candidates])
    order = singles.argsort(kind="stable")[: search.num_remove]
    search.score([tuple(search.candidates[i] for i in order)])
