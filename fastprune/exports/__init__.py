"""Checkpoints of pruned models, and recipes that tell other tools to prune alike."""

from .checkpoint import export, export_sequence

__all__ = ["export", "export_sequence"]
