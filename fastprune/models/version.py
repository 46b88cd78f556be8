"""Whether a model has changed, and what it contains: a version that is cheap to compare, and a
digest of everything."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from .fingerprint import mark
from .offload.weights import ResidentWeights, Weights

SAMPLED = 64  # values of each tensor that are compared for a change
# attributes that no result depends on
NOT_DECISIVE = ("training", "name_or_path", "max_seq_len_cached", "_is_hf_initialized")


def version_of(hf: nn.Module, config: Any, weights: Weights | ResidentWeights) -> tuple:
    """A value that changes whenever the model's outputs could change; see `Model.version`."""
    resident = list(_resident_tensors(hf, weights))
    tensors = tuple((name, tensor.data_ptr(), tensor._version) for name, tensor in resident)
    # a write through `.data` counts no version: a few values of each tensor show it, where it
    # changed many
    samples = [
        flat[:: max(1, len(flat) // SAMPLED)].double()
        for flat in (tensor.detach().reshape(-1) for _, tensor in resident)
    ]
    values = torch.cat(samples).cpu().numpy().tobytes() if samples else b""
    attention = getattr(config, "_attn_implementation", None)
    modules = tuple(plain_attributes(module) for module in hf.modules())
    return tensors, values, modules, str(weights.identity), _config_text(config), attention


def digest_of(
    hf: nn.Module, config: Any, dtype: torch.dtype, weights: Weights | ResidentWeights
) -> str:
    """SHA-256 of everything a model contains; see `Model.digest`."""

    def key() -> str:
        # equal files and equal resident tensors have an equal digest, which need not be read again
        files = json.dumps([str(dtype), weights.identity])
        resident = _digest(hf, config, _resident_tensors(hf, weights))
        return hashlib.sha256(f"{resident}{files}".encode()).hexdigest()

    return weights.remembered(key, lambda: _digest(hf, config, _all_tensors(hf, weights)))


def _digest(hf: nn.Module, config: Any, tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    digest = hashlib.sha256(_config_text(config).encode())
    for name, module in hf.named_modules():
        digest.update(f"{name}{plain_attributes(module)}".encode())
    for name, tensor in tensors:
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _all_tensors(
    hf: nn.Module, weights: Weights | ResidentWeights
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor by name; a streamed one has storage while it is the current one."""
    blocks = (block for band in weights.visit(weights.bands) for block in band)
    current = None
    for name, tensor in list(hf.named_parameters(remove_duplicate=False)):
        block = weights.block_of(name)
        if block is not None:
            while current != block:  # both ascend
                current = next(blocks)
            tensor = hf.get_parameter(name)
        yield name, tensor
    yield from hf.named_buffers(remove_duplicate=False)


def _resident_tensors(
    hf: nn.Module, weights: Weights | ResidentWeights
) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in hf.named_parameters(remove_duplicate=False):
        if weights.block_of(name) is None:
            yield name, tensor
    yield from hf.named_buffers(remove_duplicate=False)


def _config_text(config: Any) -> str:
    values = config.to_diff_dict()
    for name in ("_name_or_path", "transformers_version"):  # its folder, and the writing release
        values.pop(name, None)
    return json.dumps(values, sort_keys=True, default=str)


def plain_attributes(module: nn.Module) -> tuple:
    """A module's type, its numbers, texts and flags (except whether it trains), its hooks, and its
    own `forward`.

    Hooks and forwards are compared as objects: one of another process never equals one of this.
    """
    attributes = vars(module).items()
    plain = [
        (n, v)
        for n, v in attributes
        if n not in NOT_DECISIVE and isinstance(v, (bool, int, float, str))
    ]
    hooks = [
        mark(hook)
        for hooks in (module._forward_pre_hooks, module._forward_hooks)
        for hook in hooks.values()
    ]
    own = [mark(vars(module)["forward"])] if "forward" in vars(module) else []
    return (type(module).__qualname__, *sorted(plain), *hooks, *own)
