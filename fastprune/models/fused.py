"""The fused path: units on fused operators, for the families that `blocks` describes.

It reads the same parameters as the generic path. The generic path embeds the tokens and computes
rotary angles for it. `open_runner` compares both paths, block by block, before the fused one is
used.

B rows of L tokens, T = B * L, D columns of a state, H heads of Dh columns, R angles of a head, N
positions of a table.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn

from ..errors import InputError
from . import native
from .blocks import ANGLES, FAMILIES, Layer, Norm, layer_of, norm_of
from .code import foreign_code, global_hooks, hooks_of, own_forward
from .generic import GenericRunner
from .head import LINEAR
from .model import Model
from .operators import fast_operators, operators_named
from .operators.rows import Rows
from .swap import Arguments, HalfBlock, State, first, get_module, hidden_of, unpack
from .windows import NO_WINDOW_FORM

MAX_HIDDEN, MAX_HEAD = 16384, 256  # limits of the kernels on a row
Table = tuple[torch.Tensor, torch.Tensor]  # cos and sin, float32[N, R]


@dataclass(frozen=True)
class ChunkArguments:
    """The arguments of every layer for a chunk.

    Attributes:
        tables: Rotary tables by layer; None for one that neither rotates nor norms its heads.
        position: Each token's row in the tables, int64[T].
        query_scale: The factor of each token's query, [T, 1]; None for 1.
        attention: Plans of attention by layer.
    """

    tables: list[Table | None]
    position: torch.Tensor
    query_scale: torch.Tensor | None
    attention: list[object]


class FusedRunner:
    """Runs the units of a model on fused operators (see `Runner`).

    `blocks.FAMILIES` has a row for each family, which describes its blocks.

    Args:
        model: The model.
        operators: "triton", "native" or "torch"; by default the set for the model's device, else
            torch's.

    Raises:
        InputError: The family has no row, or the model differs from it.
    """

    def __init__(self, model: Model, operators: str | None = None):
        self.model, self.device = model, model.device
        reason = why_not_fused(model)
        if reason:
            raise InputError(f"{model.name}: the fused path cannot run this model: {reason}")
        chosen = operators or fast_operators(model.device, model.dtype) or "torch"
        self._operators = operators_named(chosen)
        self._block = FAMILIES[model.family]
        self._layers = layers_of(model)
        self._generic = GenericRunner(model)  # for embeddings and angles
        self._last_norm = _final_norm_of(model)
        self.head = self._operators.head(
            model,
            self._final_norm,
            self._block.logit_scale(model.hf),
            self._block.logit_cap(model.hf),
        )
        self.path_name = f"fused ({self._operators.name})"

    def open(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor | None = None,
        branch: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ChunkArguments]:
        """Like `GenericRunner.open`: the embedded tokens [B, L, D], and the layers' arguments."""
        state, arguments = self._generic.embed(ids, positions)
        num_rows, length = ids.shape
        tables, count = self._tables(arguments)
        position = torch.arange(ids.numel(), device=ids.device) % count
        scale = self._block.query_scale(self._layers[0].attention, arguments[0]["position_ids"])
        if scale is not None:
            scale = scale.expand(num_rows, -1).reshape(-1, 1).to(state.dtype)
        rows = Rows(num_rows, length, positions, branch, ids.device, self.model.dtype)
        windows = self._generic.windows(length if positions is None else int(positions.max()) + 1)
        plans = {window: self._plan(rows, window) for window in set(windows)}
        return state, ChunkArguments(tables, position, scale, [plans[w] for w in windows])

    def _plan(self, rows: Rows, window: int | None) -> object:
        layer = self._layers[0]
        head_dim = layer.output.in_features // layer.num_heads
        grouped = any(layer.num_heads != layer.num_kv_heads for layer in self._layers)
        altered = layer.soft_cap is not None or self._block.sinks is not None
        return self._operators.plan_attention(rows, head_dim, grouped, window, altered)

    def _tables(self, arguments: Arguments) -> tuple[list[Table | None], int]:
        """Each layer's rotary tables, and their number of rows N.

        They are read from the arguments that the model's own forward passes to the layers.
        """
        known: dict[tuple[int, bool], Table] = {}
        tables: list[Table | None] = []
        for layer, handed in zip(self._layers, arguments, strict=True):
            if not layer.rotates and (layer.q_norm is None or layer.norms_apart):
                tables.append(None)
                continue
            key = id(handed["position_embeddings"][0]), layer.rotates
            if key not in known:
                cos, sin = handed["position_embeddings"]  # [1 or B, L, 2R], or R
                angles = ANGLES[self._block.angles](cos.shape[-1])
                cos, sin = (
                    table[..., angles].flatten(0, 1).float().contiguous() for table in (cos, sin)
                )
                turns = layer.rotates  # a layer that only norms its heads turns by the angle 0
                known[key] = (cos, sin) if turns else (torch.ones_like(cos), torch.zeros_like(sin))
            tables.append(known[key])
        return tables, max((len(table[0]) for table in known.values()), default=1)

    def run(
        self, unit: int, state: State, arguments: ChunkArguments, granularity: str = "block"
    ) -> State:
        """Like `GenericRunner.run`, on states [B, L, D]. The input stays unchanged."""
        entry = hidden_of(state)
        x = entry.flatten(0, 1)
        if granularity == "block":
            return self._run_block(unit, self._layers[unit], x, arguments).view_as(entry)
        block, is_mlp = divmod(unit, 2)
        layer = self._layers[block]
        if not is_mlp:
            branch = self._attention(block, self._norm(layer.attention_norm, x), arguments)
            hidden = (x + branch).view_as(entry)
            if not layer.parallel:
                return hidden
            return HalfBlock(hidden, entry, branch.view_as(entry), layer)
        if layer.parallel:
            source = entry  # attention was skipped, or belongs to an earlier block
            if isinstance(state, HalfBlock) and state.owner is layer:
                source = state.entry
            normed = self._norm(layer.attention_norm, source.flatten(0, 1))
        else:
            normed = self._norm(layer.mlp_norm, x)
        return self._add_mlp(layer, normed, x.clone()).view_as(entry)

    def own_mlp_name(self, block: int) -> str | None:
        """The name of a block's mlp if it runs as the family's own module; None if operators run
        it."""
        return None if self._layers[block].own_mlp is None else self._block.mlp

    def run_with_mlp(
        self, block: int, state: torch.Tensor, arguments: ChunkArguments, mlp: Callable
    ) -> torch.Tensor:
        """The state [B, T, D] after a block, with a function of the normed states [1, B * T, D] in
        the place of the family's own mlp."""
        layer = replace(self._layers[block], own_mlp=mlp)
        return self._run_block(block, layer, state.flatten(0, 1), arguments).view_as(state)

    def unpack(self, packed: torch.Tensor, unit: int) -> State:
        """Like `GenericRunner.unpack`."""
        return unpack(packed, self._layers, unit)

    def numerics(self) -> str:
        return f"fused {self._operators.numerics()}, {self.head.numerics()}"

    def _final_norm(self, states: torch.Tensor) -> torch.Tensor:
        """Final states [P, D] as the head reads them."""
        return self._norm(self._last_norm, states)

    def _run_block(
        self, number: int, layer: Layer, x: torch.Tensor, arguments: ChunkArguments
    ) -> torch.Tensor:
        """The state [T, D] after a block with the parts of this layer."""
        residual = torch.empty_like(x)
        normed = self._norm(layer.attention_norm, x)
        branch = self._attention(number, normed, arguments)
        if layer.mlp_norm is not None:
            normed = self._norm(layer.mlp_norm, x, branch, residual)
        else:
            torch.add(x, branch, out=residual)
            normed = normed if layer.parallel else residual
        del branch
        return self._add_mlp(layer, normed, residual)

    def _attention(
        self, number: int, normed: torch.Tensor, arguments: ChunkArguments
    ) -> torch.Tensor:
        """The term that a block's attention adds to the state [T, D], from its normed input."""
        layer, block, ops = self._layers[number], self._block, self._operators
        heads = layer.num_heads, layer.num_kv_heads
        q_norm, k_norm = layer.q_norm, layer.k_norm
        if layer.norms_apart:
            qkv = self._side_by_side(normed, layer.qkv, (q_norm, k_norm, None))
            q_norm = k_norm = None
        else:
            qkv = self._side_by_side(normed, layer.qkv)
        if layer.clip is not None:
            qkv.clamp_(-layer.clip, layer.clip)
        table = arguments.tables[number]
        if table is not None:
            qkv = ops.rotary(
                qkv,
                *table,
                arguments.position,
                *heads,
                q_weight=q_norm and q_norm.weight,
                k_weight=k_norm and k_norm.weight,
                eps=q_norm.eps if q_norm else 0.0,
                unit_offset=block.unit_offset,
                interleaved=block.interleaved,
                norm_after=block.norm_after,
            )
        if arguments.query_scale is not None:
            qkv[:, : layer.output.in_features] *= arguments.query_scale
        plan = arguments.attention[number]
        means = ops.attention(qkv, plan, *heads, layer.scale, layer.soft_cap, layer.sinks)
        branch = layer.output(means)
        if layer.after_attention is not None:
            branch = self._norm(layer.after_attention, branch)
        return branch if layer.multiplier == 1 else branch.mul_(layer.multiplier)

    def _add_mlp(self, layer: Layer, normed: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """Add the MLP's output to the residual [T, D] in place.

        On the operators, the last matrix product accumulates into the residual.
        """
        if layer.own_mlp is not None:
            branch = self._norm(layer.after_mlp, first(layer.own_mlp(normed[None]))[0])
            return residual.add_(branch, alpha=layer.multiplier)
        gate_up = self._side_by_side(normed, layer.gate_up)
        active = self._operators.gated_mlp(gate_up, layer.activation)
        if layer.after_mlp is not None:
            branch = self._norm(layer.after_mlp, layer.down(active))
            return residual.add_(branch, alpha=layer.multiplier)
        residual.addmm_(active, layer.down.weight.T, alpha=layer.multiplier)
        bias = layer.down.bias
        return residual if bias is None else residual.add_(bias, alpha=layer.multiplier)

    def _norm(
        self,
        norm: Norm | None,
        x: torch.Tensor,
        branch: torch.Tensor | None = None,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The norm of x + branch [T, D], with the sum written to `residual`; x without a norm."""
        if norm is None:
            return x
        return self._operators.add_rms_norm(
            x,
            norm.weight,
            norm.eps,
            branch=branch,
            residual=residual,
            unit_offset=self._block.unit_offset,
            centered=self._block.centered,
            bias=norm.bias,
        )

    def _norm_heads(self, norm: Norm, x: torch.Tensor) -> torch.Tensor:
        """The norm of q or k [T, H * Dh].

        It is taken over as many columns as the weight has; with a weight [H, Dh], over each head.
        """
        weight = norm.weight
        if weight is None or weight.dim() == 1:
            width = x.shape[1] if weight is None else len(weight)
            return self._norm(norm, x.view(-1, width)).view_as(x)
        heads = self._operators.add_rms_norm(
            x.view(-1, weight.shape[1]), None, norm.eps, centered=self._block.centered
        )
        return heads.view_as(x).mul_(weight.flatten())

    def _side_by_side(
        self,
        x: torch.Tensor,
        linears: tuple[nn.Linear, ...],
        norms: tuple[Norm | None, ...] | None = None,
    ) -> torch.Tensor:
        """The outputs of several linear maps of x [T, D] as columns of one tensor, normed or not.

        No weight is copied.
        """
        if len(linears) == 1:
            return linears[0](x)
        out = x.new_empty(len(x), sum(linear.out_features for linear in linears))
        start = 0
        for linear, norm in zip(linears, norms or (None,) * len(linears), strict=True):
            columns = out[:, start : start + linear.out_features]
            if norm is not None:
                columns.copy_(self._norm_heads(norm, linear(x)))
            elif linear.bias is None:
                torch.mm(x, linear.weight.T, out=columns)
            else:
                torch.addmm(linear.bias, x, linear.weight.T, out=columns)
            start += linear.out_features
        return out


def layers_of(model: Model) -> list[Layer]:
    """Find the parts of a model's decoder layers. Raises AttributeError if one is missing."""
    block, is_eager = FAMILIES[model.family], model.config._attn_implementation == "eager"
    return [layer_of(block, layer, is_eager) for layer in model.layers]


def _final_norm_of(model: Model) -> Norm:
    """Find the norm behind the last block. Raises AttributeError if it is missing."""
    block = FAMILIES[model.family]
    return norm_of(block, getattr(get_module(model.hf, model.path[:-1]), block.final_norm))


def prefers_fused(model: Model) -> bool:
    """Whether "auto" takes the fused path: it can run the model, and has fast operators there."""
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
    """The reason why a model's layers cannot run on the fused operators now; None if they can."""
    return model.once("why not fused", lambda: _why_not(model))


def _why_not(model: Model) -> str | None:
    if model.family not in FAMILIES:
        return f"the family {model.family!r} is none of {', '.join(FAMILIES)}"
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
    try:
        layers = layers_of(model)
        _final_norm_of(model)
    except AttributeError as error:
        return f"a part was not found ({error})"
    for layer in layers:
        linears = (*layer.qkv, layer.output, *layer.mlp_maps)
        if any(type(linear) not in LINEAR for linear in linears):
            return "its projections are not plain nn.Linear"
        if layer.output.in_features // layer.num_heads > MAX_HEAD:
            return f"its heads have more than {MAX_HEAD} columns"
    head = model.output_head
    if type(head) not in LINEAR:
        return "its head is not a linear map"
    implementation = getattr(model.config, "_attn_implementation", None)
    if implementation not in ("sdpa", "eager"):
        return f"its attention is {implementation!r}, neither 'sdpa' nor 'eager'"
    generic = GenericRunner(model)
    if NO_WINDOW_FORM in generic.windows(1):
        return "its layers' masks are not those of causal windows"
    if model.hidden_size > MAX_HIDDEN:
        return f"its states have more than {MAX_HIDDEN} columns"
    return None
