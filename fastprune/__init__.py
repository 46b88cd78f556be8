"""fastprune scores depth masks of language models exactly, with nothing computed twice.

The public names are loaded when they are first used, so that a bare import stays light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from ._version import __version__ as __version__

_HOMES = {
    "data": ["Tasks", "TokenBatch", "load_tasks", "load_text"],
    "errors": ["InputError"],
    "cli.output": ["progress_bar"],
    "evaluator": ["Evaluator", "Stats"],
    "exports": ["export"],
    "masks": ["from_removed", "load_masks", "to_removed"],
    "models": ["Model", "load_model", "masked"],
    "objectives": [
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
    "plan.progress": ["ProgressEvent"],
    "plan.racing": ["Race"],
    "search": ["SearchResult", "run_search"],
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)

if TYPE_CHECKING:  # the same once more, for editors and type checkers, which run nothing
    from .cli.output import progress_bar as progress_bar
    from .data import Tasks as Tasks
    from .data import TokenBatch as TokenBatch
    from .data import load_tasks as load_tasks
    from .data import load_text as load_text
    from .errors import InputError as InputError
    from .evaluator import Evaluator as Evaluator
    from .evaluator import Stats as Stats
    from .exports import export as export
    from .masks import from_removed as from_removed
    from .masks import load_masks as load_masks
    from .masks import to_removed as to_removed
    from .models import Model as Model
    from .models import load_model as load_model
    from .models import masked as masked
    from .objectives import BytePerplexity as BytePerplexity
    from .objectives import CosineDistance as CosineDistance
    from .objectives import KLDivergence as KLDivergence
    from .objectives import NormalizedMSE as NormalizedMSE
    from .objectives import Perplexity as Perplexity
    from .objectives import TaskAccuracy as TaskAccuracy
    from .objectives import TaskLikelihood as TaskLikelihood
    from .objectives import TaskMargin as TaskMargin
    from .objectives import WordPerplexity as WordPerplexity
    from .plan.progress import ProgressEvent as ProgressEvent
    from .plan.racing import Race as Race
    from .search import SearchResult as SearchResult
    from .search import run_search as run_search
    from .solver import SubsetSolution as SubsetSolution
    from .solver import solve_subset as solve_subset


def __getattr__(name: str) -> object:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'fastprune' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
