"""Write the tables of README and docs from bench/results: `python tools/tables.py`.

A table stands between `<!-- table: NAME -->` and `<!-- end -->` in a page. A test finds every one
up to date. `python tools/tables.py --evidence` prints where each measured table and figure comes
from: its command, result file, time and machine.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "bench" / "README.md",
    ROOT / "examples" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
RESULTS = ROOT / "bench" / "results"
EVIDENCE = ROOT / "bench" / "evidence.toml"
PLACE = re.compile(r"(<!-- table: (\w+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)

Row = Mapping[str, Any]
Columns = Mapping[str, Callable[[Row], str]]  # by header, the cell of a row


def column(key: str) -> Callable[[Row], str]:
    """A column of text."""
    return lambda row: row[key]


def fixed(key: str, digits: int) -> Callable[[Row], str]:
    """A column of a number with this many digits behind its point."""
    return lambda row: f"{row[key]:,.{digits}f}"


def with_error(key: str, error: str) -> Callable[[Row], str]:
    """A column of a number with its standard error, if it has one."""
    return lambda row: f"{row[key]:.2f}" + (f" ± {row[error]:.2f}" if row[error] else "")


def load(name: str) -> Any:
    """The results of a file."""
    return json.loads((RESULTS / f"{name}.json").read_text())


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


def bench_rows(title: str, file: str = "cpu") -> list[Row]:
    """The rows of one benchmark in what `make bench-full` writes, by the begin of its title."""
    tables = load(file)["tables"]
    return next(rows for name, rows in tables.items() if name.startswith(title))


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


def speed() -> list[Row]:
    """The rows of `searches` that README shows."""
    sizes = {("16 x 256", "no"), ("128 x 256", 0.99)}
    return [row for row in searches() if (row["size"], row["racing"]) in sizes]


def races() -> list[Row]:
    """Races on SmolLM2's losses, by how many they keep."""
    entries = {name: row for name, row in load("races").items() if name.startswith("smollm2")}
    return [{"keep": name.rpartition(" ")[2], **row} for name, row in entries.items()]


MODELS = {"demo": "demo", "smollm2": "SmolLM2-135M", "gemma3": "Gemma 3 270M"}


def repeated_windows() -> list[Row]:
    """The first three windows of blocks that each race chose to run twice, on both halves."""
    return [
        {**row, "model": MODELS[model], "chosen_by": result["objective"]}
        for model, entry in load("repeat").items()
        for result in entry["chosen_by"].values()
        for row in result["best"][:3]
    ]


def told(half: str, digits: int) -> Callable[[Row], str]:
    """A column of differences to the whole model with their errors; in brackets, if two errors
    do not tell them apart."""

    def cell(row: Row) -> str:
        value = row.get(half)
        if value is None:
            return ""
        text = f"{value['difference']:+.{digits}f} ± {value['error']:.{digits}f}"
        return text if value["told_apart"] else f"({text})"

    return cell


def window_races() -> list[Row]:
    """Races of all windows against their prefix tree, and that against one pass for each."""
    return [
        {
            **entry["unraced"],
            **result["race"],
            "model": MODELS[model],
            "windows": entry["windows"],
            "by": result["objective"],
            "raced": 1 / result["race"]["share_of_unraced"],
        }
        for model, entry in load("repeat").items()
        for result in entry["chosen_by"].values()
    ]


def removed_blocks(row: Row) -> str:
    return " ".join(map(str, row["removed"])) or "none"


def healing() -> list[Row]:
    """Each model on each judge, before and after training."""
    entries = []
    for model, result in load("healing").items():
        for row in result["rows"]:
            judge = result["judges"][row["judge"]]
            unit = " %" if judge["metric"] == "accuracy" else ""
            sampled = {"model": model, "unit": unit, "samples": judge["samples"]}
            entries.append({**row, **sampled, "metric": judge["metric"]})
    return entries


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


def percent(key: str) -> Callable[[Row], str]:
    """A column of a share in percent."""
    return lambda row: f"{100 * row[key]:.0f} %"


