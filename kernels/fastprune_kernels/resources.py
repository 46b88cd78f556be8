"""Registers and shared memory of every kernel in every shipped configuration.

Triton compiles ahead of time for a named target, so no GPU is needed. Under the interpreter kernels
are Python functions, and this module cannot be used.
"""

from __future__ import annotations

import io
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from . import attention, gated_mlp, launch, linear_loss, norm, rope
from .launch import ARCHITECTURES, Config

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# the most bytes of a program. sm_80's configurations also serve 8.6, 8.9 and 12.x, which have 99 KB
# instead of 163 KB
SHARED_LIMIT = {"sm_80": 99 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
ELEMENTS = {2: "bf16", 4: "fp32"}


@dataclass(frozen=True)
class Case:
    """One kernel as it is launched, with pointer types and constants by argument name."""

    kernel: str
    variant: str
    arch: str
    config: Config
    function: object
    types: dict[str, str | None]
    constants: dict[str, object]

    def __str__(self) -> str:
        return f"{self.kernel}-{self.variant}-{self.arch}".replace(" ", "-")


@dataclass(frozen=True)
class Resources:
    """The resources of a compiled kernel. The last four are known for NVIDIA's targets only.

    Attributes:
        registers: Vector registers of a thread; for gfx942, with its accumulation registers.
        spills: Bytes of a thread's registers in memory.
        shared: Bytes of shared memory of a program.
        matrix_unit: The instruction that computes matrix products; "" without any.
        shapes: Shapes of Hopper's matrix products.
        instructions: Instructions of the whole kernel.
        stalls: Innermost loops in which no copy is under way while products run.
        serialised: Whether the assembler reports that products run one by one.
    """

    registers: int
    spills: int
    shared: int
    matrix_unit: str
    shapes: tuple[str, ...] = ()
    instructions: int = 0
    stalls: int = 0
    serialised: bool = False


def cases(arch: str, only: str | None = None) -> Iterator[Case]:
    """Yield the cases of an architecture.

    Shapes are those of LLaMA-3 8B and Qwen3 8B, and the greatest and smallest of a configuration.

    Args:
        arch: A key of `TARGETS`.
        only: The name of one kernel; None for all.
    """
    for itemsize, element in ELEMENTS.items():
        for case in _cases(arch, itemsize, f"*{element}"):
            if only is None or case.kernel == only:
                yield case


def _cases(arch: str, itemsize: int, element: str) -> Iterator[Case]:
    name = element[1:]

    def case(kernel, variant, config, function, types, **constants) -> Case:
        meta = {
            key: value
            for key, value in config.launch.items()
            if key not in ("num_warps", "num_stages")
        }
        return Case(
            kernel,
            f"{name} {variant}".strip(),
            arch,
            config,
            function,
            types,
            {**constants, **meta},
        )

    pointers = dict.fromkeys(
        ("p_states", "p_branch", "p_weight", "p_bias", "p_residual", "p_normed"), element
    )
    types = {**pointers, "eps": "fp32"}
    kinds: tuple[tuple[str, dict[str, str | None], bool], ...] = (
        ("", {"p_bias": None}, False),
        ("centered", {"p_bias": None}, True),
        ("without weight", {"p_bias": None, "p_weight": None}, True),
        ("with bias", {}, True),
    )
    for size in (128, 4096, launch.MAX_ROW):
        for kind, absent, centered in kinds:
            yield case(
                "add_rms_norm",
                f"D={size} {kind}".strip(),
                launch.norm_config(size),
                norm.add_rms_norm_kernel,
                types | absent,
                D=size,
                UNIT_OFFSET=False,
                CENTERED=centered,
            )

    config = launch.gated_mlp_config()
    for activation in gated_mlp.ACTIVATIONS:
        types = {"p_gate_up": element, "p_out": element}
        yield case(
            "gated_mlp",
            activation,
            config,
            gated_mlp.gated_mlp_kernel,
            types,
            F=14336,
            ACTIVATION=activation,
        )

    types = {
        "p_qkv": element,
        "p_cos": "*fp32",
        "p_sin": "*fp32",
        "p_position": "*i64",
        "eps": "fp32",
    }
    types |= {"num_pairs": "i32"}
    for variant, size, half, weight in (
        ("Dh=128", 128, 64, None),
        ("Dh=128 norm", 128, 64, element),
        ("Dh=256 partial norm", 256, 32, element),
        ("Dh=256 norm", 256, 128, element),
        ("Dh=128 neighbours", 128, 64, None),
        ("Dh=128 norm after", 128, 64, element),
    ):
        shape = {
            "STRIDE": 48 * size,
            "HEADS": 32,
            "KV_HEADS": 8,
            "DH": size,
            "HALF": half,
            "UNIT_OFFSET": False,
            "INTERLEAVED": variant.endswith("neighbours"),
            "NORM_AFTER": variant.endswith("norm after"),
        }
        blocks = {"BLOCK_HALF": half, "BLOCK_REST": triton.next_power_of_2(max(size - 2 * half, 1))}
        weights = {"p_q_weight": weight, "p_k_weight": weight}
        config = launch.rotary_config(size)
        yield case(
            "rotary", variant, config, rope.rotary_kernel, {**types, **weights}, **shape, **blocks
        )

    counts = {"num_rows": "i32", "vocab": "i32"}
    splits = {**counts, "num_splits": "i32", "num_targets": "i32"}
    tma = arch in launch.TMA and itemsize == 2
    for cap in (None, 30.0):
        variant = "" if cap is None else "soft cap"
        shape = {"D": 4096, "SOFT_CAP": cap}
        for described in {tma, False}:
            kind = f"{variant} pointers".strip() if tma and not described else variant

            def tiles(config, described=described, **block):
                """Types of the sources of tiles, by the block size of their rows."""
                name = "tensordesc<{}[{}, {}]>"
                if not described:
                    return dict.fromkeys(block, element)
                return {
                    x: name.format(element[1:], config[rows], config["BLOCK_D"])
                    for x, rows in block.items()
                }

            config = launch.linear_nll_config(arch, itemsize)
            types = (
                tiles(config, hidden="BLOCK_P", weight="BLOCK_V") | {"p_partial": "*fp32"} | counts
            )
            # LLaMA-3's vocabulary has whole tiles, Qwen3's has not
            passes = [("", 128256, False), ("best", 128256, True)]
            if itemsize == 2 and arch != "gfx942":
                passes.append(("cut", 151936, False))
            for note, vocab, best in passes:
                yield case(
                    "linear_nll",
                    f"{kind} {note}".strip(),
                    config,
                    linear_loss.linear_nll_kernel,
                    types,
                    **shape,
                    TMA=described,
                    POWERS=itemsize == 2,
                    BEST=best,
                    WHOLE=linear_loss.has_whole_tiles(arch, config, vocab, itemsize == 2, best),
                )
            config = launch.linear_kl_config(arch, itemsize)
            types = tiles(config, hidden="BLOCK_P", weight="BLOCK_V") | {
                "p_logits": "*fp32",
                **counts,
            }
            yield case(
                "linear_logits",
                kind,
                config,
                linear_loss.linear_logits_kernel,
                types,
                **shape,
                TMA=described,
                STRIDE=128256,
            )
            types = (
                tiles(config, masked="BLOCK_P", weight="BLOCK_V")
                | {"p_dense": "*fp32", "p_partial": "*fp32"}
                | counts
            )
            yield case(
                "linear_kl",
                kind,
                config,
                linear_loss.linear_kl_kernel,
                types,
                **shape,
                TMA=described,
                STRIDE=128256,
            )
        types = {
            "p_hidden": element,
            "p_weight": element,
            "p_target": "*i64",
            "p_partial": "*fp32",
            "p_nll": "*fp32",
        }
        shape |= {
            "POWERS": itemsize == 2,
            "BLOCK_D": launch.linear_nll_config(arch, itemsize)["BLOCK_D"],
        }
        for misses in (None, "*fp32"):
            yield case(
                "finish_nll",
                variant if misses is None else f"{variant} best".strip(),
                linear_loss.FINISH,
                linear_loss.finish_nll_kernel,
                types | splits | {"p_misses": misses},
                **shape,
            )
    if itemsize == 4:
        types = {"p_partial": "*fp32", "p_kl": "*fp32", "num_rows": "i32", "num_splits": "i32"}
        yield case("combine_kl", "", linear_loss.FINISH, linear_loss.combine_kl_kernel, types)

    tables = ("p_branch", "p_position", "p_tile_start", "p_tile_end", "p_lists", "p_blocks")
    types = {"p_qkv": element, "p_out": element, **dict.fromkeys(tables, "*i32"), "scale": "fp32"}
    softmaxes = (
        ("", None, None, None),
        ("window, soft cap", 4096, 50.0, None),
        ("window, sinks", 128, None, element),
    )
    for size in (64, 128, 256):
        for variant, window, cap, sinks in softmaxes:
            config = launch.tree_attention_config(arch, itemsize, size)
            shape = {"HEADS": 32, "KV_HEADS": 8, "DH": size, "WINDOW": window, "SOFT_CAP": cap}
            shape["BLOCK_DH"] = triton.next_power_of_2(size)
            function = attention.tree_attention_kernel
            yield case(
                "tree_attention",
                f"Dh={size} {variant}".strip(),
                config,
                function,
                types | {"p_sinks": sinks},
                **shape,
            )


def compile_case(case: Case) -> CompiledKernel:
    """Compile a case like the JIT: with aligned tensors, and without specialised integers."""
    names = case.function.arg_names
    constants = {name: None for name in names if case.types.get(name) is None} | case.constants
    signature = {name: "constexpr" if name in constants else case.types[name] for name in names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if signature[name].startswith("*")
    }
    source = ASTSource(case.function, signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": case.config.num_warps, "num_stages": case.config.num_stages}
    return triton.compile(source, target=TARGETS[case.arch], options=options)


def measure(case: Case) -> Resources:
    """Compile a case, and read the assembler's report and its output."""
    log = io.StringIO()
    with knobs.nvidia.scope(), knobs.compilation.scope(), redirect_stdout(log):
        knobs.nvidia.dump_ptxas_log = knobs.compilation.always_compile = True
        compiled = compile_case(case)
    shared, report = compiled.metadata.shared, log.getvalue()
    if case.arch == "gfx942":
        assembly = compiled.asm["amdgcn"]
        scratch = _number(assembly, r"\.private_segment_fixed_size:\s+(\d+)")
        spills = max(scratch, 4 * _number(assembly, r"\.vgpr_spill_count:\s+(\d+)"))
        unit = re.search(r"v_mfma_f32_\w+", assembly)
        return Resources(
            _number(assembly, r"\.vgpr_count:\s+(\d+)"),
            spills,
            shared,
            unit.group() if unit else "",
        )
    ptx = compiled.asm["ptx"]
    unit = re.search(r"wgmma\.mma_async|tcgen05\.mma|mma\.sync", ptx)
    return Resources(
        registers=_number(report, r"Used (\d+) registers"),
        spills=max(
            _number(report, r"(\d+) bytes stack frame"),
            _number(report, r"(\d+) bytes spill stores"),
        ),
        shared=shared,
        matrix_unit=unit.group() if unit else "",
        shapes=tuple(sorted(set(re.findall(r"wgmma\.mma_async[\w.]*?\.(m64n\d+k\d+)", ptx)))),
        instructions=len(
            re.findall(
                r"^\s+/\*[0-9a-f]{4,}\*/", _disassembled(compiled.asm["cubin"]), re.MULTILINE
            )
        ),
        stalls=sum(_stalls(body) for body in _innermost_loops(compiled.asm["ttgir"])),
        serialised="wgmma.mma_async instructions are serialized" in report,
    )


def _innermost_loops(ttgir: str) -> Iterator[list[str]]:
    """The lines of each loop that holds no other."""
    lines = ttgir.splitlines()
    for i, line in enumerate(lines):
        if " scf.for " in line:
            end = re.match(r"\s*", line).group() + "}"
            body = list(takewhile(lambda other, end=end: not other.startswith(end), lines[i + 1 :]))
            if not any(" scf.for " in other for other in body):
                yield body


def _stalls(body: list[str]) -> bool:
    """Whether a loop waits for all of its copies right after it has issued them.

    A pipelined loop issues copies at the end of a step, and waits at the beginning of the next.
    """
    copied = False
    for line in body:
        copied = copied or "async_tma_copy" in line
        if copied and "ttng.wait_barrier" in line:
            return True
    return any("async_commit_group" in line for line in body) and any(
        "ttg.async_wait" in line and "num = 0 " in line for line in body
    )


def _disassembled(cubin: bytes) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run(
            [tool, "-c", file.name], capture_output=True, text=True, check=True
        ).stdout


def _number(text: str, pattern: str) -> int:
    match = re.search(pattern, text)
    if match is None:
        raise RuntimeError(f"the assembler's report lacks {pattern}")
    return int(match.group(1))


def rows(architectures: tuple[str, ...] = ARCHITECTURES) -> Iterator[dict[str, Any]]:
    """The resources of every kernel in every shipped configuration, one after the other."""
    for arch in architectures:
        for case in cases(arch):
            named = {"kernel": case.kernel, "variant": case.variant, "target": arch}
            yield named | {"configuration": str(case.config)} | asdict(measure(case))
