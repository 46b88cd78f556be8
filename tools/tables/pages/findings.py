"""Tables of docs/findings.md."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ..render import Columns, Row, Table, column, fixed, load, removed_blocks, rounded

METRICS = (
    ("perplexity (lower is better)", "unseen-text"),
    ("ARC-Easy, % (higher is better)", "arc-easy"),
)
FIRST_SET = "WikiText-2, 64 x 128"  # of the study of calibration sets


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


def calibration_sets() -> list[Row]:
    """The calibration sets by algorithm, each with its searches by the number of blocks."""
    names = {"text": "WikiText-2", "verse": "verse", "code": "Python"}
    rows: dict[tuple[str, str], dict[Any, Any]] = {}
    for found in load("study")["calibration"]["rows"]:
        _, text, size = found["objective"].split("-")
        key = found["algorithm"], f"{names[text]}, {size.replace('x', ' x ')}"
        row = rows.setdefault(key, {"algorithm": key[0], "set": key[1]})
        row[found["size"]] = found
    return sorted(rows.values(), key=lambda row: row["algorithm"])


def against_first(label: str, size: int) -> Callable[[Row], str]:
    """A column of differences to the mask of the same size from the first set, or that mask's own
    value."""

    def cell(row: Row) -> str:
        if row["set"] == FIRST_SET:
            return judged(label)(row[size])
        difference = to_reference(label)(row[size])
        return "same mask" if difference == "0" else difference

    return cell


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


def without_data(label: str) -> str:
    """The objective of a label, which names its data, too."""
    return label.partition("-")[0]


def demo_searches() -> list[Row]:
    """The algorithms of the demo model's study, with the removed blocks of each objective and
    budget."""
    rows: dict[str, dict[Any, Any]] = {}
    for cell in load("study_demo")["cells"]:
        row = rows.setdefault(cell["algorithm"], {"algorithm": cell["algorithm"]})
        row[f"{without_data(cell['objective'])} {cell['num_remove']}"] = cell
    return list(rows.values())


def removed_by(objective: str, num_remove: int) -> Callable[[Row], str]:
    """A column of removed blocks and their loss above the optimum's."""

    def cell(row: Row) -> str:
        found = row[f"{objective} {num_remove}"]
        above = found["above_optimum"]
        return f"{removed_blocks(found)} ({f'{above:+.4f}' if above else 'optimum'})"

    return cell


def demo_spread() -> list[Row]:
    """The best and the worst chosen mask under each objective, by the objective that chose."""
    rows: dict[tuple[int, str], dict[str, Any]] = {}
    for entry in load("study_demo")["spread"]:
        key = entry["num_remove"], entry["chosen_by"]
        row = rows.setdefault(key, {"removed": key[0], "chosen_by": without_data(key[1])})
        row[without_data(entry["judged_by"])] = entry["least_loss"], entry["most_loss"]
    return list(rows.values())


def demo_costs() -> list[Row]:
    """The work of each algorithm, under both objectives and budgets."""
    rows = []
    for row in demo_searches():
        cells = [cell for cell in row.values() if isinstance(cell, dict)]
        keys = "masks", "asked_unit_runs", "naive_unit_runs", "seconds"
        sums = {key: sum(cell[key] for cell in cells) for key in keys}
        saved = sums["naive_unit_runs"] / sums["asked_unit_runs"]
        rows.append({"algorithm": row["algorithm"], "saved": saved, **sums})
    return rows


def study_costs() -> list[Row]:
    """The work of each algorithm in the study of SmolLM2, under each objective, for all sizes."""
    rows: dict[str, dict[str, Any]] = {}
    for found in load("study")["smollm2"]["rows"]:
        if found["algorithm"].startswith("("):
            continue
        row = rows.setdefault(found["algorithm"], {"algorithm": found["algorithm"]})
        for key in "naive_unit_runs", "asked_unit_runs", "unit_runs":
            name = f"{key} {without_data(found['objective'])}"
            row[name] = row.get(name, 0) + found[key]
    return list(rows.values())


PIQA: Columns = {
    "PIQA, % (higher is better)": judged("piqa"),
    "PIQA against it, points": to_reference("piqa"),
}


TABLES = {
    "demo_searches": Table(
        demo_searches,
        {
            "algorithm": column("algorithm"),
            **{
                f"{objective}, {count} removed": removed_by(objective, count)
                for objective in ("perplexity", "margin")
                for count in (3, 4)
            },
        },
    ),
    "demo_overlap": Table(
        lambda: load("study_demo")["jaccard"],
        {
            "removed": column("num_remove"),
            "within an objective": fixed("within", 3),
            "across objectives": fixed("across", 3),
        },
    ),
    "demo_spread": Table(
        demo_spread,
        {
            "removed": column("removed"),
            "chosen by": column("chosen_by"),
            "perplexity (lower is better)": lambda row: " to ".join(
                f"{math.exp(loss):.2f}" for loss in row["perplexity"]
            ),
            "margin, nats (higher is better)": lambda row: " to ".join(
                f"{-loss:.3f}" for loss in row["margin"]
            ),
        },
    ),
    "demo_costs": Table(
        demo_costs,
        {
            "algorithm": column("algorithm"),
            "masks": fixed("masks", 0),
            "unit runs: loop": fixed("naive_unit_runs", 0),
            "shared": fixed("asked_unit_runs", 0),
            "saved": lambda row: f"{row['saved']:.1f}x",
            "seconds": fixed("seconds", 0),
        },
    ),
    "study_costs": Table(
        study_costs,
        {
            "algorithm": column("algorithm"),
            **{
                f"{objective}, unit runs: {name}": fixed(f"{key} {objective}", 0)
                for objective in ("perplexity", "margin")
                for name, key in (
                    ("loop", "naive_unit_runs"),
                    ("shared", "asked_unit_runs"),
                    ("made", "unit_runs"),
                )
            },
        },
    ),
    **{
        f"study_{name}": Table(
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
    "study_calibration": Table(
        calibration_sets,
        {
            "algorithm": column("algorithm"),
            "calibrated on": column("set"),
            **{
                f"{metric}, {size} blocks": against_first(label, size)
                for metric, label in METRICS
                for size in (3, 5, 7)
            },
        },
    ),
    "study_controls": Table(
        lambda: chosen_masks("smollm2", controls=True),
        {
            "control": lambda row: row["searches"][0],
            "removed": lambda row: removed_blocks(row) if "removed" in row else "none",
            "perplexity (lower is better)": judged("unseen-text"),
            "ARC-Easy, % (higher is better)": judged("arc-easy"),
            "PIQA, % (higher is better)": judged("piqa"),
        },
    ),
    "study_regrets": Table(
        regrets,
        {
            "blocks": column("size"),
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
    "real_costs": Table(
        real_costs,
        {
            "calibration": column("calibration"),
            "unit runs: loop": fixed("naive_unit_runs", 0),
            "made": fixed("unit_runs", 0),
            "seconds": fixed("seconds", 0),
            "loop, seconds": fixed("loop", 0),
            "ratio": fixed("ratio", 1),
        },
    ),
}
