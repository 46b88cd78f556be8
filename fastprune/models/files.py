"""The files of a checkpoint: checks before they are used, and the place of each tensor."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import InputError, brief, shown
from ..io import parse_json, read_bytes
from ..validate import refuse_special
from .formats import quantization_method

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
INDEX = "model.safetensors.index.json"
LFS_POINTER = b"version "  # the first 8 bytes of a pointer file
LONGEST_HEADER = 100_000_000  # bytes; the safetensors format's own limit
# bits of one number of each dtype of the safetensors format, and the dtypes in which weights run
BITS = {
    "F64": 64,
    "F32": 32,
    "F16": 16,
    "BF16": 16,
    "I64": 64,
    "I32": 32,
    "I16": 16,
    "I8": 8,
    "BOOL": 8,
    "C64": 64,
    "U64": 64,
    "U32": 32,
    "U16": 16,
    "U8": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F4": 4,
}
FLOATS = ("F64", "F32", "F16", "BF16")
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# names of a config's sizes, each of which the weights must have
DEPTHS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer", "decoder_layers")
WIDTHS = (
    "hidden_size",
    "intermediate_size",
    "head_dim",
    "num_attention_heads",
    "num_key_value_heads",
    "num_experts",
    "num_local_experts",
    "moe_intermediate_size",
    "d_model",
    "n_embd",
    "n_inner",
    "n_head",
)
MOST_POSITIONS = 1 << 15  # of families with computed tables, if the weights hold fewer rows
MOST_CHUNK = 1 << 13  # of a state space model, which makes matrices of [chunk, chunk]
MOST_LABELS = 1 << 14  # transformers makes a list of their names, for models without labels too
MOST_DIMS = 64  # of a tensor; torch takes no more
POSITION_TABLE = re.compile(r"wpe\.|embed_positions|position_embeddings")
TOWER = re.compile(r"vision|visual|image|audio|speech|tower")  # beside the text
# integers that no size in memory follows, and the largest of all others that any weights may have
FREE_KEYS = re.compile(r"token|_id$|_ids$|_index$|max_|seq_len|length|window|seed|version|scale")
LARGEST = 1 << 20


def check_checkpoint(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Check a model folder before it is opened.

    Returns:
        The dtype and shape of every tensor, by name.

    Raises:
        InputError: config.json cannot be read, a safetensors file is incomplete, the files cannot
            hold the config's sizes, or another kind of file would be opened for the weights.
    """
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise InputError(f"{folder}: holds an adapter and no model")
        if (folder / "adapter_model.safetensors").is_file():
            raise InputError(f"{folder}: holds an adapter's weights without adapter_config.json")
        raise InputError(f"{folder}: holds no config.json, so it is not a model folder")
    # transformers and the tokenizers library open any of them
    refuse_special(
        path
        for place in (folder, folder / "additional_chat_templates")
        if place.is_dir()
        for path in sorted(place.iterdir())
    )
    config = read_config(folder / "config.json")
    if (folder / "adapter_config.json").exists():
        raise InputError(
            f"{folder}: holds an adapter (adapter_config.json) beside a whole model; merge it into "
            f"the weights first"
        )
    quantized = quantization_method(config, folder / "config.json") is not None
    index = folder / INDEX
    tensors = {}
    if (folder / "model.safetensors").is_file():  # transformers, too, looks for it first
        tensors = check_shard(folder / "model.safetensors")
    elif index.is_file():
        for shard, expected in _read_index(index).items():
            if not (folder / shard).is_file():
                raise InputError(
                    f"{folder / shard}: this shard is missing, though {index.name} lists it"
                )
            found = check_shard(folder / shard)
            absent = sorted(expected - set(found))
            if absent:
                raise InputError(
                    f"{folder / shard}: the tensor {absent[0]} is missing, though {index.name} "
                    f"lists it"
                )
            tensors |= found
    elif any(path.suffix in PICKLE_SUFFIXES for path in folder.iterdir()):
        raise InputError(
            f"{folder}: holds pickled weights only; convert them to safetensors, pickles are "
            f"never opened"
        )
    else:
        raise InputError(f"{folder}: holds no model.safetensors and no shard index")
    for name, (dtype, _) in tensors.items():
        if dtype not in FLOATS and name.endswith(".weight") and not quantized:
            raise wrong_dtype(folder, name, dtype)
    _check_sizes(config, tensors, folder / "config.json")
    return tensors


