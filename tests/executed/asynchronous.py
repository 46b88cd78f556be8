"""Work that a program starts and later waits for: copies to shared memory, and matrix products.

It is carried out as late as its waits allow. From its start until then, what it will write may not
be touched, and what it reads may not change: either is a fault.
"""

from __future__ import annotations

import ctypes
import struct
from collections import deque
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from .ptx import Fault
from .rounding import widen

Program = Any  # machine.Program, which imports this module


class _Copy(NamedTuple):
    to: np.ndarray  # addresses in shared memory, one a thread
    source: np.ndarray  # in global memory
    count: np.ndarray  # bytes that are read; the others are zeros
    size: int  # bytes that are written
    warps: np.ndarray


class Copies:
    """cp.async: each thread copies up to 16 bytes; groups are waited for in order."""

    def __init__(self, program: Program):
        self._program = program
        self._open: list[_Copy] = []
        self._groups: deque[list[_Copy]] = deque()

    def issue(self, to, source, count, size, warps) -> None:
        if ((count != 0) & (count != size)).any():
            raise Fault("cp.async of a part of its bytes")
        self._program.global_memory.check(source[count > 0], size, "copies")
        self._program.shared_memory.expect(to, size, warps)
        self._open.append(_Copy(to, source, count, size, warps))

    def commit(self) -> None:
        self._groups.append(self._open)
        self._open = []

    def wait(self, left: int) -> None:
        """Until at most `left` groups are on their way."""
        while len(self._groups) > left:
            for copy in self._groups.popleft():
                self._carry_out(copy)

    def finish(self) -> None:
        if self._open or any(self._groups):
            raise Fault("the program ends before its copies")

    def _carry_out(self, copy: _Copy) -> None:
        reads = copy.count > 0
        for first in range(0, copy.size, 4):
            words = np.zeros(len(copy.to), np.uint32)
            words[reads] = self._program.global_memory.load(copy.source[reads] + first, 4)
            self._program.shared_memory.receive(copy.to + first, 4, words)
        # only who waits for a copy sees it; others do after the next barrier
        self._program.shared_memory.note_writes(copy.to, copy.size, copy.warps)


class _Tile(NamedTuple):
    places: np.ndarray  # int64[rows, columns]: addresses in shared memory
    values: np.ndarray  # unsigned, alike


@dataclass
class _Barrier:
    count: int  # arrivals that a phase takes
    missing: int
    bytes: int = 0  # that are announced and have not arrived
    phase: int = 0
    tiles: list[_Tile] = field(default_factory=list)  # on their way


