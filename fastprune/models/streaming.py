"""Weights that stay in their safetensors files: read a band of blocks at a time, while the band before computes.

A model is opened by transformers' own code, but for the parameters of its blocks, which stay on the meta device. Where
each of them lies in the files is a table; `Weights.visit` gives them storage for as long as their band is at hand.
Files are read by plain reads into buffers that are used again, not mapped: pages of a mapped file count as resident.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..bands import Room, make_room
from ..errors import InputError
from ..records import write_json

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES |= {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}
DTYPES |= {"BOOL": torch.bool}
ALIGNMENT = 64  # bytes, as torch's own allocator aligns
STAGING = 8 << 20  # bytes read at once where they cannot go to their place directly: another dtype, or a GPU
HASHES = ".fastprune-hashes.json"
_PATCHING = threading.RLock()  # one thread at a time opens a model whose weights stay in files


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies: its file, the first byte there, dtype as safetensors names it, shape."""

    path: Path
    offset: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))


@dataclass(frozen=True)
class Piece:
    """A stored tensor's place in a block's buffer."""

    stored: Stored
    offset: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Place:
    """A parameter's place in its block's buffer."""

    module: nn.Module
    name: str
    offset: int
    dtype: torch.dtype
    shape: torch.Size


@dataclass(frozen=True)
class Block:
    """A block's parameters, and what is read for them, in the order of the files. size: bytes of its buffer."""

    places: tuple[Place, ...]
    pieces: tuple[Piece, ...]
    size: int


class Files:
    """The safetensors files of a checkpoint, open, and as they were when it was opened."""

    def __init__(self, paths: Iterable[Path]):
        self._open = {path: path.open("rb", buffering=0) for path in sorted(set(paths))}
        self._states = {path: self._state(os.fstat(file.fileno())) for path, file in self._open.items()}

    @staticmethod
    def _state(stat: os.stat_result) -> tuple[int, int, int]:
        return stat.st_ino, stat.st_size, stat.st_mtime_ns

    @property
    def identity(self) -> list[list]:
        """Name, number on this machine's disk, size and time of change of every file: nobody elsewhere can know it."""
        return [[path.name, *state] for path, state in self._states.items()]

    def check(self, paths: Iterable[Path] | None = None) -> None:
        """Raise InputError for a file that is not what it was when it was opened."""
        for path in self._open if paths is None else paths:
            try:
                found = self._state(path.stat())
            except OSError as error:
                raise InputError(
                    f"{path}: {error.strerror}, while its weights are streamed; open the model again"
                ) from None
            if found != self._states[path]:
                raise InputError(f"{path}: has changed while its weights are streamed; open the model again")

    def read(self, stored: Stored, start: int, into: torch.Tensor) -> None:
        """Fill a uint8 tensor with the bytes of a stored tensor from `start` on."""
        number, view, done = self._open[stored.path].fileno(), into.numpy().data, 0
        while done < len(view):
            count = os.preadv(number, [view[done:]], stored.offset + start + done)
            if not count:
                raise InputError(
                    f"{stored.path}: has become shorter while its weights are streamed; open the model again"
                )
            done += count

    def tensor(self, stored: Stored) -> torch.Tensor:
        """A stored tensor, read whole."""
        found = torch.empty(stored.shape, dtype=DTYPES[stored.dtype])
        if found.numel():
            self.read(stored, 0, found.view(-1).view(torch.uint8))
        return found


