"""Checkpoints of pruned models, and recipes that tell other tools to prune alike."""

from .checkpoint import can_export, export

__all__ = ["can_export", "export"]
