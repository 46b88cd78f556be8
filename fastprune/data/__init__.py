"""Calibration data: trees of tokens (`tokens`), and the files that they are read from
(`loaders`)."""

from .loaders import load_tasks, load_text
from .tokens import Tasks, TokenBatch, common_prefix

__all__ = ["Tasks", "TokenBatch", "common_prefix", "load_tasks", "load_text"]
