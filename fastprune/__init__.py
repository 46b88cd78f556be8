"""fastprune scores depth masks of language models exactly, with nothing computed twice.

The public names are loaded when they are first used, so that a bare import stays light.
"""

from __future__ import annotations

import importlib

__version__ = "0.1.0"

_HOMES = {
    "calibration": ["Tasks", "TokenBatch", "load_tasks", "load_text"],
    "errors": ["InputError"],
    "evaluator": ["Evaluator", "Stats"],
    "checkpoint": ["export", "export_sequence"],
    "masks": ["from_removed", "load_masks", "to_removed"],
    "models": ["Model", "load_model", "masked"],
    "objectives": ["KLDivergence", "Perplexity", "TaskAccuracy", "TaskLikelihood", "TaskMargin"],
    "qubo": ["SubsetSolution", "solve_subset"],
    "racing": ["Selection"],
    "search": ["SearchResult", "run_search"],
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)


def __getattr__(name: str):
    if name not in _HOME_OF:
        raise AttributeError(f"module 'fastprune' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
