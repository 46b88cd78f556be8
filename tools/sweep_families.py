"""Build a tiny random model of every family of the installed transformers, measure how far
fastprune serves it, and write the table of docs/models.md.

    python tools/sweep_families.py [NAME ...] [--json results.json] [--write docs/models.md]

A case is an entry of transformers' mappings of causal, image-text and multimodal models. Each runs
in a process of its own, with a time limit. Losses are compared with those of transformers on a copy
whose blocks are physically removed; where the family's own code cannot run such a copy, on one in
whose place the removed layers return their input.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import inspect
import json
import multiprocessing
import os
import queue
import re
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", HF_HUB_DISABLE_PROGRESS_BARS="1")

import numpy as np
import torch
import transformers as tf
from torch import nn
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import fastprune as fp
from fastprune.cli.support import support_of
from fastprune.models.text import auto_class

BLOCKS = 6
SPAN = 12  # of windows and chunks: shorter than the rows
ROWS = [np.random.default_rng(5).integers(8, 190, length).tolist() for length in (33, 17)]
REMOVED = [(), (1, 3), (0, 5), (2, 3, 4)]
TOLERANCE = 1e-5
SECONDS = 180  # of a case
MOST_PARAMETERS = 40_000_000
MAPPINGS = {
    "causal": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "image-text": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "multimodal": "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
}

# -- tiny configs ----------------------------------------------------------------------------------

# values by the name of a field, the first pattern that matches; of the text, and of towers
TEXT = [
    (r"pad_token_id", 0),
    (r"bos_token_id|decoder_start_token_id", 1),
    (r"(eos|sep|forced_eos)_token_id", 2),
    (r"(image|video|audio|vision|boi|eoi|boa|eoa|speech)\w*_token_(id|index)", 3),
    (r"vocab_size\w*|\w+_vocab_size", 200),
    (r"num_hidden_layers|num_layers|n_layers?|decoder_layers|num_blocks", BLOCKS),
    (r"encoder_layers|num_encoder_layers", 2),
    (r"hidden_size|n_embd|d_model|dim|emb_dim|embedding_size|lru_width|attention_hidden_size", 64),
    (r"hidden_size_per_layer_input|laurel_rank|rotary_dim", 8),
    (
        r"intermediate_size\w*|\w*ffn_dim|d_ff|dff|d_inner|ffn_hidden_size|dense_intermediate_size",
        96,
    ),
    (r"\w*expert\w*_(intermediate|hidden)_size|moe_intermediate_size|\w*ffn_hidden_size", 32),
    (r"num_attention_heads|n_heads?|num_heads|(de|en)coder_attention_heads", 4),
    (r"num_key_value_heads|num_kv_heads|kv_n_heads", 2),
    (r"head_dim|attention_head_size|v_head_dim|qk_nope_head_dim|index_head_dim|dim_head", 16),
    (r"qk_rope_head_dim", 8),
    (r"q_lora_rank", 24),
    (r"kv_lora_rank", 32),
    (r"index_n_heads", 16),
    (r"query_pre_attn_scalar", 16),
    (r"n_routed_experts", 8),
    (r"(moe_)?num_(local_)?experts", 4),
    (r"num_experts_per_tok(en)?|moe_topk|moe_k|moe_top_k|top_k_experts|n_group", 2),
    (r"topk_group|n_shared_experts|num_shared_experts|moe_num_shared_experts", 1),
    (r"first_k_dense_replace|num_dense_layers|max_window_layers", 2),
    (r"sliding_window\w*|attention_chunk_size|index_topk|window_size|attention_window_size", SPAN),
    (r"local_attention", 2 * SPAN),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|context_length", 256),
    (r"mamba_d_state|state_size|ssm_state_size|mamba_chunk_size|chunk_size|mamba_head_dim", 16),
    (r"mamba_d_head|linear_(key_|value_)?head_dim", 16),
    (r"mamba_(n|num)_heads", 8),
    (r"mamba_dt_rank|time_step_rank|linear_num_(value_)?heads", 4),
    (r"linear_num_key_heads|mamba_n_groups|n_groups", 2),
    (r"initializer_range|init_std", 0.12),
    (r"(attention_|resid_|hidden_|embd_|attn_)?dropout\w*|layerdrop", 0.0),
]
TOWER = [
    (r"(num_)?hidden_layers|depth|(encoder_)?layers?|n_layers|num_layers|num_blocks", 2),
    (
        r"hidden_size|embed_dim|d_model|projection_dim|vision_output_dim|hidden_dim|projector_\w+_dim",
        32,
    ),
    (r"(output|text_hidden|out_hidden)_(dim|size)|output_dim", 64),
    (r"intermediate_size|mlp_dim|encoder_ffn_dim|ffn_dim", 48),
    (r"(num_)?(attention_)?heads|encoder_attention_heads|num_key_value_heads", 2),
    (r"head_dim", 16),
    (r"image_size", 32),
    (r"patch_size", 8),
    (r"num_position_embeddings|num_mel_bins", 16),
    (r"max_(source_positions|position_embeddings)|vocab_size", 64),
    (r"fullatt_block_indexes", [1]),
    (r"deepstack_visual_indexes", [0, 1]),
]
OPTIONAL = ("q_lora_rank", "head_dim", "sliding_window", "num_key_value_heads", "pad_token_id")
MIXED = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"]
MIXED += ["full_attention", "sliding_attention"]
LINEAR = [kind.replace("sliding", "linear") for kind in MIXED]
MOE = ["dense", "sparse", "sparse", "dense", "sparse", "sparse"]
SHARED_ATTENTION: dict[str, Any] = {
    "layers_block_type": ["mamba", "mamba", "hybrid"] * 2,
    "use_mamba_kernels": False,
}
KOSMOS = {"embed_dim": 64, "layers": BLOCKS, "ffn_dim": 96, "attention_heads": 4}
LATENT = {"num_key_value_heads": 4}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}}
HALF_MROPE = {
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e4,
        "mrope_section": [2, 1, 1],
        "partial_rotary_factor": 0.5,
    }
}
BY_WINDOW, BY_LINEAR = {"layer_types": MIXED}, {"layer_types": LINEAR}
# fields that a family needs beyond the patterns; its own names, by model_type
FAMILIES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32"), LATENT),
    **dict.fromkeys(("glm4_moe_lite", "glm_moe_dsa", "minicpm3", "youtu", "mistral4"), LATENT),
    **dict.fromkeys(("afmoe", "cohere2", "cwm", "exaone4", "gemma2"), BY_WINDOW),
    **dict.fromkeys(("gemma3_text", "gpt_oss", "ministral", "olmo3"), BY_WINDOW),
    **dict.fromkeys(("qwen3_5_text", "qwen3_5_moe_text"), BY_LINEAR),
    **dict.fromkeys(("qwen3_next", "olmo_hybrid", "granitemoehybrid"), BY_LINEAR),
    **dict.fromkeys(("qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text", "glm_ocr_text"), MROPE),
    **dict.fromkeys(("qwen3_vl_moe_text", "qwen2_5_omni_text", "qwen3_omni_moe_text"), MROPE),
    **dict.fromkeys(("paddleocr_vl_text", "cosmos3_edge_text", "cosmos3_omni_text"), MROPE),
    **dict.fromkeys(("glm4v_text", "glm4v_moe_text", "glm46v_text"), HALF_MROPE),
    "kimi_linear": {"layer_types": LINEAR, "mlp_layer_types": MOE, **LATENT},
    "qwen2_moe": {"mlp_only_layers": [1, 4]},
    "qwen3_moe": {"mlp_only_layers": [1, 4]},
    "lfm2": {"full_attn_idxs": [1, 4], "block_auto_adjust_ff_dim": False},
    "lfm2_moe": {"layer_types": [k.replace("linear_attention", "conv") for k in LINEAR]},
    "minimax": {"layer_types": LINEAR, "block_size": 8, "sliding_window": None},
    "bamba": {"attn_layer_indices": [1, 4]},
    "falcon_h1": {"mamba_d_ssm": 128, "lm_head_multiplier": 1.3},
    "jamba": {"attn_layer_period": 3, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 2},
    "nemotron_h": {
        "layers_block_type": [LINEAR[0], "moe", "full_attention", "mlp", LINEAR[0], LINEAR[1]],
        "use_mamba_kernels": False,
        "n_groups": 2,
        "n_group": 1,
        "moe_shared_expert_intermediate_size": 32,
        "sliding_window": None,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 3]]},
    "dbrx": {
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "hidden_size": 64},
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
    },
    "dots1": {
        "num_key_value_heads": 4,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
    },
    "zamba": {"attention_head_dim": 32, "attention_hidden_size": 128, **SHARED_ATTENTION},
    "zamba2": SHARED_ATTENTION,
    "zaya": {"num_experts_per_tok": 1},
    "deepseek_v2": {"num_experts_per_tok": 2, **LATENT},
    "glm5_next_text": {"qk_rope_head_dim": 0, "index_kpool": 4, **LATENT},
    "longcat_flash": {
        "num_hidden_layers": 2 * BLOCKS,
        "num_key_value_heads": 4,
        "n_routed_experts": 6,
        "zero_expert_num": 2,
        "head_dim": 8,
    },
    "xlm": {"causal": True, "use_lang_emb": False},
    "smollm3": {"no_rope_layers": [1, 0, 1, 1, 0, 1]},
    "llama4_text": {
        "layer_types": [kind.replace("sliding", "chunked") for kind in MIXED],
        "no_rope_layers": [1, 0, 1, 1, 0, 1],
        "moe_layers": [1, 2, 5],
    },
    "gemma3n_text": {
        "layer_types": MIXED,
        "num_kv_shared_layers": 0,
        "activation_sparsity_pattern": [0.0] * BLOCKS,
    },
    "gemma4_text": {"layer_types": [*MIXED[:-1], "full_attention"], "num_kv_shared_layers": 0},
    "gemma4_unified_text": {
        "layer_types": [*MIXED[:-1], "full_attention"],
        "num_kv_shared_layers": 0,
    },
    "deepseek_ocr2_text": {
        "mlp_layer_types": MOE,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
    },
    **dict.fromkeys(("kosmos_2_text_model", "kosmos_2_5_text_model"), KOSMOS),
    "janus_vqgan": {
        "base_channels": 32,
        "embed_dim": 8,
        "num_embeddings": 16,
        "latent_channels": 8,
        "channel_multiplier": [1, 1],
        "num_patches": 16,
    },
    "cohere_compass_text": {
        "layer_types": MIXED,
        "rope_parameters": dict.fromkeys(
            ("sliding_attention", "full_attention"), MROPE["rope_parameters"]
        ),
    },
    "ernie4_5_vl_moe_text": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [3, 3, 2]},
        "moe_intermediate_size": [32, 16],
        "moe_num_experts": 4,
        "mlp_layer_types": MOE,
    },
    "chameleon_vqgan": {"base_channels": 32, "channel_multiplier": [1, 1], "num_embeddings": 16},
    "emu3_vqgan": {"base_channels": 32, "channel_multiplier": [1, 1], "attn_resolutions": []},
    "chameleon": {"vocabulary_map": {"<image>": 3, "IMGIMGAA": 4}},
    "emu3": {"vocabulary_map": {"<image>": 3, "<|visual token 000000|>": 4}},
    "hunyuan_vl_text": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": [2, 2, 2, 2],
            "xdrope_section": [2, 2, 2, 2],
        }
    },
    "fun_asr_nano": {"adaptor_config": {"hidden_size": 64, "intermediate_size": 16}},
    "fun_asr_nano_encoder": {"num_hidden_layers": 3, "num_timestamp_prediction_layers": 1},
    "gemma3n_vision": {"architecture": "test_vit"},
    "timm_wrapper": {
        "architecture": "test_vit",
        "hidden_size": 64,
        "model_args": {"embed_dim": 64},
    },
    "granite4_vision": {"deepstack_layer_map": [[0, 1], [1, 3]], "downsample_rate": "1/2"},
    "muse_glimmer": {"projector_hidden_size": 64},
    "mllama_text_model": {"cross_attention_layers": [1, 4]},
    "recurrent_gemma": {"block_types": ["recurrent", "attention", "recurrent"]},
    "rwkv": {"intermediate_size": 96},
    "xlstm": {"qk_dim_factor": 0.5, "v_dim_factor": 1.0},
}
# families whose own code picks weights by a layer's place in the list: after a cut it would pick
# those of another layer
PICKED_BY_PLACE = ("zamba2",)
# the text of a composite whose config leaves its kind open
TEXT_KINDS = {"granite4_vision": "granite"}
TEXT_PARTS = ("text_config", "llm_config", "decoder", "language_config", "thinker_config")


def tiny_config(kind: type, patterns: list = TEXT) -> Any:
    """A config of a class with all its sizes small."""
    own = dict(FAMILIES.get(kind.model_type, {}))
    fields = {
        name: field.default
        for name, field in inspect.signature(kind.__init__).parameters.items()
        if field.kind not in (field.VAR_KEYWORD, field.VAR_POSITIONAL) and name != "self"
    }
    fields |= {name: f.default for name, f in getattr(kind, "__dataclass_fields__", {}).items()}
    names = getattr(kind, "attribute_map", {})
    values = {}
    for name, default in fields.items():
        if name in own or names.get(name) in fields or (default is None and name not in OPTIONAL):
            continue
        if isinstance(default, (dict, property, list)):
            continue
        value = next((value for pattern, value in patterns if re.fullmatch(pattern, name)), None)
        if value is not None:
            values[name] = value
    for name, part in (getattr(kind, "sub_configs", None) or {}).items():
        if name in own:
            continue
        if part is tf.AutoConfig or part.__name__ == "AutoConfig":
            part = _kind_of_part(kind, name)
        if part is not None:
            values[name] = tiny_config(part, TEXT if name in TEXT_PARTS else TOWER)
    return kind(**{**values, **own})


def _kind_of_part(kind: type, name: str) -> type | None:
    if name in TEXT_PARTS and kind.model_type in TEXT_KINDS:
        return CONFIG_MAPPING[TEXT_KINDS[kind.model_type]]
    part = getattr(kind(), name, None)
    return type(part) if isinstance(part, tf.PretrainedConfig) else None


def build(config: Any, seed: int = 0) -> Any:
    """A random model in which every block matters: norms and biases are random, too."""
    chosen = auto_class(config)
    with torch.device("meta"), contextlib.suppress(Exception):
        count = sum(p.numel() for p in chosen.from_config(copy.deepcopy(config)).parameters())
        if count > MOST_PARAMETERS:
            raise SystemExit(f"too large: {count} parameters")
    torch.manual_seed(seed)
    hf = chosen.from_config(config).float().eval()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, weights in hf.named_parameters():
            noise = torch.randn(weights.shape, generator=generator)
            if not weights.isfinite().all():
                weights.copy_(0.1 * noise)
            elif weights.dim() < 2:
                weights += 0.1 * noise
            elif float(weights.std()) < 0.05 and "A_log" not in name:
                weights.copy_(0.1 * noise)
    return hf


# -- references ------------------------------------------------------------------------------------


class PassedOver(nn.Module):
    """In the place of a layer: returns the states that it is given, in the layer's kind of
    output."""

    def __init__(self, layer: nn.Module, length: int | None):
        super().__init__()
        self.__dict__["_layer"], self.__dict__["_length"] = layer, length

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_layer"], name)

    def forward(self, states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        length = self.__dict__["_length"]
        return states if length is None else (states, *[None] * (length - 1))


def removed_physically(hf: Any, path: str, removed: tuple[int, ...]) -> Any:
    """A deep copy without these layers: its list, its configs' lists by layer, and the indices that
    modules hold."""
    hf = copy.deepcopy(hf)
    layers = hf.get_submodule(path)
    kept = [i for i in range(len(layers)) if i not in removed]
    configs = {id(m.config): m.config for m in hf.modules() if hasattr(m, "config")}
    with contextlib.suppress(Exception):
        text = hf.config.get_text_config(decoder=True)
        configs[id(text)] = text
    for config in configs.values():
        if getattr(config, "num_hidden_layers", None) not in (len(layers), 2 * len(layers)):
            continue
        for name, value in list(vars(config).items()):
            by_layer = isinstance(value, (list, tuple)) and len(value) == len(layers)
            if by_layer and "token" not in name and "multiplier" not in name:
                setattr(config, name, type(value)(value[i] for i in kept))
        config.num_hidden_layers = config.num_hidden_layers // len(layers) * len(kept)
    above, _, last = path.rpartition(".")
    setattr(hf.get_submodule(above), last, nn.ModuleList(layers[i] for i in kept))
    for place, layer in enumerate(hf.get_submodule(path)):
        for module in layer.modules():
            if isinstance(vars(module).get("layer_idx"), int):
                module.layer_idx = place
    return hf


def passed_over(hf: Any, path: str, removed: tuple[int, ...]) -> Any:
    hf = copy.deepcopy(hf)
    layers, lengths = hf.get_submodule(path), {}

    def note(index: int) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            lengths[index] = len(output) if isinstance(output, (tuple, list)) else None

        return hook

    hooks = [layer.register_forward_hook(note(i)) for i, layer in enumerate(layers)]
    loss(hf, ROWS[1:])
    for handle in hooks:
        handle.remove()
    for index in removed:
        layers[index] = PassedOver(layers[index], lengths[index])
    return hf


def token_losses(hf: Any, row: list[int]) -> np.ndarray:
    """-log p of each token but the first, float64."""
    ids = torch.tensor([row])
    with torch.no_grad():
        logits = hf(input_ids=ids, use_cache=False).logits[0].double()
    return -logits.log_softmax(-1)[range(len(row) - 1), row[1:]].numpy()


def loss(hf: Any, rows: list[list[int]] = ROWS) -> float:
    return float(np.concatenate([token_losses(hf, row) for row in rows]).mean())


def reference(hf: Any, path: str, removed: tuple[int, ...]) -> Any:
    if not removed:
        return hf
    if hf.config.model_type in PICKED_BY_PLACE:
        return passed_over(hf, path, removed)
    try:
        cut = removed_physically(hf, path, removed)
        loss(cut)
        return cut
    except Exception:  # the family's own code reads more than its layers
        return passed_over(hf, path, removed)


# -- one case --------------------------------------------------------------------------------------


def off(result: float, expected: float) -> float:
    return abs(result - expected) / abs(expected)


def measure(model_type: str) -> dict[str, Any]:
    """The measurements of a family. "refused" is fastprune's own line, "unbuilt" the reason for
    which no tiny model was made."""
    try:
        hf = build(tiny_config(CONFIG_MAPPING[model_type]))
        dense = loss(hf)
    except BaseException as error:
        line = next(iter(str(error).splitlines()), "")
        try:
            fp.load_model(hf)
        except fp.InputError as refusal:
            return {"refused": refusal.message}
        except BaseException:
            return {"unbuilt": f"{type(error).__name__}: {line}"[:200]}
        return {"unbuilt": f"{type(error).__name__}: {line}"[:200]}
    try:
        model = fp.load_model(hf)
        fp.Evaluator(model, fp.Perplexity(fp.TokenBatch.from_ids(ROWS)))
    except fp.InputError as refusal:
        return {"refused": refusal.message}
    path, errors = ".".join(model.path), {}
    found: dict[str, Any] = {"support": support_of(model), "errors": errors, "dense": dense}
    references = [reference(hf, path, removed) for removed in REMOVED]
    expected = [loss(of) for of in references]

    def scored(opened: Any) -> float:
        ev = fp.Evaluator(opened, fp.Perplexity(fp.TokenBatch.from_ids(ROWS)))
        losses = ev.score(fp.from_removed(REMOVED, ev.num_units))
        return max(map(off, losses, expected))

    def questions() -> float:
        prompt, tails = ROWS[0][:15], ([9, 20, 31], [8, 9], [41, 50, 61, 70])
        batch = fp.TokenBatch.from_continuations([[(prompt + tail, 15) for tail in tails]])
        sizes = np.array([3, 2, 4])
        tasks = fp.Tasks(batch, np.zeros(3, dtype=int), np.array([1]), sizes, sizes)
        ev = fp.Evaluator(model, fp.TaskMargin(tasks))
        sums = ev.sums(fp.from_removed([REMOVED[1]], ev.num_units))[0, 0]
        losses = [token_losses(references[1], prompt + tail)[14:].sum() for tail in tails]
        return max(map(off, sums, losses))

    steps: dict[str, Any] = {"blocks": lambda: scored(model), "questions": questions}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "model"
        hf.save_pretrained(folder)
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))

        def exported() -> float:
            fp.export(fp.load_model(folder), Path(place) / "pruned", removed=REMOVED[1])
            again = type(hf).from_pretrained(Path(place) / "pruned").eval()
            return off(loss(again), expected[1])

        steps |= {
            "folder": lambda: scored(fp.load_model(folder)),
            "streaming": lambda: scored(fp.load_model(folder, weights_bytes=4 * size)),
            "export": exported,
        }
        for name, step in steps.items():
            try:
                errors[name] = step()
            except Exception as error:
                line = next(iter(str(error).splitlines()), type(error).__name__)
                errors[name] = line.replace(place, "")[:200]
    return found


def in_a_process(model_type: str, seconds: int = SECONDS) -> dict[str, Any]:
    context = multiprocessing.get_context("fork")
    results: Any = context.Queue()

    def work() -> None:
        warnings.simplefilter("ignore")
        tf.utils.logging.set_verbosity_error()
        tf.utils.logging.disable_progress_bar()
        torch.set_num_threads(1)
        try:
            results.put(measure(model_type))
        except BaseException as error:
            results.put({"failed": f"{type(error).__name__}: {error}"[:300]})

    process = context.Process(target=work)
    process.start()
    try:
        return results.get(timeout=seconds)
    except queue.Empty:
        return {"failed": f"no result within {seconds} s"}
    finally:
        process.kill()
        process.join()


# -- the table -------------------------------------------------------------------------------------


def is_exact(found: dict[str, Any], name: str) -> bool:
    error = found.get("errors", {}).get(name)
    return isinstance(error, float) and error <= TOLERANCE


def is_wrong(found: dict[str, Any]) -> bool:
    """Whether a number came out, and is not transformers'."""
    errors = found.get("errors", {}).values()
    return any(isinstance(error, float) and not error <= TOLERANCE for error in errors)


