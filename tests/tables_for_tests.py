"""The package that writes the tables of pages, which is no part of fastprune."""

import importlib
import sys
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@cache
def package_of_tables():
    """tools.tables with all of its modules, as `python -m tools.tables` imports it."""
    sys.path.insert(0, str(ROOT))
    try:
        importlib.import_module("tools.tables.__main__")
        return sys.modules["tools.tables"]
    finally:
        sys.path.remove(str(ROOT))