def real_costs() -> list[Row]:
    """Each calibration set's searches on a real model, against the loop."""
    found = load("real")
    rows = []
    for name, loop in found["loop_seconds"].items():
        row: dict[str, Any] = {"calibration": name, "loop": loop}
        for key in ("naive_unit_runs", "unit_runs", "seconds"):
            row[key] = sum(cell[key] for cell in found["cells"] if cell["objective"] == name)
        rows.append({**row, "ratio": loop / row["seconds"]})
    return rows


def real_cells(*names: str) -> list[Row]:
    """The searches of these calibration sets."""
    return [cell for cell in load("real_algorithms")["cells"] if cell["objective"] in names]


def real_searches() -> list[Row]:
    """The choices of each algorithm on text and on questions, small sets."""
    questions = real_cells("questions-margin")
    pairs = zip(real_cells("text-4x32"), questions, strict=True)
    return [{**text, "questions": other} for text, other in pairs]


def perplexity(row: Row) -> str:
    return f"{math.exp(row['loss']):.1f}"


def margin(row: Row) -> str:
    return f"{-row['loss']:.3f}"


def quality() -> list[Row]:
    """A real model whole and pruned, and the same after a short training; none yet without a
    file."""
    if not (RESULTS / "quality.json").exists():
        return []
    entries = []
    for row in load("quality")["rows"]:
        entry = {"removed": row["removed"], "parameters": f"{row['parameters'] / 1e6:.0f}M"}
        entry["speed"] = f"{row['tokens_per_cpu_second']:.1f}"
        for state in ("untrained", "healed"):
            for name, unit in (("perplexity", ""), ("accuracy", "%")):
                judged = (row[state] or {}).get(name)
                cell = f"{judged['value']:.1f}±{judged['error']:.1f}{unit}" if judged else ""
                entry[f"{state} {name}"] = cell
        entries.append(entry)
    return entries


def chosen_masks(name: str, controls: bool = False) -> list[Row]:
    """The masks of a study of a real model; each once, with all searches that chose it. With
    `controls`, the candidates that no search chose."""
    study = load("study")[name]
    merged: dict[tuple[int, ...], dict[str, Any]] = {}
    for row in study["rows"]:
        is_control = row["algorithm"].startswith("(")
        if is_control != controls:
            continue
        key = (is_control, *row.get("removed", row.get("sequence")))
        entry = merged.setdefault(key, {**row, "judged": {}, "searches": []})
        entry["searches"].append(row["algorithm"].strip("()") if is_control else named_search(row))
        entry["judged"] |= row["judged"]
    rows = sorted(merged.values(), key=lambda row: row["size"] or 0)
    whole = {"removed": [], "searches": ["whole model"], "judged": study["whole_model"]}
    return rows if controls else [whole, *rows]


def named_search(row: Row) -> str:
    """A search by its algorithm, objective and data."""
    objective, _, data = row["objective"].partition("-")
    return f"{row['algorithm']}, {objective}" + f" on {data}" * (data not in ("text", "questions"))


def regrets() -> list[Row]:
    """Each algorithm, with its distance from the best of all subsets of its size."""
    return [
        {**row, **row["judged"]["perplexity-text"], "share": row["unit_runs"]}
        for name in ("pairs", "optimum")
        for row in load("study").get(name, {"rows": []})["rows"]
    ]


def judged(label: str) -> Callable[[Row], str]:
    """A column of a judge's metric with its standard error."""

    def cell(row: Row) -> str:
        value = row["judged"].get(label)
        return rounded(value["value"], value["error"]) if value else ""

    return cell


def to_reference(label: str) -> Callable[[Row], str]:
    """A column of paired differences to the reference search's mask; in brackets, if two errors
    do not tell them apart."""

    def cell(row: Row) -> str:
        value = row["judged"].get(label, {}).get("to_reference")
        if value is None:
            return ""
        if not value["error"]:
            return "0"
        text = rounded(value["value"], value["error"], "+")
        return text if abs(value["value"]) > 2 * value["error"] else f"({text})"

    return cell