def row_of(name: str, found: dict[str, Any]) -> str:
    support = found["support"]
    rows = support["questions"].startswith("rows")
    cells = [
        name,
        "yes" if not support["sublayers"].startswith("no") else "",
        ("rows" if rows else "trees") if is_exact(found, "questions") else "",
        support["path"].split()[0],
        "yes" if is_exact(found, "streaming") else "",
        "yes" if is_exact(found, "export") else "",
    ]
    return f"| {' | '.join(cells)} |"


TABLE = "| family | sublayers | questions | path | streaming | export |\n|---|---|---|---|---|---|"


def page(results: dict[str, dict[str, Any]]) -> str:
    """The generated part of docs/models.md."""
    exact = {name: r for name, r in results.items() if is_exact(r, "blocks") and not is_wrong(r)}
    refused = {name: r["refused"] for name, r in results.items() if "refused" in r}
    wrong = sorted(name for name, found in results.items() if is_wrong(found))
    others = sorted(results.keys() - exact.keys() - refused.keys() - set(wrong))
    lines = [f"Measured with transformers {tf.__version__} by `tools/sweep_families.py`.", ""]
    kinds = {
        "Text": [n for n in exact if not exact[n]["support"]["inputs"].startswith("text only")],
        "Text of models with other inputs": [
            n for n in exact if exact[n]["support"]["inputs"].startswith("text only")
        ],
    }
    for title, names in kinds.items():
        lines += [f"### {title}: {len(names)} families", "", TABLE]
        lines += [row_of(name, exact[name]) for name in sorted(names)]
        lines.append("")
    lines += [f"### Refused: {len(refused)} families", "", "| family | reason |", "|---|---|"]
    for name, reason in sorted(refused.items()):
        short = re.sub(r".*cannot be run block by block: ", "", reason)
        lines.append(f"| {name} | {short.replace('|', '/')} |")
    if wrong:
        lines += ["", f"Other numbers than transformers': {', '.join(wrong)}."]
    lines += ["", f"Not measured, since no tiny model was made of it: {', '.join(others)}.", ""]
    return "\n".join(lines)


