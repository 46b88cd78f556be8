"""Transformers without the imports that scoring does not need, for this package's own processes."""

from __future__ import annotations


def import_transformers() -> None:
    """Import the classes that open a model, without scikit-learn, SciPy and accelerate.

    transformers uses these for speculative decoding, object detection and models on several
    devices, and works without them. This process does none of these. So transformers is told that
    they are not installed, which saves a fifth of the time, torch's imports included.

    torch's compiler with SymPy takes most of the remaining time. transformers first makes a model
    on the device "meta", whose operators (torch._refs) import the compiler.
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
