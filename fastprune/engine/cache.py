"""The prefix cache: states that outlive a call, by chunk and prefix, in tiers from fast to slow.
And the frontier: states that wait for a later band of weights, in the same tiers.

What is worth keeping is decided before a call, in integers (`retention`, `schedule`); here states
only come and go. A state comes back with the bits that it went with.
"""

from __future__ import annotations

import shutil
import tempfile
import warnings
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from ..models.device import available_bytes
from ..plan.trie import Units

SHARE = 4  # by default the cache may take one part in so many of what is free

Key = tuple[int, Units]  # chunk, prefix


class DeviceTier:
    """States where they were made."""

    name = "device"

    def __init__(self) -> None:
        self._states: dict[Key, torch.Tensor] = {}

    def put(self, key: Key, state: torch.Tensor) -> None:
        self._states[key] = state

    def get(self, key: Key) -> torch.Tensor:
        return self._states[key]

    def drop(self, key: Key) -> None:
        del self._states[key]


class HostTier(DeviceTier):
    """States of a GPU in the host's pinned memory, whose buffers are used again."""

    name = "host"

    def __init__(self, device: torch.device):
        super().__init__()
        self._device = device
        self._free: dict[tuple, list[torch.Tensor]] = {}

    def put(self, key: Key, state: torch.Tensor) -> None:
        kind = (state.shape, state.dtype)
        if self._free.get(kind):
            buffer = self._free[kind].pop()
        else:
            buffer = torch.empty(
                state.shape, dtype=state.dtype, pin_memory=self._device.type == "cuda"
            )
        # the copies of a stream keep their order, so that a later read finds what was written
        self._states[key] = buffer.copy_(state, non_blocking=True)

    def get(self, key: Key) -> torch.Tensor:
        return self._states[key].to(self._device, non_blocking=True)

    def drop(self, key: Key) -> None:
        buffer = self._states.pop(key)
        self._free.setdefault((buffer.shape, buffer.dtype), []).append(buffer)


class DiskTier:
    """States in a file without a name, which goes when the process does, however it ends."""

    name = "disk"

    def __init__(self, folder: Path, device: torch.device):
        self._device = device
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (open as long as this tier lives)
        self._places: dict[Key, tuple[int, torch.Size, torch.dtype, int]] = {}
        self._free: dict[int, list[int]] = {}
        self._end = 0

    def put(self, key: Key, state: torch.Tensor) -> None:
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
        self._places[key] = start, state.shape, state.dtype, len(data)

    def get(self, key: Key) -> torch.Tensor:
        start, shape, dtype, size = self._places[key]
        data = np.empty(size, dtype=np.uint8)
        self._file.seek(start)
        if self._file.readinto(data.data) != size:
            raise OSError("a state was cut short")
        return torch.from_numpy(data).view(dtype).view(shape).to(self._device)

    def drop(self, key: Key) -> None:
        start, _, _, size = self._places.pop(key)
        self._free[size].append(start)


def _make_tiers(folder: Path | None, device: torch.device) -> list[DeviceTier | DiskTier]:
    """The places for states, the fastest first: the device, the host beside a GPU, a folder's disk
    if one is given."""
    tiers: list[DeviceTier | DiskTier] = [DeviceTier()]
    if device.type == "cuda":
        tiers.append(HostTier(device))
    if folder is not None:
        tiers.append(DiskTier(folder, device))
    return tiers