class Barriers:
    """mbarriers, and the copies of tiles (TMA) that report to them."""

    def __init__(self, program: Program):
        self._program = program
        self._barriers: dict[int, _Barrier] = {}  # by address

    def _at(self, place: int) -> _Barrier:
        if place not in self._barriers:
            raise Fault(f"no barrier at {place:#x} of shared memory")
        return self._barriers[place]

    def init(self, place: int, count: int) -> None:
        self._program.shared_memory.check(np.array([place]), 8, "makes a barrier of")
        self._barriers[place] = _Barrier(count, count)

    def invalidate(self, place: int) -> None:
        if self._at(place).tiles:
            raise Fault("a barrier is given up before its copies have arrived")
        del self._barriers[place]

    def finish(self) -> None:
        if any(barrier.tiles for barrier in self._barriers.values()):
            raise Fault("the program ends before its copies")

    def arrive(self, place: int, size: int) -> None:
        barrier = self._at(place)
        barrier.missing -= 1
        barrier.bytes += size
        self._settle(barrier)

    def wait(self, place: int, parity: int) -> None:
        """Until the phase of this parity is over."""
        barrier = self._at(place)
        if barrier.phase % 2 == parity:
            tiles, barrier.tiles = barrier.tiles, []
            for tile in tiles:
                size = tile.values.dtype.itemsize
                self._program.shared_memory.receive(tile.places, size, tile.values)
                barrier.bytes -= tile.values.nbytes
                self._settle(barrier)
        if barrier.phase % 2 == parity:
            raise Fault(
                f"a wait that never ends: {barrier.missing} arrivals and {barrier.bytes} bytes "
                f"are missing"
            )

    @staticmethod
    def _settle(barrier: _Barrier) -> None:
        if barrier.missing == 0 and barrier.bytes == 0:
            barrier.phase += 1
            barrier.missing = barrier.count

    def copy(self, to: int, tensor_map: int, x: int, y: int, place: int, warp: int):
        """A tile from column x, row y on; zeros where it is outside of the matrix."""
        fields = struct.unpack("<5Q4I", ctypes.string_at(tensor_map, 56))
        magic, begin, num_columns, num_rows, row_bytes, columns, rows, swizzle, size = fields
        if magic != 0x7E4507:
            raise Fault("no tensor map at the address of a copy")
        if to % 128:
            raise Fault(f"a tile is copied to {to:#x}, which is not aligned to 128 bytes")
        row, column = np.arange(rows)[:, None], np.arange(columns)[None, :]
        places = _swizzled(to + (row * columns + column) * size, swizzle)
        inside = (y + row >= 0) & (y + row < num_rows)
        inside = inside & (x + column >= 0) & (x + column < num_columns)
        sources = (begin + (y + row) * row_bytes + (x + column) * size)[inside]
        self._program.global_memory.check(sources, size, "copies")
        self._program.shared_memory.expect(places, size, warp)
        values = np.zeros((rows, columns), {2: np.uint16, 4: np.uint32}[size])
        values[inside] = self._program.global_memory.load(sources, size)
        self._at(place).tiles.append(_Tile(places, values))


def _swizzled(places: np.ndarray, mode: int) -> np.ndarray:
    """Bits 4 to 6 of an address are mixed with bits 7 to 9: with one, two or three of them, in
    mode 1, 2 or 3 (32, 64 or 128 bytes)."""
    return places ^ ((places >> 7) & ((1 << mode) - 1)) << 4


class Product(NamedTuple):
    totals: tuple[str, ...]  # registers
    a: list[str] | np.ndarray  # registers, or descriptors: a is in shared memory
    b: np.ndarray  # descriptors
    keeps: bool  # adds to what is in `totals`
    transposed: list[int]  # of a and b
    kind: str  # f16 or bf16


