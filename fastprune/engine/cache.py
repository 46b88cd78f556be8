"""The prefix cache and the frontier: states by chunk and prefix, in tiers from fast to slow.

States of the prefix cache outlive a call. States of the frontier wait within a call until weights
are loaded. `retention` and `schedule` choose the states to keep before a call, in integers. A state
comes back with the same bits.
"""

from __future__ import annotations

import math
import shutil
import tempfile
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ..models.device import available_bytes
from ..plan.retention import Prefixes
from ..plan.trie import Units

SHARE = 4  # states may take 1 / SHARE of the free bytes by default
MARGIN = 16  # 1 / MARGIN of a GPU's free bytes stays free, for allocators and libraries
FREE_SECONDS = 1.0  # free bytes are read at most once in this time
# bytes of the first piece of pinned memory, and the most of any piece. Both are powers of two, to
# which torch's allocator rounds up.
FIRST_PIECE, LARGEST_PIECE = 64 << 20, 1 << 30
ALIGNMENT = 256  # bytes; each state in a piece begins at a multiple


class DeviceTier:
    """States in the memory of the device that computed them.

    A tier holds states by handles, which `put` returns. This one's handles are the states.
    """

    name = "device"

    def put(self, state: torch.Tensor) -> torch.Tensor:
        return state

    def get(self, handle: torch.Tensor) -> torch.Tensor:
        return handle

    def drop(self, handle: torch.Tensor) -> None:
        """Let another state take the place of a dropped one."""

    def clear(self) -> None:
        """Free the memory of all states; their handles are dropped."""


