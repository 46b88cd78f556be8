"""Replacements for parts of a transformers model, on shallow copies that share every weight.

The model itself is never changed. `Recorder` records the arguments that a model's forward passes to
its layers, and runs its steps after them. `Sublayers` runs one half of a layer without the other.
`head.Head` has two more replacements.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from .device import is_out_of_memory

# attributes of a layer's modules that hold its index, the key of its entry in a cache
INDEX_NAMES = ("layer_idx", "layer_id", "layer_index", "block_idx")


class HalfBlock(NamedTuple):
    """The state between the sublayers of a parallel block: the mlp reads `entry`, not `hidden`."""

    hidden: torch.Tensor  # [B, T, D], attention already added
    entry: torch.Tensor  # [B, T, D], the block's input
    attention: torch.Tensor  # [B, T, D], the term that attention added
    owner: object  # the block; any other block takes `hidden` as the state


State = torch.Tensor | HalfBlock
Arguments = list[dict]  # of each layer, besides the hidden states


def hidden_of(state: State) -> torch.Tensor:
    """The hidden states [B, T, D] that the final norm reads if the network ends here."""
    return state.hidden if isinstance(state, HalfBlock) else state


def state_bytes(state: State) -> int:
    tensors = (
        (state.hidden, state.entry, state.attention) if isinstance(state, HalfBlock) else (state,)
    )
    return sum(tensor.nbytes for tensor in tensors)


def pack(state: State) -> torch.Tensor:
    """Turn a state into one tensor: [B, T, D], or [3, B, T, D] inside of a parallel block."""
    return torch.stack(state[:3]) if isinstance(state, HalfBlock) else state


def unpack(packed: torch.Tensor, owners: Sequence[object], unit: int) -> State:
    """Restore the state that `pack` packed after a sublayer; `owners` are the blocks by number."""
    if packed.dim() == 3:
        return packed
    hidden, entry, attention = packed
    return HalfBlock(hidden, entry, attention, owners[unit // 2])


class Recorder:
    """Runs a base model's own forward without its layers: the steps before the first layer, and
    those after the last."""

    def __init__(self, path: tuple[str, ...], hf: nn.Module):
        # whether the model takes a tuple from each layer; None until a forward pass has worked
        self.takes_tuples: bool | None = None
        self._calls: Arguments = []
        self._state: Any = None  # the first layer's input, once it is known
        self._final: torch.Tensor | None = None  # the layers' result; None returns their input
        layers = get_module(hf, path)
        self._names = argument_names(layers[0])
        stand_ins = nn.ModuleList(StandInLayer(layer, self._record) for layer in layers)
        replaced = with_replaced(hf, path, stand_ins)
        # only the base model below the causal-LM wrapper runs
        self._base, self._owner = get_module(replaced, path[:1]), get_module(replaced, path[:-1])

    def __call__(self, **inputs: Any) -> tuple[torch.Tensor, Arguments]:
        """Run the forward; return the embeddings, and the arguments of each layer by name."""
        _, state, calls = self._either_way(self._base, inputs)
        return state, calls

    def after_layers(self, states: torch.Tensor) -> torch.Tensor:
        """The base model's output [P, D] for final states [P, D]: its norm, under any name.

        Each position is a row of its own, of one token.
        """
        self._final = states[:, None]
        try:
            ids = torch.zeros(len(states), 1, dtype=torch.int64, device=states.device)
            output, _, _ = self._either_way(self._owner, {"input_ids": ids})
            return output[0][:, 0]
        finally:
            self._final = None

    def _either_way(self, base: nn.Module, inputs: dict) -> tuple[Any, Any, list]:
        if self.takes_tuples is not None:
            return self._run(base, inputs, self.takes_tuples)
        try:
            recorded, self.takes_tuples = self._run(base, inputs, False), False
        except Exception as error:
            try:
                recorded, self.takes_tuples = self._run(base, inputs, True), True
            except Exception:
                raise error from None
        return recorded

    def _run(self, base: nn.Module, inputs: dict, as_tuple: bool) -> tuple[Any, Any, list]:
        self._calls, self._state, self._gives_tuples = [], None, as_tuple
        self._rows = inputs["input_ids"].shape
        try:
            output = base(**inputs, use_cache=False)
            self._check_shape(output[0])
            return output, self._state, self._calls
        finally:
            self._calls, self._state = [], None

    def _check_shape(self, states: torch.Tensor) -> None:
        """Detect a model that expects tuples. It takes the first row of a tensor without error."""
        first_state = self._state
        if first_state is None or first_state.dim() != 3:
            return
        if first_state.shape[:2] != self._rows:
            raise ValueError(
                f"its states have the shape {list(first_state.shape)}, not [rows, tokens, width]"
            )
        if states.shape[:2] != first_state.shape[:2]:
            raise ValueError("its layers were given states of another shape")

    def _record(
        self, hidden: torch.Tensor, args: tuple, kwargs: dict
    ) -> torch.Tensor | tuple[torch.Tensor, None]:
        if self._state is None:
            self._state = hidden
        self._check_shape(hidden)
        self._calls.append({**dict(zip(self._names, args, strict=False)), **kwargs})
        state = hidden if self._final is None else self._final
        return (state, None) if self._gives_tuples else state


class StandIn(nn.Module):
    """A module in the place of another. A model may still read the other's attributes."""

    def __init__(self, replaced: nn.Module):
        # hidden from nn.Module, so that the other is not a submodule of its stand-in
        self.__dict__["_replaced"] = replaced
        super().__init__()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_replaced"], name)


