"""Libraries that only some searches need."""

from __future__ import annotations

import importlib
from types import ModuleType

from ..errors import InputError


def import_extra(module: str, algorithm: str) -> ModuleType:
    """A module of scikit-learn or SciPy, imported when a search needs it. Raises InputError when it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise InputError(
            f"{algorithm} needs scikit-learn and SciPy, which are missing: pip install 'fastprune[search]'"
        ) from None
