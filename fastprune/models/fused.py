"""The fused path: the units of Llama-like models on fused operators, with the model's own weights.

It reads the same parameters as the generic path, which embeds the tokens and works out rotary
angles for it. `open_runner` compares it with the generic path, block by block, before it is used.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import InputError
from . import native
from .code import foreign_code, global_hooks, hooks_of, own_forward
from .generic import GenericRunner
from .head import LINEAR
from .model import Model
from .operators import OPERATORS, Rows, fast_operators
from .swap import get_module
from .tree import layer_windows

FAMILIES = (
    "llama",
    "mistral",
    "phi3",
    "qwen2",
    "qwen3",
)  # pre-norm RMSNorm, rotary, gated MLP with SiLU
MAX_HIDDEN, MAX_HEAD = 16384, 256  # limits of the kernels on a row


@dataclass(frozen=True)
class Layer:
    """The parts of one decoder layer. qkv, gate_up: linear maps whose outputs stand side by
    side."""

    attention_norm: nn.Module
    qkv: tuple[nn.Linear, ...]
    q_norm: Any  # the family's RMSNorm, or None
    k_norm: Any
    output: nn.Linear
    mlp_norm: nn.Module
    gate_up: tuple[nn.Linear, ...]
    down: nn.Linear
    num_heads: int
    num_kv_heads: int
    scale: float


@dataclass(frozen=True)
class ChunkArguments:
    """The arguments of every layer for a chunk: rotary tables [N, R], each token's row in them,
    attention by layer."""

    cos: torch.Tensor
    sin: torch.Tensor
    position: torch.Tensor  # int64[B * T]
    attention: list[object]


class FusedRunner:
    """Runs the units of a Llama-like model on fused operators (see `Runner`).

    Args:
        model: The model.
        operators: "triton", "native" or "torch"; by default the set made for the model's device,
            else torch's.

    Raises:
        InputError: The model does not have that shape.
    """

    def __init__(self, model: Model, operators: str | None = None):
        self.model, self.device = model, model.device
        reason = why_not_fused(model)
        if reason:
            raise InputError(f"{model.name}: the fused path cannot run this model: {reason}")
        chosen = operators or fast_operators(model.device, model.dtype) or "torch"
        self._operators = OPERATORS[chosen](model.dtype)
        self._windows = layer_windows(model.config, model.num_blocks)
        self._layers = [_layer(layer) for layer in model.layers]
        self._generic = GenericRunner(model)  # for embeddings and angles
        self.head = self._operators.head(model, self._final_norm)
        self.path_name = f"fused ({self._operators.name})"

    def open(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor | None = None,
        branch: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ChunkArguments]:
        """Like `GenericRunner.open`: the embedded tokens [B, T, D], and the layers' arguments."""
        state, arguments = self._generic.embed(ids, positions)
        cos, sin = arguments[0]["position_embeddings"]  # [1 or B, T, 2R], each angle twice
        half = cos.shape[-1] // 2
        cos, sin = (
            table[..., :half].reshape(-1, half).float().contiguous() for table in (cos, sin)
        )
        position = torch.arange(ids.numel(), device=ids.device) % len(cos)
        num_rows, length = ids.shape
        rows = Rows(num_rows, length, positions, branch, ids.device)
        layer = self._layers[0]
        head_dim = layer.output.in_features // layer.num_heads
        grouped = any(layer.num_heads != layer.num_kv_heads for layer in self._layers)
        plans = {
            w: self._operators.plan_attention(rows, head_dim, grouped, w)
            for w in set(self._windows)
        }
        return state, ChunkArguments(cos, sin, position, [plans[w] for w in self._windows])

    @property
    def bands(self) -> tuple[range, ...]:
        """Like `Model.bands`."""
        return self.model.bands

    def visit(self, bands: Iterable[Sequence[int]] | None = None) -> Iterator[Sequence[int]]:
        """Like `Model.visit`."""
        return self.model.visit(bands)

    def run(
        self, unit: int, state: torch.Tensor, arguments: ChunkArguments, granularity: str = "block"
    ) -> torch.Tensor:
        """Like `GenericRunner.run`, on states [B, T, D]. The input is left as it is."""
        x = state.flatten(0, 1)
        if granularity == "block":
            layer, residual = self._layers[unit], torch.empty_like(x)
            branch = self._attention(unit, x, arguments)
            normed = self._norm(layer.mlp_norm, x, branch, residual)
            del branch
            return self._add_mlp(layer, normed, residual).view_as(state)
        block, is_mlp = divmod(unit, 2)
        if is_mlp:
            layer = self._layers[block]
            return self._add_mlp(layer, self._norm(layer.mlp_norm, x), x.clone()).view_as(state)
        return (x + self._attention(block, x, arguments)).view_as(state)

    def pack(self, state: torch.Tensor) -> torch.Tensor:
        """Like `GenericRunner.pack`: states of these families are plain tensors."""
        return state

    def unpack(self, packed: torch.Tensor, unit: int) -> torch.Tensor:
        """Like `GenericRunner.unpack`."""
        return packed

    def numerics(self) -> str:
        return f"fused {self._operators.numerics()}, {self.head.numerics()}"

    def _final_norm(self, states: torch.Tensor) -> torch.Tensor:
        """Final states [P, D] as the head reads them."""
        return self._norm(get_module(self.model.hf, self.model.path[:-1]).norm, states)

    def _attention(self, block: int, x: torch.Tensor, arguments: ChunkArguments) -> torch.Tensor:
        """The term that a block's attention adds to x [T, D]."""
        layer, ops = self._layers[block], self._operators
        qkv = _side_by_side(self._norm(layer.attention_norm, x), layer.qkv)
        q_weight, k_weight, eps = None, None, 0.0
        if layer.q_norm is not None:
            q_weight, k_weight, eps = (
                layer.q_norm.weight,
                layer.k_norm.weight,
                layer.q_norm.variance_epsilon,
            )
        heads = layer.num_heads, layer.num_kv_heads
        qkv = ops.rotary(
            qkv, arguments.cos, arguments.sin, arguments.position, *heads, q_weight, k_weight, eps
        )
        return layer.output(ops.attention(qkv, arguments.attention[block], *heads, layer.scale))

    def _add_mlp(self, layer: Layer, normed: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """Add the MLP's output to the residual, in place: the matrix product accumulates there."""
        active = self._operators.gated_mlp(_side_by_side(normed, layer.gate_up))
        residual.addmm_(active, layer.down.weight.T)
        return residual if layer.down.bias is None else residual.add_(layer.down.bias)

    def _norm(
        self,
        norm: Any,
        x: torch.Tensor,
        branch: torch.Tensor | None = None,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return self._operators.add_rms_norm(x, norm.weight, norm.variance_epsilon, branch, residual)


def prefers_fused(model: Model) -> bool:
    """Whether "auto" takes the fused path: the model has the shape, and operators are made for its
    device."""
    if why_not_fused(model):
        return False
    if fast_operators(model.device, model.dtype) is not None:
        return True
    if model.device.type == "cpu" and not native.available():
        warn_of_missing_extension()
    return False


@functools.cache
def warn_of_missing_extension() -> None:
    warnings.warn(
        "fastprune was installed without its compiled operators; models run on transformers' own "
        "code, which is slower",
        RuntimeWarning,
        stacklevel=2,
    )


def why_not_fused(model: Model) -> str | None:
    """Why a model's layers, as they are now, cannot run on the fused operators; None if they
    can."""
    return model.once("why not fused", lambda: _why_not(model))


def _why_not(model: Model) -> str | None:
    if model.family not in FAMILIES:
        return f"the family {model.family!r} is none of {', '.join(FAMILIES)}"
    if not model.num_blocks:
        return "it has no blocks"
    if any(not type(layer).__module__.startswith("transformers.models.") for layer in model.layers):
        return "its layers are not transformers' own"
    for name, module in model.hf.named_modules():
        if not type(module).__module__.startswith(("transformers.", "torch.nn.", "fastprune.")):
            return f"its module {name!r} is not transformers' own"
        if own_forward(module) is not None:
            return f"its module {name!r} has a forward of its own"
        if hooks_of(module):
            return f"its module {name!r} has forward hooks or backward ones"
    if any(global_hooks()):
        return "torch has hooks on all modules"
    for place, _ in foreign_code(model.hf):
        return f"{place} is not transformers' own"
    if getattr(model.config, "hidden_act", None) not in ("silu", "swish"):
        return f"its activation is {getattr(model.config, 'hidden_act', None)!r}, not 'silu'"
    for layer in model.layers:
        try:
            parts = _layer(layer)
        except AttributeError as error:
            return f"a part was not found ({error})"
        linears = (*parts.qkv, parts.output, *parts.gate_up, parts.down)
        if any(type(linear) not in LINEAR for linear in linears):
            return "its projections are not plain nn.Linear"
        if parts.output.in_features // parts.num_heads > MAX_HEAD:
            return f"its heads have more than {MAX_HEAD} columns"
    head = model.output_head
    if type(head) not in LINEAR or head.bias is not None:
        return "its head is not a linear map without bias"
    if model.hidden_size > MAX_HIDDEN:
        return f"its states have more than {MAX_HIDDEN} columns"
    return None


def _layer(module: Any) -> Layer:
    attention, mlp = module.self_attn, module.mlp
    packed = hasattr(attention, "qkv_proj")
    qkv = (
        (attention.qkv_proj,) if packed else (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    gate_up = (mlp.gate_up_proj,) if hasattr(mlp, "gate_up_proj") else (mlp.gate_proj, mlp.up_proj)
    num_heads = attention.o_proj.in_features // attention.head_dim
    all_heads = sum(linear.out_features for linear in qkv) // attention.head_dim
    return Layer(
        attention_norm=module.input_layernorm,
        qkv=qkv,
        q_norm=getattr(attention, "q_norm", None),
        k_norm=getattr(attention, "k_norm", None),
        output=attention.o_proj,
        mlp_norm=module.post_attention_layernorm,
        gate_up=gate_up,
        down=mlp.down_proj,
        num_heads=num_heads,
        num_kv_heads=(all_heads - num_heads) // 2,
        scale=attention.scaling,
    )


def _side_by_side(x: torch.Tensor, linears: tuple[nn.Linear, ...]) -> torch.Tensor:
    """The outputs of several linear maps of x [T, D] as columns of one tensor; no weight is copied
    for it."""
    if len(linears) == 1:
        return linears[0](x)
    out = x.new_empty(len(x), sum(linear.out_features for linear in linears))
    start = 0
    for linear in linears:
        columns = out[:, start : start + linear.out_features]
        if linear.bias is None:
            torch.mm(x, linear.weight.T, out=columns)
        else:
            torch.addmm(linear.bias, x, linear.weight.T, out=columns)
        start += linear.out_features
    return out
