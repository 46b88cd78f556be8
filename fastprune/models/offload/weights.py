"""Weights that stay in their safetensors files, and are read a band of blocks at a time.

A band is read while the one before it computes. `placement` opens a model with the parameters of
its blocks on the meta device, and finds the place of each parameter in files and buffers.
`StreamedWeights.visit` gives a band's parameters storage while it is the current one. Plain reads
fill reusable buffers. Files are not mapped, because pages of a mapped file count as resident.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from ...errors import InputError
from ...io import parse_json, read_bytes, write_json
from ...plan.bands import Room, make_room
from ..files import DTYPES, Files, Stored

STAGING = 8 << 20  # bytes of a staging buffer, for a GPU or another dtype than the file's
HASHES = ".fastprune-hashes.json"
HASHES_BYTES = 1 << 16  # the largest file of hashes; eight hashes take about 1,100 bytes


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
    """A block's parameters, their pieces in the order of the files, and the bytes of its buffer."""

    places: tuple[Place, ...]
    pieces: tuple[Piece, ...]
    size: int


class Weights:
    """The weights of a model's blocks, all of them loaded: one band, and no reads.

    `StreamedWeights` has the same methods, so that no caller needs to know which of the two a model
    has.

    Attributes:
        room: It decides the sizes of bands.
        loads: The number of blocks read so far.
        bytes: The bytes of files read so far.
        waited: The seconds that computing waited for reads.
    """

    streamed = False
    loads = bytes = 0
    waited = 0.0

    def __init__(self, num_blocks: int):
        self.room = Room(num_blocks, 0, 0, num_blocks)

    @property
    def identity(self) -> list[list]:
        """The identity of the files of blocks. Raises InputError if one has changed."""
        return []

    @property
    def bands(self) -> tuple[range, ...]:
        """The bands of consecutive blocks, or one band if all blocks fit."""
        return self.room.bands

    @property
    def take_turns(self) -> bool:
        """Whether blocks must wait until others have run."""
        return len(self.bands) > 1

    def visit(self, bands: Iterable[Sequence[int]]) -> Iterator[Sequence[int]]:
        """Yield bands, each with its blocks' weights loaded while it is the current one."""
        return iter(bands)

    def blocks(self) -> Iterator[int]:
        """Yield all blocks, each with its weights loaded while it is the current one."""
        return (block for band in self.visit(self.bands) for block in band)

    def block_of(self, name: str) -> int | None:
        """The block of a parameter; None for a parameter that stays loaded."""
        return None

    def release(self) -> None:
        """Free all loaded blocks. A later visit reads them again."""

    def remembered(self, key: Callable[[], str], work: Callable[[], str]) -> str:
        """Return the hash kept beside the files under a key; else compute it by `work`, and keep
        it."""
        return work()


