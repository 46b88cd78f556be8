"""Tables of docs/benchmarks.md."""

from __future__ import annotations

import re

from ..render import Columns, Row, Table, bench_rows, column, fixed, load, percent, with_error


def cells(name: str) -> list[Row]:
    """The cells of a file, the slowest against the loop first."""
    found = load(name)["cells"]
    return sorted(found, key=lambda row: row["times_faster"])


def families() -> list[Row]:
    """The families of the fused path, the one that gains least first."""
    found = load("families")["families"]
    return sorted(
        ({"family": name, **row} for name, row in found.items()), key=lambda r: r["ratio"]
    )


def tools() -> list[Row]:
    """The scripts of other tools, with the rows and tokens that they ran on."""
    entries = load("tools")
    size = re.compile(r"--rows (\d+) --length (\d+)")
    found = []
    for entry in entries:
        match = size.search(entry["command"])
        assert match is not None
        of_entry = {"size": f"{match[1]} x {match[2]}", "model": entry.get("model", "random")}
        found += [{**row, **of_entry} for row in entry["rows"]]
    return sorted(found, key=lambda row: (row["model"], row["size"]))


def searches() -> list[Row]:
    """Whole searches on a real model; of equal settings the last."""
    entries = {}
    for entry in load("search_real"):
        search, runs = entry["search"], entry["unit_runs"]
        row = {
            **entry,
            "algorithm": "beam, width 5" if search["algorithm"] == "beam" else search["algorithm"],
            "k": search["num_remove"],
            "racing": search["racing"] or "no",
            "size": entry["text"].removesuffix(" tokens"),
            "loop_runs": runs["loop"],
            "within": runs["within calls"],
            "made": f"{round(runs['made']):,} + {round(entry['head_runs']):,}",
        }
        entries[row["algorithm"], row["k"], row["size"], row["racing"]] = row
    return [entries[key] for key in sorted(entries, key=str)]


def races() -> list[Row]:
    """Races on SmolLM2's losses, by how many they keep."""
    entries = load("races")["smollm2"]["races"]
    return [{"keep": name.rpartition(" ")[2], **row} for name, row in entries.items()]


PRECISIONS = {
    "float32": "float32 (the default)",
    "widened as used": "bfloat16, widened as they are used",
    "bfloat16": "bfloat16, with `dtype=` (timed on a quarter of the rows, times four)",
}
WAITS = {
    "as libgomp does": "default",
    "passive": "`OMP_WAIT_POLICY=passive`",
    "1,000 spins": "`GOMP_SPINCOUNT=1000`",
}


def states(row: Row) -> str:
    """The capacity of a prefix cache."""
    return "no bound" if row["states"] is None else f"{row['states']:,}"


def chunks(row: Row) -> str:
    """The size of a chunk, with the sizes that have a name."""
    names = {512: "512 tokens (default)", 128: "128 tokens: a row (the recipe)"}
    return names.get(row["chunk_tokens"], f"{row['chunk_tokens']} tokens")


AGAINST_LOOP: Columns = {
    "fastprune, CPU s": fixed("fastprune_s", 2),
    "loop, CPU s": fixed("loop_s", 2),
    "times faster": with_error("times_faster", "standard_error"),
    "turns": column("repeats"),
}


