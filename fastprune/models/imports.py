"""Transformers without what it imports and scoring does not need, for processes that are this package's own."""

from __future__ import annotations


def import_transformers() -> None:
    """Import what opens a model, without scikit-learn and SciPy, which make up a third of the time that takes.

    Transformers wants them for speculative decoding and object detection, and goes without where they are not
    installed. For this process, which does neither, it is told that they are not.
    """
    from transformers import utils

    asked = {
        name: getattr(utils, name) for name in ("is_sklearn_available", "is_scipy_available") if hasattr(utils, name)
    }
    for name in asked:
        setattr(utils, name, lambda: False)
    try:
        from transformers import AutoModelForCausalLM, PreTrainedModel  # noqa: F401  (loaded now)
    finally:
        for name, function in asked.items():
            setattr(utils, name, function)
