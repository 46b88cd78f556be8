"""Every example, one after the other, in one process: the table of README.md. all.py [MODEL]
[--text FILE] ..."""

import importlib

from shared import arguments, compare, report

NAMES = ("sleb", "evopress", "block_halves", "shapley", "pruneme", "replace_one_block", "duplicate")

if __name__ == "__main__":
    hf, rows = arguments("all")
    for name in NAMES:
        example = importlib.import_module(name)
        report(name, compare(example.loop, example.fast, hf, rows))
