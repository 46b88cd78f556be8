"""The families whose blocks run on fused operators: each is a row of `FAMILIES`.

A `Block` names a family's parts and the order in which they run. All values (weights, sizes,
windows, multipliers) come from the modules. A family is added by a row; the fused path compares
every block with the family's own code before it is used.

Attention always runs on fused operators. The mlp does if it is a gated one of plain linear maps;
any other one, such as a mixture of experts, runs as the family's own module.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

# by class name; importing the class would import packages that opening a model does not need
ACTIVATIONS = {
    "torch.nn.modules.activation.SiLU": "silu",
    "transformers.activations.SiLUActivation": "silu",
    "transformers.activations.GELUTanh": "gelu_tanh",
}


# the columns of rotary tables that hold every angle once, by the order of the columns
ANGLES: dict[str, Callable[[int], slice]] = {
    "repeated": lambda columns: slice(columns // 2),  # all angles, then all again
    "doubled": lambda columns: slice(None, None, 2),  # each angle twice in a row
    "single": lambda columns: slice(None),
}


@dataclass(frozen=True)
class Block:
    """The parts of a family's blocks, by the names of modules and attributes.

    Attributes:
        attention_norm: The norm of attention's input; None if attention reads the state itself.
        after_attention: The norm of attention's output, before it is added to the state.
        mlp_norm: The norm of the mlp's input; None if the mlp reads the state itself.
        after_mlp: The norm of the mlp's output, before it is added to the state.
        mlp: The mlp.
        final_norm: The norm behind the last block.
        parallel: The mlp reads the input of attention, `attention_norm` of the block's input. A
            layer whose `mlp_norm` is None does the same.
        centered: Norms first subtract the mean (LayerNorm).
        unit_offset: Norms scale by 1 + weight.
        eps: The norms' epsilon, if no attribute of theirs holds it.
        head_norms: The norms of q and k; families without them have no modules of these names.
        whole_norms: The norms of q and k run over all heads together.
        norm_after: The norms of q and k come after the rotation.
        interleaved: Columns 2i and 2i + 1 of a head rotate together, not i and R + i.
        angles: The order of the columns of rotary tables, a key of `ANGLES`.
        rotates: Whether an attention module rotates its heads.
        query_scale: A factor of each token's query, [B or 1, T], from the attention module and
            positions int64[B or 1, T]; None: 1.
        clip: The limit to which an attention module clips q, k and v; None: none.
        soft_cap: The attention module's attribute for the cap of scores, read by "eager" alone.
        sinks: The attention module's attribute for one more score of each head, which takes part in
            the softmax and multiplies no value.
        multiplier: The layer's attribute for the factor of both branches.
        logit_scale: The factor of logits, from the causal language model.
        logit_cap: The cap of logits, from the causal language model; None: none.
    """

    attention_norm: str | None = "input_layernorm"
    after_attention: str | None = None
    mlp_norm: str | None = "post_attention_layernorm"
    after_mlp: str | None = None
    mlp: str = "mlp"
    final_norm: str = "norm"
    parallel: bool = False
    centered: bool = False
    unit_offset: bool = False
    eps: float | None = None
    head_norms: tuple[str, str] = ("q_norm", "k_norm")
    whole_norms: bool = False
    norm_after: bool = False
    interleaved: bool = False
    angles: str = "repeated"
    rotates: Callable[[Any], bool] = lambda attention: True
    query_scale: Callable[[Any, torch.Tensor], torch.Tensor | None] = lambda *_: None
    clip: Callable[[Any], float | None] = lambda attention: None
    soft_cap: str | None = None
    sinks: str | None = None
    multiplier: str | None = None
    logit_scale: Callable[[Any], float] = lambda hf: 1.0
    logit_cap: Callable[[Any], float | None] = lambda hf: None


def _scale_by_length(attention: Any, positions: torch.Tensor) -> torch.Tensor | None:
    """Beyond the length of training, queries grow with the logarithm of their position."""
    parameters = attention.config.rope_parameters
    beta = parameters.get("llama_4_scaling_beta")
    if not beta:
        return None
    return 1 + beta * torch.log1p(positions // parameters["original_max_position_embeddings"])


LLAMA = Block()
GEMMA = Block(unit_offset=True)
GEMMA_2 = replace(
    GEMMA,
    after_attention="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    after_mlp="post_feedforward_layernorm",
    soft_cap="attn_logit_softcapping",
    logit_cap=lambda hf: hf.config.final_logit_softcapping,
)
NORMS_AFTER = Block(
    attention_norm=None,
    after_attention="post_attention_layernorm",
    mlp_norm=None,
    after_mlp="post_feedforward_layernorm",
)
GLM = Block(interleaved=True)
LAYER_NORMS = Block(centered=True)
GRANITE = replace(
    LLAMA,
    multiplier="residual_multiplier",
    logit_scale=lambda hf: 1 / hf.config.logits_scaling,
)
HUNYUAN = replace(LLAMA, head_norms=("query_layernorm", "key_layernorm"), norm_after=True)
COHERE = Block(
    mlp_norm=None,
    parallel=True,
    centered=True,
    interleaved=True,
    angles="doubled",
    logit_scale=lambda hf: hf.logit_scale,
)

FAMILIES = {
    "arcee": LLAMA,
    "cohere": COHERE,
    "cohere2": replace(COHERE, rotates=lambda attention: attention.sliding_window is not None),
    "dots1": LLAMA,
    "ernie4_5": GLM,
    "ernie4_5_moe": GLM,
    "exaone4": replace(
        NORMS_AFTER,
        rotates=lambda attention: attention.sliding_window is None or attention.is_sliding,
    ),
    "flex_olmo": replace(NORMS_AFTER, whole_norms=True),
    "gemma": GEMMA,
    "gemma2": GEMMA_2,
    "gemma3_text": replace(GEMMA_2, soft_cap=None),
    "glm": GLM,
    "glm4": replace(
        GLM, after_attention="post_self_attn_layernorm", after_mlp="post_mlp_layernorm"
    ),
    "glm4_moe": LLAMA,
    "gpt_oss": replace(LLAMA, angles="single", sinks="sinks"),
    "granite": GRANITE,
    "granite_swa": replace(
        GRANITE,
        sinks="sinks",
        rotates=lambda attention: bool(attention.config.layer_rope_theta[attention.layer_idx]),
    ),
    "granitemoe": replace(GRANITE, mlp="block_sparse_moe"),
    "helium": GLM,
    "hunyuan_v1_dense": HUNYUAN,
    "hunyuan_v1_moe": HUNYUAN,
    "llama": LLAMA,
    "ministral": LLAMA,
    "ministral3": replace(LLAMA, query_scale=_scale_by_length),
    "mistral": LLAMA,
    "mixtral": LLAMA,
    "minimax_m2": replace(LLAMA, whole_norms=True),
    "nemotron": replace(LAYER_NORMS, unit_offset=True),
    "olmo": replace(
        LLAMA, centered=True, eps=1e-5, clip=lambda attention: attention.config.clip_qkv
    ),
    "olmo2": replace(NORMS_AFTER, whole_norms=True),
    "olmo3": replace(NORMS_AFTER, whole_norms=True),
    "olmoe": replace(LLAMA, whole_norms=True, clip=lambda attention: attention.config.clip_qkv),
    "phi": replace(
        LAYER_NORMS,
        mlp_norm=None,
        parallel=True,
        final_norm="final_layernorm",
        head_norms=("q_layernorm", "k_layernorm"),
    ),
    "phi3": LLAMA,
    "phimoe": LAYER_NORMS,
    "qwen2": LLAMA,
    "qwen2_moe": LLAMA,
    "qwen3": LLAMA,
    "qwen3_moe": LLAMA,
    "seed_oss": LLAMA,
    "smollm3": replace(LLAMA, rotates=lambda attention: attention.use_rope),
    "stablelm": replace(LAYER_NORMS, head_norms=("q_layernorm", "k_layernorm")),
    "starcoder2": LAYER_NORMS,
}


@dataclass(frozen=True)
class Norm:
    """A norm over the last dimension. Its weight may be streamed, so each run reads it again."""

    module: Any
    eps: float

    @property
    def weight(self) -> torch.Tensor | None:
        return getattr(self.module, "weight", None)

    @property
    def bias(self) -> torch.Tensor | None:
        return getattr(self.module, "bias", None)


@dataclass(frozen=True)
class Layer:
    """The parts of one decoder layer.

    `qkv` and `gate_up` are linear maps whose outputs are columns of one tensor. `own_mlp` is the
    family's module, which runs as it is; None if gate_up, activation and down replace it. With
    `parallel`, the mlp reads the input of attention. With `norms_apart`, q and k are normed before
    `rotary`.
    """

    attention: Any  # the family's module
    attention_norm: Norm | None
    qkv: tuple[nn.Linear, ...]
    q_norm: Norm | None
    k_norm: Norm | None
    output: nn.Linear
    after_attention: Norm | None
    mlp_norm: Norm | None
    own_mlp: Any | None
    gate_up: tuple[nn.Linear, ...]
    activation: str
    down: Any  # a linear map
    after_mlp: Norm | None
    parallel: bool
    norms_apart: bool
    num_heads: int
    num_kv_heads: int
    scale: float
    soft_cap: float | None
    sinks_name: str | None
    multiplier: float
    clip: float | None
    rotates: bool

    @property
    def sinks(self) -> torch.Tensor | None:
        """One more score of each head, [H]. It may be streamed, so each run reads it again."""
        return None if self.sinks_name is None else getattr(self.attention, self.sinks_name)

    @property
    def mlp_maps(self) -> tuple[nn.Linear, ...]:
        """The linear maps of a mlp that the operators run."""
        return () if self.own_mlp is not None else (*self.gate_up, self.down)


def layer_of(block: Block, module: Any, is_eager: bool) -> Layer:
    """Find the parts of a family's decoder layer. Raises AttributeError if one is missing."""
    attention, mlp = module.self_attn, getattr(module, block.mlp)
    packed = hasattr(attention, "qkv_proj")
    qkv = (
        (attention.qkv_proj,) if packed else (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    output = attention.o_proj if hasattr(attention, "o_proj") else attention.dense
    gated = _gated_parts(mlp)
    gate_up, activation, down = gated or ((), "", None)
    num_heads = output.in_features // attention.head_dim
    all_heads = sum(linear.out_features for linear in qkv) // attention.head_dim

    def norm(name: str | None) -> Norm | None:
        held = None if name is None else getattr(module, name)
        return None if held is None else norm_of(block, held)

    q_norm, k_norm = (
        norm_of(block, getattr(attention, name)) if hasattr(attention, name) else None
        for name in block.head_norms
    )
    mlp_norm = norm(block.mlp_norm)
    if block.sinks is not None:
        getattr(attention, block.sinks)
    return Layer(
        attention=attention,
        attention_norm=norm(block.attention_norm),
        qkv=qkv,
        q_norm=q_norm,
        k_norm=k_norm,
        output=output,
        after_attention=norm(block.after_attention),
        mlp_norm=mlp_norm,
        own_mlp=None if gated else mlp,
        gate_up=gate_up,
        activation=activation,
        down=down,
        after_mlp=norm(block.after_mlp),
        parallel=block.parallel or (block.mlp_norm is not None and mlp_norm is None),
        norms_apart=q_norm is not None
        and (block.whole_norms or block.centered or _dimensions(q_norm.weight) == 2),
        num_heads=num_heads,
        num_kv_heads=(all_heads - num_heads) // 2,
        scale=attention.scaling,
        soft_cap=getattr(attention, block.soft_cap) if block.soft_cap and is_eager else None,
        sinks_name=block.sinks,
        multiplier=getattr(module, block.multiplier) if block.multiplier else 1.0,
        clip=block.clip(attention),
        rotates=block.rotates(attention),
    )


def _gated_parts(mlp: Any) -> tuple[tuple[nn.Linear, ...], str, nn.Linear] | None:
    """The maps of a gated mlp that `gated_mlp` runs, and its activation; None for another one."""
    act = mlp.act_fn if hasattr(mlp, "act_fn") else getattr(mlp, "activation_fn", None)
    kind = type(act)
    activation = ACTIVATIONS.get(f"{kind.__module__}.{kind.__qualname__}")
    packed = hasattr(mlp, "gate_up_proj")
    names = ("gate_up_proj", "down_proj") if packed else ("gate_proj", "up_proj", "down_proj")
    parts: list[Any] = [getattr(mlp, name, None) for name in names]
    if activation is None or not all(isinstance(part, nn.Linear) for part in parts):
        return None
    *gate_up, down = parts
    return tuple(gate_up), activation, down


def _dimensions(weight: torch.Tensor | None) -> int:
    return 0 if weight is None else weight.dim()


def norm_of(block: Block, module: Any) -> Norm:
    """A family's norm, by its module."""
    eps = block.eps
    if eps is None:
        eps = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps
    return Norm(module, eps)
