"""Search algorithms: one file per family, one registry. They know only the evaluator's public methods."""

from . import beam, one_shot  # noqa: F401 (importing a family registers its algorithms)
from .registry import ALGORITHMS, check_algorithm
from .run import Search, SearchResult, run_search

__all__ = ["ALGORITHMS", "Search", "SearchResult", "check_algorithm", "run_search"]
