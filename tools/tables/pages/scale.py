"""Tables of docs/scale.md."""

from __future__ import annotations

from collections.abc import Callable

from ..render import Row, Table, column, fixed, load


def two_workers() -> list[Row]:
    """The cost of two workers."""
    names = "1 process of 1 thread", "2 workers of 1 thread", "1 process of 2 threads"
    found = load("workers_overhead")
    rows = [{"name": name, **found[name]} for name in names]
    return [*rows, {"name": "starting the two workers, once", **found["starting 2 workers"]}]


def simulated_workers() -> list[Row]:
    """Searches whose calls 64 workers share."""
    names = {"beam": "beam, width 5", "genetic": "genetic, 50 x 10", "random": "500 random masks"}
    return [
        {"search": names.get(name, name), **row}
        for name, row in load("workers")["searches"].items()
    ]


def times(workers: int) -> Callable[[Row], str]:
    """A column of how much faster this many workers are than one."""
    return lambda row: f"{row[f'{workers} workers']['faster']:.1f}x"


def streamed() -> list[Row]:
    """Memory, seconds and reads of a run in memory and of one that streams its weights."""
    found = load("streaming")
    whole, parts = found["resident"], found["streamed"]

    def mebibytes(key: str, row: Row) -> str:
        return f"{row[key] / 2**20:,.0f}"

    def measure(name: str, cell: Callable[[Row], str], both: bool = True) -> Row:
        return {"measure": name, "resident": cell(whole) if both else "", "streamed": cell(parts)}

    return [
        measure("limit, MiB", lambda row: mebibytes("limit", row), both=False),
        measure("peak resident memory (VmHWM), MiB", lambda row: mebibytes("peak", row)),
        measure("of which before the model is opened", lambda row: mebibytes("before", row)),
        measure("CPU seconds, reading included", fixed("cpu_seconds", 0)),
        measure("seconds", fixed("wall_seconds", 0)),
        measure("blocks read", fixed("loads", 0), both=False),
        measure("MiB read", lambda row: mebibytes("read_bytes", row), both=False),
        measure("seconds of waiting for reading", fixed("waited_seconds", 2), both=False),
    ]


TABLES = {
    "streaming": Table(
        streamed,
        {"": column("measure"), "in memory": column("resident"), "streamed": column("streamed")},
    ),
    "split": Table(
        lambda: load("counts")["split"],
        {
            "masks": column("masks"),
            "unit runs, one worker": fixed("one worker", 0),
            "repeated on 64": lambda row: f"{100 * row['repeated']:.1f} %",
            "busiest worker / mean": fixed("busiest", 2),
        },
    ),
    "two_workers": Table(
        two_workers,
        {
            "": column("name"),
            "seconds of cores, of all": fixed("cores", 1),
            "on the clock": fixed("seconds", 1),
        },
    ),
    "simulated_workers": Table(
        simulated_workers,
        {
            "search": column("search"),
            "calls": fixed("calls", 0),
            "masks": fixed("masks", 0),
            "unit runs, one worker": fixed("runs", 0),
            "8 workers": times(8),
            "10": times(10),
            "64": times(64),
            "runs on 64, against one": lambda row: f"{100 * row['64 workers']['more_runs']:+.1f} %",
        },
    ),
}
