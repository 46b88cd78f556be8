"""Search algorithms: one file per family, one registry. They know only the evaluator's public methods."""

# Importing a family registers its algorithms, in the order in which they are listed.
# isort: off
from . import one_shot  # noqa: F401
from . import beam  # noqa: F401
from . import evolution  # noqa: F401
from . import bayesian  # noqa: F401
from . import quadratic  # noqa: F401
from . import fast_block_select  # noqa: F401
from . import similarity  # noqa: F401
from . import enumeration  # noqa: F401

# isort: on
from .registry import ALGORITHMS, check_algorithm, describe_algorithms, find_algorithm, require_sklearn
from .run import Search, SearchResult, run_search

__all__ = [
    "ALGORITHMS",
    "Search",
    "SearchResult",
    "check_algorithm",
    "describe_algorithms",
    "find_algorithm",
    "require_sklearn",
    "run_search",
]
