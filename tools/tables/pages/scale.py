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
    return [{"search": names.get(name, name), **row} for name, row in load("workers").items()]


def times(workers: int) -> Callable[[Row], str]:
    """A column of how much faster this many workers are than one."""
    return lambda row: f"{row[f'{workers} workers']['faster']:.1f}x"


TABLES = {
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
