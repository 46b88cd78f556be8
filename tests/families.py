"""Tiny random models of every supported family, and references that share no code with fastprune.

A reference removes blocks from a deep copy of the model, or scales residual branches with forward
hooks, and takes losses from the full logits in float64.
"""

from __future__ import annotations

import copy
import warnings

import numpy as np
import torch
import transformers as tf

COMMON = {
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "attention_dropout": 0.0,
    "max_position_embeddings": 128,
}
LLAMA_LIKE = {
    **COMMON,
    "vocab_size": 97,
    "hidden_size": 36,
    "intermediate_size": 44,
    "num_hidden_layers": 5,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 10,
}
ALIGNED = {
    "hidden_size": 40,
    "intermediate_size": 48,
}  # grouped matrix products want rows of whole 16 bytes
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
WINDOW = 6  # shorter than every sequence of the tests


def _gemma2(attn_implementation: str):
    config = tf.Gemma2Config(
        **LLAMA_LIKE,
        sliding_window=WINDOW,
        query_pre_attn_scalar=10,
        attn_logit_softcapping=4.0,
        final_logit_softcapping=8.0,
        tie_word_embeddings=True,
    )
    return config, attn_implementation


CONFIGS = {
    "llama": lambda: tf.LlamaConfig(
        **LLAMA_LIKE, rope_parameters=LLAMA3_ROPE, tie_word_embeddings=False
    ),
    "llama-tied": lambda: tf.LlamaConfig(
        **(LLAMA_LIKE | {"vocab_size": 101, "num_key_value_heads": 3}),
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=True,
    ),
    "mistral": lambda: tf.MistralConfig(**LLAMA_LIKE, sliding_window=WINDOW),
    "qwen2": lambda: tf.Qwen2Config(
        **(LLAMA_LIKE | {"hidden_size": 42, "head_dim": 14}), tie_word_embeddings=True
    ),
    "qwen2-window": lambda: tf.Qwen2Config(
        **(LLAMA_LIKE | {"hidden_size": 42, "head_dim": 14}),
        use_sliding_window=True,
        sliding_window=WINDOW,
        max_window_layers=2,
    ),
    "qwen3": lambda: tf.Qwen3Config(**LLAMA_LIKE, tie_word_embeddings=False),
    "gemma2-eager": lambda: _gemma2("eager"),
    "gemma2-sdpa": lambda: _gemma2("sdpa"),
    "gemma3": lambda: tf.Gemma3TextConfig(
        **LLAMA_LIKE,
        sliding_window=WINDOW,
        query_pre_attn_scalar=10,
        layer_types=[
            "sliding_attention",
            "full_attention",
            "sliding_attention",
            "sliding_attention",
            "full_attention",
        ],
    ),
    "phi3": lambda: tf.Phi3Config(
        **(LLAMA_LIKE | {"head_dim": 12, "num_key_value_heads": 3, "vocab_size": 113})
    ),
    "olmo2": lambda: tf.Olmo2Config(**(LLAMA_LIKE | {"head_dim": 12}), tie_word_embeddings=False),
    "gpt-neox": lambda: tf.GPTNeoXConfig(
        **(COMMON | {"vocab_size": 99, "hidden_size": 36, "intermediate_size": 52}),
        num_hidden_layers=5,
        num_attention_heads=3,
        use_parallel_residual=True,
    ),
    "gpt-neox-sequential": lambda: tf.GPTNeoXConfig(
        **(COMMON | {"vocab_size": 99, "hidden_size": 36, "intermediate_size": 52}),
        num_hidden_layers=5,
        num_attention_heads=3,
        use_parallel_residual=False,
        tie_word_embeddings=True,
    ),
    "gpt2": lambda: tf.GPT2Config(
        vocab_size=103,
        n_positions=128,
        n_embd=33,
        n_layer=6,
        n_head=3,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "mixtral": lambda: tf.MixtralConfig(
        **(LLAMA_LIKE | ALIGNED | {"num_hidden_layers": 4}),
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=None,
    ),
    "qwen3-moe": lambda: tf.Qwen3MoeConfig(
        **(LLAMA_LIKE | ALIGNED),
        num_experts=5,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        norm_topk_prob=True,
        mlp_only_layers=[1],
    ),
}
FAMILIES = sorted(CONFIGS)

MIXED = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"]
MIXED.append("full_attention")
SQUARE = LLAMA_LIKE | {"head_dim": 12}
EXPERTS = {**SQUARE, **ALIGNED, "head_dim": 10, "num_attention_heads": 4}
EXPERTS |= {"num_key_value_heads": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
PARTLY_ROTATED = {
    "rope_type": "default",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
}
# more families whose blocks run on fused operators, beside those above
FUSED_CONFIGS = {
    "arcee": lambda: tf.ArceeConfig(**LLAMA_LIKE),
    "cohere": lambda: tf.CohereConfig(**SQUARE, logit_scale=0.25),
    "cohere-norms": lambda: tf.CohereConfig(**SQUARE, logit_scale=0.25, use_qk_norm=True),
    "cohere2": lambda: tf.Cohere2Config(
        **SQUARE, logit_scale=0.25, sliding_window=WINDOW, layer_types=MIXED
    ),
    "dots1": lambda: tf.Dots1Config(
        **EXPERTS, n_routed_experts=4, n_shared_experts=1, first_k_dense_replace=1
    ),
    "ernie4_5": lambda: tf.Ernie4_5Config(**LLAMA_LIKE, use_bias=True),
    "ernie4_5-moe": lambda: tf.Ernie4_5_MoeConfig(
        **(EXPERTS | {"num_experts_per_tok": 0}), moe_num_experts=4, moe_k=2
    ),
    "exaone4": lambda: tf.Exaone4Config(**LLAMA_LIKE, sliding_window=WINDOW, layer_types=MIXED),
    "exaone4-full": lambda: tf.Exaone4Config(
        **LLAMA_LIKE, sliding_window=None, layer_types=["full_attention"] * 5
    ),
    "flex_olmo": lambda: tf.FlexOlmoConfig(**EXPERTS, num_experts=4),
    "gemma": lambda: tf.GemmaConfig(**LLAMA_LIKE),
    "glm": lambda: tf.GlmConfig(
        **(LLAMA_LIKE | {"head_dim": 12}),
        rope_parameters=PARTLY_ROTATED,
    ),
    "glm4": lambda: tf.Glm4Config(
        **(LLAMA_LIKE | {"head_dim": 12}),
        rope_parameters=PARTLY_ROTATED,
    ),
    "glm4-moe": lambda: tf.Glm4MoeConfig(
        **EXPERTS,
        n_routed_experts=4,
        first_k_dense_replace=1,
        use_qk_norm=True,
        rope_parameters=PARTLY_ROTATED,
    ),
    "gpt_oss": lambda: (
        tf.GptOssConfig(
            **EXPERTS,
            num_local_experts=4,
            sliding_window=WINDOW,
            layer_types=MIXED,
            rope_parameters={
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "original_max_position_embeddings": 16,
            },
        ),
        "eager",
    ),
    "granite": lambda: tf.GraniteConfig(
        **LLAMA_LIKE,
        embedding_multiplier=3.0,
        attention_multiplier=0.2,
        residual_multiplier=0.4,
        logits_scaling=2.0,
        mlp_bias=True,
    ),
    "granite-swa": lambda: (
        tf.GraniteSWAConfig(
            **LLAMA_LIKE,
            sliding_window=WINDOW,
            layer_types=MIXED,
            layer_rope_theta=[10000.0, 0, 500.0, 0, 10000.0],
            attention_multiplier=0.2,
            residual_multiplier=0.4,
            logits_scaling=2.0,
        ),
        "eager",
    ),
    "granite-moe": lambda: tf.GraniteMoeConfig(
        **EXPERTS,
        num_local_experts=4,
        embedding_multiplier=3.0,
        attention_multiplier=0.2,
        residual_multiplier=0.4,
        logits_scaling=2.0,
    ),
    "helium": lambda: tf.HeliumConfig(**(SQUARE | {"num_key_value_heads": 3})),
    "hunyuan": lambda: tf.HunYuanDenseV1Config(**LLAMA_LIKE),
    "hunyuan-moe": lambda: tf.HunYuanMoEV1Config(
        **(EXPERTS | {"num_experts_per_tok": 0}), num_experts=4, moe_topk=2
    ),
    "minimax-m2": lambda: tf.MiniMaxM2Config(
        **EXPERTS, num_local_experts=4, rope_parameters=PARTLY_ROTATED
    ),
    "ministral": lambda: tf.MinistralConfig(**LLAMA_LIKE, sliding_window=WINDOW, layer_types=MIXED),
    "ministral3": lambda: tf.Ministral3Config(
        **LLAMA_LIKE,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "original_max_position_embeddings": 16,
            "llama_4_scaling_beta": 0.5,
        },
    ),
    "nemotron": lambda: tf.NemotronConfig(**LLAMA_LIKE, rope_parameters=PARTLY_ROTATED),
    "olmo": lambda: tf.OlmoConfig(**SQUARE, clip_qkv=1.5),
    "olmo3": lambda: tf.Olmo3Config(**SQUARE, sliding_window=WINDOW, layer_types=MIXED),
    "olmoe": lambda: tf.OlmoeConfig(**EXPERTS, num_experts=4, clip_qkv=1.5),
    "phi": lambda: tf.PhiConfig(**SQUARE, qk_layernorm=True, rope_parameters=PARTLY_ROTATED),
    "phimoe": lambda: tf.PhimoeConfig(**EXPERTS, num_local_experts=4, lm_head_bias=True),
    "qwen2-moe": lambda: tf.Qwen2MoeConfig(
        **EXPERTS, num_experts=4, shared_expert_intermediate_size=16
    ),
    "seed_oss": lambda: tf.SeedOssConfig(**LLAMA_LIKE, attention_out_bias=True),
    "smollm3": lambda: tf.SmolLM3Config(
        **LLAMA_LIKE,
        no_rope_layers=[1, 0, 1, 1, 0],
        use_sliding_window=True,
        sliding_window=WINDOW,
    ),
    "stablelm": lambda: tf.StableLmConfig(**SQUARE, rope_parameters=PARTLY_ROTATED),
    "stablelm-parallel": lambda: tf.StableLmConfig(
        **SQUARE, use_parallel_residual=True, use_qkv_bias=True, rope_parameters=PARTLY_ROTATED
    ),
    "starcoder2": lambda: tf.Starcoder2Config(**SQUARE, sliding_window=WINDOW),
}
WINDOWED = ["gemma2-eager", "gemma2-sdpa", "gemma3", "mistral", "qwen2-window"]

# where a layer's residual branches end: the last modules before each sum
POST_NORMS = ("post_attention_layernorm", "post_feedforward_layernorm")
BRANCHES = {
    "gemma2": POST_NORMS,
    "gemma3_text": POST_NORMS,
    "olmo2": POST_NORMS,
    "olmo3": POST_NORMS,
    "exaone4": POST_NORMS,
    "flex_olmo": POST_NORMS,
    "glm4": ("post_self_attn_layernorm", "post_mlp_layernorm"),
    "granitemoe": ("self_attn", "block_sparse_moe"),
    "gpt_neox": ("attention", "mlp"),
    "gpt2": ("attn", "mlp"),
}


def build(name: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes):
    """A random model of a family, in evaluation mode: norms and biases are random too, so that none
    is neutral.

    changes: attributes of its config that are to be others.
    """
    config = (CONFIGS | FUSED_CONFIGS)[name]()
    config, attn_implementation = config if isinstance(config, tuple) else (config, "sdpa")
    for attribute, value in changes.items():
        setattr(config, attribute, value)
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hf = tf.AutoModelForCausalLM.from_config(config, attn_implementation=attn_implementation)
    if dtype == torch.float64:
        hf.set_experts_implementation("eager")  # grouped matrix products know no float64
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in hf.parameters():
            if parameter.dim() == 1:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
        embeddings = hf.get_input_embeddings().weight
        embeddings[0] = embeddings[1].roll(1)  # transformers zeroes the padding token's row
    return hf.to(dtype).eval()


def layers_of(hf) -> torch.nn.ModuleList:
    """The decoder layers of a model."""
    base = hf.base_model
    return base.h if hasattr(base, "h") else base.layers


def num_blocks(hf) -> int:
    return len(layers_of(hf))


def physically_removed(hf, removed):
    """A deep copy of the model whose removed blocks are gone from its list and its config."""
    return physically_ordered(hf, [i for i in range(num_blocks(hf)) if i not in set(removed)])


def physically_ordered(hf, sequence):
    """A deep copy of the model whose list and config hold these blocks, in this order; some may
    stand repeatedly."""
    hf = copy.deepcopy(hf)
    kept = list(sequence)
    blocks = torch.nn.ModuleList(layers_of(hf)[i] for i in kept)
    if hasattr(hf.base_model, "h"):
        hf.base_model.h = blocks
    else:
        hf.base_model.layers = blocks
    for config in {id(c): c for c in (hf.config, hf.base_model.config)}.values():
        config.num_hidden_layers = len(kept)
        for name in ("layer_types", "layer_rope_theta"):
            if getattr(config, name, None) is not None:
                setattr(config, name, [getattr(config, name)[i] for i in kept])
    return hf


def with_scaled_branches(hf, scales):
    """A deep copy whose residual branches (attention, mlp of block 0, ...) are multiplied by scales
    [2 * blocks].

    scales: numbers, or a tensor that takes gradients.
    """
    scales = (
        scales if isinstance(scales, torch.Tensor) else np.asarray(scales, dtype=float).tolist()
    )
    hf = copy.deepcopy(hf)
    names = BRANCHES.get(hf.config.model_type, ("self_attn", "mlp"))
    for i, layer in enumerate(layers_of(hf)):
        for j, name in enumerate(names):
            getattr(layer, name).register_forward_hook(_scaling_hook(scales[2 * i + j]))
    return hf


def _scaling_hook(scale: float | torch.Tensor):
    def hook(module, inputs, output):
        if isinstance(output, tuple):
            return (output[0] * scale, *output[1:])
        return output * scale

    return hook


def reference_model(hf, mask, granularity: str = "block"):
    """A deep copy of the model that runs only what a mask keeps."""
    mask = np.asarray(mask, dtype=bool)
    if granularity == "block":
        return physically_removed(hf, np.flatnonzero(~mask).tolist())
    return with_scaled_branches(hf, mask.astype(float))


def full_log_probs(hf, rows) -> list[torch.Tensor]:
    """log p of every token at every position, float64 [T, V] for each row.

    All rows are run together, the shorter ones with tokens behind their end, which nothing before
    them sees.
    """
    rows = [torch.as_tensor(np.asarray(row)) for row in rows]
    with torch.no_grad():
        logits = hf(
            input_ids=torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), use_cache=False
        ).logits
    return [
        torch.log_softmax(of_row[: len(row)].double(), dim=-1)
        for row, of_row in zip(rows, logits, strict=True)
    ]