class HostTier:
    """States of a GPU in the host's pinned memory, when the GPU's own memory is full.

    Pinning takes milliseconds, and rounds sizes up to a power of two. So states are cut from a few
    large pieces, each as large as all before. The place of a dropped state is used again.

    Args:
        device: The device of the states.
        pin: Allocates a piece of pinned memory, uint8[size]; by default by torch.
    """

    name = "host"

    def __init__(self, device: torch.device, pin: Callable[[int], torch.Tensor] | None = None):
        self._device, self._pin = device, pin or self._pinned
        self._piece = torch.empty(0, dtype=torch.uint8)  # the unused rest of the last piece
        self._total = 0  # bytes of all pieces
        self._free: dict[int, list[torch.Tensor]] = {}  # places of dropped states, by size

    def _pinned(self, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8, pin_memory=self._device.type == "cuda")

    def put(self, state: torch.Tensor) -> torch.Tensor:
        free = self._free.get(state.nbytes)
        place = free.pop() if free else self._cut(state.nbytes)
        buffer = place.view(state.dtype).view(state.shape)
        # the copies of a stream keep their order, so that a later read finds this state
        return buffer.copy_(state, non_blocking=True)

    def _cut(self, size: int) -> torch.Tensor:
        """A new place for a state, uint8[size]."""
        if size > len(self._piece):
            wanted = min(max(self._total, FIRST_PIECE), LARGEST_PIECE)
            self._piece = self._pin(max(wanted, 1 << (size - 1).bit_length()))
            self._total += len(self._piece)
        place = self._piece[:size]
        self._piece = self._piece[-(-size // ALIGNMENT) * ALIGNMENT :]
        return place

    def get(self, handle: torch.Tensor) -> torch.Tensor:
        return handle.to(self._device, non_blocking=True)

    def drop(self, handle: torch.Tensor) -> None:
        place = handle.flatten().view(torch.uint8)
        self._free.setdefault(len(place), []).append(place)

    def clear(self) -> None:
        # torch reuses a piece only after the copies from and to it
        self._free.clear()
        self._piece, self._total = torch.empty(0, dtype=torch.uint8), 0


class _Extent(NamedTuple):
    """A state in a file: `size` bytes from `start` on, which hold a tensor."""

    start: int
    size: int
    shape: torch.Size
    dtype: torch.dtype


class DiskTier:
    """States in a file without a name, which the system deletes when the process ends."""

    name = "disk"

    def __init__(self, folder: Path, device: torch.device):
        self._device = device
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (open as long as this tier lives)
        self._free: dict[int, list[int]] = {}  # by size, the offsets of dropped states
        self._end = 0

    def put(self, state: torch.Tensor) -> _Extent:
        data = state.contiguous().cpu().flatten().view(torch.uint8).numpy()
        free = self._free.setdefault(len(data), [])
        start = free[-1] if free else self._end
        self._file.seek(start)
        self._file.write(data.data)
        self._file.flush()
        if free:
            free.pop()
        else:
            self._end += len(data)
        return _Extent(start, len(data), state.shape, state.dtype)

    def get(self, extent: _Extent) -> torch.Tensor:
        data = np.empty(extent.size, dtype=np.uint8)
        self._file.seek(extent.start)
        if self._file.readinto(data.data) != extent.size:
            raise OSError("a state was cut short")
        return torch.from_numpy(data).view(extent.dtype).view(extent.shape).to(self._device)

    def drop(self, extent: _Extent) -> None:
        self._free[extent.size].append(extent.start)

    def clear(self) -> None:
        self._free.clear()
        self._end = 0
        with suppress(OSError):  # then its bytes are overwritten
            self._file.truncate(0)


class _Place(NamedTuple):
    """The name of the tier that holds a state, the tier's handle, and the state's bytes."""

    tier: str
    handle: Any
    size: int


class TieredStates:
    """States by chunk and prefix, each in the fastest tier that has room for it.

    The tiers are the device, with a GPU the host's memory, and the disk of a folder. When the disk
    fails, one warning says so, and no more states are written there. States on it can still be
    read. A subclass defines `has_room`.

    Attributes:
        held_bytes: Bytes held now, by the name of the tier, the fastest first.
        hits: The number of states that were read, by the name of the tier.
    """

    def __init__(self, folder: Path | None, device: torch.device):
        self._folder, self._device = folder, device
        self._tiers: dict[str, DeviceTier | HostTier | DiskTier] = {"device": DeviceTier()}
        if device.type == "cuda":
            self._tiers["host"] = HostTier(device)
        if folder is not None:
            self._tiers["disk"] = DiskTier(folder, device)
        self.held_bytes = dict.fromkeys(self._tiers, 0)
        self.hits = dict.fromkeys(self._tiers, 0)
        # by chunk and prefix, so that a chunk's states can be dropped without a search
        self._places: dict[int, dict[Units, _Place]] = {}
        # states held, by chunk and tier
        self._counts: defaultdict[int, Counter[str]] = defaultdict(Counter)
        self._memory: dict[str, tuple[float, int]] = {}  # by tier: time of reading, and bytes

    def has_room(self, tier: str, chunk: int, size: int) -> bool:
        """Whether a tier may take one more state of a chunk, of this number of bytes."""
        raise NotImplementedError

    def share_of(self, tier: str, sharers: int, reserve: int | None = None) -> int:
        """Compute the bytes that a tier may hold: 1 / `SHARE` of its own and the free bytes.

        Args:
            tier: The tier's name.
            sharers: The number of processes that divide these bytes.
            reserve: Bytes of the device that this process needs for other purposes. With it, the
                device's tier may hold all bytes but these and a margin, if that is more.

        Returns:
            The bytes; 0 for a disk that failed.
        """
        room = (self._disk_room() if tier == "disk" else self._memory_room(tier)) // sharers
        share = room // SHARE
        if tier == "device" and reserve is not None:
            share = max(share, room - room // MARGIN - reserve)
        return share

    def _disk_room(self) -> int:
        """The states' own and the free bytes of the disk; 0 if it failed."""
        if self._folder is None:
            return 0
        try:
            return shutil.disk_usage(self._folder).free + self.held_bytes["disk"]
        except OSError as error:  # the folder was removed
            self._give_up_disk(error)
            return 0

    def _memory_room(self, tier: str) -> int:
        """The tier's own and the free bytes of its memory, read at most `FREE_SECONDS` ago."""
        now, (read, room) = time.monotonic(), self._memory.get(tier, (-math.inf, 0))
        if now - read > FREE_SECONDS:
            device = self._device if tier == "device" else torch.device("cpu")
            room = available_bytes(device) + self.held_bytes[tier]
            self._memory[tier] = now, room
        return room

    def put(self, chunk: int, prefix: Units, state: torch.Tensor) -> str | None:
        """Hold a state in the first tier that has room and does not fail.

        Args:
            chunk: The state's chunk.
            prefix: The state's prefix, which is not held yet.
            state: The state.

        Returns:
            The tier's name; None if no tier took it.
        """
        for tier in self._tiers:
            has_failed = tier == "disk" and self._folder is None
            if has_failed or not self.has_room(tier, chunk, state.nbytes):
                continue
            try:
                return self._hold(tier, chunk, prefix, state)
            except OSError as error:
                self._give_up_disk(error)
        return None

    def _hold(self, tier: str, chunk: int, prefix: Units, state: torch.Tensor) -> str:
        place = _Place(tier, self._tiers[tier].put(state), state.nbytes)
        self._places.setdefault(chunk, {})[prefix] = place
        self._counts[chunk][tier] += 1
        self.held_bytes[tier] += place.size
        return tier

    def get(self, chunk: int, prefix: Units) -> torch.Tensor:
        """Read a held state onto the device."""
        place = self._places[chunk][prefix]
        self.hits[place.tier] += 1
        return self._tiers[place.tier].get(place.handle)

    def drop(self, chunk: int, prefix: Units) -> None:
        """Drop a state, if it is held."""
        place = self._places.get(chunk, {}).pop(prefix, None)
        if place is not None:
            self._tiers[place.tier].drop(place.handle)
            self._counts[chunk][place.tier] -= 1
            self.held_bytes[place.tier] -= place.size

    def clear(self) -> None:
        """Drop all held states, and free their memory and their part of the disk."""
        for name, tier in self._tiers.items():
            tier.clear()
            self.held_bytes[name] = 0
        self._places.clear()
        self._counts.clear()

    def _give_up_disk(self, error: OSError) -> None:
        message = f"{self._folder}: no more states are kept there: {error}"
        warnings.warn(message, RuntimeWarning, stacklevel=4)
        self._folder = None

    def held(self, chunk: int) -> Collection[Units]:
        """The prefixes of a chunk whose states are held."""
        return self._places.get(chunk, {}).keys()


NONE_HELD = Prefixes()


class PrefixCache(TieredStates):
    """States of prefixes that earlier calls ran, for each chunk of a calibration set.

    Every chunk may hold the same number of prefixes.

    Args:
        limit: The most bytes in memory; 0 keeps none. None takes a quarter of the free bytes at
            each call, or on a device with a reserve all but the reserve.
        folder: A folder for further states, up to a quarter of its disk's free bytes; or None.
        device: The device that computes the states.
        reserve: Bytes of a GPU that a call needs for other purposes; None if they are not known.

    Attributes:
        per_machine: The number of processes that share the host and its disk.
        per_device: The number of processes that share the device.
    """

    per_machine = per_device = 1
    _sharers = 1  # caches of this process that share the limit

    def __init__(
        self,
        limit: int | None,
        folder: Path | None,
        device: torch.device,
        reserve: int | None = None,
    ):
        super().__init__(folder, device)
        self._limit, self._reserve = limit, reserve
        self._rooms = dict.fromkeys(self.held_bytes, 0)  # prefixes of each chunk, by tier
        self._share, self._state_bytes = 1.0, 1
        self._matches: dict[int, Prefixes] = {}

    def start(self, state_bytes: int) -> None:
        """Begin empty. The states of one prefix on all chunks take `state_bytes`."""
        self.clear()
        self._state_bytes = max(1, state_bytes)

    @property
    def bytes(self) -> int:
        """Bytes held now, in all tiers."""
        return sum(self.held_bytes.values())

    @property
    def free_bytes(self) -> int:
        """Unused bytes of the limit."""
        return int(self._share * sum(self._limits().values())) - self.bytes

    @property
    def capacity(self) -> int:
        """The number of prefixes that each chunk may hold, set by the last `resize`."""
        return sum(self._rooms.values())

    def resize(self) -> None:
        """Set the capacity from the bytes free now."""
        self._rooms = {
            tier: int(self._share * limit) // self._state_bytes
            for tier, limit in self._limits().items()
        }

    def _limits(self) -> dict[str, int]:
        """Bytes that each tier may hold."""
        limits = {
            tier: self.share_of(
                tier,
                self._sharers * (self.per_device if tier == "device" else self.per_machine),
                self._reserve,
            )
            for tier in self.held_bytes
        }
        if self._limit is None:
            return limits
        limit = self._limit // self._sharers
        if "host" in limits:
            limits["device"] = min(limits["device"], limit)
            limits["host"] = limit - limits["device"]
        else:
            limits["device"] = limit
        return limits

    def share(self, sharers: int) -> None:
        """Divide the limit by the number of caches that share it.

        States that no longer fit are evicted, the least likely needed first.
        """
        self._sharers = sharers
        self.resize()
        for chunk, match in list(self._matches.items()):
            ranked = np.argsort(-match.likelihood, kind="stable")
            self.evict(chunk, [match.prefixes[i] for i in ranked[self.capacity :]])
            self.commit(chunk, match)

    def match(self, chunk: int) -> Prefixes:
        """The prefixes of a chunk whose states are held, and their likelihoods."""
        return self._matches.get(chunk, NONE_HELD)

    def insert(self, chunk: int, states: Mapping[Units, torch.Tensor]) -> None:
        """Hold states of a chunk by prefix, each in the fastest tier that has room."""
        for prefix, state in states.items():
            self.put(chunk, prefix, state)

    def has_room(self, tier: str, chunk: int, size: int) -> bool:
        return self._counts[chunk][tier] < self._rooms[tier]

    def takes(self, chunk: int, count: int) -> bool:
        """Whether the device has room for `count` more states of a chunk."""
        return self._counts[chunk]["device"] + count <= self._rooms["device"]

    def evict(self, chunk: int, prefixes: Iterable[Units]) -> None:
        """Drop the held ones among these states."""
        for prefix in prefixes:
            self.drop(chunk, prefix)

    def commit(self, chunk: int, prefixes: Prefixes) -> None:
        """Let later calls match those of these prefixes of a chunk that are held."""
        inside = self.held(chunk)
        if len(inside) < len(prefixes):  # some were evicted, or the disk has failed
            held = [i for i, prefix in enumerate(prefixes.prefixes) if prefix in inside]
            prefixes = Prefixes([prefixes.prefixes[i] for i in held], prefixes.likelihood[held])
        self._matches[chunk] = prefixes

    def forget(self, chunk: int) -> None:
        """Evict all states of a chunk, such as after an interrupted walk."""
        self.evict(chunk, list(self.held(chunk)))
        self._counts.pop(chunk, None)
        self._matches.pop(chunk, None)

    def clear(self) -> None:
        """Evict all states."""
        super().clear()
        self._matches.clear()

    def shrink(self) -> None:
        """Evict all states, and use a quarter of the room from now on; none after a third call."""
        self.clear()
        self._share = self._share / 4 if self._share > 1 / 16 else 0


class Frontier(TieredStates):
    """States that wait within a call for units that are loaded later, by chunk and prefix.

    No state is ever lost: the device holds those for which no tier has room.

    Attributes:
        per_machine: The number of processes that share the slower tiers.
    """

    per_machine = 1

    def __init__(self, folder: Path | None, device: torch.device):
        super().__init__(folder, device)
        self._limits = dict.fromkeys(self.held_bytes, 0)  # bytes, by tier

    def start(self, memory: int) -> None:
        """Begin empty, with `memory` bytes on the device, and a share of the slower tiers."""
        self.clear()
        for tier in self._limits:
            self._limits[tier] = (
                memory if tier == "device" else self.share_of(tier, self.per_machine)
            )

    @property
    def bytes(self) -> int:
        """Bytes held on the device."""
        return self.held_bytes["device"]

    @property
    def slower_bytes(self) -> int:
        """Bytes that the tiers beyond the device may hold."""
        return sum(self._limits.values()) - self._limits["device"]

    def has_room(self, tier: str, chunk: int, size: int) -> bool:
        return self.held_bytes[tier] + size <= self._limits[tier]

    def put(self, chunk: int, prefix: Units, state: torch.Tensor) -> str:
        """Hold a state, in the fastest tier that has room."""
        return super().put(chunk, prefix, state) or self._hold("device", chunk, prefix, state)
