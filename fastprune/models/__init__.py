"""Checkpoints and transformers models -> units that the engine can run one by one."""

from .fused import FusedModel, make_runner
from .generic import Model, masked
from .open import load_model
from .runner import Runner

__all__ = ["FusedModel", "Model", "Runner", "load_model", "make_runner", "masked"]