def reference_token_nll(hf, rows) -> list[np.ndarray]:
    """-log p(x_t | x_<t) of every token but the first, float64 [T - 1] for each row."""
    return [
        -log_probs[torch.arange(len(row) - 1), torch.as_tensor(np.asarray(row))[1:]].numpy()
        for row, log_probs in zip(rows, full_log_probs(hf, rows), strict=True)
    ]


def reference_loss(hf, rows) -> float:
    """Mean negative log-likelihood over all targets, in nats."""
    return float(np.concatenate(reference_token_nll(hf, rows)).mean())


def reference_losses(hf, masks, rows, granularity: str = "block") -> np.ndarray:
    """The loss of every mask, float64[N]; equal masks are computed once."""
    known: dict[bytes, float] = {}
    for mask in np.asarray(masks, dtype=bool):
        if mask.tobytes() not in known:
            known[mask.tobytes()] = reference_loss(reference_model(hf, mask, granularity), rows)
    return np.array([known[mask.tobytes()] for mask in np.asarray(masks, dtype=bool)])


def some_masks(num_units: int, count: int, seed: int) -> np.ndarray:
    """`count` masks: nothing removed, singles, all but one removed, random ones, and duplicates of
    these."""
    rng = np.random.default_rng(seed)
    masks = [np.ones(num_units, dtype=bool)]
    for unit in rng.permutation(num_units)[:6]:
        masks.append(np.arange(num_units) != unit)
        masks.append(np.arange(num_units) == unit)
    while len(masks) < count - 6:
        mask = rng.random(num_units) < rng.uniform(0.2, 0.9)
        if mask.any():
            masks.append(mask)
    masks += [masks[i] for i in rng.integers(0, len(masks), count - len(masks))]
    return np.array(masks)[rng.permutation(len(masks))]


def random_rows(vocab_size: int, lengths, seed: int = 0) -> list[list[int]]:
    """Random token ids, one row per length."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab_size, length).tolist() for length in lengths]
