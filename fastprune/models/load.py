"""Folder, hub id, "demo" or a model in memory -> Model. safetensors only; every file is checked before it is read."""

from __future__ import annotations

import math
import os
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import InputError
from ..memory import available_bytes
from ..records import brief, check_bytes, parse_json, shown
from .generic import Model, layer_paths
from .precision import has_instructions, widen
from .streaming import Stored, blocks_left_out, resident_bytes, to_device

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
LONGEST_MESSAGE = 400
MOST_OF_MEMORY = 0.8  # that is available: what weights in float32 may take, so that something is left for activations
LONGEST_HEADER = 100_000_000  # bytes; the safetensors format's own limit
# bits of one number of each dtype of the safetensors format, and those of them that weights are scored in
BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "BOOL": 8, "C64": 64}
BITS |= {"U64": 64, "U32": 32, "U16": 16, "U8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8}
BITS |= {"F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4}
FLOATS = ("F64", "F32", "F16", "BF16")
# buffers of earlier releases that carry no weights: causal masks, position tables, rotary frequencies
BUFFERS = re.compile(r"(attn|attention)\.(masked_)?bias$|(^|\.)position_ids$|rotary_emb\.inv_freq$")
# what a config may call its sizes: each is found again in the weights
DEPTHS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")
WIDTHS: tuple[str, ...] = ("hidden_size", "intermediate_size", "head_dim", "num_attention_heads")
WIDTHS += ("num_key_value_heads", "num_experts", "num_local_experts", "moe_intermediate_size")
WIDTHS += ("d_model", "n_embd", "n_inner", "n_head", "n_positions")
# the files of a hub repository that a model and its tokenizer are made of
HUB_FILES = ["*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja", "model.safetensors", "model-*.safetensors"]
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def load_model(
    source: str | os.PathLike | Model | nn.Module,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    *,
    tokenizer: Any = None,
    trust_remote_code: bool = False,
    weights_bytes: int | None = None,
) -> Model:
    """Open a language model for scoring.

    source: "demo", a folder of safetensors, a hub id, or a transformers causal language model in memory (its
        weights are shared, and it is left as it was found; device and dtype must then stay None).
    device: by default "cuda" where there is a GPU, else "cpu".
    dtype: by default the checkpoint's own; but on a CPU without instructions for a 16-bit one it is float32, to which
        the weights are widened as they are loaded, or, where that would not fit into memory, as they are used (a
        UserWarning says so). "auto" is the checkpoint's own in any case.
    weights_bytes: for a checkpoint larger than memory, or than this: its blocks stay in their files, and are read a
        band at a time into so many bytes, embeddings and head included. Scores have the same bits.
    Raises InputError for a missing or truncated shard, a folder of pickles, or a family that cannot be run.
    """
    if isinstance(source, Model):
        return source
    if not isinstance(source, (str, os.PathLike)):
        if device is not None or dtype is not None:
            raise InputError("device and dtype belong to a model that is loaded; move a model in memory yourself")
        if weights_bytes is not None:
            raise InputError("weights_bytes belongs to a model that is read from a folder; this one is in memory")
        return Model(source, tokenizer)
    try:
        return _load(
            source, device, dtype, tokenizer, trust_remote_code, check_bytes("weights_bytes", weights_bytes, 1)
        )
    except InputError as error:
        raise InputError(brief(str(error), LONGEST_MESSAGE)) from error.__cause__


def _load(
    source: str | os.PathLike,
    device: str | torch.device | None,
    dtype: str | torch.dtype | None,
    tokenizer: Any,
    trust_remote_code: bool,
    weights_bytes: int | None,
) -> Model:
    name, folder = str(source), Path(source)
    if name == "demo":
        from ..demo import MODEL_DIR

        folder = MODEL_DIR
    try:
        is_folder, exists = folder.is_dir(), folder.exists()
    except OSError as error:
        raise InputError(f"{name}: cannot be looked at ({error.strerror})") from None
    if exists and not is_folder:
        raise InputError(f"{name}: a model is a folder, a hub id or 'demo', not a file")
    if not exists and (not _HUB_ID.fullmatch(name) or name.startswith(".")):
        raise InputError(f"{name}: no such model folder")
    device, dtype = _check_device(device), _check_dtype(dtype)
    if not exists:
        folder = _fetch(name, trust_remote_code)
    tensors = check_folder(folder)
    wanted = _stored_dtype(folder, tensors) if dtype is None else dtype
    slow = device.type == "cpu" and isinstance(wanted, torch.dtype) and not has_instructions(wanted)
    weights = None
    if weights_bytes is not None:
        widens = slow and dtype is None
        with blocks_left_out(folder, _locate(folder), _only_layers) as made:
            hf = _from_pretrained(
                folder, name, torch.float32 if widens else dtype or "auto", trust_remote_code, tensors
            )
        (weights,) = made
        how = "its weights are widened to float32 as they are read" if widens else _MANY_TIMES
    elif slow and dtype is None:
        hf, how = _load_widened(folder, name, trust_remote_code, tensors)
        if hf.dtype == torch.float32:
            dtype = torch.float32  # for workers, whose memory may decide otherwise
    else:
        hf = _from_pretrained(folder, name, dtype or "auto", trust_remote_code, tensors)
        how = _MANY_TIMES
    if slow:
        lacks = f"{name}: this processor has no instructions for {str(wanted).removeprefix('torch.')}"
        warnings.warn(f"{lacks}: {how}", stacklevel=3)
    tokenizer = tokenizer or _load_tokenizer(folder, trust_remote_code)
    if weights is None or weights_bytes is None:
        model = Model(hf.to(device).eval(), tokenizer, name)
    else:
        hf = to_device(hf, device).eval()
        weights.start(weights_bytes, resident_bytes(hf), device, name)
        model = Model(hf, tokenizer, name, weights)
    place = str(Path(source).absolute()) if exists and name != "demo" else name
    model.opened = (place, dtype, trust_remote_code, weights_bytes), model.state
    return model


_MANY_TIMES = "a run takes many times as long as in float32"


def _only_layers(hf: nn.Module) -> tuple[str, ...]:
    found = layer_paths(hf)
    if len(found) != 1:
        raise ValueError("its list of decoder layers was not found, so that its weights cannot be streamed")
    return found[0]


def _locate(folder: Path) -> dict[str, Stored]:
    """Where every tensor of a model folder lies, which `check_folder` has passed."""
    paths, found = [folder / "model.safetensors"], {}
    if not paths[0].is_file():
        paths = [folder / shard for shard in _read_index(folder / "model.safetensors.index.json")]
    for path in paths:
        start, header = _read_header(path)
        for key, entry in header.items():
            found[key] = Stored(path, start + entry["data_offsets"][0], entry["dtype"], tuple(entry["shape"]))
    return found


def _load_widened(folder: Path, name: str, trust_remote_code: bool, tensors: dict) -> tuple[nn.Module, str]:
    """A checkpoint in 16 bits as a model that runs in float32, and how that was done."""
    needed = 4 * sum(math.prod(shape) for _, shape in tensors.values())
    if needed > MOST_OF_MEMORY * available_bytes(torch.device("cpu")):
        hf = _from_pretrained(folder, name, "auto", trust_remote_code, tensors)
        if widen(hf):
            return hf, "its weights are widened to float32 as they are used, since all would not fit"
        del hf
    hf = _from_pretrained(folder, name, torch.float32, trust_remote_code, tensors)
    return hf, "its weights were widened to float32, which loses nothing"


def _stored_dtype(folder: Path, tensors: dict) -> torch.dtype:
    """The dtype that transformers takes for a checkpoint's own: what its config says, else that of its first weight."""
    config = _read_config(folder / "config.json")
    parts = [config, config["text_config"] if isinstance(config.get("text_config"), dict) else {}]
    for said in (part.get(key) for part in parts for key in ("dtype", "torch_dtype")):
        if isinstance(said, str) and isinstance(getattr(torch, said.removeprefix("torch."), None), torch.dtype):
            return getattr(torch, said.removeprefix("torch."))
    stored = {"BF16": torch.bfloat16, "F16": torch.float16}
    return next((stored.get(kind, torch.float32) for kind, _ in tensors.values() if kind in FLOATS), torch.float32)


def _fetch(name: str, trust_remote_code: bool) -> Path:
    """The folder that holds a hub repository's files, fetched where they are not there yet."""
    from huggingface_hub import snapshot_download

    patterns = [*HUB_FILES, "model.safetensors.index.json", *["*.py"] * trust_remote_code]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns=["*/*"]))
    except Exception as error:
        raise InputError(f"{name}: no such model folder, and not on the hub: {_first_line(error)}") from error