def _check_sizes(config: dict, tensors: dict[str, tuple[str, tuple[int, ...]]], path: Path) -> None:
    """Refuse a config with larger sizes than the weights, before a model of that size is made.

    Each layer must have a tensor of its own, and each token a row of one. No width may exceed the
    number of all weights.
    """
    # a tensor without numbers may have any dimension at no price in bytes
    filled = [shape for _, shape in tensors.values() if math.prod(shape)]
    longest = max((max(shape, default=0) for shape in filled), default=0)
    total = sum(math.prod(shape) for shape in filled)
    learned = any(POSITION_TABLE.search(name) and not TOWER.search(name) for name in tensors)
    limits = [
        *((key, len(filled), "tensors") for key in DEPTHS),
        ("vocab_size", longest, "rows in the largest of them"),
        *((key, total, "numbers") for key in WIDTHS),
        ("rotary_dim", longest, "rows in the largest of them"),
        ("n_positions", max(longest, MOST_POSITIONS), "positions"),
        ("chunk_size", MOST_CHUNK, "positions"),
        ("max_position_embeddings", longest if learned else math.inf, "positions"),
    ]
    _check_other_numbers(config, {key for key, _, _ in limits}, len(filled), total, path)
    for part in (config, config.get("text_config")):
        for key, limit, of_what in limits:
            value = part.get(key) if isinstance(part, dict) else None
            if value is None:
                continue
            least = 0 if "moe" in key or "expert" in key else 1  # hybrid families write 0 experts
            by_layer = value if isinstance(value, list) and key in WIDTHS else [value]
            wrong = [entry for entry in by_layer if type(entry) is not int or entry < least]
            if wrong:
                raise InputError(
                    f"{path}: {key} must be an integer of at least {least}, not {shown(wrong[0])}"
                )
            if max(by_layer, default=0) > limit:
                raise InputError(
                    f"{path}: {key} is {shown(value)}, but the weights hold only {limit} {of_what}"
                )


def _check_other_numbers(
    config: dict, known: set[str], num_tensors: int, total: int, path: Path
) -> None:
    """Refuse integers of a config, at any depth, that `total` weights do not support.

    transformers makes tables, lists and modules of such lengths.
    """
    checked = [config, config.get("text_config")]
    for part in _parts(config):
        for key, value in part.items():
            bounded = key == "num_labels" or (key in known and any(part is one for one in checked))
            if type(value) is not int or bounded or FREE_KEYS.search(key):
                continue
            most = num_tensors if "layers" in key else max(LARGEST, total)
            if value > most:
                raise InputError(
                    f"{path}: {brief(key, 40)} is {shown(value)}; for weights of {total} numbers "
                    f"in {num_tensors} tensors it may be at most {most}"
                )
        labels = part.get("num_labels")
        if labels is not None and (type(labels) is not int or not 0 <= labels <= MOST_LABELS):
            raise InputError(
                f"{path}: num_labels must be an integer from 0 to {MOST_LABELS}, not "
                f"{shown(labels)}"
            )


def _parts(config: dict) -> Iterator[dict]:
    """Yield the config, and all configs inside it: transformers makes an object of each."""
    waiting: list[object] = [config]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            yield part
            waiting += part.values()


def wrong_dtype(place: str | Path, tensor: str, dtype: str) -> InputError:
    return InputError(
        f"{place}: the tensor {brief(tensor, 80)} is {dtype}; weights are scored in "
        f"{', '.join(FLOATS)}"
    )


