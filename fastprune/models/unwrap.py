"""The transformers model inside of a wrapper that computes the same."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..errors import InputError
from .swap import with_replaced

# adapters of peft in the form of layers inside the model, for any tokens
INNER_ADAPTERS = ("LORA", "IA3", "LOHA", "LOKR", "OFT", "BOFT", "VERA", "HRA", "LN_TUNING")


def unwrap(module: nn.Module) -> nn.Module:
    """The model that torch.compile, DataParallel or peft has wrapped; any other is returned as it
    is.

    Raises InputError for an adapter that acts outside of the model's layers, and for weights other
    than plain tensors, such as those that torchao has quantized.
    """
    while True:
        kind = type(module).__name__
        inner = None
        if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = module.module
        elif kind == "OptimizedModule":
            inner = module._orig_mod
        elif hasattr(module, "peft_config") and hasattr(module, "get_base_model"):
            inner = _without_peft(module)
        if not isinstance(inner, nn.Module):
            break
        module = inner
    if isinstance(module, nn.Module):
        _refuse_other_tensors(module)
    return module


def without_adapters(hf: nn.Module) -> nn.Module:
    """The model with adapters of peft merged into copies of the weights that they change; the model
    itself if it has none."""
    merged = hf
    for name, module in hf.named_modules():
        if callable(getattr(module, "get_base_layer", None)) and hasattr(module, "merged_adapters"):
            layer: Any = copy.deepcopy(module)
            layer.merge(safe_merge=True)
            merged = with_replaced(merged, name.split("."), layer.get_base_layer())
    if merged is not hf:
        # set by transformers' own add_adapter, by which save_pretrained writes adapters alone
        vars(merged)["_hf_peft_config_loaded"] = False
    return merged


def _without_peft(module: Any) -> nn.Module:
    for config in module.peft_config.values():
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        if kind not in INNER_ADAPTERS or getattr(config, "alora_invocation_tokens", None):
            raise InputError(
                f"model is a {type(module).__name__} whose adapter ({kind}) acts on its inputs; "
                f"merge it into the weights, or give the base model"
            )
    return module.get_base_model()


def _refuse_other_tensors(module: nn.Module) -> None:
    for name, weight in module.named_parameters():
        data: torch.Tensor = weight.data
        if is_traceable_wrapper_subclass(data):
            raise InputError(
                f"model: its weight {name} is a {type(data).__name__}; only plain tensors are "
                f"scored, so dequantize or gather the weights first"
            )