class StandInLayer(StandIn):
    """Replaces a layer by a function of (hidden states, positional arguments, named ones)."""

    def __init__(self, layer: nn.Module, call: Callable):
        super().__init__(layer)
        self._call = call

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return self._call(hidden_states, args, kwargs)


class Place(NamedTuple):
    """A place in a list of layers: the block whose settings count, the module that runs there, and
    its halves that run (0 attention, 1 MLP)."""

    block: int
    layer: nn.Module
    halves: frozenset[int] = frozenset((0, 1))


class Exchanged(StandIn):
    """A module in the place of a layer.

    It gets those of the layer's arguments that it accepts. A cache counts its tokens, too.

    Args:
        layer: The layer.
        module: The module that runs.
        accepted: Names of the arguments that it accepts; None for all.
        as_tuple: Whether the model takes a tuple from each layer.
    """

    def __init__(
        self, layer: nn.Module, module: nn.Module, accepted: frozenset[str] | None, as_tuple: bool
    ):
        super().__init__(layer)
        self.module, self._accepted, self._as_tuple = module, accepted, as_tuple
        self.layer_idx = 0  # the key of its entry in a cache
        self._names = argument_names(layer)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        arguments = {**dict(zip(self._names, args, strict=False)), **kwargs}
        caches = [value for value in arguments.values() if isinstance(value, Cache)]
        lengths = [_length(cache, self.layer_idx) for cache in caches]
        output = first(self.module(hidden_states, **accepted_of(arguments, self._accepted)))
        for cache, length in zip(caches, lengths, strict=True):
            if _length(cache, self.layer_idx) == length:
                _count_tokens(cache, self.layer_idx, hidden_states)
        return (output, None) if self._as_tuple else output


def argument_names(layer: nn.Module) -> list[str]:
    """The parameters of a layer's forward after self and the hidden states."""
    names = inspect.signature(type(layer).forward).parameters
    return [name for name in names if name != "self"][1:]


def accepted_of(arguments: dict, names: frozenset[str] | None) -> dict:
    """A layer's arguments that a module accepts; all if `names` is None."""
    if names is None:
        return arguments
    return {name: value for name, value in arguments.items() if name in names}


