"""Masked models in other tools. Each module needs its tool, which an extra installs."""

from __future__ import annotations

from ..validate import require


def require_harness() -> None:
    """Raise InputError unless lm-evaluation-harness and its libraries are installed."""
    require("lm-eval", "lm_eval", "accelerate")