BEGIN, END = "<!-- begin: tools/sweep_families.py -->", "<!-- end: tools/sweep_families.py -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    names = options.names or families()
    results = {}
    if options.json and options.json.is_file():
        results = json.loads(options.json.read_text())  # measured before
    for name in names:
        if name in results:
            continue
        started = time.perf_counter()
        results[name] = in_a_process(name)
        print(
            f"{name:28s} {time.perf_counter() - started:5.1f} s  {summary(results[name])}",
            flush=True,
        )
        if options.json:
            options.json.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    if options.write:
        text = options.write.read_text()
        before, _, rest = text.partition(BEGIN)
        after = rest.partition(END)[2]
        options.write.write_text(f"{before}{BEGIN}\n{page(results)}{END}{after}")
    wrong = [name for name, found in results.items() if is_wrong(found)]
    print(f"exact {sum(is_exact(r, 'blocks') for r in results.values())}, wrong {wrong}")


def families() -> list[str]:
    """Every family of the mappings, once."""
    return list(dict.fromkeys(n for m in MAPPINGS.values() for n in getattr(modeling_auto, m)))


def summary(found: dict[str, Any]) -> str:
    if "errors" not in found:
        return str(found)[:150]
    return ", ".join(
        f"{k} {v:.0e}" if isinstance(v, float) else f"{k}: {v[:70]}"
        for k, v in found["errors"].items()
    )


if __name__ == "__main__":
    main()
