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
    """Import the classes that open a model, without scikit-learn, SciPy and accelerate: a fifth of
    the time, torch's included.

    Transformers wants them for speculative decoding, object detection and models spread over
    devices, and works without them if they are not installed. This process does none of these, so
    Transformers is told that they are missing. (`accelerate_shown` lets it use accelerate.)

    Most of the remaining time is torch's compiler with SymPy: transformers makes a model on the
    device "meta" first, whose operators (torch._refs) import it when the first of them is called.
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
