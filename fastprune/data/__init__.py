"""Calibration data: trees of tokens (`tokens`), and the loaders of every form of text, chats and
questions (`loaders`), each by a reader of its own."""

from .loaders import load_tasks, load_text
from .readers import is_data
from .tokens import Tasks, TokenBatch, common_prefix

__all__ = ["Tasks", "TokenBatch", "common_prefix", "is_data", "load_tasks", "load_text"]
