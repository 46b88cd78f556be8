"""The instructions of PTX that Triton uses for our kernels, as functions over all threads.

Each entry of the table is a pattern of opcodes and a function that makes a `Step` of one
instruction. An opcode that no entry knows, down to its last modifier, is a `Fault` that names it.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from .asynchronous import Product
from .ptx import Fault, Instruction, Kernel
from .rounding import flush, narrow, widen

# Program is machine.Program, which imports this module.
Program = Any
Active = "np.ndarray | None"  # the threads that run an instruction; None: all
Read = Callable[[Program], np.ndarray]


class Jump(NamedTuple):
    takes: np.ndarray  # threads
    target: int  # index of an instruction


class Barrier(NamedTuple):
    """Every thread waits for every other one."""


Step = Callable[[Program, Active], "Jump | Barrier | None"]
Make = Callable[[Kernel, Instruction, re.Match], Step]

UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_SIGNED = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}
_TYPES = {
    "pred": np.bool_,
    **{f"{kind}{8 * size}": number for size, number in UNSIGNED.items() for kind in "bu"},
    **{f"s{8 * size}": number for size, number in _SIGNED.items()},
    "f16": np.float16,
    "f32": np.float32,
    "f64": np.float64,
}
_SIZES = {**{name: np.dtype(number).itemsize for name, number in _TYPES.items()}}
_SIZES |= {"bf16": 2, "f16x2": 4, "bf16x2": 4}
FLOAT = "f32|f16|bf16|f16x2|bf16x2"

_TABLE: list[tuple[re.Pattern, Make]] = []


def operation(pattern: str) -> Callable[[Make], Make]:
    def enter(make: Make) -> Make:
        _TABLE.append((re.compile(pattern), make))
        return make

    return enter


def decode(kernel: Kernel) -> list[Step]:
    return [_decode(kernel, instruction) for instruction in kernel.instructions]


def _decode(kernel: Kernel, instruction: Instruction) -> Step:
    for pattern, make in _TABLE:
        if match := pattern.fullmatch(instruction.opcode):
            step = make(kernel, instruction, match)
            jumps = make in (_branch, _return)
            return step if instruction.guard is None or jumps else _guarded(instruction, step)
    raise Fault(f"{kernel.name}: unknown opcode {instruction.opcode}, in {instruction}")


def _guarded(instruction: Instruction, step: Step) -> Step:
    def guarded(program, active):
        mask = _taken(program, instruction, active)
        if not mask.any():
            return None
        return step(program, None if mask.all() else mask)

    return guarded


def _taken(program, instruction, active) -> np.ndarray:
    """Threads for which the guard holds."""
    if instruction.guard is None:
        mask = np.ones(program.threads, bool)
    else:
        mask = program.registers[instruction.guard]
        mask = ~mask if instruction.negated else mask
    return mask if active is None else mask & active


# --- operands ---


def _as_type(raw: np.ndarray, kind: str) -> np.ndarray:
    """Bits of a register as numbers of a type; packed ones as [threads, 2], bfloat16 in float32."""
    size = _SIZES[kind]
    if raw.dtype.itemsize > size:
        raw = raw.astype(UNSIGNED[size])
    if kind == "bf16":
        return widen(raw)
    if kind == "bf16x2":
        return widen(raw.view(np.uint16)).reshape(-1, 2)
    if kind == "f16x2":
        return raw.view(np.float16).reshape(-1, 2)
    return raw.view(_TYPES[kind])


def _as_bits(values: np.ndarray, kind: str) -> np.ndarray:
    """The opposite: an unsigned number a thread, or a signed one where it would be extended."""
    if kind in ("bf16", "bf16x2"):
        values = narrow(values)
    else:
        values = np.ascontiguousarray(values, _TYPES["f16" if kind == "f16x2" else kind])
    if kind.endswith("x2"):
        return np.ascontiguousarray(values).view(np.uint32).reshape(-1)
    return values if values.dtype.kind in "bi" else values.view(UNSIGNED[values.dtype.itemsize])


def _immediate(text: str, kind: str) -> int | None:
    """The bits of a number in the code."""
    if match := re.fullmatch(r"0[fF]([0-9A-Fa-f]{8})", text):
        return int(match[1], 16)
    if re.fullmatch(r"-?(0[xX][0-9A-Fa-f]+|\d+)", text):
        return int(text, 0) & ((1 << 8 * _SIZES[kind]) - 1)
    return None


def reader(kernel: Kernel, text: str, kind: str) -> Read:
    """An operand as an array with one number of the type a thread."""
    bits = 0 if text == "global_smem" else _immediate(text, kind)
    if bits is not None:
        raw = np.full(kernel.threads, bits, UNSIGNED[_SIZES[kind]])
        constant = raw != 0 if kind == "pred" else _as_type(raw, kind)
        return lambda program: constant
    if match := re.fullmatch(r"%(ctaid|nctaid)\.([xyz])", text):
        axis = "xyz".index(match[2])
        if match[1] == "ctaid":
            return lambda program: np.full(program.threads, program.index[axis], _TYPES[kind])
        return lambda program: np.full(program.threads, program.grid[axis], _TYPES[kind])
    if text == "%tid.x":
        return lambda program: program.thread.view(_TYPES[kind])
    if any(text == param.name for param in kernel.params):
        return lambda program: np.full(
            program.threads, ctypes.addressof(program.params[text]), _TYPES[kind]
        )
    declared = kernel.register_type(text)
    if _SIZES[kind] > _SIZES[declared] or (kind == "pred") != (declared == "pred"):
        raise Fault(f"{kernel.name}: {text} holds {declared}, not {kind}")
    return lambda program: _as_type(program.registers[text], kind)


def writer(kernel: Kernel, text: str, kind: str) -> Callable[[Program, np.ndarray, Active], None]:
    """Writes numbers of the type to a register, extended where it is wider."""
    if text == "_":
        return lambda program, values, active: None
    declared = kernel.register_type(text)
    if _SIZES[kind] > _SIZES[declared] or (kind == "pred") != (declared == "pred"):
        raise Fault(f"{kernel.name}: {text} holds {declared}, not {kind}")
    raw = _TYPES[declared]

    def write(program, values, active):
        program.write(text, _as_bits(values, kind).astype(raw, copy=False), active)

    return write


def members(text: str) -> list[str]:
    """The operands of `{a, b}`; of one without braces, itself."""
    return [part.strip() for part in text.strip("{} ").split(",")]


def address(kernel: Kernel, text: str, space: str) -> Read:
    """`[base + offset]`, as int64."""
    match = re.fullmatch(r"\[\s*([^\s+\]]+)\s*(?:\+\s*(-?\d+))?\s*\]", text)
    if match is None:
        raise Fault(f"{kernel.name}: address {text} is not understood")
    base = reader(kernel, match[1], "u64" if space == "global" else "u32")
    offset = int(match[2] or 0)
    return lambda program: base(program).astype(np.int64) + offset


def everyone(active: Active, what: str) -> None:
    if active is not None:
        raise Fault(f"{what} runs in some threads only")


def _map(kernel, instruction, kinds, result, function, *, ftz=None) -> Step:
    """destination = function(operands), thread by thread."""
    reads = [reader(kernel, text, kind) for text, kind in zip(instruction.operands[1:], kinds)]
    if len(kinds) != len(instruction.operands) - 1:
        raise Fault(f"{kernel.name}: {instruction} has not {len(kinds)} operands")
    write = writer(kernel, instruction.operands[0], result)

    def step(program, active):
        write(program, function(*[read(program) for read in reads]), active)

    def flushing(program, active):
        write(program, flush(function(*[flush(read(program)) for read in reads])), active)

    return flushing if ftz else step


# --- arithmetic ---

_ARITHMETIC = {
    "add": np.add,
    "sub": np.subtract,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "neg": np.negative,
    "abs": np.abs,
    "not": np.invert,
}


@operation(rf"(add|sub|mul|neg|abs|min|max)(?:\.rn)?(\.ftz)?\.({FLOAT})")
def _float(kernel, instruction, match):
    special = {"mul": np.multiply, "min": np.fmin, "max": np.fmax}  # a number wins over NaN
    function = special.get(match[1]) or _ARITHMETIC[match[1]]
    kinds = [match[3]] * (1 if match[1] in ("neg", "abs") else 2)
    return _map(kernel, instruction, kinds, match[3], function, ftz=match[2])


@operation(rf"fma\.rn(\.ftz)?\.({FLOAT})")
def _fused(kernel, instruction, match):
    # a product of two float32 numbers is exact in float64; the sum is rounded there and again,
    # which differs from one rounding in one of 2^29 cases
    def function(a, b, c):
        exact = a.astype(np.float64) * b + c
        return exact.astype(np.float32) if match[2] == "f32" else exact

    return _map(kernel, instruction, [match[2]] * 3, match[2], function, ftz=match[1])


@operation(r"(ex2|rsqrt)\.approx(\.ftz)?\.f32|div\.full\.f32")
def _approximate(kernel, instruction, match):
    exact = {"ex2": np.exp2, "rsqrt": lambda x: 1 / np.sqrt(x), None: np.divide}[match[1]]
    limit = flush if match[2] else np.asarray
    operands = instruction.operands
    reads = [reader(kernel, text, "f32") for text in operands[1:]]
    write = writer(kernel, operands[0], "f32")

    def step(program, active):
        values = [limit(read(program)).astype(np.float64) for read in reads]
        write(program, limit(program.arithmetic.function(exact(*values))), active)

    return step


@operation(r"(add|sub|and|or|xor|neg|not|min|max|mul\.lo|mad\.lo)\.([bsu](?:16|32|64)|pred)")
def _integer(kernel, instruction, match):
    special = {
        "min": np.minimum,
        "max": np.maximum,
        "mul.lo": np.multiply,
        "mad.lo": lambda a, b, c: a * b + c,
    }
    function = special.get(match[1]) or _ARITHMETIC[match[1]]
    count = {"neg": 1, "not": 1, "mad.lo": 3}.get(match[1], 2)
    return _map(kernel, instruction, [match[2]] * count, match[2], function)


@operation(r"(mul|mad)\.(wide|hi)\.([su])32")
def _wide(kernel, instruction, match):
    """The product in 64 bits; .hi: its upper half."""
    narrow_kind, wide_kind = f"{match[3]}32", f"{match[3]}64"
    wide = _TYPES[wide_kind]
    if match[2] == "hi":

        def function(a, b):
            return (a.astype(wide) * b.astype(wide) >> wide(32)).astype(_TYPES[narrow_kind])
    else:

        def function(a, b, *added):
            return sum(added, a.astype(wide) * b.astype(wide))

    kinds = [narrow_kind] * 2 + [wide_kind] * (match[1] == "mad")
    result = narrow_kind if match[2] == "hi" else wide_kind
    return _map(kernel, instruction, kinds, result, function)


@operation(r"(div|rem)\.([su](?:32|64))")
def _divide(kernel, instruction, match):
    """Rounds towards zero, where NumPy rounds down."""

    def function(a, b):
        remainder = np.fmod(a, np.where(b == 0, 1, b).astype(b.dtype))
        return (a - remainder) // np.where(b == 0, 1, b) if match[1] == "div" else remainder

    return _map(kernel, instruction, [match[2]] * 2, match[2], function)


@operation(r"(shl|shr)\.([bsu](?:16|32|64))")
def _shift(kernel, instruction, match):
    bits = 8 * _SIZES[match[2]]

    def function(values, count):
        kind = values.dtype.type
        if match[1] == "shr" and values.dtype.kind == "i":
            return values >> np.minimum(count, bits - 1).astype(kind)
        shifted = (np.left_shift if match[1] == "shl" else np.right_shift)(
            values, np.minimum(count, bits - 1).astype(kind)
        )
        return np.where(count < bits, shifted, kind(0))

    return _map(kernel, instruction, [match[2], "u32"], match[2], function)


@operation(r"bfe\.([su]32)")
def _field(kernel, instruction, match):
    """`length` bits from `place` on, sign-extended in s32."""

    def function(values, place, length):
        place, length = place.astype(np.int64), length.astype(np.int64)
        left = values.astype(np.int64) << (64 - place - length)
        if match[1] == "s32":
            return (left >> (64 - length)).astype(np.int32)
        return (left.view(np.uint64) >> (64 - length).astype(np.uint64)).astype(np.uint32)

    return _map(kernel, instruction, [match[1], "u32", "u32"], match[1], function)


@operation(r"prmt\.b32")
def _permute(kernel, instruction, match):
    """Each nibble of the selector picks a byte of the two words; its high bit repeats the sign."""

    def function(low, high, selector):
        words = low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)
        result = np.zeros_like(low)
        for i in range(4):
            nibble = selector >> np.uint32(4 * i)
            byte = words >> ((nibble & np.uint32(7)) * np.uint32(8)).astype(np.uint64)
            byte = byte.astype(np.uint8)
            sign = np.where(byte & np.uint8(0x80), np.uint8(0xFF), np.uint8(0))
            byte = np.where(nibble & np.uint32(8), sign, byte)
            result |= byte.astype(np.uint32) << np.uint32(8 * i)
        return result

    return _map(kernel, instruction, ["b32"] * 3, "b32", function)


_COMPARE = {
    "eq": np.equal,
    "ne": lambda a, b: (a < b) | (a > b) if a.dtype.kind == "f" else a != b,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    # true for NaN
    "equ": lambda a, b: ~((a < b) | (a > b)),
    "neu": lambda a, b: ~(a == b),
    "ltu": lambda a, b: ~(a >= b),
    "leu": lambda a, b: ~(a > b),
    "gtu": lambda a, b: ~(a <= b),
    "geu": lambda a, b: ~(a < b),
    "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
    "nan": lambda a, b: np.isnan(a) | np.isnan(b),
}


@operation(rf"setp\.({'|'.join(_COMPARE)})\.([bsu](?:16|32|64)|f32|f16|bf16)")
def _compare(kernel, instruction, match):
    return _map(kernel, instruction, [match[2]] * 2, "pred", _COMPARE[match[1]])


@operation(r"selp\.([bsu](?:16|32|64)|f32)")
def _select(kernel, instruction, match):
    return _map(
        kernel, instruction, [match[1]] * 2 + ["pred"], match[1], lambda a, b, p: np.where(p, a, b)
    )


# --- moves ---


@operation(r"mov\.([bsu](?:16|32|64)|f32|pred)|cvta(?:\.param|\.to\.global)?\.(u64)")
def _move(kernel, instruction, match):
    """Also packs `{a, b}` into a register of twice the width, and unpacks it."""
    kind = (match[1] or match[2]).replace("f", "b")  # the bits, NaN's too
    to, source = instruction.operands
    half = f"b{4 * _SIZES[kind]}"
    if source.startswith("{"):
        reads = [reader(kernel, text, half) for text in members(source)]
        write = writer(kernel, to, kind)

        def step(program, active):
            parts = np.stack([read(program) for read in reads], axis=1)
            write(program, parts.view(_TYPES[kind])[:, 0], active)

        return step
    if to.startswith("{"):
        read = reader(kernel, source, kind)
        writes = [writer(kernel, text, half) for text in members(to)]

        def step(program, active):
            parts = read(program).view(_TYPES[half]).reshape(-1, 2)
            for i, write in enumerate(writes):
                write(program, np.ascontiguousarray(parts[:, i]), active)

        return step
    return _map(kernel, instruction, [kind], kind, lambda values: values)


@operation(r"cvt\.rn\.(f16x2|bf16x2)\.f32")
def _pack(kernel, instruction, match):
    """Two float32 numbers, the first into the upper half."""
    return _map(
        kernel, instruction, ["f32"] * 2, match[1], lambda high, low: np.stack([low, high], axis=1)
    )


@operation(r"cvt(?:\.rn)?\.(f32|f16|bf16)\.(f32|f16|bf16|[us](?:16|32))|cvt\.([us]\d+)\.([us]\d+)")
def _convert(kernel, instruction, match):
    to, source = match[1] or match[3], match[2] or match[4]
    number = np.float32 if to == "bf16" else _TYPES[to]
    return _map(kernel, instruction, [source], to, lambda values: values.astype(number))


@operation(r"shfl\.sync\.(bfly|idx|up|down)\.b32")
def _shuffle(kernel, instruction, match):
    """Reads a register of another lane of the warp."""
    to, source, by, clamp, mask = instruction.operands
    if mask != "-1" or clamp not in ("31", "0"):
        raise Fault(f"{kernel.name}: {instruction} is not for whole warps")
    read, distance = reader(kernel, source, "b32"), reader(kernel, by, "u32")
    write = writer(kernel, to, "b32")

    def step(program, active):
        own = program.thread.astype(np.int64)
        lane, count = own % 32, distance(program).astype(np.int64)
        other = {"bfly": lane ^ count, "idx": count % 32, "up": lane - count, "down": lane + count}
        other = other[match[1]]
        other = own - lane + np.where((other >= 0) & (other < 32), other, lane)
        if active is not None and not active[other[active]].all():
            raise Fault("shfl from a thread that does not take part")
        write(program, read(program)[other], active)

    return step


@operation(r"redux\.sync\.(max|min)\.s32")
def _reduce(kernel, instruction, match):
    """The extreme of all lanes of a warp, for each of them."""
    to, source, mask = instruction.operands
    read, members_of = reader(kernel, source, "s32"), reader(kernel, mask, "u32")
    write, extreme = writer(kernel, to, "s32"), getattr(np, match[1])

    def step(program, active):
        everyone(active, instruction.opcode)
        if (members_of(program) != 0xFFFFFFFF).any():
            raise Fault(f"{kernel.name}: {instruction} is not for whole warps")
        of_warps = extreme(read(program).reshape(-1, 32), axis=1)
        write(program, np.repeat(of_warps, 32), None)

    return step


@operation(r"elect\.sync")
def _elect(kernel, instruction, match):
    """One thread of each warp: the first."""
    text, chosen = instruction.operands[0].split("|")
    lane, write = writer(kernel, text, "b32"), writer(kernel, chosen, "pred")

    def step(program, active):
        everyone(active, instruction.opcode)
        lane(program, np.zeros(program.threads, np.uint32), None)
        write(program, program.thread % 32 == 0, None)

    return step


# --- control ---


@operation(r"bra(?:\.uni)?")
def _branch(kernel, instruction, match):
    target = kernel.labels[instruction.operands[0]]
    return lambda program, active: Jump(_taken(program, instruction, active), target)


@operation(r"ret")
def _return(kernel, instruction, match):
    end = len(kernel.instructions)
    return lambda program, active: Jump(_taken(program, instruction, active), end)


@operation(r"bar\.sync")
def _barrier(kernel, instruction, match):
    if instruction.operands != ("0",):
        raise Fault(f"{kernel.name}: {instruction} is not for all threads")
    return lambda program, active: Barrier()


@operation(
    r"wgmma\.fence\.sync\.aligned|fence\.proxy\.async\.shared::cta|bar\.warp\.sync"
    r"|fence\.mbarrier_init\.release\.cluster"
)
def _nothing(kernel, instruction, match):
    """Orders what is ordered here anyway."""
    return lambda program, active: None


# --- memory ---


@operation(r"ld\.param\.([bsu](?:8|16|32|64)|f32)")
def _load_parameter(kernel, instruction, match):
    place = re.fullmatch(r"\[\s*(\w+)\s*(?:\+\s*(\d+))?\s*\]", instruction.operands[1])
    kind = match[1].replace("f", "b")
    first = int(place[2] or 0)
    write = writer(kernel, instruction.operands[0], kind)

    def step(program, active):
        value = program.params[place[1]].raw[first : first + _SIZES[kind]]
        write(program, np.full(program.threads, np.frombuffer(value, _TYPES[kind])), active)

    return step


_ACCESS = r"(global|shared)(?:::cta)?(?:\.v([24]))?\.([bsu](?:8|16|32|64)|f32)"


@operation(rf"ld\.{_ACCESS}")
def _load(kernel, instruction, match):
    space, kind, size = match[1], match[3].replace("f", "b"), _SIZES[match[3]]
    where = address(kernel, instruction.operands[1], space)
    names = members(instruction.operands[0])
    writes = [writer(kernel, name, kind) for name in names]
    if len(names) != int(match[2] or 1):
        raise Fault(f"{kernel.name}: {instruction} has not {match[2] or 1} registers")

    def step(program, active):
        memory = getattr(program, f"{space}_memory")
        threads = slice(None) if active is None else active
        places = where(program)[threads]
        memory.check(places, size * len(names), "loads")
        memory.note_reads(places, size * len(names), program.warp[threads])
        for i, write in enumerate(writes):
            values = memory.load(places + size * i, size).view(_TYPES[kind])
            if active is not None:
                values, loaded = np.zeros(program.threads, values.dtype), values
                values[active] = loaded
            write(program, values, active)

    return step


@operation(rf"st\.{_ACCESS}")
def _store(kernel, instruction, match):
    space, kind, size = match[1], match[3].replace("f", "b"), _SIZES[match[3]]
    where = address(kernel, instruction.operands[0], space)
    reads = [reader(kernel, name, kind) for name in members(instruction.operands[1])]
    if len(reads) != int(match[2] or 1):
        raise Fault(f"{kernel.name}: {instruction} has not {match[2] or 1} registers")

    def step(program, active):
        memory = getattr(program, f"{space}_memory")
        threads = slice(None) if active is None else active
        places = where(program)[threads]
        memory.check(places, size * len(reads), "stores")
        memory.note_writes(places, size * len(reads), program.warp[threads])
        for i, read in enumerate(reads):
            memory.store(places + size * i, size, read(program)[threads].view(UNSIGNED[size]))

    return step


_MATRICES = r"matrix\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared\.b16"


def _matrix(program, places: np.ndarray, number: int, transposed: bool) -> list[np.ndarray]:
    """The addresses of each lane's elements of a matrix; 8 lanes of a warp have those of its rows.
    A lane has the pair of columns lane % 4 of the row lane // 4, in one piece; transposed, the pair
    of rows of that column, one by one."""
    lane = np.arange(program.threads) % 32
    first = np.arange(program.threads) - lane + 8 * number
    if not transposed:
        return [places[first + lane // 4] + 4 * (lane % 4)]
    return [places[first + 2 * (lane % 4) + i] + 2 * (lane // 4) for i in range(2)]


@operation(rf"ld{_MATRICES}")
def _load_matrices(kernel, instruction, match):
    count, transposed = int(match[1]), match[2] is not None
    where = address(kernel, instruction.operands[1], "shared")
    writes = [writer(kernel, name, "b32") for name in members(instruction.operands[0])]

    def step(program, active):
        everyone(active, instruction.opcode)
        memory, places = program.shared_memory, where(program)
        memory.check(places[program.thread % 32 < 8 * count], 16, "loads")
        for i, write in enumerate(writes):
            elements = _matrix(program, places, i, transposed)
            size = 4 // len(elements)
            for at in elements:
                memory.note_reads(at, size, program.warp)
            loaded = np.stack([memory.load(at, size) for at in elements], axis=1)
            write(program, loaded.view(np.uint32)[:, 0], None)

    return step


@operation(rf"st{_MATRICES}")
def _store_matrices(kernel, instruction, match):
    count, transposed = int(match[1]), match[2] is not None
    where = address(kernel, instruction.operands[0], "shared")
    reads = [reader(kernel, name, "b32") for name in members(instruction.operands[1])]

    def step(program, active):
        everyone(active, instruction.opcode)
        memory, places = program.shared_memory, where(program)
        memory.check(places[program.thread % 32 < 8 * count], 16, "stores")
        for i, read in enumerate(reads):
            elements = _matrix(program, places, i, transposed)
            size = 4 // len(elements)
            values = np.ascontiguousarray(read(program)).view(UNSIGNED[size])
            for at, stored in zip(elements, values.reshape(program.threads, -1).T, strict=True):
                memory.note_writes(at, size, program.warp)
                memory.store(at, size, stored)

    return step


# --- asynchronous work: see asynchronous.py ---


@operation(r"cp\.async\.(?:ca|cg)\.shared\.global")
def _copy(kernel, instruction, match):
    to, source, size, *count = instruction.operands
    to, source = address(kernel, to, "shared"), address(kernel, source, "global")
    size = int(size, 0)
    copied = reader(kernel, count[0] if count else str(size), "u32")  # the rest is zeros

    def step(program, active):
        threads = slice(None) if active is None else active
        where = to(program)[threads], source(program)[threads], copied(program)[threads]
        program.copies.issue(*where, size, program.warp[threads])

    return step


@operation(r"cp\.async\.(commit_group|wait_group|wait_all)")
def _copy_group(kernel, instruction, match):
    def step(program, active):
        everyone(active, instruction.opcode)
        if match[1] == "commit_group":
            program.copies.commit()
        else:
            program.copies.wait(int(instruction.operands[0]) if instruction.operands else 0)

    return step


@operation(r"mbarrier\.(init|inval)\.shared(?:::cta)?\.b64")
def _barrier_lifetime(kernel, instruction, match):
    where = address(kernel, instruction.operands[0], "shared")

    def step(program, active):
        for place in np.unique(where(program)[slice(None) if active is None else active]).tolist():
            if match[1] == "init":
                program.barriers.init(place, int(instruction.operands[1]))
            else:
                program.barriers.invalidate(place)

    return step


@operation(r"mbarrier\.arrive\.expect_tx\.shared(?:::cta)?\.b64")
def _barrier_arrive(kernel, instruction, match):
    where = address(kernel, instruction.operands[1], "shared")
    size = int(instruction.operands[2])

    def step(program, active):
        for place in where(program)[slice(None) if active is None else active].tolist():
            program.barriers.arrive(place, size)

    return step


@operation(r"mbarrier\.try_wait\.parity\.shared(?:::cta)?\.b64")
def _barrier_wait(kernel, instruction, match):
    write = writer(kernel, instruction.operands[0], "pred")
    where = address(kernel, instruction.operands[1], "shared")
    parity = reader(kernel, instruction.operands[2], "u32")

    def step(program, active):
        threads = slice(None) if active is None else active
        waits = set(zip(where(program)[threads].tolist(), parity(program)[threads].tolist()))
        for place, phase in waits:
            program.barriers.wait(place, phase)
        write(program, np.ones(program.threads, bool), active)

    return step


@operation(r"cp\.async\.bulk\.tensor\.2d\.shared::cluster\.global\.mbarrier::complete_tx::bytes")
def _copy_tile(kernel, instruction, match):
    to, source, barrier = instruction.operands
    tensor_map, x, y = re.fullmatch(r"\[(\S+), \{(\S+), (\S+)\}\]", source).groups()
    to, barrier = address(kernel, to, "shared"), address(kernel, barrier, "shared")
    reads = [reader(kernel, tensor_map, "u64"), *(reader(kernel, c, "s32") for c in (x, y))]

    def step(program, active):
        threads = np.flatnonzero(np.ones(program.threads) if active is None else active)
        if len(threads) != 1:
            raise Fault(f"{len(threads)} threads issue one copy of a tile")
        values = [int(read(program)[threads[0]]) for read in (to, *reads, barrier)]
        program.barriers.copy(*values, program.warp[threads[0]])

    return step


@operation(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k16\.f32\.(f16|bf16)\.\2")
def _product(kernel, instruction, match):
    totals, a, b, keeps, *signs = instruction.operands
    a_in_registers = a.startswith("{")
    transposed = [int(x) for x in signs[2:]]
    if signs[:2] != ["1", "1"] or len(transposed) != (1 if a_in_registers else 2):
        raise Fault(f"{kernel.name}: {instruction.opcode} with negated operands")
    a_names = members(a) if a_in_registers else []
    a_descriptor = None if a_in_registers else reader(kernel, a, "u64")
    b_descriptor = reader(kernel, b, "u64")
    keep = reader(kernel, keeps, "pred")
    transposed = [0, *transposed] if a_in_registers else transposed
    names = tuple(members(totals))
    if len(names) != int(match[1]) // 2:
        raise Fault(f"{kernel.name}: {instruction.opcode} has {len(names)} sums a thread")

    def step(program, active):
        everyone(active, instruction.opcode)
        operand = a_names if a_descriptor is None else a_descriptor(program)
        kept = bool(keep(program)[0])
        program.products.issue(
            Product(names, operand, b_descriptor(program), kept, transposed, match[2])
        )

    return step


@operation(r"wgmma\.(commit_group|wait_group)\.sync\.aligned")
def _product_group(kernel, instruction, match):
    def step(program, active):
        everyone(active, instruction.opcode)
        if match[1] == "commit_group":
            program.products.commit()
        else:
            program.products.wait(int(instruction.operands[0]))

    return step
