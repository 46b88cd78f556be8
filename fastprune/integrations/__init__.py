"""Masked models in other tools. Each module needs its tool, which an extra of the package brings
along."""

from __future__ import annotations

from ..validate import require


def require_harness() -> None:
    """Raise InputError unless lm-evaluation-harness and the libraries of its model of transformers
    are installed."""
    require("lm-eval", "lm_eval", "accelerate")