class Weights:
    """The blocks of a model whose weights stay in files; `visit` brings them in, band by band.

    loads: blocks that were read so far; bytes: of files; waited: seconds that computing stood still for them.
    """

    def __init__(self, folder: Path, files: Files, blocks: Sequence[Block], names: dict[str, int]):
        self.folder, self._files, self._blocks = folder, files, blocks
        self._block_of = names
        self._device = torch.device("cpu")
        self._loaded: dict[int, torch.Tensor] = {}
        self._free: list[torch.Tensor] = []
        self._made = 0
        self._reading: _Reading | None = None
        self._staging: list[tuple[torch.Tensor, torch.cuda.Event | None]] = []
        self.room = Room(len(blocks), max((block.size for block in blocks), default=0), 0, len(blocks))
        self.loads = self.bytes = 0
        self.waited = 0.0

    def start(self, limit: int, resident: int, device: torch.device, name: str) -> None:
        """Take a limit in bytes, of which `resident` are for what stays loaded. Raises InputError for one too small."""
        self._device = device
        direct = device.type == "cpu" and all(
            piece.dtype == DTYPES[piece.stored.dtype] for block in self._blocks for piece in block.pieces
        )
        always = resident + (0 if direct else 2 * STAGING)
        self.room = make_room(limit, len(self._blocks), self.room.block_bytes, always, name)

    @property
    def bands(self) -> tuple[range, ...]:
        return self.room.bands

    @property
    def identity(self) -> list[list]:
        """Of the files, equal as long as none changes. Raises InputError where one has."""
        self._files.check()
        return self._files.identity

    def block_of(self, name: str) -> int | None:
        """The block that a parameter of the model belongs to; None for what stays loaded."""
        return self._block_of.get(name)

    def visit(self, bands: Iterable[Sequence[int]]) -> Iterator[Sequence[int]]:
        """Bands, one after the other, each with its blocks' weights in place while it is the current one.

        The next one is read meanwhile, as far as there is room. A block that is still there is not read again. Raises
        InputError where a file has changed.
        """
        bands = list(bands)
        for band, following in zip(bands, [*bands[1:], ()]):
            started = time.perf_counter()
            self._settle()
            missing = [block for block in band if block not in self._loaded]
            if missing:
                self._read(missing, band)
                self._settle()
            self.waited += time.perf_counter() - started
            self._read([block for block in following if block not in self._loaded], [*band, *following])
            yield band

    def release(self) -> None:
        """Give back all that is loaded; what is needed again is read again."""
        self._settle()
        for block in list(self._loaded):
            self._release(block)
        self._free.clear()
        self._made = 0

    def remembered(self, key: str, work: Callable[[], str]) -> str:
        """The hash that is kept beside the files under a key, or else what `work` gives, which is kept then."""
        path = self.folder / HASHES
        known: dict = {}
        with suppress(OSError, ValueError):
            said = json.loads(path.read_text())
            known = said if isinstance(said, dict) else {}
        found = known.get(key)
        if isinstance(found, str) and len(found) == 64 and not set(found) - set("0123456789abcdef"):
            return found
        found = work()
        self._files.check()
        with suppress(OSError):  # a folder that cannot be written to: it is worked out again each time
            write_json(path, {**dict(list(known.items())[-7:]), key: found}, replace=True)
        return found

    def _read(self, wanted: Sequence[int], keep: Sequence[int]) -> None:
        """Begin to read blocks, in the background, as many as there is room for without those in `keep`."""
        places = []
        try:
            for block in wanted:
                buffer = self._buffer(block, keep)
                if buffer is None:
                    break
                places.append((block, buffer))
        except BaseException:  # memory ran out: what was collected is of use the next time
            self._free += [buffer for _, buffer in places]
            raise
        if places:
            ready = torch.cuda.current_stream(self._device).record_event() if self._device.type == "cuda" else None
            self._reading = _Reading(lambda: self._fill(places, ready), places)

    def _buffer(self, block: int, keep: Sequence[int]) -> torch.Tensor | None:
        """Room for a block; where all is taken, that of the one not in `keep` that is needed last, when blocks ascend
        and begin again: the one just before."""
        if self._free:
            return self._free.pop()
        if self._made < self.room.places:
            made = torch.empty(self.room.block_bytes, dtype=torch.uint8, device=self._device)
            self._made += 1
            return made
        others = [other for other in self._loaded if other not in keep]
        if not others:
            return None
        return self._release(max(others, key=lambda other: (other - block) % len(self._blocks)))

    def _settle(self) -> None:
        """Wait for what is being read, and put it in place."""
        if self._reading is None:
            return
        reading = self._reading
        error = reading.wait()  # interrupted here, the next visit settles it
        self._reading = None
        if error is not None:
            self._free += [buffer for _, buffer in reading.places]
            raise error
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
        for number, buffer in reading.places:
            block = self._blocks[number]
            for place in block.places:
                place.module._parameters[place.name] = nn.Parameter(_part(buffer, place), requires_grad=False)
            self._loaded[number] = buffer
            self.loads += 1
            self.bytes += sum(DTYPES[p.stored.dtype].itemsize * p.stored.numel for p in block.pieces)

    def _release(self, number: int) -> torch.Tensor:
        """Take a block's weights away; the buffer that they were in."""
        for place in self._blocks[number].places:
            place.module._parameters[place.name] = _nothing(place.shape, place.dtype)
        return self._loaded.pop(number)

    # -- in the background ---------------------------------------------------------------------------------------

    def _fill(self, places: Sequence[tuple[int, torch.Tensor]], ready: torch.cuda.Event | None) -> None:
        """Read blocks into their buffers; on a GPU, on a stream of its own, once what runs now is done with these."""
        if ready is not None:
            self._stream.wait_event(ready)
        for number, buffer in places:
            pieces = self._blocks[number].pieces
            for piece in pieces:
                self._fill_piece(piece, buffer)
            self._files.check({piece.stored.path for piece in pieces})

    def _fill_piece(self, piece: Piece, buffer: torch.Tensor) -> None:
        dtype, count = DTYPES[piece.stored.dtype], piece.stored.numel
        target = buffer[piece.offset : piece.offset + count * piece.dtype.itemsize]
        if self._device.type == "cpu" and dtype == piece.dtype:
            self._files.read(piece.stored, 0, target)
            return
        target, step = target.view(piece.dtype), STAGING // dtype.itemsize
        for start in range(0, count, step):
            part = target[start : start + step]
            staged, done = self._stage()
            raw = staged[: len(part) * dtype.itemsize]
            self._files.read(piece.stored, start * dtype.itemsize, raw)
            if done is not None:
                with torch.cuda.stream(self._stream):
                    if dtype == piece.dtype:
                        part.copy_(raw.view(dtype), non_blocking=True)
                    else:
                        part.copy_(raw.view(dtype).to(piece.dtype))
                    done.record()
            else:
                part.copy_(raw.view(dtype))

    def _stage(self) -> tuple[torch.Tensor, torch.cuda.Event | None]:
        """A staging buffer whose last copy is done, and on a GPU the event to record after the next."""
        is_gpu = self._device.type == "cuda"
        if len(self._staging) < (2 if is_gpu else 1):
            event = torch.cuda.Event() if is_gpu else None
            self._staging.append((torch.empty(STAGING, dtype=torch.uint8, pin_memory=is_gpu), event))
        else:
            self._staging.append(self._staging.pop(0))
        staged, event = self._staging[-1]
        if event is not None:
            event.synchronize()
        return staged, event

    @property
    def _stream(self) -> torch.cuda.Stream:
        if not hasattr(self, "_own_stream"):
            self._own_stream = torch.cuda.Stream(self._device)
        return self._own_stream


