"""Checkpoints and transformers models -> units that the engine can run one by one."""

from .generic import Model
from .load import load_model

__all__ = ["Model", "load_model"]
