"""Transformers without the imports that scoring does not need, for this package's own processes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

ACCELERATE = "is_accelerate_available"


def _missing() -> bool:
    """Stands in for transformers' functions that say whether a package is installed."""
    return False


def import_transformers() -> None:
    """Import the classes that open a model, without scikit-learn, SciPy and accelerate.

    transformers uses these for speculative decoding, object detection and models on several
    devices, and works without them. This process does none of these. So transformers is told that
    they are not installed, which saves a fifth of the time, torch's imports included.
    `accelerate_shown` lets it use accelerate.

    torch's compiler with SymPy takes most of the remaining time. transformers first makes a model
    on the device "meta", whose operators (torch._refs) import the compiler.
    """
    from transformers import utils

    names = ("is_sklearn_available", "is_scipy_available", ACCELERATE)
    asked = {name: getattr(utils, name) for name in names if hasattr(utils, name)}
    for name in asked:
        setattr(utils, name, _missing)
    try:
        from transformers import AutoModelForCausalLM, PreTrainedModel  # noqa: F401  (loaded now)
    finally:
        for name, function in asked.items():
            setattr(utils, name, function)


@contextmanager
def accelerate_shown() -> Iterator[None]:
    """Let transformers see accelerate, without which it dequantizes neither GGUF files nor FP8."""
    from transformers import utils

    modules = [vars(module) for module in list(sys.modules.values()) if module is not None]
    blind = [names for names in modules if names.get(ACCELERATE) is _missing]
    for names in blind:
        names[ACCELERATE] = utils.is_accelerate_available
    try:
        yield
    finally:
        for names in blind:
            names[ACCELERATE] = _missing