def check_folder(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """(dtype, shape) of every tensor that a model folder holds.

    Raises InputError unless there are a readable config.json, whole safetensors files that can hold what it promises,
    and nothing else that would be opened for its weights.
    """
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder}: holds no config.json, so it is not a model folder")
    config = _read_config(folder / "config.json")
    if (folder / "adapter_config.json").exists():
        raise InputError(f"{folder}: holds an adapter (adapter_config.json); merge it into the weights first")
    index = folder / "model.safetensors.index.json"
    tensors = {}
    if (folder / "model.safetensors").is_file():  # transformers, too, looks for it first
        tensors = check_shard(folder / "model.safetensors")
    elif index.is_file():
        for shard, expected in _read_index(index).items():
            if not (folder / shard).is_file():
                raise InputError(f"{folder / shard}: this shard is missing, though {index.name} lists it")
            found = check_shard(folder / shard)
            absent = sorted(expected - set(found))
            if absent:
                raise InputError(f"{folder / shard}: the tensor {absent[0]} is missing, though {index.name} lists it")
            tensors |= found
    elif any(path.suffix in PICKLE_SUFFIXES for path in folder.iterdir()):
        raise InputError(f"{folder}: holds pickled weights only; convert them to safetensors, pickles are never opened")
    else:
        raise InputError(f"{folder}: holds no model.safetensors and no shard index")
    for name, (dtype, _) in tensors.items():
        if dtype not in FLOATS and name.endswith(".weight"):
            raise _wrong_dtype(folder, name, dtype)
    _check_sizes(config, tensors, folder / "config.json")
    return tensors