class Sublayers:
    """The two halves of a decoder layer: the layer itself with the other half's modules replaced.

    The first half is all modules whose results the layer adds before the state between the halves;
    the second is those after it. A sequential block is mlp(attention(h)), and a replaced half adds
    zero. In a parallel block both halves read the block's input. So its mlp half runs the layer
    with attention replaced by its earlier result.

    Args:
        layer: The layer.
        halves: Names of the modules of each half, all children of the layer.
        kinds: The number of values that a module returns in a tuple, by name; None for a tensor.
        parallel: Whether both halves read the block's input; the first is then one module.
    """

    def __init__(
        self,
        layer: nn.Module,
        halves: tuple[tuple[str, ...], tuple[str, ...]],
        kinds: Mapping[str, int | None],
        parallel: bool,
    ):
        self.halves, self._kinds, self._parallel = halves, kinds, parallel
        attention, mlp = halves
        without_mlp = self._without(layer, mlp)
        self._attention_only, self._mlp_only = without_mlp, self._without(layer, attention)
        self._neither = self._without(without_mlp, attention)
        if parallel:
            (name,) = attention
            module = getattr(layer, name)
            self._kept, self._given = _KeepTerm(module), _GivenTerm(module, kinds[name])
            self._attention_only = with_replaced(without_mlp, (name,), self._kept)
            self._mlp_only = with_replaced(layer, (name,), self._given)

    def _without(self, layer: nn.Module, names: Iterable[str]) -> nn.Module:
        for name in names:
            term = _GivenTerm(getattr(layer, name), self._kinds[name])
            layer = with_replaced(layer, (name,), term)
        return layer

    def attention(self, state: State, arguments: dict) -> State:
        entry = hidden_of(state)
        if not self._parallel:
            return first(self._attention_only(entry, **arguments))
        try:
            hidden = first(self._attention_only(entry, **arguments))
            return HalfBlock(hidden, entry, self._kept.term, self)
        finally:
            self._kept.term = None

    def mlp(self, state: State, arguments: dict) -> torch.Tensor:
        # if attention was skipped, the state may have been left by an earlier block whose mlp was
        if not (isinstance(state, HalfBlock) and state.owner is self):
            return first(self._mlp_only(hidden_of(state), **arguments))
        try:
            self._given.term = state.attention
            return first(self._mlp_only(state.entry, **arguments))
        finally:
            self._given.term = None

    def neither(self, state: torch.Tensor, arguments: dict) -> torch.Tensor:
        """Run the layer with both halves replaced."""
        return first(self._neither(state, **arguments))

    def modules(self, layer: nn.Module, half: int) -> list[nn.Module]:
        """The modules of a half: 0 attention, 1 mlp."""
        return [getattr(layer, name) for name in self.halves[half]]

    def stand_ins(self, layer: nn.Module, kept: set[int]) -> list[tuple[str, nn.Module]]:
        """The modules that replace this layer's removed halves (0 attention, 1 mlp), by name."""
        return [
            (name, SkippedTerm(getattr(layer, name), self._kinds[name]))
            for half, names in enumerate(self.halves)
            if half not in kept
            for name in names
        ]


def split_layer(
    layer: nn.Module, state: torch.Tensor, arguments: dict, whole: torch.Tensor
) -> Sublayers | None:
    """Find the two halves of a layer, which give its own output `whole` to the bit.

    The terms of a layer are the results of modules that hold a matrix and return states, in the
    order of their calls. A cut between two terms is right under three conditions. The halves, run
    one after the other, give the layer's output. They leave their inputs unchanged. Without both
    halves, the layer adds nothing.

    Returns:
        The halves; None if the layer does not have two.
    """
    try:
        kinds = _terms(layer, state, arguments)
    except Exception as error:  # the layer does not run with replaced modules
        if is_out_of_memory(error):
            raise
        return None
    names = tuple(kinds)
    ways = [(cut, False) for cut in range(1, len(names))]
    # in a parallel block every cut adds up, so that only two terms have a clear cut
    ways += [(1, True)] * (len(names) == 2)
    for cut, parallel in ways:
        sublayers = Sublayers(layer, (names[:cut], names[cut:]), kinds, parallel)
        try:
            if _adds_up(sublayers, state, arguments, whole):
                return sublayers
        except Exception as error:  # a module of this family returns something else
            if is_out_of_memory(error):
                raise
    return None


def _terms(layer: nn.Module, state: torch.Tensor, arguments: dict) -> dict[str, int | None]:
    """The modules of a layer that may add to its states, in the order of their calls.

    By name, with the number of values that each returns in a tuple, or None for a tensor.
    """
    kinds: dict[str, int | None] = {}
    watched = layer
    for name, module in layer.named_children():
        # norms and scales hold vectors only
        if not isinstance(module, (nn.ModuleList, nn.ModuleDict)) and any(
            weights.dim() > 1 for weights in module.parameters()
        ):
            watched = with_replaced(watched, (name,), _Watched(module, name, state, kinds))
    watched(state, **arguments)
    return kinds


def _adds_up(
    sublayers: Sublayers, state: torch.Tensor, arguments: dict, whole: torch.Tensor
) -> bool:
    middle = sublayers.attention(state, arguments)
    inputs = (
        [t for t in middle if isinstance(t, torch.Tensor)]
        if isinstance(middle, HalfBlock)
        else [middle]
    )
    versions = [tensor._version for tensor in inputs]
    after, nothing = sublayers.mlp(middle, arguments), sublayers.neither(state, arguments)
    return versions == [tensor._version for tensor in inputs] and all(
        torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
        for a, b in ((after, whole), (nothing, state))
    )


