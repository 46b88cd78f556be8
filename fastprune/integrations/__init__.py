"""Masked models in other tools. Each module needs its tool, which an extra of the package brings
along."""

from __future__ import annotations

import importlib.util

from ..errors import InputError


def require(extra: str, *modules: str) -> None:
    """Raise InputError when a module that an extra brings along is not installed. Imports none of
    them."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise InputError(
                f"{module} is needed for this and not installed: pip install 'fastprune[{extra}]'"
            )


def require_harness() -> None:
    """Raise InputError unless lm-evaluation-harness and what its model of transformers needs are
    installed."""
    require("lm-eval", "lm_eval", "accelerate")