PIQA: Columns = {
    "PIQA, % (higher is better)": judged("piqa"),
    "PIQA against it, points": to_reference("piqa"),
}


def rounded(value: float, error: float, sign: str = "") -> str:
    """A value with its standard error, both to the error's second digit."""
    if abs(value) >= 1e5:
        return f"{value:{sign}.1e} ± {error:.0e}"
    digits = max(0, 1 - math.floor(math.log10(error))) if error else 1
    return f"{value:{sign}.{digits}f} ± {error:.{digits}f}"


def measured(key: str) -> Callable[[Row], str]:
    """A column of a metric with its standard error and unit."""
    return lambda row: rounded(row[key], row[f"{key}_error"]) + row["unit"]


def difference(key: str) -> Callable[[Row], str]:
    """A column of a paired difference, marked where it is not told apart."""

    def cell(row: Row) -> str:
        value, error = row[key]["value"], row[key]["error"]
        if not error:
            return ""
        apart = "" if abs(value) > 2 * error else " (not told apart)"
        return f"{rounded(value, error, '+')}{row['unit']}{apart}"

    return cell


def evidence() -> list[Row]:
    """The source of each measured table and figure."""
    return tomllib.loads(EVIDENCE.read_text(encoding="utf-8"))["evidence"]


def needs() -> list[Row]:
    """The things that commands need and the repository does not hold."""
    entries = tomllib.loads(EVIDENCE.read_text(encoding="utf-8"))["needs"]
    return [{"name": name, "how": " ".join(text.split())} for name, text in entries.items()]


def link(row: Row) -> str:
    """The title of an entry, linked to its first page, from bench/."""
    return f"[{row['shows']}](../{row['at'][0].removesuffix('#')})"