class Products:
    """wgmma: each 4 warps multiply 64 rows of their own by up to 256 of another matrix, 16 columns
    at a time, on to sums in registers. Groups are waited for in order.

    While a product is on its way, the registers of its sums hold nothing.
    """

    def __init__(self, program: Program):
        self._program = program
        self._open: list[tuple[Product, list]] = []  # with their operands
        self._groups: deque[list[tuple[Product, list]]] = deque()
        self._sums: dict[tuple[str, ...], np.ndarray] = {}  # uint32[registers, threads]

    def issue(self, product: Product) -> None:
        if product.totals not in self._sums:
            nothing = np.zeros(self._program.threads, np.uint32)
            registers = self._program.registers
            before = [
                registers[name] if product.keeps else registers.get(name, nothing)
                for name in product.totals
            ]
            self._sums[product.totals] = np.stack(before)
            for name in product.totals:
                registers.pop(name, None)
        self._open.append((product, self._operands(product)))

    def commit(self) -> None:
        self._groups.append(self._open)
        self._open = []

    def wait(self, left: int) -> None:
        """Until at most `left` groups are on their way."""
        while len(self._groups) > left:
            for product, operands in self._groups.popleft():
                self._carry_out(product, operands)
        waiting = {product.totals for group in (*self._groups, self._open) for product, _ in group}
        for totals in [totals for totals in self._sums if totals not in waiting]:
            for name, total in zip(totals, self._sums.pop(totals)):
                if name in self._program.registers:
                    raise Fault(f"{name} is written before its product is done")
                self._program.registers[name] = total

    def finish(self) -> None:
        if self._open or any(self._groups):
            raise Fault("the program ends before its products")

    def _operands(self, product: Product) -> list[tuple[np.ndarray, np.ndarray]]:
        """Bits of a and b, for each 4 warps: uint16[64, 16] and uint16[N, 16]."""
        operands = []
        for first in range(0, self._program.threads, 128):
            warps = slice(first, first + 128)
            if isinstance(product.a, list):
                a = self._from_registers(product.a, warps)
            else:
                a = self._matrix(product.a[warps], 64, product.transposed[0])
            rows = 2 * len(product.totals)
            operands.append((a, self._matrix(product.b[warps], rows, product.transposed[1])))
        return operands

    def _carry_out(self, product: Product, operands: list) -> None:
        sums = self._sums[product.totals]
        if not product.keeps:
            sums = np.zeros_like(sums)
        row, column = _layout(len(sums))
        for number, (a, b) in enumerate(self._operands(product)):
            if not all(np.array_equal(x, y) for x, y in zip((a, b), operands[number])):
                raise Fault("an operand is written before its product is done")
            warps = slice(128 * number, 128 * number + 128)
            total = np.empty((64, 2 * len(sums)), np.float32)
            total[row, column] = sums[:, warps].view(np.float32)
            total = self._program.arithmetic.multiply(
                _numbers(a, product.kind), _numbers(b, product.kind), total
            )
            sums[:, warps] = total[row, column].view(np.uint32)
        self._sums[product.totals] = sums

    def _from_registers(self, names: list[str], warps: slice) -> np.ndarray:
        lane, warp = np.arange(128) % 32, np.arange(128) // 32
        a = np.empty((64, 16), np.uint16)
        for number, name in enumerate(names):
            pair = self._program.registers[name][warps].view(np.uint16).reshape(-1, 2)
            row = 16 * warp + lane // 4 + 8 * (number % 2)
            column = 2 * (lane % 4) + 8 * (number // 2)
            a[row, column], a[row, column + 1] = pair[:, 0], pair[:, 1]
        return a

    def _matrix(self, descriptors: np.ndarray, rows: int, transposed: int) -> np.ndarray:
        """uint16[rows, 16] of shared memory.

        A descriptor holds, in units of 16 bytes, where the matrix begins (bits 0 to 13), the
        distance of its parts along the row (16 to 29) and of blocks of 8 rows (32 to 45), and the
        swizzle (62 and 63). transposed: rows are contiguous, not columns.
        """
        descriptor = int(descriptors[0])
        if (descriptors != descriptors[0]).any():
            raise Fault("descriptors differ within four warps")
        begin, leading, stride = (((descriptor >> bit) & 0x3FFF) << 4 for bit in (0, 16, 32))
        swizzle = {0: 0, 1: 3, 2: 2, 3: 1}[descriptor >> 62]
        if swizzle == 0:
            raise Fault("a matrix without swizzle")
        pitch = 16 << swizzle  # bytes of a row
        row, column = np.arange(rows)[:, None], np.arange(16)[None, :]
        if transposed:
            numbers = pitch // 2
            places = row // numbers * leading + row % numbers * 2
            places = places + column // 8 * stride + column % 8 * pitch
        else:
            places = row // 8 * stride + row % 8 * pitch + column * 2
        places = _swizzled(begin + places, swizzle)
        self._program.shared_memory.check(places, 2, "multiplies")
        self._program.shared_memory.note_reads(places, 2, self._program.shared_memory.SEVERAL)
        return self._program.shared_memory.load(places, 2)


def _layout(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of each thread's sums. int64[count, 128]"""
    number, thread = np.arange(count)[:, None], np.arange(128)[None, :]
    row = 16 * (thread // 32) + thread % 32 // 4 + 8 * (number // 2 % 2)
    return row, 8 * (number // 4) + 2 * (thread % 4) + number % 2


def _numbers(bits: np.ndarray, kind: str) -> np.ndarray:
    return widen(bits) if kind == "bf16" else bits.view(np.float16).astype(np.float32)