class PrefixCache:
    """States of prefixes that earlier calls ran, for each chunk of a calibration set.

    limit: bytes in memory; None for a quarter of what is free, asked anew before each call; 0 for
    none. folder: where states go that do not fit, up to a quarter of what its disk has free; None
    for nowhere. hits: states that were read, by tier. Every chunk has room for the same number of
    prefixes. per_machine, per_device: how many processes share what is free of the host and its
    disk, and of the device.
    """

    per_machine = per_device = 1

    def __init__(self, limit: int | None, folder: Path | None, device: torch.device):
        self._limit, self._folder, self._device = limit, folder, device
        self._tiers = _make_tiers(folder, device)
        self.hits = {tier.name: 0 for tier in self._tiers}
        self._rooms = [0] * len(self._tiers)  # prefixes that each chunk may have in each tier
        self._share, self._state_bytes = 1.0, 1
        self._known: dict[int, tuple[tuple[Units, ...], np.ndarray]] = {}
        self._place: dict[Key, tuple[int, int]] = {}  # tier, bytes
        self._counts: list[dict[int, int]] = [{} for _ in self._tiers]
        self._held = [0] * len(self._tiers)

    def start(self, state_bytes: int) -> None:
        """Begin anew, empty, with chunks over all of which the states of one prefix weigh so
        much."""
        self.clear()
        self._state_bytes = max(1, state_bytes)

    @property
    def bytes(self) -> int:
        """What is held now, in all tiers."""
        return sum(self._held)

    def capacity(self) -> int:
        """How many prefixes each chunk may hold, as of now."""
        budgets = self._budgets()
        self._rooms = [
            int(self._share * budgets.get(tier.name, 0)) // self._state_bytes
            for tier in self._tiers
        ]
        return sum(self._rooms)

    def known(self, chunk: int) -> tuple[tuple[Units, ...], np.ndarray]:
        """The prefixes that are held of a chunk, and how likely each is wanted (see
        `retention`)."""
        return self._known.get(chunk, ((), np.zeros(0)))

    def put(self, chunk: int, prefix: Units, state: torch.Tensor) -> None:
        """Keep a state, in the fastest tier that has room."""
        for number, room in enumerate(self._rooms):
            if self._counts[number].get(chunk, 0) >= room:
                continue
            try:
                self._tiers[number].put((chunk, prefix), state)
            except OSError as error:
                self._give_up_disk(error)
                return
            self._place[chunk, prefix] = number, state.nbytes
            self._counts[number][chunk] = self._counts[number].get(chunk, 0) + 1
            self._held[number] += state.nbytes
            return

    def get(self, chunk: int, prefix: Units) -> torch.Tensor:
        """A state that is held, on the device."""
        tier = self._tiers[self._place[chunk, prefix][0]]
        state = tier.get((chunk, prefix))
        self.hits[tier.name] += 1
        return state

    def drop(self, chunk: int, prefixes: Iterable[Units]) -> None:
        for prefix in prefixes:
            if (chunk, prefix) in self._place:
                number, size = self._place.pop((chunk, prefix))
                self._tiers[number].drop((chunk, prefix))
                self._counts[number][chunk] -= 1
                self._held[number] -= size

    def settle(self, chunk: int, prefixes: tuple[Units, ...], likelihood: np.ndarray) -> None:
        """Note what a finished walk of a chunk has left here."""
        left = [i for i, prefix in enumerate(prefixes) if (chunk, prefix) in self._place]
        if len(left) < len(prefixes):  # no room on the disk after all
            prefixes, likelihood = tuple(prefixes[i] for i in left), likelihood[left]
        self._known[chunk] = prefixes, likelihood

    def forget(self, chunk: int) -> None:
        """Drop all that is held of a chunk: a walk was broken off."""
        self.drop(chunk, [prefix for of, prefix in self._place if of == chunk])
        self._known.pop(chunk, None)

    def clear(self) -> None:
        """Drop everything."""
        for chunk, prefix in list(self._place):
            self.drop(chunk, [prefix])
        self._known.clear()

    def shrink(self) -> None:
        """Drop everything and take a quarter of the room from now on; none at all the third
        time."""
        self.clear()
        self._share = self._share / 4 if self._share > 1 / 16 else 0

    def _budgets(self) -> dict[str, int]:
        """Bytes that each tier may take."""
        held = {tier.name: held for tier, held in zip(self._tiers, self._held)}
        budgets, limit, is_gpu = {}, self._limit, self._device.type == "cuda"
        if limit is None or is_gpu:
            budgets["device"] = (available_bytes(self._device) + held["device"]) // (
                SHARE * self.per_device
            )
        if limit is None and is_gpu:
            budgets["host"] = (available_bytes(torch.device("cpu")) + held["host"]) // (
                SHARE * self.per_machine
            )
        elif limit is not None:
            budgets["device"] = min(budgets.get("device", limit), limit)
            if is_gpu:
                budgets["host"] = limit - budgets["device"]
        if self._folder is not None:
            try:
                free = shutil.disk_usage(self._folder).free
            except OSError as error:  # the folder has gone
                self._give_up_disk(error)
            else:
                budgets["disk"] = (free + held["disk"]) // (SHARE * self.per_machine)
        return budgets

    def _give_up_disk(self, error: OSError) -> None:
        warnings.warn(
            f"{self._folder}: no more states are kept there: {error}", RuntimeWarning, stacklevel=2
        )
        self._folder = None
        self._rooms[-1] = 0


class Frontier:
    """States that go from one visit of a band to later ones, by chunk and prefix.

    What does not fit into memory goes to the host's (from a GPU), then to a disk. Nothing is ever
    lost: a disk that fails is given up with one warning, and memory takes what it should have had.
    per_machine: how many processes share the slower tiers.
    """

    per_machine = 1

    def __init__(self, folder: Path | None, device: torch.device):
        self._folder, self._device = folder, device
        self._tiers = _make_tiers(folder, device)
        self._rooms = [0] * len(self._tiers)
        self._held = [0] * len(self._tiers)
        self._place: dict[Key, tuple[int, int]] = {}  # tier, bytes

    def start(self, memory: int) -> int:
        """Begin anew, empty, with so many bytes in memory; how many there are beyond it."""
        self.clear()
        self._rooms = [memory]
        if self._device.type == "cuda":
            self._rooms.append(available_bytes(torch.device("cpu")) // (SHARE * self.per_machine))
        if self._folder is not None:
            try:
                free = shutil.disk_usage(self._folder).free
                self._rooms.append(free // (SHARE * self.per_machine))
            except OSError as error:  # the folder has gone
                self._give_up_disk(error)
        return sum(self._rooms[1:])

    @property
    def bytes(self) -> int:
        """What is held in memory, on the device."""
        return self._held[0]

    def put(self, chunk: int, prefix: Units, state: torch.Tensor) -> None:
        """Keep a state, in the fastest tier that has room."""
        fits = (i for i, room in enumerate(self._rooms) if self._held[i] + state.nbytes <= room)
        number = next(fits, 0)
        try:
            self._tiers[number].put((chunk, prefix), state)
        except OSError as error:
            self._give_up_disk(error)
            self._rooms[number], number = 0, 0
            self._tiers[0].put((chunk, prefix), state)
        self._place[chunk, prefix] = number, state.nbytes
        self._held[number] += state.nbytes

    def get(self, chunk: int, prefix: Units) -> torch.Tensor:
        """A state that is held, on the device."""
        return self._tiers[self._place[chunk, prefix][0]].get((chunk, prefix))

    def drop(self, chunk: int, prefix: Units) -> None:
        number, size = self._place.pop((chunk, prefix))
        self._tiers[number].drop((chunk, prefix))
        self._held[number] -= size

    def clear(self) -> None:
        """Drop everything."""
        for key in list(self._place):
            self.drop(*key)

    def _give_up_disk(self, error: OSError) -> None:
        warnings.warn(
            f"{self._folder}: no more states go there: {error}", RuntimeWarning, stacklevel=3
        )
        self._folder = None  # for later calls, too
