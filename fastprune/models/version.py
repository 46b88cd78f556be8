"""The version of a model, which changes with the model, and the digest of its content.

A version is a number, cheap to read before every call. A digest is a hash of the whole
content, for the store and for workers.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import operator
import types
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from .alignment import placement
from .code import (
    HOOK_FLAGS,
    HOOKS,
    IMPLEMENTATIONS,
    foreign_code,
    global_hooks,
    hooks_of,
    namespaces,
    own_forward,
    sources,
)
from .fingerprint import mark, number_of
from .offload.weights import Weights

SAMPLES = 32  # values of each tensor compared for a change
LEAST = 16  # the same, of a tensor of any shape
# attributes that decide no result
NOT_DECISIVE = frozenset(
    {
        "training",
        "name_or_path",
        "max_seq_len_cached",
        "_is_hf_initialized",
        "recurrent_states",  # this and the next: states of RecurrentGemma's last row
        "conv1d_state",
    }
)
_OF_TORCH = frozenset(vars(nn.Module()))  # attributes that every module has, such as its hooks
DEPTH = 2  # objects inside of objects whose attributes are compared
_PLAIN = (bool, int, float, str, complex, type(None), torch.dtype, torch.device)
_CONTAINERS = (list, dict, set)
Ids = tuple[int, ...]  # of the containers around a value, one of which may be the value itself


class Watch:
    """Detects changes of a model.

    It compares the model's dictionaries with shallow copies. Tensors are compared by address, count
    of writes and some values, and code by the functions in its namespaces (`code.namespaces`). Only
    a model that differs is described in full. A known description keeps its number, so an undone
    change restores the old version.

    torch does not count an edit through `.data`. Such an edit is detected if it changes one of the
    `SAMPLES` compared values of each tensor.

    Args:
        hf: The transformers model.
        weights: Its blocks' weights, which may be streamed.
    """

    def __init__(self, hf: nn.Module, weights: Weights):
        self._hf, self._weights = hf, weights
        self._numbers: dict[bytes, int] = {}  # versions by the hash of their description
        self._read_again()

    def read(self, wait: bool = True) -> int:
        """Read the version of the model.

        Args:
            wait: Whether values on a GPU are compared now. Otherwise they are copied behind the
                GPU's current work, and `settle` compares them.

        Raises:
            InputError: A file of streamed weights has changed.
        """
        samples = self._last.samples
        self._unsettled = samples.deferred and not wait
        if self._last.differs(self._weights):
            self._read_again()
        elif self._unsettled:
            samples.fetch()
        elif samples.values() != self._last.values:
            self._read_again()
        return self._number

    def settle(self) -> int:
        """Compare the GPU's values of the last `read`, and return the version of that time.

        The GPU copied them before all work that was started after `read`.
        """
        if self._unsettled and self._last.samples.fetched() != self._last.values:
            self._read_again()
        self._unsettled = False
        return self._number

    def modules(self) -> list[nn.Module]:
        """The modules that the model has now."""
        last = self._last
        return last.modules if last.has_same_children() else list(self._hf.modules())

    def _read_again(self) -> None:
        self._unsettled = False  # whether values on a GPU were copied and not compared
        self._last: Snapshot = Snapshot(self._hf, self._weights)
        key = hashlib.sha256(repr(self._last.description).encode()).digest()
        self._number: int = self._numbers.setdefault(key, len(self._numbers))


class Snapshot:
    """All compared values of a model, as they are now.

    Attributes:
        modules: Its modules.
        samples: The `Samples` of its tensors.
        values: The values of these samples.
    """

    def __init__(self, hf: nn.Module, weights: Weights):
        self._named = list(hf.named_modules())
        self.modules = [module for _, module in self._named]
        self._types = list(map(type, self.modules))
        self._attributes = [vars(module) for module in self.modules]
        self._copies = [dict(attributes) for attributes in self._attributes]
        self._children = [dict(module._modules) for module in self.modules]
        self._configs = _configs_of(self.modules)
        dictionaries = [
            *_dictionaries_of(self._attributes),
            *(module._modules for module in self.modules),
            *global_hooks(),
            *map(vars, self._configs),
        ]
        self._dictionaries = [values for values in dictionaries if values]
        self._contents = list(map(_copied, self._dictionaries))
        self._spaces = [space.functions for space in namespaces(self.modules)]
        self._functions = [dict(functions) for functions in self._spaces]
        # tensors, by the dictionary that holds them: a streamed one comes and goes
        holders = [
            (f"{name}.", held)
            for name, module in self._named
            for held in (module._parameters, module._buffers)
        ]
        self._holders: list[dict] = [held for _, held in holders if held]
        self._empty = [values for values in dictionaries if not values]  # most of them
        self._empty += [held for _, held in holders if not held]
        self._lengths = list(map(len, self._holders))
        self._places = [
            (held, name)
            for prefix, held in holders
            for name in held
            if weights.block_of(f"{prefix}{name}".lstrip(".")) is None
        ]
        self._entries = [held[name] for held, name in self._places]
        self._tensors = [tensor for tensor in self._entries if tensor is not None]
        self._tensors += [t for held in self._attributes for _, t in attribute_tensors(held)]
        self._states, self._files = _states(self._tensors), str(weights.identity)
        self.samples = Samples(self._tensors)
        self.values = self.samples.values()

    def differs(self, weights: Weights) -> bool:
        """Whether the model differs from this by anything but sampled values."""
        try:
            if (
                not self._has_same_attributes()
                or any(self._empty)
                or self._dictionaries != self._contents
                or any(map(operator.ne, self._spaces, self._functions))
                or list(map(type, self.modules)) != self._types
            ):
                return True
        except Exception:  # values that cannot be compared, such as tensors
            return True
        entries = [held.get(name) for held, name in self._places]
        return (
            not all(map(operator.is_, entries, self._entries))
            or list(map(len, self._holders)) != self._lengths
            or _states(self._tensors) != self._states
            or str(weights.identity) != self._files
        )

    def has_same_children(self) -> bool:
        """Whether every module still has its submodules, under the same names."""
        return [attributes["_modules"] for attributes in self._attributes] == self._children

    def _has_same_attributes(self) -> bool:
        """Whether every module still has its attributes, except for its training flag."""
        if self._attributes == self._copies:
            return True
        for attributes, copied in zip(self._attributes, self._copies):
            copied["training"] = attributes["training"]
        return self._attributes == self._copies

    @property
    def description(self) -> tuple:
        """A description, equal for equal models: plain values, and numbers for objects."""
        return (
            [(name, _description(module)) for name, module in self._named],
            [None if t is None else (str(t.dtype), tuple(t.shape)) for t in self._entries],
            self._states,
            self.values,
            self._files,
            [(_config_text(config), _implementations(config)) for config in self._configs],
            [[number_of(hook) for hook in hooks.values()] for hooks in global_hooks()],
            list(map(_described, self._functions)),
        )


class Samples:
    """Some values of each tensor, spread over its rows and columns, as bytes.

    Attributes:
        deferred: Whether some are on a GPU, so that the host would wait for them.
    """

    def __init__(self, tensors: Iterable[torch.Tensor]):
        host: dict[torch.dtype, list[np.ndarray]] = {}
        device: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
        for tensor in tensors:
            if tensor.is_meta or not tensor.numel() or type(tensor) not in _DENSE:
                continue
            for view in _sampled(tensor):
                if view.device.type == "cpu":
                    host.setdefault(view.dtype, []).append(view.numpy())
                else:
                    device.setdefault((view.device, view.dtype), []).append(view)
        self.deferred = bool(device)
        self._host = [
            (views, np.empty(sum(map(len, views)), views[0].dtype)) for views in host.values()
        ]
        self._device = [
            (views, _pinned(sum(map(len, views)), views[0])) for views in device.values()
        ]

    def values(self) -> bytes:
        """The values now."""
        self.fetch()
        return self.fetched()

    def fetch(self) -> None:
        """Begin to copy values from a GPU, without waiting."""
        for views, copied in self._device:
            copied.copy_(torch.cat(views), non_blocking=True)

    def fetched(self) -> bytes:
        """The GPU's values of the last `fetch`, and the host's values of now."""
        for device in {views[0].device for views, _ in self._device}:
            torch.cuda.current_stream(device).synchronize()
        for views, copied in self._host:
            np.concatenate(views, out=copied)
        copies = [*(copied for _, copied in self._host), *(c.numpy() for _, c in self._device)]
        return b"".join([copied.tobytes() for copied in copies])


_DENSE = (torch.Tensor, nn.Parameter, nn.Buffer)
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by size in bytes


def _pinned(count: int, like: torch.Tensor) -> torch.Tensor:
    return torch.empty(count, dtype=like.dtype, pin_memory=like.device.type == "cuda")


def _sampled(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Views of some values of a tensor, at least `LEAST` if it has that many, as integers."""
    tensor = tensor.detach()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    tensor = tensor.view(_INTEGERS[tensor.itemsize])
    count, columns = tensor.numel(), tensor.shape[-1] if tensor.dim() else 1
    if not tensor.is_contiguous():
        if not torch.ops.aten.is_non_overlapping_and_dense(tensor):
            return _diagonals(tensor)
        tensor = tensor.as_strided((count,), (1,))
    step = max(1, count // SAMPLES)
    if step >= columns > 1:  # sample each row at another column
        step += int(0.618 * columns) - step % columns
    return [tensor.view(-1)[::step]]


def _diagonals(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Views of the diagonals of a tensor with gaps in memory, a part of a larger one.

    A diagonal of [40, 100] has the places (0, 0), (1, 3), (2, 6), ... (31, 93). Each index of a
    dimension below `LEAST` has a diagonal of its own.
    """
    for dim, size in enumerate(tensor.shape):
        if size < LEAST and tensor.dim() > 1:
            return [view for part in tensor.unbind(dim) for view in _diagonals(part)]
    count = min(SAMPLES, *tensor.shape)
    stride = sum(size // count * step for size, step in zip(tensor.shape, tensor.stride()))
    return [tensor.as_strided((count,), (stride,))]


def _states(tensors: Sequence[torch.Tensor]) -> list:
    """The address of each tensor, and its number of writes."""
    addresses = [tensor.data_ptr() for tensor in tensors]
    try:
        return [addresses, [tensor._version for tensor in tensors]]
    except RuntimeError:  # tensors made in inference mode count no writes
        writes = [-1 if tensor.is_inference() else tensor._version for tensor in tensors]
        return [addresses, writes]


# -- descriptions ----------------------------------------------------------------------------------


def _description(module: nn.Module) -> tuple:
    """A module's class, attributes, hooks, forward and children."""
    forward = own_forward(module)
    return (
        number_of(module),
        number_of(type(module)),
        None if forward is None else _identity(forward),
        [(_identity(hook), by_name) for hook, by_name in hooks_of(module)],
        [(name, child and number_of(child)) for name, child in module._modules.items()],
        _described(vars(module), {*_OF_TORCH, *NOT_DECISIVE, "forward"}),
        _contents(dict(other_attributes(vars(module))), _identity),
    )


def other_attributes(attributes: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the attributes of a module that are neither plain, nor functions, nor configs."""
    for name, value in list(attributes.items()):
        if (
            name not in _OF_TORCH
            and name not in NOT_DECISIVE
            and not _is_plain(value)
            and (not callable(value) or isinstance(value, _KINDS))
            and not hasattr(value, "to_diff_dict")
        ):
            yield name, value


def attribute_tensors(attributes: Mapping[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors in a module's attributes that are neither parameters nor buffers."""
    waiting: list[tuple[str, Any, int, Ids]] = [
        (name, value, DEPTH, ()) for name, value in other_attributes(attributes)
    ]
    while waiting:
        name, value, depth, path = waiting.pop()
        if type(value) in _DENSE:
            yield name, value
            continue
        if depth and _holds_values(value):
            value, depth = vars(value), depth - 1
        if id(value) in path:
            continue
        path = (*path, id(value))
        if isinstance(value, dict):
            waiting += [(f"{name}.{key}", held, depth, path) for key, held in value.items()]
        elif isinstance(value, (list, tuple)):
            waiting += [(f"{name}.{place}", held, depth, path) for place, held in enumerate(value)]


def _contents(
    value: Any, identify: Callable[[Any], Any], depth: int = DEPTH, path: Ids = ()
) -> Any:
    """Describe a value by its contents as far as they are plain, containers or objects of others.

    Args:
        value: Any value.
        identify: Describes all other things, such as classes and tensors.
        depth: Objects inside of objects, at most.
        path: The containers around the value. One of them is described by its place among them.
    """
    if _is_plain(value):
        return _plain_text(value)
    if id(value) in path:
        return f"container {path.index(id(value))}"
    inner = (*path, id(value))
    if isinstance(value, dict):
        return sorted(
            (repr(key), _contents(held, identify, depth, inner)) for key, held in value.items()
        )
    if isinstance(value, (list, tuple)):
        return [_contents(held, identify, depth, inner) for held in value]
    if depth and _holds_values(value):
        return identify(type(value)), _contents(vars(value), identify, depth - 1, inner)
    return identify(value)


def _holds_values(value: Any) -> bool:
    """Whether a value is an object of another package, with attributes of its own."""
    owner = type(value).__module__.partition(".")[0]
    return (
        type(getattr(value, "__dict__", None)) is dict
        and not isinstance(value, (*_KINDS, torch.Tensor))
        and not callable(value)
        and owner not in ("torch", "transformers")
    )


def _described(values: Mapping[Any, Any], ignored: Collection[str] = ()) -> list:
    """Plain values by name, and functions by a number each."""
    described = []
    for name, value in list(values.items()):
        if name in ignored or str(name).startswith("__"):
            continue
        if _is_plain(value):
            described.append((str(name), repr(value)))
        elif isinstance(value, _DESCRIPTORS) or (callable(value) and not isinstance(value, _KINDS)):
            described.append((str(name), _identity(value)))
    return sorted(described, key=operator.itemgetter(0))


_DESCRIPTORS = (staticmethod, classmethod, property)
_KINDS = (type, nn.Module)


def _identity(function: Any) -> Any:
    """A value that is equal for the same function of the same object."""
    if isinstance(function, types.MethodType):
        return number_of(function.__self__), number_of(function.__func__)
    return number_of(function)


def _is_plain(value: Any, path: Ids = ()) -> bool:
    """Whether a value is plain, or holds plain ones only; a container in itself is not."""
    if not isinstance(value, (dict, list, tuple, set, frozenset)):
        return isinstance(value, _PLAIN)
    if id(value) in path:
        return False
    inner = (*path, id(value))
    parts = itertools.chain(value, value.values()) if isinstance(value, dict) else value
    return all(_is_plain(part, inner) for part in parts)


def _copied(values: Any, path: Ids = ()) -> Any:
    """A copy of a container, and of those in it, but for those around it; other objects are
    shared."""
    if id(values) in path:
        return values
    inner = (*path, id(values))
    if isinstance(values, dict):
        return {name: _copied(value, inner) for name, value in values.items()}
    if isinstance(values, list):
        return [_copied(value, inner) for value in values]
    return copy.copy(values) if isinstance(values, _CONTAINERS) else values


def _dictionaries_of(attributes: Iterable[dict[str, Any]]) -> list[Any]:
    """The hooks, containers and objects of modules, which can change in place."""
    return [
        *(of[name] for of in attributes for name in (*HOOKS, *HOOK_FLAGS) if name in of),
        *(
            held
            for of in attributes
            for name, value in of.items()
            if name not in _OF_TORCH
            for held in _changeable(value, DEPTH)
        ),
    ]


def _changeable(value: Any, depth: int) -> Iterator[Any]:
    """Yield a container, and the attributes of objects in it, down to `DEPTH`."""
    if isinstance(value, _CONTAINERS):
        yield value
    if depth and _holds_values(value):
        yield vars(value)
        value, depth = vars(value), depth - 1
    if isinstance(value, (dict, list, tuple)) and not _is_plain(value):
        for held in value.values() if isinstance(value, dict) else value:
            if _holds_values(held):
                yield from _changeable(held, depth)


def _configs_of(modules: Iterable[nn.Module]) -> list:
    """The distinct configs of modules, and those in them."""
    configs = {id(c): c for m in modules if (c := vars(m).get("config")) is not None}
    for config in list(configs.values()):
        parts = getattr(config, "__dict__", {}).values()
        configs |= {id(part): part for part in parts if hasattr(part, "to_diff_dict")}
    return [config for config in configs.values() if hasattr(config, "to_diff_dict")]


def _implementations(config: Any) -> list[str]:
    return [str(getattr(config, name, None)) for name in IMPLEMENTATIONS]


# -- digest ----------------------------------------------------------------------------------------


def digest_of(hf: nn.Module, config: Any, dtype: torch.dtype, weights: Weights) -> str:
    """Compute the SHA-256 of a model's content; see `Model.digest`."""

    def key() -> str:
        # equal files and equal resident tensors have an equal digest, so files are not read again
        files = json.dumps([str(dtype), weights.identity])
        resident = _digest(hf, config, _tensors(hf, weights, streamed=False))
        return hashlib.sha256(f"{resident}{files}".encode()).hexdigest()

    return weights.remembered(key, lambda: _digest(hf, config, _tensors(hf, weights)))


def _digest(hf: nn.Module, config: Any, tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    digest = hashlib.sha256(_config_text(config).encode())
    for name, module in hf.named_modules():
        digest.update(f"{name}{plain_attributes(module)}".encode())
    code = [*sources(hf), *(f"{place}: {mark(function)}" for place, function in foreign_code(hf))]
    digest.update(json.dumps(code).encode())
    for name, tensor in tensors:
        if tensor.is_meta:  # of towers, which stay in their files
            continue
        described = f"{name}{tuple(tensor.shape)}{tensor.dtype}{placement(tensor)}"
        digest.update(described.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _tensors(
    hf: nn.Module, weights: Weights, streamed: bool = True
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor by name: parameters, buffers, and tensors in attributes.

    Those that are streamed may be left out; one has storage only while it is the current one.
    """
    blocks, current = weights.blocks(), None
    for name, tensor in list(hf.named_parameters(remove_duplicate=False)):
        block = weights.block_of(name)
        if block is None:
            yield name, tensor
        elif streamed:
            while current != block:  # both ascend
                current = next(blocks)
            yield name, hf.get_parameter(name)
    yield from hf.named_buffers(remove_duplicate=False)
    for name, module in hf.named_modules():
        for attribute, value in attribute_tensors(vars(module)):
            yield f"{name}.{attribute}", value


def _config_text(config: Any) -> str:
    values = config.to_diff_dict()
    for name in ("_name_or_path", "transformers_version"):  # its folder, and the writing release
        values.pop(name, None)
    return json.dumps(values, sort_keys=True, default=str)


def _plain_text(value: Any) -> str:
    """A text for a plain value, equal in all processes, where sets have other orders."""
    if isinstance(value, dict):
        return f"{{{sorted((repr(key), _plain_text(held)) for key, held in value.items())}}}"
    if isinstance(value, (set, frozenset)):
        return f"{{{sorted(map(repr, value))}}}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_plain_text, value))}]"
    return repr(value)


def plain_attributes(module: nn.Module) -> tuple:
    """A module's type, attributes except its training flag, hooks, and own `forward`.

    Hooks and forwards are compared as objects. So those of two processes are never equal. Tensors
    are left out.
    """
    plain = [
        (name, _plain_text(value))
        for name, value in vars(module).items()
        if name not in _OF_TORCH and name not in NOT_DECISIVE and _is_plain(value)
    ]
    hooks = [(mark(hook), by_name) for hook, by_name in hooks_of(module)]
    forward = own_forward(module)
    own = [] if forward is None else [mark(forward)]
    others = _contents(dict(other_attributes(vars(module))), _named)
    return (type(module).__qualname__, *sorted(plain), *others, *hooks, *own)


def _named(value: Any) -> str:
    """A text for a thing in an attribute: its class's name, as objects of two processes differ."""
    kind = value if isinstance(value, type) else type(value)
    return f"{kind.__module__}.{kind.__qualname__}"