class _Reading(threading.Thread):
    """A thread of its own for what is read meanwhile. A daemon: nobody waits for it at the end of a process."""

    def __init__(self, work: Callable[[], None], places: Sequence[tuple[int, torch.Tensor]]):
        super().__init__(name="fastprune-reading", daemon=True)
        self.places, self._work = places, work
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._work()
        except BaseException as error:  # whoever waits raises it
            self._error = error

    def wait(self) -> BaseException | None:
        self.join()
        return self._error


def _part(buffer: torch.Tensor, place: Place) -> torch.Tensor:
    size = place.shape.numel() * place.dtype.itemsize
    return buffer[place.offset : place.offset + size].view(place.dtype).view(place.shape)


def _nothing(shape: torch.Size, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)


# -- opening a model --------------------------------------------------------------------------------------------------


@contextmanager
def blocks_left_out(
    folder: Path, stored: dict[str, Stored], find_layers: Callable[[nn.Module], Sequence[str]]
) -> Iterator[list[Weights]]:
    """Inside, transformers' from_pretrained leaves the parameters of the blocks on the meta device; what it makes is
    as it always is otherwise. The list then holds the `Weights` of the model that was opened.

    stored: the checkpoint's tensors. find_layers: the attribute path to a model's list of layers.
    """
    from transformers import PreTrainedModel

    base: Any = PreTrainedModel
    made: list[Weights] = []
    thread = threading.get_ident()
    _PATCHING.acquire()
    original = base._load_pretrained_model

    def load(model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != thread:  # another thread opens a model of its own
            return original(model, state_dict, checkpoint_files, load_config, *args, **kwargs)
        files = Files(tensor.path for tensor in stored.values())
        prefix = ".".join(find_layers(model)) + "."
        parameters = {name for name, _ in model.named_parameters(remove_duplicate=False) if name.startswith(prefix)}
        sources, others = _sort(model, load_config, stored, parameters)
        residents = {key: _Later(files, tensor) for key, tensor in others.items()}
        found = original(model, residents, None, load_config, *args, **kwargs)
        blocks, names = _lay_out(model, load_config, prefix, parameters, sources)
        found[0].missing_keys -= names.keys()
        made.append(Weights(folder, files, blocks, names))
        return found

    base._load_pretrained_model = staticmethod(load)
    try:
        yield made
    finally:
        base._load_pretrained_model = staticmethod(original)
        _PATCHING.release()


class _Later:
    """A stored tensor that is read when transformers asks for it, as it does of a safetensors slice."""

    def __init__(self, files: Files, stored: Stored):
        self._files, self._stored = files, stored

    def get_dtype(self) -> str:
        return self._stored.dtype

    def get_shape(self) -> list[int]:
        return list(self._stored.shape)

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self._files.tensor(self._stored)[index]


def _sort(
    model: Any, load_config: Any, stored: dict[str, Stored], parameters: set[str]
) -> tuple[dict, dict[str, Stored]]:
    """The checkpoint's tensors that parameters of blocks are made of, as {parameter: [(pattern or None, key, tensor)]},
    by transformers' own rules of renaming; and all others."""
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    rules = load_config.weight_mapping or []
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    state, prefix = model.state_dict(), model.base_model_prefix
    sources: dict[str, list] = {}
    others = {}
    for key in sorted(stored, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, state)
        if name not in state and key in state:
            name, pattern = rename_source_key(key, [], [], base_model_prefix=prefix, meta_state_dict=state)
        if name in parameters:
            sources.setdefault(name, []).append((pattern, key, stored[key]))
        else:
            others[key] = stored[key]
    return sources, others


def _lay_out(
    model: Any, load_config: Any, prefix: str, parameters: set[str], sources: dict
) -> tuple[list[Block], dict[str, int]]:
    """The blocks of a model, and the block of each parameter that has its tensors."""
    by_block: dict[int, list[str]] = {}
    for name in model.state_dict():
        if name in parameters:
            by_block.setdefault(int(name.removeprefix(prefix).split(".")[0]), []).append(name)
    count = len(model.get_submodule(prefix[:-1]))
    blocks, block_of = [], {}
    for number in range(count):
        places, pieces, end = [], [], 0
        for name in by_block.get(number, []):
            if name not in sources:
                continue  # transformers reports it as missing
            parameter = model.get_parameter(name)
            dtype = _planned_dtype(load_config, name, parameter.dtype)
            owner, _, own_name = name.rpartition(".")
            place = Place(model.get_submodule(owner), own_name, end, dtype, parameter.shape)
            places.append(place)
            pieces += _pieces(model, load_config, name, place, sources[name])
            nothing: Any = _nothing(place.shape, dtype)
            place.module._parameters[own_name] = nothing
            nothing._is_hf_initialized = True
            block_of[name] = number
            end += -(-parameter.numel() * dtype.itemsize // ALIGNMENT) * ALIGNMENT
        pieces.sort(key=lambda piece: (piece.stored.path, piece.stored.offset))
        blocks.append(Block(tuple(places), tuple(pieces), end))
    return blocks, block_of


def _planned_dtype(load_config: Any, name: str, dtype: torch.dtype) -> torch.dtype:
    """What transformers loads a parameter as: as it was made, but where a family keeps some in float32."""
    from transformers.core_model_loading import build_glob_alternation

    plan = load_config.dtype_plan or {}
    if plan:
        pattern, by_group, _ = build_glob_alternation(list(plan))
        found = pattern.search(name)
        if found is not None and found.lastgroup is not None:
            return plan[by_group[found.lastgroup]]
    return dtype


def _pieces(model: Any, load_config: Any, name: str, place: Place, sources: list) -> list[Piece]:
    """Where the tensors that a parameter is made of go. Raises ValueError for what is not just put side by side."""
    if len(sources) == 1 and sources[0][0] is None:
        (_, key, stored), offsets = sources[0], [0]
        if stored.shape != tuple(place.shape):
            raise ValueError(f"{key} has the shape {list(stored.shape)}, but the config asks for {list(place.shape)}")
    else:
        offsets = _side_by_side(model, load_config, name, place, sources)
    return [
        Piece(stored, place.offset + offset * place.dtype.itemsize, place.dtype)
        for (_, _, stored), offset in zip(sources, offsets, strict=True)
    ]


def _side_by_side(model: Any, load_config: Any, name: str, place: Place, sources: list) -> list[int]:
    """The first number of each source within a parameter that transformers merges from several.

    Its own rule is run on one number in the place of each source, which shows where each goes.
    """
    from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

    rules = [rule for rule in load_config.weight_mapping or [] if isinstance(rule, WeightConverter)]
    rule: Any = next((rule for rule in rules if sources[0][0] in rule.source_patterns), None)
    shape = sources[0][2].shape
    plain = rule is not None and all(type(op) in (MergeModulelist, Concatenate) for op in rule.operations)
    if not plain or any(stored.shape != shape for _, _, stored in sources):
        raise ValueError(f"{name} is converted from the checkpoint in a way that cannot be streamed; open it whole")
    rule = deepcopy(rule)
    for number, (pattern, key, _) in enumerate(sources):
        one = torch.full((1,) * len(shape), number)
        rule.add_tensor(name, key, pattern, lambda one=one: one)
    (grid,) = rule.convert(name, model=model, config=model.config).values()
    cells = (1,) * (grid.dim() - len(shape)) + shape
    if tuple(a * b for a, b in zip(grid.shape, cells, strict=True)) != tuple(place.shape):
        raise ValueError(f"{name} has not the shape that the config asks for, {list(place.shape)}")
    whole = torch.empty(place.shape, device="meta")
    offsets = [0] * len(sources)
    for cell in np.ndindex(*grid.shape):
        part = whole[tuple(slice(i * n, (i + 1) * n) for i, n in zip(cell, cells, strict=True))]
        if not part.squeeze().is_contiguous():
            raise ValueError(f"{name} is put together from columns, which cannot be streamed; open it whole")
        offsets[int(grid[cell])] = int(part.storage_offset())
    return offsets


def to_device(hf: nn.Module, device: torch.device) -> nn.Module:
    """The model with all that has storage on a device; tied parameters stay tied."""
    moved: dict[int, nn.Parameter] = {}
    for module in hf.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.device.type != "meta" and parameter.device != device:
                if id(parameter) not in moved:
                    moved[id(parameter)] = nn.Parameter(parameter.to(device), requires_grad=parameter.requires_grad)
                module._parameters[name] = moved[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)
    return hf


def resident_bytes(hf: nn.Module) -> int:
    """Bytes of a model's parameters and buffers that have storage, each once."""
    tensors = [tensor for tensor in (*hf.parameters(), *hf.buffers()) if tensor.device.type != "meta"]
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())
