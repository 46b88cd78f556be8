"""Executes a kernel one program (CTA) at a time, all its threads at once, in NumPy.

A register is an array with one element a thread, and is replaced, never changed. Where threads
take different branches, those that stand earliest in the code run until they meet the others.
"""

from __future__ import annotations

import ctypes
import itertools

import numpy as np

from .asynchronous import Barriers, Copies, Products
from .instructions import UNSIGNED, Jump, Step, decode
from .ptx import Fault, Kernel
from .rounding import Arithmetic

LIMIT = 3_000_000  # instructions of a program, which a loop without end would pass

_BEGIN = 0x10000  # of the address space as one array; nothing is mapped below
_SPACE = np.ctypeslib.as_array((ctypes.c_uint8 * ((1 << 47) - _BEGIN)).from_address(_BEGIN))


class Memory:
    """Bytes that threads load and store, by address. Every address is checked first."""

    def __init__(self, name: str, space: np.ndarray, begin: int, spans: list[tuple[int, int]]):
        """spans: the addresses that may be used, [begin, end)."""
        self.name = name
        self._begin = begin
        whole = len(space) // 8 * 8
        self._views = {size: space[:whole].view(kind) for size, kind in UNSIGNED.items()}
        spans = sorted({span for span in spans if span[0] < span[1]})
        self._starts = np.array([start for start, _ in spans], np.int64)
        self._ends = np.array([end for _, end in spans], np.int64)

    def check(self, addresses: np.ndarray, size: int, verb: str) -> None:
        if not addresses.size:
            return
        if (addresses % size).any():
            raise Fault(f"{verb} {size} bytes of {self.name} memory at a misaligned address")
        inside = np.searchsorted(self._starts, addresses, side="right") - 1
        wrong = (
            (inside < 0) | (addresses + size > self._ends[inside])
            if len(self._starts)
            else np.ones(addresses.shape, bool)
        )
        if wrong.any():
            spans = ", ".join(f"[{a:#x}, {b:#x})" for a, b in zip(self._starts, self._ends))
            raise Fault(
                f"{verb} {size} bytes of {self.name} memory at {addresses[wrong][0]:#x}, outside "
                f"{spans or 'of everything'}"
            )

    def load(self, addresses: np.ndarray, size: int) -> np.ndarray:
        return self._views[size][(addresses - self._begin) // size]

    def store(self, addresses: np.ndarray, size: int, values: np.ndarray) -> None:
        self._views[size][(addresses - self._begin) // size] = values

    def note_reads(self, addresses: np.ndarray, size: int, warps: np.ndarray | int) -> None:
        """Programs share nothing that they write to global memory: there is nothing to note."""

    def note_writes(self, addresses: np.ndarray, size: int, warps: np.ndarray | int) -> None:
        """As `note_reads`."""


class SharedMemory(Memory):
    """A program's share, full of NaN at first. It is aligned as on the card, and ends where the
    launch says.

    What a copy has still to write may not be touched. What a warp writes, others may not read
    before a barrier of all threads, nor write over what they read.
    """

    SEVERAL = -1  # warps; the number of none

    def __init__(self, size: int):
        whole = np.full(size + 1024 + 16, 0xFF, np.uint8)
        aligned = whole[-whole.ctypes.data % 1024 :][: size + 16]
        super().__init__("shared", aligned, 0, [(0, size)])
        self._awaited = np.zeros(size // 4 + 4, bool)  # by words: a copy is on its way there
        self._barriers = 0  # that all threads have passed
        # by 2 bytes: who read and wrote them last, and after which barrier
        self._reader, self._writer = (np.full(size // 2 + 8, self.SEVERAL) for _ in range(2))
        self._read, self._written = (np.full(size // 2 + 8, -1) for _ in range(2))

    def synchronize(self) -> None:
        """All threads have passed a barrier."""
        self._barriers += 1

    def note_reads(self, addresses: np.ndarray, size: int, warps: np.ndarray | int) -> None:
        """warps: that read, one an address; SEVERAL: four together, for a product."""
        for half in range(size // 2):
            at = addresses // 2 + half
            if ((self._written[at] == self._barriers) & (self._writer[at] != warps)).any():
                raise Fault("shared memory is read that another warp writes, with no barrier")
            others = (self._read[at] == self._barriers) & (self._reader[at] != warps)
            self._reader[at] = warps
            others |= self._reader[at] != warps  # of two that read it now, one was noted
            self._reader[at[others]] = self.SEVERAL
            self._read[at] = self._barriers

    def note_writes(self, addresses: np.ndarray, size: int, warps: np.ndarray | int) -> None:
        """Two warps may write one address: they write the same."""
        self._refuse_readers(addresses, size, warps)
        for half in range(size // 2):
            self._writer[addresses // 2 + half] = warps
            self._written[addresses // 2 + half] = self._barriers

    def _refuse_readers(self, addresses, size, warps) -> None:
        for half in range(size // 2):
            at = addresses // 2 + half
            if ((self._read[at] == self._barriers) & (self._reader[at] != warps)).any():
                raise Fault("shared memory is written that another warp reads, with no barrier")

    def check(self, addresses: np.ndarray, size: int, verb: str) -> None:
        super().check(addresses, size, verb)
        for word in range(0, max(size // 4, 1)):
            if self._awaited[addresses // 4 + word].any():
                raise Fault(f"{verb} shared memory that a copy has still to write")

    def expect(self, addresses: np.ndarray, size: int, warps: np.ndarray | int) -> None:
        """Warps start a copy: until it is received, nothing may touch what it will write."""
        self.check(addresses, size, "copies to")
        self._refuse_readers(addresses, size, warps)
        for word in range(0, max(size // 4, 1)):
            self._awaited[addresses // 4 + word] = True

    def receive(self, addresses: np.ndarray, size: int, values: np.ndarray) -> None:
        """The copy's bytes, up to 4 an address."""
        self._awaited[addresses // 4] = False
        self.store(addresses, size, values)


class Program:
    """A program while it runs."""

    def __init__(self, kernel, grid, index, shared_bytes, values, global_memory, arithmetic):
        self.threads = kernel.threads
        self.thread = np.arange(kernel.threads, dtype=np.uint32)
        self.warp = np.arange(kernel.threads) // 32
        self.grid, self.index = grid, index
        self.params = dict(zip((param.name for param in kernel.params), values))
        self.global_memory = global_memory
        self.shared_memory = SharedMemory(shared_bytes)
        self.arithmetic: Arithmetic = arithmetic
        self.registers: dict[str, np.ndarray] = {}
        self.copies = Copies(self)
        self.barriers = Barriers(self)
        self.products = Products(self)

    def write(self, name: str, raw: np.ndarray, active: np.ndarray | None) -> None:
        """Replaces a register where threads are active; None: everywhere. Where it was never
        written, all its bits are set, which is NaN in floats."""
        if active is not None:
            before = self.registers.get(name)
            if before is None:
                before = np.full(self.threads, -1 if raw.dtype != bool else True).astype(raw.dtype)
            raw = np.where(active, raw, before)
        self.registers[name] = raw


def execute(
    kernel: Kernel,
    grid: tuple[int, int, int],
    shared_bytes: int,
    values: list[bytes],
    storages: list[tuple[int, int]],
    arithmetic: Arithmetic,
) -> None:
    """Runs every program of a launch, in order.

    Args:
        values: the kernel's parameters.
        storages: begin and end of the memory that it may touch.
        arithmetic: how the card rounds.
    """
    # parameters have addresses too: those of tensor maps are taken
    values = [ctypes.create_string_buffer(value, len(value)) for value in values]
    if kernel.code is None:
        kernel.code = decode(kernel)
    memory = Memory("global", _SPACE, _BEGIN, storages)
    with np.errstate(all="ignore"):
        for z, y, x in itertools.product(*(range(size) for size in reversed(grid))):
            program = Program(kernel, grid, (x, y, z), shared_bytes, values, memory, arithmetic)
            try:
                _run(kernel.code, program)
                program.copies.finish()
                program.products.finish()
                program.barriers.finish()
            except KeyError as missing:
                raise Fault(f"{kernel.name}: {missing} is read before it is written") from missing
            except Fault as fault:
                raise Fault(f"{kernel.name}, program {(x, y, z)}: {fault}") from fault


def _run(code: list[Step], program: Program) -> None:
    everyone: int | None = 0  # where all threads are, while they are together
    places = np.zeros(program.threads, np.int64)  # else where each is
    at_barrier = np.zeros(program.threads, bool)
    for _ in range(LIMIT):
        if everyone is not None:
            here, active = everyone, None
            if here >= len(code):
                return
        else:
            running = places < len(code)
            ready = running & ~at_barrier
            if not running.any():
                return
            if not ready.any():
                if len(set(places[running].tolist())) > 1:
                    raise Fault("threads wait at different barriers")
                program.shared_memory.synchronize()
                at_barrier[:] = False
                places[running] += 1
                if running.all():
                    everyone = int(places[0])
                continue
            here = int(places[ready].min())
            active = ready & (places == here)
            if active.all():
                everyone = here
                continue
        step = code[here]
        outcome = step(program, active)
        if outcome is None:
            if active is None:
                everyone += 1
            else:
                places[active] += 1
        elif isinstance(outcome, Jump):
            takes, target = outcome
            if active is None and (takes.all() or not takes.any()):
                everyone = target if takes.all() else here + 1
            else:
                if active is None:
                    everyone = None
                    active = np.ones(program.threads, bool)
                places[active] = np.where(takes[active], target, here + 1)
        elif active is None:  # a barrier that all have reached together
            program.shared_memory.synchronize()
            everyone += 1
        else:
            at_barrier |= active
    raise Fault(f"more than {LIMIT} instructions")
