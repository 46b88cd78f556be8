"""fastprune scores depth masks of language models exactly, with nothing computed twice.

The public names are loaded when they are first used, so that a bare import stays light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"  # which the build reads, too

_HOMES = {
    "costs": ["Budget"],
    "data": ["Tasks", "TokenBatch", "load_tasks", "load_text"],
    "errors": ["InputError"],
    "cli.output": ["progress_bar"],
    "evaluator": ["Evaluator"],
    "exports": ["export"],
    "masks": ["from_removed", "load_masks", "load_sequences", "to_removed"],
    "models": ["Library", "Model", "load_model", "masked"],
    "objectives": [
        "Agreement",
        "BytePerplexity",
        "CosineDistance",
        "KLDivergence",
        "NormalizedMSE",
        "Perplexity",
        "TaskAccuracy",
        "TaskLikelihood",
        "TaskMargin",
        "WordPerplexity",
    ],
    "solver": ["SubsetSolution", "solve_subset"],
    "plan.cost": ["Cost", "Stats"],
    "plan.progress": ["ProgressEvent"],
    "plan.racing": ["Race"],
    "search": ["SearchResult", "run_search"],
    "study.groups": ["Winners", "best_by_group"],
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)

if TYPE_CHECKING:  # the same once more, for editors and type checkers, which run nothing
    from .cli.output import progress_bar as progress_bar
    from .costs import Budget as Budget
    from .data import Tasks as Tasks
    from .data import TokenBatch as TokenBatch
    from .data import load_tasks as load_tasks
    from .data import load_text as load_text
    from .errors import InputError as InputError
    from .evaluator import Evaluator as Evaluator
    from .exports import export as export
    from .masks import from_removed as from_removed
    from .masks import load_masks as load_masks
    from .masks import load_sequences as load_sequences
    from .masks import to_removed as to_removed
    from .models import Library as Library
    from .models import Model as Model
    from .models import load_model as load_model
    from .models import masked as masked
    from .objectives import Agreement as Agreement
    from .objectives import BytePerplexity as BytePerplexity
    from .objectives import CosineDistance as CosineDistance
    from .objectives import KLDivergence as KLDivergence
    from .objectives import NormalizedMSE as NormalizedMSE
    from .objectives import Perplexity as Perplexity
    from .objectives import TaskAccuracy as TaskAccuracy
    from .objectives import TaskLikelihood as TaskLikelihood
    from .objectives import TaskMargin as TaskMargin
    from .objectives import WordPerplexity as WordPerplexity
    from .plan.cost import Cost as Cost
    from .plan.cost import Stats as Stats
    from .plan.progress import ProgressEvent as ProgressEvent
    from .plan.racing import Race as Race
    from .search import SearchResult as SearchResult
    from .search import run_search as run_search
    from .solver import SubsetSolution as SubsetSolution
    from .solver import solve_subset as solve_subset
    from .study.groups import Winners as Winners
    from .study.groups import best_by_group as best_by_group


def __getattr__(name: str) -> object:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'fastprune' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
