"""Checkpoints in other forms: GGUF files, quantized weights, adapters, names behind a prefix.

The usual form is a folder of floating-point weights under the family's own names.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import InputError, brief, shown
from ..io import parse_json, read_bytes

ADAPTER = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
LONGEST_FILE = 10_000_000  # bytes of an adapter's config
# methods whose weights transformers dequantizes on any device, and the packages that it needs
BITSANDBYTES = "bitsandbytes"
DEQUANTIZED = {
    "fp8": ("accelerate",),
    "mxfp4": (),
    BITSANDBYTES: ("accelerate", "bitsandbytes"),
}
# prefixes of all names if a wrapper of torch, or a model with towers, was saved
PREFIXES = ("module.", "_orig_mod.", "model._orig_mod.", "language_model.")


# -- quantized weights -----------------------------------------------------------------------------


def quantization_method(config: dict, place: str | Path) -> str | None:
    """The method that quantized a checkpoint's weights; None if they are floating-point numbers.

    Raises:
        InputError: transformers cannot dequantize weights of this method, or not without a package
            that is missing.
    """
    parts = [config, config.get("text_config")]
    quantization = next(
        (
            part["quantization_config"]
            for part in parts
            if isinstance(part, dict) and part.get("quantization_config") is not None
        ),
        None,
    )
    if quantization is None:
        return None
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if isinstance(quantization, dict) and method is None:  # the form of old releases
        method = BITSANDBYTES if "load_in_8bit" in quantization else None
    if method in DEQUANTIZED:
        packages = DEQUANTIZED[method]
        if any(importlib.util.find_spec(package) is None for package in packages):
            raise InputError(
                f"{place}: the weights are quantized by {method} (quantization_config); to "
                f"dequantize them, pip install {' '.join(packages)}"
            )
        return method
    named = brief(str(method), 40) if method else "a method without a name"
    raise InputError(
        f"{place}: the weights are quantized by {named} (quantization_config), and only floating "
        f"ones are scored; open the checkpoint that it was quantized from"
    )


def ask_to_dequantize(config: Any) -> None:
    """Let transformers dequantize the weights of a checkpoint with this config as it loads them."""
    text: Any = getattr(config, "text_config", None)
    inner = getattr(text, "quantization_config", None)
    if inner is not None:  # transformers reads only the outer config
        config.quantization_config = getattr(config, "quantization_config", None) or inner
        del text.quantization_config
    quantization = config.quantization_config
    if isinstance(quantization, dict):
        quantization["dequantize"] = True
    else:
        quantization.dequantize = True


def dequantized(hf: Any) -> Any:
    """The model with floating-point weights of one dtype, by transformers' own rules."""
    quantizer = getattr(hf, "hf_quantizer", None)
    if quantizer is not None and quantizer.quantization_config.quant_method == BITSANDBYTES:
        hf = hf.dequantize()  # the other methods dequantize as they load
    # weights of MXFP4 become bfloat16, whatever the dtype of the others
    for weights in hf.parameters():
        if weights.is_floating_point() and weights.dtype.itemsize <= hf.dtype.itemsize:
            weights.data = weights.data.to(hf.dtype)
    return hf


def forget_form(hf: Any) -> None:
    """Remove the marks of a checkpoint's form, which `save_pretrained` would write again."""
    for owner, name in ((hf.config, "quantization_config"), (hf, "hf_quantizer")):
        if hasattr(owner, name):
            delattr(owner, name)
    hf.is_quantized = False
    hf._weight_conversions = None  # transformers looks up the family's conversions again


# -- names -----------------------------------------------------------------------------------------


def common_prefix(names: Iterable[str], towers: bool) -> str:
    """The known prefix of all names of tensors; "" without one.

    `towers` says whether the family has towers, and so a part such as `language_model` of its own.
    """
    names, whole = list(names), ""
    while names:
        known = PREFIXES[:-1] if towers else PREFIXES
        prefix = next((p for p in known if all(n.startswith(whole + p) for n in names)), None)
        if prefix is None:
            break
        whole += prefix
    return whole


# -- GGUF ------------------------------------------------------------------------------------------


def check_gguf(path: Path) -> None:
    """Raise InputError unless this is a GGUF file, and its reader's packages are installed."""
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise InputError(f"{path}: not a GGUF file")
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(
            f"{path}: reading GGUF needs the package {missing[0]}: pip install 'fastprune[gguf]'"
        )


# -- adapters --------------------------------------------------------------------------------------


def adapter_base(folder: Path) -> str | None:
    """The base model that an adapter's folder names; None if the folder holds a whole model.

    Raises:
        InputError: The adapter names no base, its weights are no safetensors, or peft is missing.
    """
    if not (folder / ADAPTER).exists() or (folder / "config.json").exists():
        return None
    path = folder / ADAPTER
    config = parse_json(read_bytes(path, LONGEST_FILE), str(path), finite=False)
    base = config.get("base_model_name_or_path") if isinstance(config, dict) else None
    if not isinstance(base, str) or not base:
        raise InputError(
            f"{path}: base_model_name_or_path must be a folder or a hub id, not {shown(base)}"
        )
    if config.get("peft_type") not in ("LORA", "IA3", "LOHA", "LOKR"):
        raise InputError(
            f"{path}: adapters of the kind {shown(config.get('peft_type'))} are not merged; "
            f"merge it into the weights first"
        )
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise InputError(
            f"{folder}: holds an adapter without {ADAPTER_WEIGHTS}; pickles are never opened"
        )
    if importlib.util.find_spec("peft") is None:
        raise InputError(f"{folder}: opening an adapter needs peft: pip install 'fastprune[peft]'")
    beside = folder / base  # a relative path may also start beside the adapter
    return str(beside) if not Path(base).exists() and beside.is_dir() else base


def merged(hf: Any, folder: Path) -> Any:
    """The model with an adapter's weights merged into its own."""
    from peft import PeftModel

    try:
        adapted = PeftModel.from_pretrained(hf, os.fspath(folder), is_trainable=False)
        return adapted.merge_and_unload(safe_merge=True)
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        line = next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(
            f"{folder}: the adapter does not fit its base model: {brief(line, 200)}"
        ) from error
