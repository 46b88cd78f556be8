"""The source folder of a model, and the parts that an export takes from it.

These are the dtype of its weights, all files of its tokenizer, its own code and its generation
config.
"""

from __future__ import annotations

import json
import math
import shutil
import warnings
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import shown
from ..io import parse_json

if TYPE_CHECKING:
    import torch

    from ..models import Model
    from ..models.offload.placement import Towers

TOKENIZER_FILES = (
    "tokenizer*",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "*.jinja",
    "tekken.json",
    "normalizer.json",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template*",
    "additional_chat_templates",
    "*processor_config.json",
)


def source_folder(model: Model) -> Path | None:
    """The folder from which `load_model` opened the model; None for a model in memory."""
    if model.opened is None:
        return None
    name = str(model.opened[0][0])
    if name == "demo":
        from ..demo import MODEL_DIR

        return MODEL_DIR
    if Path(name).exists():  # an adapter's folder and a GGUF file hold no checkpoint to copy from
        return Path(name) if (Path(name) / "config.json").is_file() else None
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except Exception:  # the cache was cleared meanwhile
        return None


# -- weights ---------------------------------------------------------------------------------------


def narrowed(hf: Any, source: Path | None) -> tuple[dict[str, Any] | None, str | None]:
    """Narrow weights to the dtype of the source, for `save_pretrained`.

    A model may run in a wider dtype than its checkpoint has. A tensor is narrowed only if that
    loses nothing.

    Returns:
        The tensors by name, and the dtype for the config; None, None to save the model's own.
    """
    import torch

    from ..models.files import FLOATS, check_checkpoint, read_config, stored_dtype

    if source is None:
        return None, None
    stored = check_checkpoint(source)
    sizes: Counter[str] = Counter()
    for kind, shape in stored.values():
        sizes[kind] += math.prod(shape) if kind in FLOATS else 0
    dtypes = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
    dtype = dtypes.get(sizes.most_common(1)[0][0]) if sizes else None
    if dtype is None:
        return None, None
    result: dict[str, Any] = {}
    known: dict[tuple, Any] = {}  # tied tensors stay one
    parameters = {name for name, _ in hf.named_parameters(remove_duplicate=False)}
    lossless = True
    for name, tensor in loaded_state(hf).items():
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if key not in known:
            known[key] = _narrow(tensor, dtype)
        result[name] = known[key]
        wide = tensor.is_floating_point() and result[name].dtype.itemsize > dtype.itemsize
        lossless &= not (wide and name in parameters)
    if not lossless:  # weights have changed since they were read
        return None, None
    stated = stored_dtype(read_config(source / "config.json"), stored)
    return result, str(stated).removeprefix("torch.")


def loaded_state(hf: Any) -> dict[str, torch.Tensor]:
    """The tensors of a model by name, but for towers that stayed in their files."""
    return {name: tensor for name, tensor in hf.state_dict().items() if not tensor.is_meta}