def _check_sizes(config: dict, tensors: dict[str, tuple[str, tuple[int, ...]]], path: Path) -> None:
    """Refuse a config that promises more than the weights hold, before a model of that size is made.

    A layer has a tensor of its own, a token its row of one, and no width is beyond all numbers there are.
    """
    longest = max((max(shape, default=0) for _, shape in tensors.values()), default=0)
    total = sum(math.prod(shape) for _, shape in tensors.values())
    limits: list[tuple[str, float, str]] = [(key, len(tensors), "tensors") for key in DEPTHS]
    limits += [("vocab_size", longest, "rows in the largest of them")]
    limits += [(key, total, "numbers") for key in WIDTHS]
    limits += [("max_position_embeddings", math.inf, "")]
    for part in (config, config.get("text_config")):
        for key, limit, of_what in limits:
            value = part.get(key) if isinstance(part, dict) else None
            if value is None:
                continue
            least = 0 if "moe" in key or "expert" in key else 1  # hybrid families write 0 experts
            by_layer = value if isinstance(value, list) and key in WIDTHS else [value]
            wrong = [entry for entry in by_layer if type(entry) is not int or entry < least]
            if wrong:
                raise InputError(f"{path}: {key} must be an integer of at least {least}, not {shown(wrong[0])}")
            if max(by_layer, default=0) > limit:
                raise InputError(f"{path}: {key} is {shown(value)}, but the weights hold only {limit} {of_what}")


def _wrong_dtype(place: str | Path, tensor: str, dtype: str) -> InputError:
    return InputError(f"{place}: the tensor {brief(tensor, 80)} is {dtype}; weights are scored in {', '.join(FLOATS)}")


def _read_config(path: Path) -> dict:
    config = parse_json(path.read_bytes(), str(path), finite=False)  # some families write an infinite limit
    if not isinstance(config, dict):
        raise InputError(f"{path}: a model's config is a JSON object, not {type(config).__name__}")
    if config.get("quantization_config") is not None:
        raise InputError(f"{path}: the weights are quantized (quantization_config), and only floating ones are scored")
    if config.get("transformers_weights") is not None:
        raise InputError(f"{path}: transformers_weights names a file of weights; they are read from model.safetensors")
    return config


def _read_index(path: Path) -> dict[str, set[str]]:
    """The tensors that each shard of an index is to hold. Shards are safetensors files below the index's folder."""
    index = parse_json(path.read_bytes(), f"{path}: not a readable shard index")
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{path}: not a readable shard index (it has no weight_map)")
    shards: dict[str, set[str]] = {}
    for tensor, shard in weight_map.items():
        # a link in the place of a plain name may lead elsewhere, as it does in the hub's cache; a name may not
        plain = isinstance(shard, str) and shard.isprintable() and not re.search(r"^[/~]|\\|:|(^|/)\.\.(/|$)", shard)
        if not plain or not shard.endswith(".safetensors"):
            raise InputError(
                f"{path}: the tensor {brief(tensor, 80)} is said to lie in {brief(repr(shard), 80)}; "
                "only .safetensors files in the model's folder are opened"
            )
        shards.setdefault(shard, set()).add(tensor)
    return dict(sorted(shards.items()))


