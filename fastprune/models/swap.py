"""Stand-ins for parts of a transformers model, put in place on shallow copies that share every
weight.

The model itself is never changed. `Recorder` learns the arguments that a model's forward passes to
its layers, and runs its steps after them. `Sublayers` runs one half of a layer without the other.
(`head.Head` has two more.)
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import Cache

# attributes of a layer's modules that hold its index, by which a cache has its entries
INDEX_NAMES = ("layer_idx", "layer_id", "layer_index", "block_idx")


class HalfBlock(NamedTuple):
    """The state between the sublayers of a parallel block: the mlp reads `entry`, not `hidden`."""

    hidden: torch.Tensor  # [B, T, D], attention already added
    entry: torch.Tensor  # [B, T, D], the block's input
    attention: torch.Tensor  # [B, T, D], the term that attention added
    owner: Sublayers  # the block around it: to any other, `hidden` is the state


State = torch.Tensor | HalfBlock
Arguments = list[dict]  # of each layer, besides the hidden states


def hidden_of(state: State) -> torch.Tensor:
    """The hidden states [B, T, D] that the final norm reads, should the network end here."""
    return state.hidden if isinstance(state, HalfBlock) else state


def state_bytes(state: State) -> int:
    tensors = (
        (state.hidden, state.entry, state.attention) if isinstance(state, HalfBlock) else (state,)
    )
    return sum(tensor.nbytes for tensor in tensors)


class Recorder:
    """Runs a base model's forward with its layers replaced: all that it does before its first
    layer, and all that it does after its last."""

    def __init__(self, path: tuple[str, ...], hf: nn.Module):
        # whether the model takes a tuple from each layer; None until a forward pass has worked
        self._as_tuple: bool | None = None
        self._calls: list[tuple[tuple, dict]] = []
        self._state: Any = None  # the first layer's input, once it is known
        self._final: torch.Tensor | None = None  # the layers' result, if not their input
        layers = nn.ModuleList(StandInLayer(layer, self._record) for layer in get_module(hf, path))
        replaced = with_replaced(hf, path, layers)
        # the causal-LM wrapper is left out: only the base model below it is run
        self._base, self._owner = get_module(replaced, path[:1]), get_module(replaced, path[:-1])

    def __call__(self, **inputs: Any) -> tuple[torch.Tensor, list[tuple[tuple, dict]]]:
        """The embeddings, and the arguments of each layer."""
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
        if self._as_tuple is not None:
            return self._run(base, inputs, self._as_tuple)
        try:
            recorded, self._as_tuple = self._run(base, inputs, False), False
        except Exception as error:
            try:
                recorded, self._as_tuple = self._run(base, inputs, True), True
            except Exception:
                raise error from None
        return recorded

    def _run(self, base: nn.Module, inputs: dict, as_tuple: bool) -> tuple[Any, Any, list]:
        self._calls, self._state, self._gives_tuples = [], None, as_tuple
        try:
            output = base(**inputs, use_cache=False)
            return output, self._state, self._calls
        finally:
            self._calls, self._state = [], None

    def _record(
        self, hidden: torch.Tensor, args: tuple, kwargs: dict
    ) -> torch.Tensor | tuple[torch.Tensor, None]:
        if self._state is None:
            self._state = hidden
        self._calls.append((args, kwargs))
        state = hidden if self._final is None else self._final
        return (state, None) if self._gives_tuples else state


class StandInLayer(nn.Module):
    """Stands in for a layer: called in its place is a function of (hidden states, other arguments,
    those by name)."""

    def __init__(self, layer: nn.Module, call: Callable):
        super().__init__()
        # hidden from nn.Module, so that the layer is not a submodule of its stand-in
        self.__dict__["_layer"], self.__dict__["_call"] = layer, call

    def __getattr__(self, name: str) -> Any:
        return getattr(
            self.__dict__["_layer"], name
        )  # models read attributes such as attention_type

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return self._call(hidden_states, args, kwargs)


class Sublayers:
    """The two halves of a decoder layer: the layer itself with the other half's module replaced.

    A sequential block is mlp(attention(h)) and a replaced half adds zero. In a parallel block both
    read the block's input, so the mlp half runs the layer with attention replaced by its earlier
    result.
    """

    def __init__(
        self,
        layer: nn.Module,
        attention_name: str,
        mlp_name: str,
        parallel: bool,
        mlp_as_tuple: bool,
    ):
        # what each half runs, attention and MLP
        self.modules = getattr(layer, attention_name), getattr(layer, mlp_name)
        self._parallel = parallel
        self._names, self._mlp_as_tuple = (attention_name, mlp_name), mlp_as_tuple
        self._given, self._kept = _GivenAttention(), _KeepAttention(getattr(layer, attention_name))
        without_mlp = with_replaced(layer, (mlp_name,), _NoMlp(mlp_as_tuple))
        self._attention_only = with_replaced(without_mlp, (attention_name,), self._kept)
        self._mlp_only = with_replaced(layer, (attention_name,), self._given)
        self._neither = with_replaced(without_mlp, (attention_name,), _GivenAttention())

    def attention(self, state: State, arguments: dict) -> State:
        entry = hidden_of(state)
        try:
            hidden = first(self._attention_only(entry, **arguments))
            return HalfBlock(hidden, entry, self._kept.output, self) if self._parallel else hidden
        finally:
            self._kept.output = None

    def mlp(self, state: State, arguments: dict) -> torch.Tensor:
        if isinstance(state, HalfBlock) and state.owner is self:
            entry, self._given.output = state.entry, state.attention
        # attention was skipped; the state may have been left by an earlier block whose mlp was
        else:
            entry = hidden_of(state)
        try:
            return first(self._mlp_only(entry, **arguments))
        finally:
            self._given.output = None

    def neither(self, state: torch.Tensor, arguments: dict) -> torch.Tensor:
        """The layer with both halves replaced: the terms that its residual branches add when
        skipped."""
        return first(self._neither(state, **arguments))

    def stand_ins(self, layer: nn.Module, kept: set[int]) -> list[tuple[str, nn.Module]]:
        """The modules that replace this layer's removed halves (0 attention, 1 mlp), by name."""
        attention, mlp = self._names
        attention_skipped = SkippedAttention(layer.get_submodule(attention))
        both = [(attention, attention_skipped), (mlp, _NoMlp(self._mlp_as_tuple))]
        return [pair for half, pair in enumerate(both) if half not in kept]


