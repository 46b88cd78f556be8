"""study and demo: many searches, compared."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import click
from rich.table import Table

from ..errors import InputError, nearest
from ..objectives import OBJECTIVES
from ..search import ALGORITHMS, check_algorithm, check_racing
from ..study import check_study, check_study_folder, figures, run_study, write_report
from ..study.folder import check_label
from ..study.tables import (
    TABLE_NOTE,
    calibration_table,
    format_dense,
    format_races,
    format_removed,
    judge_notes,
    pattern_text,
    results_table,
)
from ..validate import check_folder
from .evaluation import evaluate_study, harness_on_stderr, open_tasks, task_settings, task_table
from .options import (
    MOST,
    MOST_SEED,
    Command,
    FileName,
    Folder,
    check_calibration,
    check_gradients,
    check_workers,
    evaluator_settings,
    model_settings,
    naming,
    open_model,
    open_objective,
    open_workers,
    racing_option,
    refuse_text_sizes,
    split_options,
)
from .output import note, printing, progress_bar, say

if TYPE_CHECKING:
    from ..models import Model

STUDIED = tuple(name for name, known in ALGORITHMS.items() if known.studied)
COMPARED = tuple({known.data: name for name, known in reversed(OBJECTIVES.items())}.values())[
    ::-1
]  # one of each kind


class _Size(NamedTuple):
    """What the demo runs, and how much of text and of questions it searches and reads held out
    (None: all)."""

    algorithms: tuple[str, ...]
    searched: Mapping[str, int | None]
    held_out: Mapping[str, int | None]


DEMO = _Size(
    STUDIED, {"text": 16, "tasks": None}, {"text": None, "tasks": None}
)  # not all, so that it stays short
QUICK = _Size(STUDIED[:3], {"text": 8, "tasks": 24}, {"text": 8, "tasks": 48})
DEMO_OPTIONS = {"bayesian": {"trials": 100}}  # its 200 would be nearly all subsets that there are


@click.command(cls=Command)
@click.argument("models", nargs=-1, required=True, type=FileName(), metavar="MODEL...")
@click.option("--algorithms", default=",".join(STUDIED), show_default=True, help="Names, or all.")
@click.option(
    "--objective",
    "objectives",
    multiple=True,
    help=f"{', '.join(OBJECTIVES)}, as NAME=FILE or, to use one several times, LABEL:NAME=FILE. "
    "Without FILE: on every --calibration of its kind. The demo model has files of its own.",
)
@click.option(
    "--calibration",
    "calibrations",
    multiple=True,
    help="A calibration set that searches are compared on, as NAME=text:FILE or NAME=tasks:FILE, "
    "and behind it "
    ",samples=16,seq-len=256,seed=1 where it differs from --num-samples, --seq-len and "
    "--sample-seed.",
)
@click.option(
    "--held-out",
    multiple=True,
    help="An objective that no search sees and every chosen mask is judged by, as NAME=FILE or "
    "LABEL:NAME=FILE; sizes "
    "behind it as for --calibration.",
)
@click.option("--num-remove", required=True, help="Budgets, such as 7,9.")
@click.option(
    "--option", "options", multiple=True, help="An algorithm's option, such as beam.beam_width=5."
)
@click.option("--seed", type=click.IntRange(0, MOST_SEED), default=0, show_default=True)
@racing_option
@click.option(
    "--out",
    "out_dir",
    required=True,
    type=Folder(),
    help="The study's folder; the same study continues there.",
)
@click.option(
    "--evaluate",
    "tasks",
    help="Tasks of lm-evaluation-harness to run every chosen mask on, by their names.",
)
@task_settings
@model_settings
@evaluator_settings
def study(
    models: tuple[str, ...],
    algorithms: str,
    objectives: tuple[str, ...],
    calibrations: tuple[str, ...],
    held_out: tuple[str, ...],
    num_remove: str,
    options: tuple[str, ...],
    seed: int,
    racing: float | None,
    out_dir: Path,
    device: str | None,
    dtype: str | None,
    trust_remote_code: bool,
    num_samples: int | None,
    seq_len: int | None,
    sample_seed: int,
    granularity: str,
    backend: str,
    memory_bytes: int | None,
    weights_bytes: int | None,
    cache_bytes: int | None,
    cache_dir: Path | None,
    workers: int | None,
    ray: str | None,
    quiet: bool,
    tasks: str | None,
    include_path: str | None,
    limit: float | None,
    num_fewshot: int | None,
) -> None:
    """Compare search algorithms on MODELs.

    Runs every algorithm for every objective and budget, over one store of scores, and writes
    study.json and report.html. Interrupted, it continues where it stopped.
    """
    names = (
        list(ALGORITHMS)
        if algorithms == "all"
        else [name.strip() for name in algorithms.split(",")]
    )
    given = _options_by_algorithm(options)
    _refuse_twice("--algorithms", names)
    _refuse_twice("MODEL", models)
    for algorithm in dict.fromkeys([*names, *given]):
        check_algorithm(algorithm, given.get(algorithm, {}))
    with naming("--racing"):
        check_racing(names, racing)
    figures.check_installed()
    budgets = _parse_budgets(num_remove)
    size = _Data(None, num_samples, seq_len, sample_seed)
    sets = _calibration_sets(calibrations, size)
    searched = _searched(objectives, sets)
    _refuse_text_sizes([*searched, *held_out], size)
    makers = _objective_makers(models, searched, size, names, sets)
    judges = _held_out_makers(models, held_out, size)
    if both := makers.keys() & judges.keys():
        raise InputError(
            f"--held-out: {min(both)!r} is searched with; give it a label of its own, as "
            f"LABEL:NAME=FILE"
        )
    settings = {name: check_algorithm(name, given.get(name, {}))[1] for name in names}
    known = {
        "algorithms": settings,
        "budgets": budgets,
        "seed": seed,
        "racing": racing,
        "granularity": granularity,
    }
    with naming("--out"):
        check_study_folder(Path(out_dir), known)
    check_study(names, given, out_dir)
    check_workers(workers, ray)
    if tasks is not None:
        task_names, manager = open_tasks("--evaluate", tasks, include_path, weights_bytes)
    elif (include_path, limit, num_fewshot) != (None,) * 3:
        raise InputError(
            "--include-path, --limit and --num-fewshot belong to --evaluate; name its tasks"
        )
    opened = [
        open_model(model, device, dtype, trust_remote_code, weights_bytes) for model in models
    ]
    shared = open_workers(workers, ray, opened[0])
    with progress_bar(quiet) as progress:
        found = run_study(
            opened,
            makers,
            names,
            budgets,
            out_dir,
            options=given,
            seed=seed,
            racing=racing,
            notify=_notify(quiet),
            held_out=judges,
            backend=backend,
            memory_bytes=memory_bytes,
            cache_bytes=cache_bytes,
            cache_dir=cache_dir,
            granularity=granularity,
            workers=shared,
            progress=progress,
        )
    write_report(found, Path(out_dir) / "report.html")
    evaluated = {}
    if tasks is not None:
        _notify(quiet)("running tasks on every chosen mask")
        with harness_on_stderr(quiet):
            evaluated = evaluate_study(
                opened,
                found,
                Path(out_dir),
                task_names,
                granularity,
                task_manager=manager,
                limit=limit,
                num_fewshot=num_fewshot,
                backend=backend,
                memory_bytes=memory_bytes,
                workers=shared,
            )
    with printing(out_dir):
        _print_cells(found)
        for model, rows in evaluated.items():
            for task in rows[0]["results"]:
                say(task_table(f"{Path(model).name}, {task}", task, rows))
        say(f"written to {out_dir}: report.html, {'tasks.json, ' * bool(evaluated)}study.json")


@click.command(cls=Command)
@click.option(
    "--num-remove",
    type=click.IntRange(0, MOST),
    default=3,
    show_default=True,
    help="How many blocks to remove.",
)
@click.option(
    "--out",
    "out_dir",
    type=Folder(),
    help="Folder for report and figure.  [default: fastprune-demo, or fastprune-demo-quick]",
)
@click.option(
    "--quick",
    is_flag=True,
    help="Three algorithms on a part of the data: seconds instead of minutes.",
)
@click.option("--quiet", is_flag=True, help="No progress bars.")
def demo(num_remove: int, out_dir: Path | None, quick: bool, quiet: bool) -> None:
    """Search a small model that is built in; no downloads.

    Seven algorithms look for the blocks to remove, under two objectives, and a report shows what
    they found.
    """
    size = QUICK if quick else DEMO
    with naming("--out"):
        out_dir = out_dir or check_folder(
            Path("fastprune-demo-quick" if quick else "fastprune-demo")
        )
    names = size.algorithms
    options = {name: given for name, given in DEMO_OPTIONS.items() if name in names}
    check_study(names, options, out_dir)
    settings = {name: check_algorithm(name, options.get(name, {}))[1] for name in names}
    with naming("--out"):
        check_study_folder(Path(out_dir), {"algorithms": settings, "budgets": [num_remove]})
    figures.check_installed()
    model = open_model("demo")
    if num_remove >= model.num_blocks:
        raise InputError(
            f"num_remove must be from 0 to {model.num_blocks - 1} (the model has "
            f"{model.num_blocks})"
        )
    with printing(out_dir):
        say(
            f"The demo model: a {model.family} of {model.num_blocks} blocks, searched for "
            f"{num_remove} to remove.\n"
        )
    makers: dict[str, Callable] = {}
    for name in COMPARED:
        makers |= _objective_makers(
            ["demo"], (name,), _Data(None, size.searched[OBJECTIVES[name].data])
        )
    with progress_bar(quiet) as progress:
        found = run_study(
            [model],
            makers,
            names,
            [num_remove],
            out_dir,
            options=options,
            notify=_notify(quiet),
            progress=progress,
        )
    rows = [
        (cell["objective"], cell["algorithm"], cell["removed"])
        for cell in found["cells"]
        if not cell["error"]
    ]
    title = f"Demo model: {num_remove} of {model.num_blocks} blocks removed"
    figures.save(
        figures.pattern_figure(rows, model.num_blocks, title), Path(out_dir) / "pattern.png"
    )
    write_report(found, Path(out_dir) / "report.html")
    with printing(out_dir):
        _print_cells(found)
        say("\nRemoved blocks (filled), by objective and algorithm:\n")
        say(pattern_text(rows, model.num_blocks))
    held_out = _held_out_table(model, rows, size.held_out, quiet)
    with printing(out_dir):
        say(held_out)
        say(f"\nwritten to {out_dir}: report.html, pattern.png, study.json")


def _print_cells(found: Mapping) -> None:
    groups: dict[tuple, list[dict]] = {}
    for cell in found["cells"]:
        groups.setdefault((cell["model"], cell["objective"], cell["num_remove"]), []).append(cell)
    for (model, objective, num_remove), cells in groups.items():
        measured = OBJECTIVES[found["objectives"][objective]["name"]]
        dense = format_dense(measured, found["dense"][model][objective]["loss"])
        rows = []
        for cell in cells:
            cost = (cell["masks"], cell["asked_unit_runs"], cell["naive_unit_runs"])
            result = cell["error"] or measured.format(cell["loss"], named=False)
            rows.append((cell["algorithm"], cell["removed"], result, *cost))
        units = f"{num_remove} of {found['num_units'][model]} removed"
        title = f"{Path(model).name}, {objective}, {units} ({dense})"
        say(results_table(title, measured.header(), rows))
    say(TABLE_NOTE, style="dim")
    if found["inputs"]["racing"]:
        say(format_races(sum(cell["decided_early"] for cell in found["cells"])))
    if found["calibration"]:
        say(calibration_table(found["calibration"], found["objectives"] | found["held_out"]))
    for note_line in judge_notes(found):
        say(note_line)
    made, asked = (
        sum(cell[name] for cell in found["cells"]) for name in ("unit_runs", "asked_unit_runs")
    )
    if 0 < made < asked:
        how = "share their scores, and race" if found["inputs"]["racing"] else "share their scores"
        say(f"Searches {how}: {made:.0f} unit runs were made where they take {asked:.0f} alone.")


def _held_out_table(
    model: Model, rows: Sequence[tuple], samples: Mapping[str, int | None], quiet: bool
) -> Table:
    """What the removals cost on data that no search has seen: on so much text and so many questions
    (None: all)."""
    from .. import demo as data
    from ..evaluator import Evaluator
    from ..masks import from_removed

    distinct = list(dict.fromkeys([(), *(tuple(removed) for _, _, removed in rows)]))
    files = {"text": data.TEXT_HELDOUT, "tasks": data.QUESTIONS_HELDOUT}
    read = (OBJECTIVES["perplexity"], OBJECTIVES["accuracy"])
    columns = []
    for known in read:
        name, file = known.name, files[known.data]
        objective = open_objective(name, str(file), samples[known.data], None, 0, model)
        with progress_bar(quiet) as progress:
            sample_losses = Evaluator(model, objective, progress=progress).score_samples(
                from_removed(distinct, model.num_blocks)
            )
        losses = objective.mean(sample_losses).tolist()
        errors = objective.standard_error(sample_losses).tolist()
        columns.append([known.format(*pair, named=False) for pair in zip(losses, errors)])
    table = Table(title="\nOn held-out text and questions", title_justify="left")
    table.add_column("removed")
    table.add_column("chosen by")
    for known in read:
        table.add_column(known.header(), justify="right")
    for removed, *losses in zip(distinct, *columns):
        by: dict[str, list[str]] = {}
        for objective, algorithm, units in rows:
            if tuple(units) == removed:
                by.setdefault(objective, []).append(algorithm)
        who = "; ".join(
            f"{objective}: {', '.join(algorithms)}" for objective, algorithms in by.items()
        )
        table.add_row(format_removed(removed), who or "(dense)", *losses)
    return table


@dataclass(frozen=True)
class _Data:
    """A file (None: the demo model's own), and how much of it is taken."""

    file: str | None
    num_samples: int | None = None
    seq_len: int | None = None
    seed: int = 0
    kind: str = ""  # text or tasks, of a calibration set

    def maker(self, name: str, file: str) -> Callable:
        """What makes the objective of a model on this much of a file."""
        return lambda model: open_objective(
            name, file, self.num_samples, self.seq_len, self.seed, model
        )


def _objective_makers(
    models: Sequence[str],
    objectives: Sequence[str],
    size: _Data,
    algorithms: Sequence[str] = (),
    sets: Mapping[str, _Data] | None = None,
) -> dict[str, Callable]:
    """By label, functions from a model to its objective; every name and file is checked now.

    sets: calibration sets by name. An objective without a file of its own is made on each of them
    that is of its kind.
    """
    makers: dict[str, Callable] = {}
    used: set[str] = set()
    for text in objectives:
        label, name, file = _parse_objective(text)
        on = {label: replace(size, file=file or None)}
        if sets and not file and name in OBJECTIVES:
            kind = OBJECTIVES[name].data
            fitting = {of: data for of, data in sets.items() if data.kind == kind}
            if not fitting:
                raise InputError(
                    f"--objective {text}: takes {kind}, of which no --calibration is; "
                    f"NAME={kind}:FILE"
                )
            on = {f"{label}-{of}": data for of, data in fitting.items()}
            used.update(fitting)
        for own, data in on.items():
            if own in makers:
                raise InputError(
                    f"--objective: the label {own!r} is given twice; name each, as LABEL:NAME=FILE"
                )
            with naming("--objective"):
                check_label(own)
            files = {check_calibration(model, name, data.file) for model in models}
            check_gradients(algorithms, name, own)
            if len(files) > 1:
                raise InputError(f"--objective {text}: name a file, as NAME=FILE")
            makers[own] = data.maker(name, files.pop())
    for of, data in (sets or {}).items():
        if of not in used:
            raise InputError(
                f"--calibration: no objective is calibrated on {of!r}; give one of {data.kind}, "
                f"as NAME"
            )
    return makers


def _calibration_sets(texts: Sequence[str], size: _Data) -> dict[str, _Data]:
    """By name, the sets NAME=KIND:FILE,..."""
    found: dict[str, _Data] = {}
    for text in texts:
        name, equals, rest = text.partition("=")
        kind, colon, rest = rest.partition(":")
        if not equals or not colon or kind not in ("text", "tasks"):
            raise InputError(f"--calibration takes NAME=text:FILE or NAME=tasks:FILE, not {text!r}")
        if name in found:
            raise InputError(f"--calibration: {name!r} is given twice")
        with naming("--calibration"):
            check_label(name)
        found[name] = replace(_parse_data("--calibration", rest, size, kind), kind=kind)
    return found


def _held_out_makers(
    models: Sequence[str], texts: Sequence[str], size: _Data
) -> dict[str, Callable]:
    """By label, functions from a model to an objective that is judged by."""
    makers: dict[str, Callable] = {}
    for text in texts:
        label, name, rest = _parse_objective(text)
        if name not in OBJECTIVES:
            raise InputError(f"--held-out: unknown objective {name!r}; {nearest(name, OBJECTIVES)}")
        if not rest:
            raise InputError(f"--held-out {text}: name a file, as NAME=FILE")
        label = label if ":" in text.partition("=")[0] else f"held-out-{name}"
        if label in makers:
            raise InputError(
                f"--held-out: the label {label!r} is given twice; name each, as LABEL:NAME=FILE"
            )
        with naming("--held-out"):
            check_label(label)
        data = _parse_data("--held-out", rest, size, OBJECTIVES[name].data)
        makers[label] = data.maker(
            name, check_calibration(models[0], name, data.file, "--held-out")
        )
    return makers


def _searched(objectives: Sequence[str], sets: Mapping[str, _Data]) -> Sequence[str]:
    """The objectives that are given; else one for each kind of data, of which there are sets where
    any is given."""
    kinds = {data.kind for data in sets.values()}
    return objectives or [name for name in COMPARED if not sets or OBJECTIVES[name].data in kinds]


def _refuse_text_sizes(objectives: Sequence[str], size: _Data) -> None:
    names = [_parse_objective(text)[1] for text in objectives]
    if set(names) <= set(OBJECTIVES):  # others are refused by name, later
        refuse_text_sizes(names, size.seq_len, size.seed)


def _parse_objective(text: str) -> tuple[str, str, str]:
    """Label, name and what follows of NAME=... or LABEL:NAME=..."""
    head, _, rest = text.partition("=")
    label, colon, name = head.partition(":")
    return label, name if colon else label, rest


def _parse_data(flag: str, text: str, size: _Data, kind: str) -> _Data:
    """FILE,samples=16,seq-len=256,seed=1; what is not given is as in `size`."""
    given: dict[str, int] = {}
    while match := re.fullmatch(r"(.*),(samples|seq-len|seed)=([0-9]+)", text, re.DOTALL):
        text, name, number = match.groups()
        least, most = {"samples": (1, MOST), "seq-len": (2, MOST), "seed": (0, MOST_SEED)}[name]
        if name in given or not least <= int(number) <= most:
            raise InputError(f"{flag}: {name} is given once, from {least} to {most}, not {number}")
        if kind == "tasks" and name != "samples":
            raise InputError(f"{flag}: {name} is of text; of questions, samples says how many")
        given[name] = int(number)
    if not text:
        raise InputError(f"{flag}: names no file")
    if (match := re.fullmatch(r".*,([\w-]+)=([^,/]*)", text, re.DOTALL)) and not Path(
        text
    ).exists():
        takes = (
            "samples=NUMBER" if kind == "tasks" else "samples=, seq-len= and seed=, each a number"
        )
        raise InputError(f"{flag}: behind the file stand {takes}, not {match[1]}={match[2]}")
    return replace(
        size,
        file=text,
        num_samples=given.get("samples", size.num_samples),
        seq_len=given.get("seq-len", size.seq_len),
        seed=given.get("seed", size.seed),
    )


def _options_by_algorithm(options: Sequence[str]) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    for name, value in split_options(options).items():
        algorithm, dot, option = name.partition(".")
        if not dot:
            text = f"{name}={value}"
            raise InputError(
                f"--option takes ALGORITHM.NAME=VALUE, such as beam.beam_width=5, not {text!r}"
            )
        if algorithm not in ALGORITHMS:
            raise InputError(
                f"--option: unknown algorithm {algorithm!r}; {nearest(algorithm, ALGORITHMS)}"
            )
        found.setdefault(algorithm, {})[option] = value
    return found


def _parse_budgets(text: str) -> list[int]:
    try:
        budgets = [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(
            f"--num-remove takes integers separated by commas, such as 7,9, not {text!r}"
        ) from None
    if len(set(budgets)) < len(budgets) or not 0 <= min(budgets) <= max(budgets) <= MOST:
        raise InputError(
            f"--num-remove: budgets must be distinct and from 0 to {MOST}, not {text!r}"
        )
    return budgets


def _refuse_twice(flag: str, names: Sequence[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"{flag}: {name!r} is given twice")


def _notify(quiet: bool) -> Callable[[str], None]:
    return (lambda message: None) if quiet else note