AGAINST_LOOP: Columns = {
    "fastprune, CPU s": fixed("fastprune_s", 2),
    "loop, CPU s": fixed("loop_s", 2),
    "times faster": with_error("times_faster", "standard_error"),
    "turns": lambda row: str(row["repeats"]),
}
TABLES: dict[str, tuple[Callable[[], Iterable[Row]], Columns]] = {
    "head": (
        lambda: cells("head"),
        {"cell": column("cell"), "path": column("path"), **AGAINST_LOOP},
    ),
    "grid": (
        lambda: cells("grid"),
        {
            "cell": column("cell"),
            **AGAINST_LOOP,
            "FLOP ratio": fixed("flop_ratio", 2),
            "peak, MB": fixed("fastprune_peak_mb", 0),
            "loop's peak, MB": fixed("loop_peak_mb", 0),
        },
    ),
    "families": (
        families,
        {
            "family": column("family"),
            "generic, CPU s": fixed("generic_s", 2),
            "fused, CPU s": fixed("fused_s", 2),
            "times faster": fixed("ratio", 2),
        },
    ),
    "tools": (
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
    "windows": (
        repeated_windows,
        {
            "model": column("model"),
            "chosen by": column("chosen_by"),
            "blocks run twice": column("window"),
            "on the half that chose": told("chosen on", 3),
            "perplexity (lower is better)": told("perplexity", 3),
            "margin, nats (higher is better)": told("margin", 3),
            "accuracy, points (higher is better)": told("accuracy", 1),
        },
    ),
    "window_races": (
        window_races,
        {
            "model": column("model"),
            "by": column("by"),
            "windows": lambda row: str(row["windows"]),
            "FLOP ratio, unraced": fixed("flop_ratio", 2),
            "measured": lambda row: f"{row['times_faster']:.2f}" if "times_faster" in row else "",
            "fewer unit runs, raced": fixed("raced", 1),
            "race, CPU s": fixed("cpu_s", 0),
        },
    ),
    **{
        f"study_{name}": (
            lambda name=name: chosen_masks(name),
            {
                "removed": removed_blocks,
                "chosen by": lambda row: "; ".join(row["searches"]),
                "perplexity (lower is better)": judged("unseen-text"),
                "against the reference": to_reference("unseen-text"),
                "ARC-Easy, % (higher is better)": judged("arc-easy"),
                "against it, points": to_reference("arc-easy"),
            }
            | (PIQA if name == "smollm2" else {}),
        )
        for name in ("smollm2", "gemma3")
    },
    "study_controls": (
        lambda: chosen_masks("smollm2", controls=True),
        {
            "control": lambda row: row["searches"][0],
            "removed": lambda row: removed_blocks(row) if "removed" in row else "none",
            "perplexity (lower is better)": judged("unseen-text"),
            "ARC-Easy, % (higher is better)": judged("arc-easy"),
            "PIQA, % (higher is better)": judged("piqa"),
        },
    ),
    "study_regrets": (
        regrets,
        {
            "blocks": lambda row: str(row["size"]),
            "algorithm": column("algorithm"),
            "removed": removed_blocks,
            "perplexity (lower is better)": lambda row: f"{row['value']:.2f}",
            "above the optimum": lambda row: (
                rounded(row["to_reference"]["value"], row["to_reference"]["error"], "+")
                if row["to_reference"]["error"]
                else "0"
            ),
            "unit runs": lambda row: f"{row['asked_unit_runs']:,.0f}",
        },
    ),
    "sharing": (
        lambda: bench_rows("Scoring fields"),
        {
            "dtype": column("dtype"),
            "field": column("field"),
            "masks": lambda row: str(row["masks"]),
            "loop, s": fixed("loop_s", 0),
            "fastprune, s": fixed("fastprune_s", 1),
            "speed-up": fixed("speedup", 2),
            "FLOP ratio": fixed("flop_ratio", 2),
            "speed-up / ratio": fixed("beyond_sharing", 3),
        },
    ),
    "paths": (
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
    "harness": (
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
    "searches": (
        searches,
        {
            "search": column("algorithm"),
            "k": lambda row: str(row["k"]),
            "text": column("size"),
            "racing": lambda row: str(row["racing"]),
            "masks": lambda row: str(row["masks"]),
            "unit runs: loop": fixed("loop_runs", 0),
            "shared within calls": fixed("within", 0),
            "made + heads": column("made"),
            "CPU s": fixed("cpu_s", 0),
            "loop, CPU s": fixed("loop_cpu_s", 0),
            "times faster": fixed("speedup", 2),
            "FLOP ratio": fixed("flop_ratio", 2),
        },
    ),
    "speed": (
        speed,
        {
            "search": lambda row: (
                f"{row['algorithm']}, {row['k']} blocks, {row['size']} tokens"
                + (", raced" if row["racing"] != "no" else "")
            ),
            "masks": lambda row: str(row["masks"]),
            "times faster": fixed("speedup", 1),
        },
    ),
    "quality": (
        quality,
        {
            "blocks removed": removed_blocks,
            "parameters": column("parameters"),
            "perplexity": column("untrained perplexity"),
            "ARC-Easy": column("untrained accuracy"),
            "tokens/s": column("speed"),
            "healed: perplexity": column("healed perplexity"),
            "ARC-Easy, healed": column("healed accuracy"),
        },
    ),
    "operators": (
        operators,
        {
            "operator": column("operator"),
            "dtype": column("dtype"),
            **{head: against_torch(*shape) for head, shape in SHAPES.items()},
        },
    ),
    "compiled": (
        operators,
        {
            "operator": column("operator"),
            "dtype": column("dtype"),
            **{head: against_compiled(*shape) for head, shape in SHAPES.items()},
        },
    ),
    "two_workers": (
        two_workers,
        {
            "": column("name"),
            "seconds of cores, of all": fixed("cores", 1),
            "on the clock": fixed("seconds", 1),
        },
    ),
    "simulated_workers": (
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
    "cached": (
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
    "split": (
        lambda: load("counts")["split"],
        {
            "masks": column("masks"),
            "unit runs, one worker": fixed("one worker", 0),
            "repeated on 64": lambda row: f"{100 * row['repeated']:.1f} %",
            "busiest worker / mean": fixed("busiest", 2),
        },
    ),
    "real_costs": (
        real_costs,
        {
            "calibration": column("calibration"),
            "unit runs of a loop": fixed("naive_unit_runs", 0),
            "made": fixed("unit_runs", 0),
            "seconds": fixed("seconds", 0),
            "loop, seconds": fixed("loop", 0),
            "ratio": fixed("ratio", 1),
        },
    ),
    "real_searches": (
        real_searches,
        {
            "removed": fixed("num_remove", 0),
            "algorithm": column("algorithm"),
            "text": removed_blocks,
            "perplexity (lower is better)": perplexity,
            "questions": lambda row: removed_blocks(row["questions"]),
            "margin, nats (higher is better)": lambda row: margin(row["questions"]),
        },
    ),
    "real_raced": (
        lambda: real_cells("text-32x64"),
        {
            "algorithm": column("algorithm"),
            "removed": removed_blocks,
            "perplexity (lower is better)": perplexity,
            "unit runs: made": fixed("unit_runs", 0),
            "shared within calls": fixed("asked_unit_runs", 0),
            "loop": fixed("naive_unit_runs", 0),
        },
    ),
    "real_questions": (
        lambda: real_cells("questions-margin, 64 questions"),
        {
            "removed": fixed("num_remove", 0),
            "algorithm": column("algorithm"),
            "blocks": removed_blocks,
            "margin, nats (higher is better)": margin,
            "unit runs: made": fixed("unit_runs", 0),
            "loop": fixed("naive_unit_runs", 0),
        },
    ),
    "races": (
        races,
        {
            "keep": column("keep"),
            "wrong": fixed("wrong", 2),
            "work": fixed("work", 2),
            "work of the old rule": fixed("old_work", 2),
        },
    ),
    "healing": (
        healing,
        {
            "model": column("model"),
            "removed": removed_blocks,
            "judge": lambda row: f"{row['judge']}: {row['metric']}, n = {row['samples']}",
            "untrained": measured("untrained"),
            "trained": measured("trained"),
            "trained, to the whole model untrained": difference("trained_to_whole_untrained"),
            "trained, to the whole model trained alike": difference("trained_to_whole_trained"),
        },
    ),
    "evidence": (
        evidence,
        {
            "shows": link,
            "command": lambda row: f"`{row['command']}`",
            "result": lambda row: ", ".join(f"`{file}`" for file in row.get("result", ["printed"])),
            "time": column("time"),
            "machine": column("machine"),
            "needs": lambda row: ", ".join(row.get("needs", [])),
        },
    ),
    "needs": (
        needs,
        {"name": column("name"), "how to have it": column("how")},
    ),
}


def write_table(name: str) -> str:
    """A table in Markdown; nothing where no result is there yet."""
    rows, columns = TABLES[name]
    lines = [[cell(row) for cell in columns.values()] for row in rows()]
    if not lines:
        return ""
    lines = [list(columns), ["---"] * len(columns), *lines]
    return "".join(f"|{'|'.join(line)}|\n" for line in lines)


def updated(page: str) -> str:
    """A page with every table as the results have it."""
    return PLACE.sub(lambda found: f"{found[1]}{write_table(found[2])}{found[4]}", page)


def print_evidence() -> None:
    """Print where each measured table and figure comes from, and how to have what it needs."""
    for row in evidence():
        print(f"{row['shows']}\n  on       {', '.join(row['at'])}\n  command  {row['command']}")
        print(f"  result   {', '.join(row.get('result', ['printed']))}")
        print(f"  took     {row['time']}; {row['machine']}")
        if "needs" in row:
            print(f"  needs    {', '.join(row['needs'])}")
        print()
    for row in needs():
        print(f"{row['name']}: {row['how']}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--evidence", action="store_true", help="print the registry instead")
    if parser.parse_args().evidence:
        print_evidence()
        return
    for path in PAGES:
        page = path.read_text(encoding="utf-8")
        if updated(page) != page:
            path.write_text(updated(page), encoding="utf-8")


if __name__ == "__main__":
    main()
