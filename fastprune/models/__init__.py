"""Checkpoints and transformers models -> units that the engine can run one by one."""

from .fused import FusedRunner
from .generic import GenericRunner
from .head import Head
from .library import Library
from .model import Granularity, Model
from .open import load_model, open_runner
from .runner import Runner
from .surgery import masked
from .verify import Needs

__all__ = [
    "FusedRunner",
    "GenericRunner",
    "Granularity",
    "Head",
    "Library",
    "Model",
    "Needs",
    "Runner",
    "load_model",
    "masked",
    "open_runner",
]