def check_shard(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """(dtype, shape) of every tensor in a safetensors file, read from its header.

    The header is a JSON object; the tensors fill the rest of the file without gap or overlap, each as many bytes as
    its dtype and shape ask for. Raises InputError when anything else is found, or the file is cut short.
    """
    start, header = _read_header(path)
    spans = []
    for name, entry in header.items():
        place = f"{path}: not a safetensors file (tensor {brief(name, 80)})"
        if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= set(entry):
            raise InputError(f"{place}: it needs dtype, shape and data_offsets")
        if not isinstance(entry["dtype"], str) or entry["dtype"] not in BITS:
            raise InputError(f"{place}: no such dtype as {brief(repr(entry['dtype']), 40)}")
        if not _are_counts(entry["shape"]) or not _are_counts(entry["data_offsets"]) or len(entry["data_offsets"]) != 2:
            raise InputError(f"{place}: its shape and its two data_offsets must be integers of at least 0")
        begin, end = entry["data_offsets"]
        if 8 * (end - begin) != math.prod(entry["shape"]) * BITS[entry["dtype"]]:
            raise InputError(f"{place}: its data_offsets do not fit its dtype and shape")
        spans.append((begin, end, name))
    reached = 0
    for begin, end, name in sorted(spans):
        if begin != reached:
            raise InputError(f"{path}: not a safetensors file (tensor {brief(name, 80)} overlaps, or leaves a gap)")
        reached = end
    size, expected = path.stat().st_size, start + reached
    if size != expected:
        raise InputError(f"{path}: truncated or damaged, {size} bytes where its header promises {expected}")
    return {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in header.items()}


def _read_header(path: Path) -> tuple[int, dict]:
    """Where a safetensors file's tensors begin, and its header's entries, of which nothing is checked yet."""
    size = path.stat().st_size
    with path.open("rb") as file:
        header_length = int.from_bytes(file.read(8), "little")
        if size < 8 or header_length > size - 8:
            raise InputError(f"{path}: truncated, its header is incomplete ({size} bytes)")
        if header_length > LONGEST_HEADER:
            raise InputError(f"{path}: not a safetensors file (a header of {header_length} bytes)")
        header = parse_json(file.read(header_length), f"{path}: not a safetensors file")
    if not isinstance(header, dict):
        raise InputError(f"{path}: not a safetensors file (its header is no JSON object)")
    header.pop("__metadata__", None)
    return 8 + header_length, header


def _are_counts(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _from_pretrained(folder: Path, name: str, dtype: str | torch.dtype, trust_remote_code: bool, tensors: dict) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        found: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    except Exception as error:  # of whatever kind: what is in the folder brought it about
        if not trust_remote_code and "trust_remote_code" in str(error):
            raise InputError(
                f"{name}: brings code of its own, which runs only with --trust-remote-code (trust_remote_code=True)"
            ) from error
        raise InputError(f"{name}: cannot be loaded: {_first_line(error)}") from error
    hf, report = found
    for problem in ("missing_keys", "mismatched_keys"):
        if report.get(problem):
            tensor = sorted(report[problem], key=str)[0]
            raise InputError(f"{name}: the checkpoint does not fit its config ({problem.replace('_', ' ')}: {tensor})")
    for tensor in sorted(report.get("unexpected_keys", ()), key=str):
        if not BUFFERS.search(tensor) and not (tensor == "lm_head.weight" and hf.config.tie_word_embeddings):
            raise InputError(f"{name}: the config has no place for the tensor {brief(tensor, 80)} of the checkpoint")
    own = [buffer for buffer, values in hf.named_buffers() if not values.is_floating_point()]
    for tensor, (kind, _) in tensors.items():
        is_buffer = BUFFERS.search(tensor) or any(f".{buffer}".endswith(f".{tensor}") for buffer in own)
        if kind not in FLOATS and not is_buffer:
            raise _wrong_dtype(name, tensor, kind)
    return hf


def _first_line(error: Exception) -> str:
    """What an exception says first (transformers' messages run over many lines), or its kind."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _load_tokenizer(folder: Path, trust_remote_code: bool) -> Any:
    """The checkpoint's tokenizer, or None where it has none (token ids can still be scored)."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:  # the tokenizers library raises no narrower class
        if (folder / "tokenizer.json").is_file():
            why = _first_line(error)
            raise InputError(f"{folder / 'tokenizer.json'}: cannot be read as a tokenizer: {why}") from error
        return None
    longest = getattr(tokenizer, "model_max_length", 0)
    if not isinstance(longest, (int, float)):
        raise InputError(f"{folder / 'tokenizer_config.json'}: model_max_length must be a number, not {shown(longest)}")
    return tokenizer


def _check_device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise InputError(f"device {str(device)!r} cannot be used: {str(error).splitlines()[0]}") from None
    return device


def _check_dtype(dtype: str | torch.dtype | None) -> torch.dtype | str | None:
    if dtype is None or dtype == "auto":
        return dtype
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
    if isinstance(dtype, torch.dtype) and dtype in known.values():
        return dtype
    if dtype not in known:
        raise InputError(f"dtype must be auto or one of {', '.join(known)}, not {dtype!r}")
    return known[dtype]