def stored_dtype(config: dict, tensors: dict) -> torch.dtype:
    """A checkpoint's own dtype for transformers: the config's, or its first weight's."""
    parts = [config, config["text_config"] if isinstance(config.get("text_config"), dict) else {}]
    for said in (part.get(key) for part in parts for key in ("dtype", "torch_dtype")):
        if isinstance(said, str) and isinstance(
            getattr(torch, said.removeprefix("torch."), None), torch.dtype
        ):
            return getattr(torch, said.removeprefix("torch."))
    stored = {"BF16": torch.bfloat16, "F16": torch.float16}
    return next(
        (stored.get(kind, torch.float32) for kind, _ in tensors.values() if kind in FLOATS),
        torch.float32,
    )


def names_other_attention(config: dict) -> bool:
    """Whether a config names attention other than sdpa and eager.

    Such kernels take no masks, and some are downloaded from the hub.
    """
    names = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")
    implementations = (part.get(name) for part in _parts(config) for name in names)
    return any(name not in (None, "sdpa", "eager") for name in implementations)


def read_config(path: Path) -> dict:
    """Read a model's config. Raises InputError if it cannot be one."""
    config = parse_json(
        read_bytes(path, LONGEST_HEADER), str(path), finite=False
    )  # some families write an infinite limit
    if not isinstance(config, dict):
        raise InputError(f"{path}: a model's config is a JSON object, not {type(config).__name__}")
    if config.get("transformers_weights") is not None:
        raise InputError(
            f"{path}: transformers_weights names a file of weights; they are read from "
            f"model.safetensors"
        )
    return config


def stated_depth(folder: Path) -> int | None:
    """The number of decoder layers that a folder's config states; None where it is not sure.

    Only num_hidden_layers is sure: under another name it depends on the family's code.
    """
    try:
        config = read_config(folder / "config.json")
    except (InputError, OSError):
        return None
    inner = [part for part in _parts(config) if part is not config]
    text = config.get("text_config")
    if not isinstance(text, dict):
        if any(name in part for part in inner for name in DEPTHS):  # of towers, or of the text
            return None
        text = config
    depth = text.get("num_hidden_layers")
    agree = all(text[name] == depth for name in DEPTHS if name in text)
    sure = type(depth) is int and depth > 0 and agree
    return depth if sure and not config.get("is_encoder_decoder") else None


def _read_index(path: Path) -> dict[str, set[str]]:
    """The tensors of each shard, by an index. Shards are safetensors files below its folder."""
    index = parse_json(read_bytes(path, LONGEST_HEADER), f"{path}: not a readable shard index")
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{path}: not a readable shard index (it has no weight_map)")
    shards: dict[str, set[str]] = {}
    for tensor, shard in weight_map.items():
        # a shard may be a link to another place, as in the hub's cache; its name may not
        plain = (
            isinstance(shard, str)
            and shard.isprintable()
            and not re.search(r"^[/~]|\\|:|(^|/)\.\.(/|$)", shard)
        )
        if not plain or not shard.endswith(".safetensors"):
            raise InputError(
                f"{path}: the tensor {brief(tensor, 80)} is said to lie in "
                f"{brief(repr(shard), 80)}; "
                "only .safetensors files in the model's folder are opened"
            )
        shards.setdefault(shard, set()).add(tensor)
    return dict(sorted(shards.items()))


def listed_shards(folder: Path) -> list[str]:
    """The shards that a folder's index names; none if one file holds all weights."""
    if (folder / "model.safetensors").is_file() or not (folder / INDEX).is_file():
        return []
    return list(_read_index(folder / INDEX))


