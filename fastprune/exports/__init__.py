"""Checkpoints of pruned models, and recipes by which other tools prune the same blocks."""

from .checkpoint import can_export, export

__all__ = ["can_export", "export"]
