"""Transformers without the imports that scoring does not need, for this package's own processes."""

from __future__ import annotations


def import_transformers() -> None:
    """Import the classes that open a model, without scikit-learn, SciPy and accelerate: a fifth of
    the time, torch's included.

    Transformers wants them for speculative decoding, object detection and models spread over
    devices, and works without them if they are not installed. This process does none of these, so
    Transformers is told that they are missing.

    Most of the remaining time is torch's compiler with SymPy: transformers makes a model on the
    device "meta" first, whose operators (torch._refs) import it when the first of them is called.
    """
    from transformers import utils

    names = ("is_sklearn_available", "is_scipy_available", "is_accelerate_available")
    asked = {name: getattr(utils, name) for name in names if hasattr(utils, name)}
    for name in asked:
        setattr(utils, name, lambda: False)
    try:
        from transformers import AutoModelForCausalLM, PreTrainedModel  # noqa: F401  (loaded now)
    finally:
        for name, function in asked.items():
            setattr(utils, name, function)