def _narrow(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if not tensor.is_floating_point() or tensor.dtype.itemsize <= dtype.itemsize:
        return tensor
    narrow = tensor.to(dtype)
    same = ((narrow.to(tensor.dtype) == tensor) | tensor.isnan()).all()
    return narrow if bool(same) else tensor


# -- files -----------------------------------------------------------------------------------------


def save_model(hf: Any, folder: Path, source: Path | None, towers: Towers | None) -> None:
    """Write weights, config and generation config.

    An invalid generation config is written unchanged, with a warning. Weights of towers that stayed
    in their files are copied.
    """
    weights, dtype = narrowed(hf, source)
    generation, problem = getattr(hf, "generation_config", None), None
    if generation is not None:
        try:
            generation.validate(strict=True)
        except ValueError as error:
            lines = [line.lstrip("- ") for line in str(error).splitlines() if line.strip()]
            problem = lines[1] if len(lines) > 1 else str(error)
            hf.generation_config = type(generation)()  # hf is a shallow copy
    hf.save_pretrained(folder, state_dict=loaded_state(hf) if weights is None else weights)
    if towers is not None:
        _add_shard(folder, towers)
    if generation is not None and problem is not None:
        (folder / "generation_config.json").write_text(
            generation.to_json_string(use_diff=True), encoding="utf-8"
        )
        warnings.warn(
            f"the generation config is invalid, and is written unchanged: {shown(problem)}",
            stacklevel=4,
        )
    _edit(folder / "config.json", lambda config: _for_every_reader(config, dtype))


def _add_shard(folder: Path, towers: Towers) -> None:
    """Put the weights of towers beside those that were written, and an index over all."""
    from ..models.files import BITS, INDEX, check_shard

    towers.write(folder / "towers.safetensors")
    (folder / INDEX).unlink(missing_ok=True)
    paths = [*sorted(folder.glob("model*.safetensors")), folder / "towers.safetensors"]
    weight_map: dict[str, str] = {}
    size = 0
    for number, path in enumerate(paths, 1):
        shard = folder / f"model-{number:05}-of-{len(paths):05}.safetensors"
        path.rename(shard)
        tensors = check_shard(shard)
        weight_map |= dict.fromkeys(tensors, shard.name)
        size += sum(math.prod(shape) * BITS[kind] // 8 for kind, shape in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def save_tokenizer(model: Model, folder: Path, source: Path | None) -> None:
    """Write the tokenizer: the source's own files if the model has the source's tokenizer."""
    tokenizer = model.tokenizer
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    own = source is not None and str(getattr(tokenizer, "name_or_path", source)) == str(source)
    if source is None or not own:
        return
    keeps_written = tokenizer is not None and not _is_unchanged(tokenizer, source)
    for path in sorted({path for pattern in TOKENIZER_FILES for path in source.glob(pattern)}):
        target = folder / path.name
        if path.is_dir():
            shutil.copytree(path, target, dirs_exist_ok=True)
        elif path.suffix != ".py" and not (keeps_written and target.exists()):
            shutil.copyfile(path, target)


def save_code(model: Model, folder: Path, source: Path | None) -> None:
    """Write the code that the configs name, or take its names out of them."""
    own = [
        type(part).__module__.startswith("transformers_modules.")
        for part in (model.hf, model.tokenizer)
    ]
    if source is not None and any(own):
        for path in source.rglob("*.py"):
            target = folder / path.relative_to(source)
            if not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
    for name, has_code in zip(("config.json", "tokenizer_config.json"), own, strict=True):
        _edit(folder / name, lambda config, has_code=has_code: _code(config, folder, has_code))


def reader_notes(folder: Path) -> list[str]:
    """List, in sentences for its card, the parts of a checkpoint that transformers 4 misreads."""
    notes = []
    config = parse_json((folder / "config.json").read_bytes(), "config.json", finite=False)
    rope = _text_config(config).get("rope_parameters")
    if isinstance(rope, dict) and any(isinstance(value, dict) for value in rope.values()):
        notes.append(
            "Read it with transformers 5 or later: earlier releases ignore rope_parameters by kind "
            "of layer."
        )
    path = folder / "tokenizer_config.json"
    if path.is_file():
        kind = parse_json(path.read_bytes(), path.name).get("tokenizer_class")
        if kind in ("TokenizersBackend", "SentencePieceBackend"):
            notes.append(f"Its tokenizer class, {kind}, needs transformers 5 or later.")
    return notes


def _is_unchanged(tokenizer: Any, source: Path) -> bool:
    """Whether a tokenizer still equals the one in its files."""
    from transformers import AutoTokenizer

    own_code = type(tokenizer).__module__.startswith("transformers_modules.")
    try:
        fresh: Any = AutoTokenizer.from_pretrained(
            source, trust_remote_code=own_code, local_files_only=True
        )
        return all(
            getattr(fresh, name) == getattr(tokenizer, name)
            for name in ("special_tokens_map", "chat_template", "model_max_length")
        ) and bool(fresh.get_vocab() == tokenizer.get_vocab())
    except Exception:  # a tokenizer that cannot be compared is written from memory
        return False


def _edit(path: Path, change: Any) -> None:
    """Change the JSON object of a file that the export has written; skip a missing file."""
    if not path.is_file():
        return
    before = path.read_text(encoding="utf-8")
    config = parse_json(before, path.name, finite=False)
    change(config)
    if config != parse_json(before, path.name, finite=False):
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _for_every_reader(config: dict, dtype: str | None) -> None:
    """Enter the source's dtype, and rope parameters also under the names of transformers 4."""
    text = _text_config(config)
    if dtype is not None:
        for part in (config, text):
            if "dtype" in part:
                part["dtype"] = dtype
    rope = text.get("rope_parameters")
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        return
    for name in ("rope_theta", "partial_rotary_factor"):
        if name in rope:
            text.setdefault(name, rope[name])
    if rope.get("rope_type", "default") != "default":
        text.setdefault("rope_scaling", rope)


def _text_config(config: dict) -> dict:
    text = config.get("text_config")
    return text if isinstance(text, dict) else config


def _code(config: dict, folder: Path, has_code: bool) -> None:
    """Remove the names of code that did not run, or whose files the folder lacks."""
    names = config.get("auto_map")
    if not isinstance(names, dict):
        return
    classes = [
        name
        for value in names.values()
        for name in (value if isinstance(value, (list, tuple)) else [value])
        if isinstance(name, str)
    ]
    has_files = all(
        "--" in name or (folder / f"{name.rpartition('.')[0].replace('.', '/')}.py").is_file()
        for name in classes
    )
    if not has_code or not has_files:
        del config["auto_map"]