TABLES = {
    "precision": Table(
        lambda: load("precision")["weights"],
        {
            "weights": lambda row: PRECISIONS[row["weights"]],
            "MB": fixed("MB", 0),
            "CPU s": fixed("cpu_s", 1),
            "of float32's speed": fixed("of_float32s_speed", 2),
        },
    ),
    "recipe_chunks": Table(
        lambda: load("recipe_counts")["recipe"],
        {
            "chunks of": chunks,
            "states in the prefix cache": states,
            "unit runs, times fewer": fixed("fewer_units", 2),
            "heads, times fewer": fixed("fewer_heads", 2),
        },
    ),
    "evopress_counts": Table(
        lambda: load("evopress_counts")["unit_runs_of_a_sample"],
        {
            "states for each sample": states,
            "unit runs of a sample: the authors' passes": fixed("theirs", 0),
            "made": fixed("made", 0),
            "times fewer": fixed("fewer", 2),
        },
    ),
    "threads": Table(
        lambda: load("threads")["medians"],
        {
            "threads": column("threads"),
            "waiting": lambda row: WAITS[row["waiting"]],
            "seconds": fixed("seconds", 1),
            "CPU seconds": fixed("cpu_seconds", 2),
        },
    ),
    "starting": Table(
        lambda: load("starting")["commands"],
        {
            "command": lambda row: f"`{row['command']}`" + row["remark"],
            "seconds": fixed("cpu_seconds", 1),
        },
    ),
    "sharing": Table(
        lambda: bench_rows("Scoring fields"),
        {
            "dtype": column("dtype"),
            "field": column("field"),
            "masks": column("masks"),
            "loop, s": fixed("loop_s", 0),
            "fastprune, s": fixed("fastprune_s", 1),
            "speed-up": fixed("speedup", 2),
            "FLOP ratio": fixed("flop_ratio", 2),
            "speed-up / ratio": fixed("beyond_sharing", 3),
        },
    ),
    "paths": Table(
        lambda: bench_rows("The fused path"),
        {
            "model": column("model"),
            "dtype": column("dtype"),
            "data": column("data"),
            "generic, s": fixed("generic_s", 3),
            "fused, s": fixed("fused_s", 3),
            "ratio": fixed("ratio", 2),
        },
    ),
    "families": Table(
        families,
        {
            "family": column("family"),
            "generic, CPU s": fixed("generic_s", 2),
            "fused, CPU s": fixed("fused_s", 2),
            "times faster": fixed("ratio", 2),
        },
    ),
    "harness": Table(
        lambda: bench_rows("lm-evaluation-harness", "harness"),
        {
            "masks": column("field"),
            "task": column("task"),
            "hf, CPU s": fixed("hf_cpu_s", 1),
            "fastprune, CPU s": fixed("fastprune_cpu_s", 1),
            "ratio": fixed("ratio", 2),
            "of the likelihoods alone": fixed("answers_ratio", 2),
            "shared blocks alone": fixed("blocks_ratio", 2),
        },
    ),
    "cached": Table(
        lambda: load("counts")["cached"],
        {
            "search": column("search"),
            "loop": fixed("loop", 0),
            "within calls": fixed("within", 0),
            "unbounded": fixed("unbounded", 0),
            "1,000 states": percent("share of 1000"),
            "100 states": percent("share of 100"),
        },
    ),
    "searches": Table(
        searches,
        {
            "search": column("algorithm"),
            "k": column("k"),
            "text": column("size"),
            "racing": column("racing"),
            "masks": column("masks"),
            "unit runs: loop": fixed("loop_runs", 0),
            "shared within calls": fixed("within", 0),
            "made + heads": column("made"),
            "CPU s": fixed("cpu_s", 0),
            "loop, CPU s": fixed("loop_cpu_s", 0),
            "times faster": fixed("speedup", 2),
            "FLOP ratio": fixed("flop_ratio", 2),
        },
    ),
    "tools": Table(
        tools,
        {
            "script": column("tool"),
            "model": column("model"),
            "rows x tokens": column("size"),
            "theirs, CPU s": fixed("theirs", 1),
            "with fastprune": fixed("fastprune", 1),
            "times faster": fixed("ratio", 1),
            "same choice": lambda row: "yes" if row["same"] else "no",
        },
    ),
    "races": Table(
        races,
        {
            "keep": column("keep"),
            "wrong": fixed("wrong", 2),
            "work": fixed("work", 2),
            "work of the old rule": fixed("old_work", 2),
        },
    ),
    "head": Table(
        lambda: cells("head"),
        {"cell": column("cell"), "path": column("path"), **AGAINST_LOOP},
    ),
    "grid": Table(
        lambda: cells("grid"),
        {
            "cell": column("cell"),
            **AGAINST_LOOP,
            "FLOP ratio": fixed("flop_ratio", 2),
            "peak, MB": fixed("fastprune_peak_mb", 0),
            "loop's peak, MB": fixed("loop_peak_mb", 0),
        },
    ),
}
