"""store info, export, prune: the content of a file of finished sums."""

from __future__ import annotations

from pathlib import Path

import click
from rich.table import Table

from ..engine.store import SumStore
from ..errors import InputError
from ..io import write_jsonl
from ..validate import MOST
from .options import FILE_NAME, NEW_FILE, Command, check_store
from .output import printing, say


@click.group()
def store() -> None:
    """Show, export or prune a store of finished sums."""


@store.command(cls=Command)
@click.argument("file", type=FILE_NAME)
def info(file: str) -> None:
    """Show the contexts of a store (model, measure, machine) with their numbers of sums, and the
    number of damaged rows."""
    opened = _open(file)
    table = Table(
        "context",
        "sums",
        "weights",
        "measure",
        "dtype",
        "granularity",
        "path",
        "fastprune",
        "device",
    )
    for number, (by, count) in opened.contexts().items():
        machine = by.get("machine", {})
        of_model = [
            by.get("weights", "")[:12],
            *(by.get(name) for name in ("measure", "dtype", "granularity", "path")),
        ]
        of_machine = [machine.get(name) for name in ("fastprune", "device")]
        table.add_row(*map(str, (number, count, *of_model, *of_machine)))
    damaged = sum(values is None for *_, values in opened.rows())
    with printing(None):
        say(table)
        say(f"{Path(file).stat().st_size / 2**20:.1f} MiB, {damaged} damaged rows")


@store.command(cls=Command)
@click.argument("file", type=FILE_NAME)
@click.option(
    "--out",
    required=True,
    type=NEW_FILE,
    help="New .jsonl file. A row has context, chunk, units and sums.",
)
def export(file: str, out: Path) -> None:
    """Write all sums of a store as JSON lines, each with its context and the units that ran."""
    opened = _open(file)
    contexts = opened.contexts()
    rows = [
        {
            "context": contexts[context][0],
            "chunk": chunk.hex(),
            "units": list(units),
            "sums": values.tolist(),
        }
        for context, chunk, units, values in opened.rows()
        if values is not None and context in contexts
    ]
    write_jsonl(out, rows)
    with printing(out):
        say(f"written: {out} ({len(rows)} rows)")


@store.command(cls=Command)
@click.argument("file", type=FILE_NAME)
@click.option(
    "--context",
    "contexts",
    multiple=True,
    type=click.IntRange(0, MOST),
    help="Number of a context to remove, as `store info` shows it. It may be repeated.",
)
@click.option("--damaged", is_flag=True, help="Remove rows whose checksum does not fit.")
def prune(file: str, contexts: tuple[int, ...], damaged: bool) -> None:
    """Remove contexts or damaged rows from a store, and give back their space."""
    if not contexts and not damaged:
        raise InputError(
            "say what to remove: --context NUMBER, as store info shows them, or --damaged"
        )
    opened = _open(file)
    unknown = sorted({*contexts} - {*opened.contexts()})
    if unknown:
        raise InputError(
            f"--context: {file} has no context {unknown[0]}; store info shows those it has"
        )
    gone = opened.prune(contexts, damaged)
    with printing(None):
        say(f"removed: {gone} rows; {Path(file).stat().st_size / 2**20:.1f} MiB are left")


def _open(file: str) -> SumStore:
    if not Path(file).is_file():
        raise InputError(f"{file}: no such file")
    check_store(file)
    return SumStore(file)
