"""Folder, hub id, "demo" or a model in memory -> Model. safetensors only; every file is checked before it is read."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import torch

from ..errors import InputError
from .generic import Model

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def load_model(
    source,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    *,
    tokenizer=None,
    trust_remote_code: bool = False,
) -> Model:
    """Open a language model for scoring.

    source: "demo", a folder of safetensors, a hub id, or a transformers causal language model in memory (its
        weights are shared, and it is left as it was found; device and dtype must then stay None).
    device: by default "cuda" where there is a GPU, else "cpu". dtype: by default the checkpoint's own.
    Raises InputError for a missing or truncated shard, a folder of pickles, or a family that cannot be run.
    """
    if isinstance(source, Model):
        return source
    if not isinstance(source, (str, os.PathLike)):
        if device is not None or dtype is not None:
            raise InputError("device and dtype belong to a model that is loaded; move a model in memory yourself")
        return Model(source, tokenizer)
    name, folder = str(source), Path(source)
    if name == "demo":
        from ..demo import MODEL_DIR

        folder = MODEL_DIR
    if folder.is_dir():
        check_folder(folder)
        source = folder
    elif folder.exists():
        raise InputError(f"{name}: a model is a folder, a hub id or 'demo', not a file")
    elif not _HUB_ID.fullmatch(name) or name.startswith("."):
        raise InputError(f"{name}: no such model folder")
    device = _check_device(device)
    hf = _from_pretrained(source, name, _check_dtype(dtype), trust_remote_code).to(device).eval()
    return Model(hf, tokenizer or _load_tokenizer(source, trust_remote_code), name)


def check_folder(folder: Path) -> None:
    """Raise InputError unless the folder holds config.json and whole safetensors shards."""
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder}: holds no config.json, so it is not a model folder")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            weight_map = json.loads(index.read_text())["weight_map"]
            shards = sorted(set(weight_map.values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise InputError(f"{index}: not a readable shard index") from None
        for shard in shards:
            if not (folder / shard).is_file():
                raise InputError(f"{folder / shard}: this shard is missing, though {index.name} lists it")
            expected = {name for name, file in weight_map.items() if file == shard}
            absent = sorted(expected - check_shard(folder / shard))
            if absent:
                raise InputError(f"{folder / shard}: the tensor {absent[0]} is missing, though {index.name} lists it")
    elif (folder / "model.safetensors").is_file():
        check_shard(folder / "model.safetensors")
    elif any(path.suffix in PICKLE_SUFFIXES for path in folder.iterdir()):
        raise InputError(f"{folder}: holds pickled weights only; convert them to safetensors, pickles are never opened")
    else:
        raise InputError(f"{folder}: holds no model.safetensors and no shard index")


def check_shard(path: Path) -> set[str]:
    """Names of the tensors in a safetensors file. Raises InputError when it is not one, or is cut short."""
    size = path.stat().st_size
    with path.open("rb") as file:
        header_length = int.from_bytes(file.read(8), "little")
        if size < 8 or header_length > size - 8:
            raise InputError(f"{path}: truncated, its header is incomplete ({size} bytes)")
        try:
            header = json.loads(file.read(header_length))
            tensors = {name: entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise InputError(f"{path}: not a safetensors file") from None
    expected = 8 + header_length + max(tensors.values(), default=0)
    if size != expected:
        raise InputError(f"{path}: truncated or damaged, {size} bytes where its header promises {expected}")
    return set(tensors)


def _from_pretrained(source, name: str, dtype, trust_remote_code: bool):
    from transformers import AutoModelForCausalLM

    try:
        hf, report = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        # transformers' messages run over many lines; the first says what happened
        first_line = next(line for line in str(error).splitlines() if line.strip())
        raise InputError(f"{name}: cannot be loaded: {first_line}") from error
    for problem in ("missing_keys", "mismatched_keys"):
        if report.get(problem):
            tensor = sorted(report[problem], key=str)[0]
            raise InputError(f"{name}: the checkpoint does not fit its config ({problem.replace('_', ' ')}: {tensor})")
    return hf


def _load_tokenizer(source, trust_remote_code: bool):
    """The checkpoint's tokenizer, or None where it has none (token ids can still be scored)."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _check_device(device) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise InputError(f"device {str(device)!r} cannot be used: {str(error).splitlines()[0]}") from None
    return device


def _check_dtype(dtype) -> torch.dtype | str:
    if dtype is None:
        return "auto"
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
    if isinstance(dtype, torch.dtype) and dtype in known.values():
        return dtype
    if dtype not in known:
        raise InputError(f"dtype must be one of {', '.join(known)}, not {dtype!r}")
    return known[dtype]
