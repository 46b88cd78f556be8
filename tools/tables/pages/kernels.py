"""Tables of docs/kernels.md."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..render import Row, Table, bench_rows, column, fixed, load, percent, significant

SHAPES = {
    f"d = {width}, T = {tokens:,}": (width, tokens)
    for width in (128, 512)
    for tokens in (1024, 2048)
}


def operators() -> list[Row]:
    """The compiled operators, with all shapes of one in a row."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for entry in bench_rows("The compiled operators"):
        name = entry["operator"], entry["dtype"]
        row = rows.setdefault(name, {"operator": name[0], "dtype": name[1]})
        row[f"{entry['d']} {entry['tokens']}"] = entry
    return list(rows.values())


def against_torch(width: int, tokens: int) -> Callable[[Row], str]:
    """A column of ratios to torch, and both times in microseconds to three digits."""

    def digits(microseconds: float) -> str:
        rounded = float(f"{microseconds:.3g}")
        return f"{rounded:,.0f}"

    def cell(row: Row) -> str:
        entry = row[f"{width} {tokens}"]
        times = f"{digits(entry['torch_us'])} / {digits(entry['native_us'])}"
        return f"{entry['torch_ratio']:.1f} ({times})"

    return cell


def against_compiled(width: int, tokens: int) -> Callable[[Row], str]:
    """A column of ratios to torch.compile."""
    return lambda row: f"{row[f'{width} {tokens}']['compiled_ratio']:.2f}"


def shown_kernels() -> list[Row]:
    """The kernels in bfloat16 on sm_90, and those that know float32 alone."""
    rows = [row for row in load("kernel_resources")["kernels"] if row["target"] == "sm_90"]
    halves = {row["kernel"] for row in rows if row["variant"].startswith("bf16")}
    return [row for row in rows if row["variant"].startswith("bf16") or row["kernel"] not in halves]


TABLES = {
    "resources": Table(
        shown_kernels,
        {
            "kernel": column("kernel"),
            "variant": column("variant"),
            "configuration": column("configuration"),
            "registers": column("registers"),
            "shared bytes": column("shared"),
            "instructions": column("instructions"),
            "matrix unit": lambda row: ", ".join(row["shapes"]) or row["matrix_unit"],
        },
    ),
    "gpu_kernels": Table(
        lambda: load("gpu_model")["kernels"],
        {
            "kernel": column("kernel"),
            "shape": column("shape"),
            "registers": column("registers"),
            "shared KB": fixed("shared_kb", 0),
            "programs an SM": column("programs"),
            "waves": significant("waves", 3),
            "L2 B/FLOP": significant("cache", 3),
            "shared B/FLOP": significant("shared", 3),
            "ms": significant("ms", 3),
            "of floor": fixed("of_floor", 2),
            "limit": column("limit"),
            "host us": column("host_us"),
        },
    ),
    "gpu_steps": Table(
        lambda: load("gpu_model")["steps"],
        {
            "step of a LLaMA-3 8B block, 8,192 tokens": column("step"),
            "ms": significant("ms", 3),
            "share": percent("share", 1),
            "host us": fixed("host_us", 0),
        },
    ),
    "gpu_blocks": Table(
        lambda: load("gpu_model")["blocks"],
        {
            "model": column("model"),
            "tokens": fixed("tokens", 0),
            "q, k, v": column("qkv"),
            "device ms": significant("device_ms", 3),
            "host ms": significant("host_ms", 3),
            "of the product's rate": fixed("of_rate", 2),
        },
    ),
    "gpu_searches": Table(
        lambda: load("gpu_model")["searches"],
        {
            "model": column("model"),
            "questions in a chunk": column("questions"),
            "states kept": column("kept"),
            "masks": fixed("masks", 0),
            "unit runs": fixed("unit_runs", 0),
            "block ms": significant("block_ms", 3),
            "host ms": significant("host_ms", 3),
            "seconds": fixed("seconds", 0),
            "of the product's rate": fixed("of_rate", 2),
        },
    ),
    "operators": Table(
        operators,
        {
            "operator": column("operator"),
            "dtype": column("dtype"),
            **{head: against_torch(*shape) for head, shape in SHAPES.items()},
        },
    ),
    "compiled": Table(
        operators,
        {
            "operator": column("operator"),
            "dtype": column("dtype"),
            **{head: against_compiled(*shape) for head, shape in SHAPES.items()},
        },
    ),
}