def check_shard(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Check a safetensors file by its header.

    The header is a JSON object. The tensors fill the rest of the file without gap or overlap, each
    with the bytes of its dtype and shape.

    Returns:
        The dtype and shape of every tensor, by name.

    Raises:
        InputError: The file has another form, or is cut short.
    """
    start, header = _read_header(path)
    spans = []
    for name, entry in header.items():
        place = f"{path}: not a safetensors file (tensor {brief(name, 80)})"
        if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= set(entry):
            raise InputError(f"{place}: it needs dtype, shape and data_offsets")
        if not isinstance(entry["dtype"], str) or entry["dtype"] not in BITS:
            raise InputError(f"{place}: no such dtype as {brief(repr(entry['dtype']), 40)}")
        if (
            not _are_counts(entry["shape"])
            or not _are_counts(entry["data_offsets"])
            or len(entry["data_offsets"]) != 2
        ):
            raise InputError(
                f"{place}: its shape and its two data_offsets must be integers of at least 0"
            )
        if len(entry["shape"]) > MOST_DIMS:
            raise InputError(
                f"{place}: its shape has {len(entry['shape'])} dimensions, at most {MOST_DIMS} fit"
            )
        begin, end = entry["data_offsets"]
        if 8 * (end - begin) != math.prod(entry["shape"]) * BITS[entry["dtype"]]:
            raise InputError(f"{place}: its data_offsets do not fit its dtype and shape")
        spans.append((begin, end, name))
    reached = 0
    for begin, end, name in sorted(spans):
        if begin != reached:
            raise InputError(
                f"{path}: not a safetensors file (tensor {brief(name, 80)} overlaps, or leaves a "
                f"gap)"
            )
        reached = end
    size, expected = path.stat().st_size, start + reached
    if size != expected:
        raise InputError(
            f"{path}: truncated or damaged, {size} bytes where its header promises {expected}"
        )
    return {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in header.items()}


def _read_header(path: Path) -> tuple[int, dict]:
    """The offset of a safetensors file's first tensor, and its header's unchecked entries."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if start == LFS_POINTER:
            raise InputError(f"{path}: a pointer of Git LFS, not the weights; run git lfs pull")
        header_length = int.from_bytes(start, "little")
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
    return isinstance(values, list) and all(
        type(value) is int and 0 <= value < 2**63 for value in values
    )


@dataclass(frozen=True)
class Stored:
    """The place of a tensor: its file, its first byte, dtype as safetensors names it, shape."""

    path: Path
    offset: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def locate(folder: Path) -> dict[str, Stored]:
    """The place of every tensor of a model folder, which `check_checkpoint` has accepted."""
    places = {}
    for name in listed_shards(folder) or ["model.safetensors"]:
        path = folder / name
        start, header = _read_header(path)
        for key, entry in header.items():
            places[key] = Stored(
                path, start + entry["data_offsets"][0], entry["dtype"], tuple(entry["shape"])
            )
    return places


class Files:
    """The open safetensors files of a checkpoint, which must not change."""

    def __init__(self, paths: Iterable[Path]):
        self._open = {path: path.open("rb", buffering=0) for path in sorted(set(paths))}
        self._states = {
            path: self._state(os.fstat(file.fileno())) for path, file in self._open.items()
        }

    @staticmethod
    def _state(stat: os.stat_result) -> tuple[int, int, int]:
        return stat.st_ino, stat.st_size, stat.st_mtime_ns

    @property
    def identity(self) -> list[list]:
        """Name, inode, size and time of change of every file, valid on this machine."""
        return [[path.name, *state] for path, state in self._states.items()]

    def check(self, paths: Iterable[Path] | None = None) -> None:
        """Raise InputError for a file that has changed since it was opened."""
        for path in self._open if paths is None else paths:
            try:
                found = self._state(path.stat())
            except OSError as error:
                raise InputError(
                    f"{path}: {error.strerror}, while weights stay in it; open the model again"
                ) from None
            if found != self._states[path]:
                raise InputError(
                    f"{path}: has changed while weights stay in it; open the model again"
                )

    def read(self, stored: Stored, start: int, into: torch.Tensor) -> None:
        """Fill a uint8 tensor with the bytes of a stored tensor from `start` on."""
        number, view, done = self._open[stored.path].fileno(), into.numpy().data, 0
        while done < len(view):
            count = os.preadv(number, [view[done:]], stored.offset + start + done)
            if not count:
                raise InputError(
                    f"{stored.path}: has become shorter while weights stay in it; open the model "
                    f"again"
                )
            done += count

    def tensor(self, stored: Stored) -> torch.Tensor:
        """Read a whole stored tensor."""
        found = torch.empty(stored.shape, dtype=DTYPES[stored.dtype])
        if found.numel():
            self.read(stored, 0, found.view(-1).view(torch.uint8))
        return found
