"""Calibration data: trees of tokens (`tokens`), and loaders of text, chats and questions.

`loaders` joins the parts. Each form of data has a reader of its own.
"""

from .chats import LOSS_ON
from .loaders import TASKS_READING, TEXT_READING, load_tasks, load_text
from .readers import is_data
from .tokens import Tasks, TokenBatch, common_prefix

__all__ = [
    "LOSS_ON",
    "TASKS_READING",
    "TEXT_READING",
    "Tasks",
    "TokenBatch",
    "common_prefix",
    "is_data",
    "load_tasks",
    "load_text",
]
