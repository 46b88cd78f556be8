"""Recipes that describe a pruned model to other tools, as texts that their own loaders read, and a
model card.

Nothing here looks at weights. Each function names the definition of its format.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence

from ..masks import is_mask

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
    """A mergekit configuration of method passthrough: slices of the base model, half-open
    `layer_range`s.

    Consecutive blocks are one slice; a repeated block begins another. Format: `slices`, `sources`,
    `layer_range` and `merge_method: passthrough` of arcee-ai/mergekit (README.md,
    docs/merge_methods.md, and `InputSliceDefinition` of mergekit/config.py, whose range leaves out
    its end).
    """
    runs: list[list[int]] = []
    for block in sequence:
        if runs and block == runs[-1][1]:
            runs[-1][1] += 1
        else:
            runs.append([block, block + 1])
    slices = "".join(
        f"  - sources:\n      - model: {json.dumps(base)}\n        layer_range: {run}\n"
        for run in runs
    )
    return f"slices:\n{slices}merge_method: passthrough\ndtype: {dtype}\n"


def llama_cpp(removed: Iterable[int], warning: str | None = None, base: str = "") -> str:
    """The option of llama-quantize that leaves these blocks out of a GGUF file, as the last line of
    a text; for a base model that is such a file, the complete command, which copies all tensors
    that stay.

    Format: `--prune-layers L0,L1,...` and the type COPY of ggml-org/llama.cpp, tools/quantize (its
    README and usage).
    """
    comment = f"# {warning}\n" if warning else ""
    option = f"--prune-layers {','.join(map(str, sorted(removed)))}"
    if base.endswith(".gguf"):
        files = shlex.join([base, f"{base.removesuffix('.gguf')}-pruned.gguf"])
        return f"{comment}llama-quantize {option} {files} COPY\n"
    return f"{comment}{option}\n"


def llama_cpp_warning(per_layer: Mapping[str, Sequence]) -> str | None:
    """The warning about --prune-layers for a family with these per-layer lists in its config; None
    if none applies.

    llama-quantize lowers block_count and renumbers tensors, but leaves per-layer arrays of the
    metadata as long as they were, so that the file does not load (ggml-org/llama.cpp, issue 27976);
    if the pattern is in llama.cpp's own code, each layer after the first removed one takes its
    neighbour's settings.
    """
    mixed = [
        name for name, values in per_layer.items() if any(value != values[0] for value in values)
    ]
    if not mixed:
        return None
    return (
        f"the layers differ in {', '.join(sorted(mixed))}, which --prune-layers may leave to the "
        f"wrong layers: convert "
        "the exported checkpoint instead, and compare its perplexity there with transformers'"
    )


def evopress(removed: Iterable[int], num_blocks: int) -> str:
    """A drop list of EvoPress: one line for each block, `none` or `attn+mlp`.

    Format: `drop_layers_from_config` of IST-DASLab/EvoPress, src/model_utils.py (its
    --drop_layer_config).
    """
    gone = set(removed)
    return "".join("attn+mlp\n" if block in gone else "none\n" for block in range(num_blocks))


def llm_drop(removed: Iterable[int]) -> str:
    """The entries `drop_attn_list` and `drop_mlp_list` of a config.json of LLM-Drop: indices of
    blocks.

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
    """README.md of a hub repository: base model, removed blocks, results, how to heal.

    results: of each objective its metric with direction and data, and its value before and after.
    notes: sentences on these.

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
    """Texts by file name. Drop lists are included if the blocks ascend, and some are left out."""
    recipes = {"mergekit.yaml": mergekit(base, sequence, dtype)}
    removed = sorted(set(range(num_blocks)) - set(sequence))
    if is_mask(sequence) and removed:
        recipes["llama.cpp.txt"] = llama_cpp(removed, warning, base)
        recipes["evopress.txt"] = evopress(removed, num_blocks)
        recipes["llm-drop.json"] = llm_drop(removed)
    return recipes
