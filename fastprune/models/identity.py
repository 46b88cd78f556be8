"""What of a model decides its results: a state that is cheap to compare, and a hash of all of
it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn

from .fingerprint import mark

if TYPE_CHECKING:  # a model has one of these
    from .generic import Model

SAMPLED = 64  # values of each tensor that are looked at for a change
# attributes that no result depends on
NOT_DECISIVE = ("training", "name_or_path", "max_seq_len_cached", "_is_hf_initialized")


class Identity:
    """See `Model.state` and `Model.weights_hash`."""

    def __init__(self, model: Model):
        self._model = model
        self._hashed: tuple[tuple, str] | None = None

    def state(self) -> tuple:
        model = self._model
        known = list(self._resident_tensors())
        tensors = tuple((name, tensor.data_ptr(), tensor._version) for name, tensor in known)
        # what is written through `.data` counts no version: a few values of each tensor show it,
        # where many changed
        samples = [
            flat[:: max(1, len(flat) // SAMPLED)].double()
            for flat in (tensor.detach().reshape(-1) for _, tensor in known)
        ]
        values = torch.cat(samples).cpu().numpy().tobytes() if samples else b""
        files = None if model.weights is None else str(model.weights.identity)
        attention = getattr(model.config, "_attn_implementation", None)
        modules = tuple(plain_attributes(module) for module in model.hf.modules())
        return tensors, values, modules, files, self._config_text(), attention

    def hash(self) -> str:
        state = self.state()
        if self._hashed is None or self._hashed[0] != state:
            self._hashed = (state, self._hash())
        return self._hashed[1]

    def _hash(self) -> str:
        weights = self._model.weights
        if weights is None:
            return self._digest(self._tensors())
        # with the same files and the same of all else, the whole hash is the same, and need not be
        # read for again
        files = json.dumps([str(self._model.dtype), weights.identity])
        key = hashlib.sha256(
            f"{self._digest(self._resident_tensors())}{files}".encode()
        ).hexdigest()
        return weights.remembered(key, lambda: self._digest(self._tensors()))

    def _digest(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
        digest = hashlib.sha256(self._config_text().encode())
        for name, module in self._model.hf.named_modules():
            digest.update(f"{name}{plain_attributes(module)}".encode())
        for name, tensor in tensors:
            digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(
                tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
            )
        return digest.hexdigest()

    def _tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor by name; one that stays in a file has storage while it is the current
        one."""
        hf, weights = self._model.hf, self._model.weights
        blocks, current = self._model.visited_blocks(), None
        for name, tensor in list(hf.named_parameters(remove_duplicate=False)):
            block = None if weights is None else weights.block_of(name)
            if block is not None:
                while current != block:  # both ascend
                    current = next(blocks)
                tensor = hf.get_parameter(name)
            yield name, tensor
        yield from hf.named_buffers(remove_duplicate=False)

    def _resident_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        hf, weights = self._model.hf, self._model.weights
        for name, tensor in hf.named_parameters(remove_duplicate=False):
            if weights is None or weights.block_of(name) is None:
                yield name, tensor
        yield from hf.named_buffers(remove_duplicate=False)

    def _config_text(self) -> str:
        config = self._model.config.to_diff_dict()
        for name in ("_name_or_path", "transformers_version"):  # where it lies and who wrote it
            config.pop(name, None)
        return json.dumps(config, sort_keys=True, default=str)


def plain_attributes(module: nn.Module) -> tuple:
    """A module's type, its numbers, texts and flags (whether it trains is none), its hooks, and its
    own `forward`.

    Of a hook or a forward only the object is known: none of another process is taken for it.
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