class _NoMlp(nn.Module):
    """An mlp that adds nothing; some families' return a tuple."""

    def __init__(self, as_tuple: bool):
        super().__init__()
        self._as_tuple = as_tuple

    def forward(
        self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor | tuple[torch.Tensor, None]:
        nothing = torch.zeros_like(hidden_states)
        return (nothing, None) if self._as_tuple else nothing


class _GivenAttention(nn.Module):
    """Attention that adds nothing, or a term given before."""

    output: torch.Tensor | None = None

    def forward(
        self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        if self.output is not None:
            return self.output, None
        return torch.zeros_like(hidden_states), None


class SkippedAttention(nn.Module):
    """Attention that adds nothing. A cache counts its tokens all the same, since models take the
    number of earlier tokens from their first layer."""

    def __init__(self, attention: nn.Module):
        super().__init__()
        # read by models and caches, such as layer_idx; hidden from nn.Module, as in StandInLayer
        self.__dict__["_attention"] = attention

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_attention"], name)

    def forward(
        self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        for cache in (*args, *kwargs.values()):
            if isinstance(cache, Cache):
                own = vars(self._attention)
                index = next(own[name] for name in INDEX_NAMES if name in own)
                rows, tokens, _ = hidden_states.shape
                nothing = hidden_states.new_zeros(rows, 1, tokens, 1)
                cache.update(nothing, nothing, index)
        return torch.zeros_like(hidden_states), None


class _KeepAttention(nn.Module):
    """Attention that also keeps its output."""

    def __init__(self, attention: nn.Module):
        super().__init__()
        self.attention = attention
        self.output: Any = None  # of the last call

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        result = self.attention(*args, **kwargs)
        self.output = result[0]
        return result


def first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output


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
    """A copy of a module and of those inside it, which shares every tensor and has attributes of
    its own."""
    clone: Any = copy.copy(module)
    clone._modules = {
        name: None if inner is None else twin(inner) for name, inner in module._modules.items()
    }
    return clone
