"""Search algorithms: a file for each family, and one registry.

They use the evaluator's public methods only.
"""

# importing a family registers its algorithms, in the order in which lists show them
# isort: off
from . import one_shot, beam, evolution, bayesian, quadratic, fast_block_select, shapley, sliding  # noqa: F401 (as above)
from . import similarity, enumeration, repeat  # noqa: F401 (as above)

# isort: on
from .protect import PRESETS, check_budget, protected_units, units_to_remove
from .registry import (
    ALGORITHMS,
    Allowed,
    Count,
    CountOrAuto,
    Share,
    algorithm,
    check_algorithm,
    check_racing,
    describe_algorithms,
    find_algorithm,
    known_algorithms,
    load_plugins,
    require_sklearn,
)
from .run import SearchResult, run_search
from .task import Scorer, Search, SequenceSearch

__all__ = [
    "ALGORITHMS",
    "PRESETS",
    "Allowed",
    "Count",
    "CountOrAuto",
    "Scorer",
    "Search",
    "SearchResult",
    "SequenceSearch",
    "Share",
    "algorithm",
    "check_algorithm",
    "check_budget",
    "check_racing",
    "describe_algorithms",
    "find_algorithm",
    "known_algorithms",
    "load_plugins",
    "protected_units",
    "require_sklearn",
    "run_search",
    "units_to_remove",
]
