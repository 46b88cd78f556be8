"""Recipes that describe a pruned model to other tools, as texts that their loaders read.

The model card is one of them. No weights are read. Each function names the source of its format.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence

from ..masks import is_mask, stretches

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
HEALING = """\
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("PATH OR HUB ID OF THIS MODEL")
lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
model = get_peft_model(model, lora)
# train on text such as the base model's, then: model.merge_and_unload().save_pretrained("healed")
"""


def mergekit(base: str, sequence: Sequence[int], dtype: str) -> str:
    """Write a mergekit configuration of method passthrough, with slices of the base model.

    Consecutive blocks are one slice; a repeated block begins another. A `layer_range` leaves out
    its end. Format: `slices`, `sources`, `layer_range` and `merge_method: passthrough` of
    arcee-ai/mergekit (README.md, docs/merge_methods.md, `InputSliceDefinition` of
    mergekit/config.py).

    Examples:
        >>> from fastprune.exports.recipes import mergekit
        >>> print(mergekit("org/base", (0, 1, 3), "bfloat16"), end="")
        slices:
          - sources:
              - model: "org/base"
                layer_range: [0, 2]
          - sources:
              - model: "org/base"
                layer_range: [3, 4]
        merge_method: passthrough
        dtype: bfloat16
    """
    source = f"  - sources:\n      - model: {json.dumps(base)}\n        layer_range: "
    slices = "".join(f"{source}[{first}, {last + 1}]\n" for first, last in stretches(sequence))
    return f"slices:\n{slices}merge_method: passthrough\ndtype: {dtype}\n"


def llama_cpp(removed: Iterable[int], warning: str | None = None, base: str = "") -> str:
    """Write the option of llama-quantize that leaves these blocks out of a GGUF file.

    It is the last line of the text. If the base model is a GGUF file, the line is the complete
    command, which copies the remaining tensors. Format: `--prune-layers L0,L1,...` and the type
    COPY of ggml-org/llama.cpp, tools/quantize (README and usage).
    """
    comment = f"# {warning}\n" if warning else ""
    option = f"--prune-layers {','.join(map(str, sorted(removed)))}"
    if base.endswith(".gguf"):
        files = shlex.join([base, f"{base.removesuffix('.gguf')}-pruned.gguf"])
        return f"{comment}llama-quantize {option} {files} COPY\n"
    return f"{comment}{option}\n"


def llama_cpp_warning(per_layer: Mapping[str, Sequence]) -> str | None:
    """The warning about --prune-layers for a config with per-layer lists; None if none applies.

    llama-quantize lowers block_count and renumbers tensors. It keeps the length of per-layer arrays
    in the metadata, so that the file does not load (ggml-org/llama.cpp, issue 27976). If
    llama.cpp's own code holds the pattern, layers after the first removed one get their
    neighbours' settings.
    """
    mixed = [
        name for name, values in per_layer.items() if any(value != values[0] for value in values)
    ]
    if not mixed:
        return None
    return (
        f"the layers differ in {', '.join(sorted(mixed))}, which --prune-layers may leave to the "
        f"wrong layers: convert the exported checkpoint instead, and compare its perplexity in "
        f"llama.cpp with transformers'"
    )


def evopress(removed: Iterable[int], num_blocks: int) -> str:
    """Write a drop list of EvoPress: a line for each block, `none` or `attn+mlp`.

    Format: `drop_layers_from_config` of IST-DASLab/EvoPress, src/model_utils.py (its
    --drop_layer_config).
    """
    gone = set(removed)
    return "".join("attn+mlp\n" if block in gone else "none\n" for block in range(num_blocks))


def llm_drop(removed: Iterable[int]) -> str:
    """Write the entries `drop_attn_list` and `drop_mlp_list` of LLM-Drop's config.json.

    Format: CASE-Lab-UMD/LLM-Drop, the config.json files of its experiments, and
    src/llmtuner/compression/prune/models/configuration_dropped_llama.py.
    """
    blocks = sorted(removed)
    return json.dumps({"drop_attn_list": blocks, "drop_mlp_list": blocks}, indent=1) + "\n"


def model_card(
    base: str,
    sequence: Sequence[int],
    num_blocks: int,
    results: Sequence[tuple[str, str, str]],
    notes: Sequence[str],
    warning: str | None,
) -> str:
    """Write README.md of a hub repository: base model, removed blocks, results, healing.

    Args:
        base: The name of the base model.
        sequence: The blocks that run.
        num_blocks: The number of blocks of the base model.
        results: For each objective its metric with direction and data, and its value before and
            after.
        notes: Sentences on the results.
        warning: A warning about llama.cpp, or None.

    Format: the model cards of the Hugging Face hub, YAML metadata between `---` lines, then
    Markdown.
    """
    metadata = ["library_name: transformers", "pipeline_tag: text-generation"]
    if HUB_ID.fullmatch(base):
        metadata.append(f"base_model: {base}")
    metadata += ["tags:", "- depth-pruning", "- fastprune"]
    lines = [
        "---",
        *metadata,
        "---",
        "",
        f"# {base.split('/')[-1]}, {len(sequence)} of {num_blocks} blocks",
        "",
    ]
    if is_mask(sequence):
        gone = sorted(set(range(num_blocks)) - set(sequence))
        lines += [
            f"{base} without the blocks {', '.join(map(str, gone)) or '(none)'}, counted from 0."
        ]
    else:
        lines += [
            f"The blocks of {base}, counted from 0, in this order: {', '.join(map(str, sequence))}."
        ]
    lines += ["Nothing was trained: every weight is the base model's.", ""]
    if results:
        lines += ["| metric | before | after |", "|---|---|---|"]
        lines += [f"| {' | '.join(row)} |" for row in results]
        lines.append("")
    for note in notes:
        lines += [f"{note.removesuffix('.')}.", ""]
    lines += [
        "## Healing",
        "",
        "A short fine-tuning with low-rank adapters gets back part of what was lost:",
        "",
    ]
    lines += ["```python", *HEALING.splitlines(), "```", ""]
    lines += [
        "## The same for other tools",
        "",
        "`recipes/` holds this in the formats of other tools.",
    ]
    if warning:
        lines += ["", f"For llama.cpp: {warning}."]
    return "\n".join(lines) + "\n"


def all_recipes(
    base: str, sequence: Sequence[int], num_blocks: int, dtype: str, warning: str | None
) -> dict[str, str]:
    """Write all recipes, by file name; drop lists only if blocks ascend and some are left out."""
    recipes = {"mergekit.yaml": mergekit(base, sequence, dtype)}
    removed = sorted(set(range(num_blocks)) - set(sequence))
    if is_mask(sequence) and removed:
        recipes["llama.cpp.txt"] = llama_cpp(removed, warning, base)
        recipes["evopress.txt"] = evopress(removed, num_blocks)
        recipes["llm-drop.json"] = llm_drop(removed)
    return recipes