class StreamedWeights(Weights):
    """The weights of blocks that stay in files; `visit` loads them, band by band."""

    streamed = True

    def __init__(self, folder: Path, files: Files, blocks: Sequence[Block], names: dict[str, int]):
        self.folder, self._files, self._blocks = folder, files, blocks
        self._block_of = names
        self._device = torch.device("cpu")
        self._loaded: dict[int, torch.Tensor] = {}
        self._free: list[torch.Tensor] = []
        self._made = 0
        self._reading: _Reading | None = None
        self._staging: list[tuple[torch.Tensor, torch.cuda.Event | None]] = []
        self.room = Room(
            len(blocks), max((block.size for block in blocks), default=0), 0, len(blocks)
        )

    def start(self, limit: int, resident: int, device: torch.device, name: str) -> None:
        """Set a limit in bytes, of which `resident` are for weights that stay loaded.

        Raises InputError if the limit is too small.
        """
        self._device = device
        direct = device.type == "cpu" and all(
            piece.dtype == DTYPES[piece.stored.dtype]
            for block in self._blocks
            for piece in block.pieces
        )
        always = resident + (0 if direct else 2 * STAGING)
        self.room = make_room(limit, len(self._blocks), self.room.block_bytes, always, name)

    @property
    def identity(self) -> list[list]:
        self._files.check()
        return self._files.identity

    def block_of(self, name: str) -> int | None:
        return self._block_of.get(name)

    def visit(self, bands: Iterable[Sequence[int]]) -> Iterator[Sequence[int]]:
        """See `Weights.visit`.

        While a band is the current one, the blocks of the next one are read that fit. A block in
        memory is not read again. Raises InputError if a file has changed.
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
            self._read(
                [block for block in following if block not in self._loaded], [*band, *following]
            )
            yield band

    def release(self) -> None:
        self._settle()
        for block in list(self._loaded):
            self._release(block)
        self._free.clear()
        self._made = 0

    def remembered(self, key: Callable[[], str], work: Callable[[], str]) -> str:
        name = key()
        path = self.folder / HASHES
        known: dict = {}
        # any program may have put a file there; one of another form is ignored
        with suppress(OSError, InputError):
            said = parse_json(read_bytes(path, HASHES_BYTES), str(path))
            known = said if isinstance(said, dict) else {}
        found = known.get(name)
        if isinstance(found, str) and len(found) == 64 and not set(found) - set("0123456789abcdef"):
            return found
        found = work()
        self._files.check()
        with suppress(OSError):  # a read-only folder: the hash is computed each time
            write_json(path, {**dict(list(known.items())[-7:]), name: found}, replace=True)
        return found

    def _read(self, wanted: Sequence[int], keep: Sequence[int]) -> None:
        """Begin to read blocks in the background, as many as fit beside those in `keep`."""
        places = []
        try:
            for block in wanted:
                buffer = self._buffer(block, keep)
                if buffer is None:
                    break
                places.append((block, buffer))
        except BaseException:  # memory ran out: a later read uses the buffers
            self._free += [buffer for _, buffer in places]
            raise
        if places:
            ready = (
                torch.cuda.current_stream(self._device).record_event()
                if self._device.type == "cuda"
                else None
            )
            self._reading = _Reading(lambda: self._fill(places, ready), places)

    def _buffer(self, block: int, keep: Sequence[int]) -> torch.Tensor | None:
        """Return a buffer for a block.

        If all are taken, a block outside of `keep` gives its buffer: the one needed last
        when blocks ascend and begin again, which is the one just before.
        """
        if self._free:
            return self._free.pop()
        if self._made < self.room.places:
            buffer = torch.empty(self.room.block_bytes, dtype=torch.uint8, device=self._device)
            self._made += 1
            return buffer
        others = [other for other in self._loaded if other not in keep]
        if not others:
            return None
        return self._release(max(others, key=lambda other: (other - block) % len(self._blocks)))

    def _settle(self) -> None:
        """Wait for the current read, and give its blocks their storage."""
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
                place.module._parameters[place.name] = nn.Parameter(
                    _part(buffer, place), requires_grad=False
                )
            self._loaded[number] = buffer
            self.loads += 1
            self.bytes += sum(
                DTYPES[p.stored.dtype].itemsize * p.stored.numel for p in block.pieces
            )

    def _release(self, number: int) -> torch.Tensor:
        """Take a block's storage away, and return its buffer."""
        for place in self._blocks[number].places:
            place.module._parameters[place.name] = nothing(place.shape, place.dtype)
        return self._loaded.pop(number)

    # -- in the background -------------------------------------------------------------------------

    def _fill(
        self, places: Sequence[tuple[int, torch.Tensor]], ready: torch.cuda.Event | None
    ) -> None:
        """Read blocks into their buffers.

        A GPU copies them on a stream of its own, after the current work that uses the buffers.
        """
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
        """A free staging buffer, and on a GPU the event to record after its next copy."""
        is_gpu = self._device.type == "cuda"
        if len(self._staging) < (2 if is_gpu else 1):
            event = torch.cuda.Event() if is_gpu else None
            self._staging.append(
                (torch.empty(STAGING, dtype=torch.uint8, pin_memory=is_gpu), event)
            )
        else:
            self._staging.append(self._staging.pop(0))
        staged, event = self._staging[-1]
        if event is not None:
            event.synchronize()
        return staged, event

    @cached_property
    def _stream(self) -> torch.cuda.Stream:
        return torch.cuda.Stream(self._device)


class _Reading(threading.Thread):
    """A thread for reads in the background. It is a daemon: the end of a process does not wait."""

    def __init__(self, work: Callable[[], None], places: Sequence[tuple[int, torch.Tensor]]):
        super().__init__(name="fastprune-reading", daemon=True)
        self.places, self._work = places, work
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._work()
        except BaseException as error:  # `wait` returns it, and its caller raises it
            self._error = error

    def wait(self) -> BaseException | None:
        self.join()
        return self._error


def _part(buffer: torch.Tensor, place: Place) -> torch.Tensor:
    size = place.shape.numel() * place.dtype.itemsize
    return buffer[place.offset : place.offset + size].view(place.dtype).view(place.shape)


def nothing(shape: torch.Size, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)