class _InPlaceOf(StandIn):
    """A stand-in whose class a layer may read, too: it is the other module's."""

    @property  # type: ignore[misc]
    def __class__(self) -> Any:  # isinstance reads it
        return type(self.__dict__["_replaced"])

    def __reduce_ex__(self, protocol: Any) -> Any:  # pickle reads the class, too
        return object.__new__, (type(self),), self.__dict__


class _Watched(_InPlaceOf):
    """A module that notes the kind of its result if that has the size of the layer's states."""

    def __init__(self, module: nn.Module, name: str, state: torch.Tensor, kinds: dict):
        super().__init__(module)
        self._watched = name, state.numel(), kinds

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        name, size, kinds = self._watched
        result = self._replaced(*args, **kwargs)
        term = first(result)
        if isinstance(term, torch.Tensor) and term.numel() == size:
            kinds.setdefault(name, len(result) if isinstance(result, (tuple, list)) else None)
        return result


def _zeros(args: tuple, kwargs: dict) -> torch.Tensor:
    """A term of zeros for a module that was called with these arguments."""
    tensors = (value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
    states: Any = kwargs.get("hidden_states", next(tensors, None))
    return torch.zeros_like(states)


class _GivenTerm(_InPlaceOf):
    """A module that adds nothing, or a term that was set before.

    `kind` is the number of values that the other module returns in a tuple; None for a tensor.
    """

    term: torch.Tensor | None = None

    def __init__(self, module: nn.Module, kind: int | None):
        super().__init__(module)
        self._kind = kind

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        term = _zeros(args, kwargs) if self.term is None else self.term
        return term if self._kind is None else (term, *[None] * (self._kind - 1))


class SkippedTerm(_GivenTerm):
    """A module that adds nothing, in the place of a layer's own.

    A cache still counts the tokens of a skipped attention: models read the number of earlier tokens
    from their first layer.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        result = super().forward(*args, **kwargs)
        own = vars(self._replaced)
        index = next((own[name] for name in INDEX_NAMES if name in own), None)
        for cache in (*args, *kwargs.values()):
            if isinstance(cache, Cache) and index is not None:
                _count_tokens(cache, index, first(result))
        return result


def _count_tokens(cache: Cache, index: int, states: torch.Tensor) -> None:
    """Add the tokens of states [B, T, D] without keys to a layer's entry of a cache."""
    if _keeps_keys(cache, index):
        rows, tokens, _ = states.shape
        no_keys = states.new_zeros(rows, 1, tokens, 1)
        cache.update(no_keys, no_keys, index)


def _length(cache: Cache, index: int) -> int:
    """The tokens that a layer's entry of a cache has counted."""
    return int(cache.get_seq_length(index)) if _keeps_keys(cache, index) else 0


def _keeps_keys(cache: Cache, index: int) -> bool:
    """Whether a layer's entry of a cache holds keys and values; recurrent layers hold states."""
    layers = cache.layers
    return index >= len(layers) or isinstance(layers[index], CacheLayerMixin)


class _KeepTerm(_InPlaceOf):
    """A module that also keeps the term that it adds."""

    term: Any = None  # the term of the last call

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        result = self._replaced(*args, **kwargs)
        self.term = first(result)
        return result


def first(output: Any) -> Any:
    return output[0] if isinstance(output, (tuple, list)) else output


def get_module(module: nn.Module, path: Sequence[str]) -> Any:
    for name in path:
        module = getattr(module, name)
    return module


def with_replaced(module: nn.Module, path: Sequence[str], replacement: nn.Module) -> nn.Module:
    """A shallow copy of `module`, sharing all weights, with the submodule at `path` replaced."""
    clone: Any = copy.copy(module)
    clone._modules = dict(module._modules)
    name, *rest = path
    clone._modules[name] = (
        with_replaced(clone._modules[name], rest, replacement) if rest else replacement
    )
    return clone


def twin(module: nn.Module) -> nn.Module:
    """Copy a module and the modules inside it; the copy shares every tensor, not attributes."""
    clone: Any = copy.copy(module)
    clone._modules = {
        name: None if inner is None else twin(inner) for name, inner in module._modules.items()
    }
    return clone
