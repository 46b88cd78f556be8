"""eval: tasks of lm-evaluation-harness, for many masks at once."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.table import Table

from .. import __version__
from ..io import write_json, write_jsonl
from ..masks import Candidate, record_units
from ..objectives import Objective
from ..plan.cost import Cost
from ..study.folder import STORE
from ..study.judging import to_difference
from ..study.tables import format_record, format_saved, units_header
from ..validate import MOST
from .candidates import candidate_options, check_candidates, read_candidates
from .opening import check_workers, open_model, open_workers
from .options import (
    FILE_NAME,
    NEW_FILE,
    Command,
    group,
    json_option,
    model_options,
    naming,
    output_options,
    running_settings,
    store_option,
    weights_option,
    workers_options,
)
from .output import err, printing, progress_bar, say, say_json, written_somewhere

if TYPE_CHECKING:
    from ..models import Model

task_settings = group(
    click.option("--include-path", type=FILE_NAME, help="Folder with tasks of your own."),
    click.option(
        "--limit",
        type=click.FloatRange(0, min_open=True),
        help="Number of documents of each task, from the first on, or a share of them below 1.",
    ),
    click.option(
        "--num-fewshot",
        type=click.IntRange(0, MOST),
        help="Number of worked examples before each question. Default: the task's own.",
    ),
    click.option(
        "--apply-chat-template",
        is_flag=True,
        help="Write prompts through the tokenizer's chat template, as `lm_eval` does.",
    ),
    click.option("--system-instruction", help="Text in front of every prompt."),
    click.option(
        "--fewshot-as-multiturn/--no-fewshot-as-multiturn",
        default=True,
        show_default=True,
        help="Make each worked example a turn of its own, if a chat template is applied.",
    ),
)


@click.command("eval", cls=Command)
@click.option(
    "--tasks",
    required=True,
    help="Names of tasks, or patterns such as mmlu_*, separated by commas; `lm_eval ls "
    "tasks` lists all.",
)
@candidate_options
@task_settings
@click.option(
    "--batch-size",
    type=click.IntRange(1, MOST),
    default=1,
    show_default=True,
    help="Number of texts that are generated together.",
)
@click.option(
    "--max-length",
    type=click.IntRange(1, MOST),
    help="Number of tokens that the model may see. Default: as many as it can take.",
)
@click.option(
    "--bootstrap-iters",
    type=click.IntRange(0, MOST),
    default=100_000,
    show_default=True,
    help="Number of bootstrap samples for standard errors; 0 leaves out the errors that need them.",
)
@click.option("--log-samples", is_flag=True, help="Add every document's answers to the rows.")
@click.option(
    "--out",
    "out_file",
    type=NEW_FILE,
    help='Write rows {"removed" or "sequence", "results", ...} to this new .jsonl file.',
)
@json_option
@store_option
@running_settings
@weights_option
@workers_options
@output_options
@model_options
def evaluate(
    model: str,
    device: str | None,
    dtype: str | None,
    trust_remote_code: bool,
    tasks: str,
    masks_file: str | None,
    removed: tuple[tuple[int, ...] | str, ...],
    sequences: tuple[tuple[int, ...], ...],
    include_path: str | None,
    out_file: Path | None,
    weights_bytes: int | None,
    workers: int | None,
    ray: str | None,
    quiet: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Run tasks of lm-evaluation-harness on MODEL without some units, or with others repeated.

    Metrics are the harness's own, as it computes them for the exported checkpoints. All masks are
    run together. Workers and streamed weights are for likelihoods: text is generated in one
    process, by the whole model.
    """
    check_candidates(masks_file, removed, sequences)
    check_workers(workers, ray)
    with harness_on_stderr(quiet):
        names, settings["task_manager"] = open_tasks(
            "--tasks", tasks, include_path, weights_bytes is not None
        )
        from ..integrations.lm_eval import evaluate_masks, plain

        opened = open_model(model, device, dtype, trust_remote_code, weights_bytes, quiet)
        num_units = len(opened.unit_names(settings["granularity"]))
        chosen = read_candidates(masks_file, removed, sequences, num_units)
        settings["workers"] = open_workers(workers, ray, opened)
        with progress_bar(quiet) as progress:
            results = evaluate_masks(
                opened, None, names, sequences=chosen, progress=progress, **settings
            )
    (cost,) = {Cost(**result.pop("cost")) for result in results}  # of all masks together
    rows = [
        {**record_units(units, num_units), **plain(result)}
        for units, result in zip(chosen, results)
    ]
    writing = written_somewhere(out_file, lambda path: write_jsonl(path, rows))
    with writing as (written, trouble), printing(written):
        if as_json:
            version = {"fastprune": __version__}
            say_json({"model": opened.name, **version, "cost": vars(cost), "masks": rows})
        else:
            for task in rows[0]["results"]:
                say(task_table(task, task, rows))
                if table := difference_table(task, rows):
                    say(table)
            if cost.masks:
                say(_cost_line(cost))
            if written and not trouble:
                say(f"written: {written}")


def _cost_line(cost: Cost) -> str:
    """The cost of likelihoods in words. A score is that of one mask on one kind of request."""
    saved = format_saved(cost.naive_unit_runs, cost.unit_runs)
    hits = (
        f"; {cost.store_hits} of {cost.masks} scores were in the store" if cost.store_hits else ""
    )
    return (
        f"likelihoods: {cost.unit_runs:.0f} unit runs where one pass per mask takes "
        f"{cost.naive_unit_runs:.0f}{saved and f' ({saved})'}{hits}, {cost.seconds:.1f} s"
    )


def open_tasks(
    flag: str, tasks: str, include_path: str | None, streamed: bool, load: bool = False
) -> tuple[list[str], object]:
    """Find the tasks that a text names. With `load` or streamed weights, load them once.

    Returns:
        Their names, and the harness's manager that knows them.

    Raises:
        InputError: A task is unknown, generates text while weights are streamed, or does not load.
    """
    from ..integrations import require_harness

    require_harness()
    from ..integrations.lm_eval import check_loading, find_tasks

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    with naming(flag):
        manager = find_tasks(names, include_path)
        if load or streamed:
            check_loading(names, manager, streamed)
        return names, manager


def evaluate_study(
    models: Sequence[Model],
    found: Mapping,
    out_dir: Path,
    names: Sequence[str],
    granularity: str,
    **settings: Any,
) -> dict[str, list[dict]]:
    """Run tasks on each model of a study, whole, with each chosen candidate and
    with each control.

    `found` is the study that `run_study` returned. The study's folder gets tasks.json, and its
    store keeps all computed values.

    Returns:
        Rows, by the model's name.
    """
    from ..integrations.lm_eval import evaluate_masks, plain

    rows: dict[str, list[dict]] = {}
    for model in models:
        by: dict[Candidate, list] = {Candidate(removed=()): []}
        controls: dict[Candidate, dict[str, None]] = {}  # names, each once
        for cell in found["cells"]:
            if cell["model"] == model.name and not cell["error"]:
                chosen = {name: cell[name] for name in ("objective", "num_remove", "algorithm")}
                by.setdefault(Candidate.of(cell), []).append(chosen)
        for control in found["controls"]:
            if control["model"] == model.name:
                candidate = Candidate.of(control)
                by.setdefault(candidate, [])
                controls.setdefault(candidate, {})[control["name"]] = None
        sequences = [candidate.units(found["num_units"][model.name]) for candidate in by]
        store = out_dir / STORE
        settings |= {"granularity": granularity, "store": store, "log_samples": False}
        results = evaluate_masks(model, None, names, sequences=sequences, **settings)
        rows[model.name] = [
            {
                **candidate.record,
                "chosen": chosen,
                "controls": list(controls.get(candidate, {})),
                "results": plain(result["results"]),
                "differences": plain(result["differences"]),
                "higher_is_better": plain(result["higher_is_better"]),
            }
            for (candidate, chosen), result in zip(by.items(), results)
        ]
    write_json(out_dir / "tasks.json", rows, replace=True)
    return rows


def task_table(title: str, task: str, rows: Sequence[dict]) -> Table:
    """Make a table of one task's metrics, with a row for each mask.

    Metrics have the harness's names, filters and directions.
    """
    metrics = [name for name in rows[0]["results"][task] if "," in name and "_stderr," not in name]
    table = _metrics_table(title, task, metrics, rows, justify="right")
    for row in rows:
        cells = [_with_error(row["results"][task], name) for name in metrics]
        table.add_row(_marked(row), *cells)
    return table


def _metrics_table(
    title: str, task: str, metrics: Sequence[str], rows: Sequence[dict], **column: Any
) -> Table:
    """Make a table without rows: the units, and metrics with the harness's directions, if any."""
    table = Table(units_header(rows), title=title, title_justify="left")
    higher = rows[0]["higher_is_better"].get(task, {})
    for name in metrics:
        is_higher = higher.get(name.partition(",")[0])
        direction = f" ({'higher' if is_higher else 'lower'} is better)"
        table.add_column(name.removesuffix(",none") + direction * (is_higher is not None), **column)
    return table


def _with_error(values: Mapping[str, Any], name: str) -> str:
    """The value of a metric, with its standard error if that is known."""
    error = values.get("_stderr,".join(name.split(",", 1)))
    value = _number(values[name])
    return f"{value} ± {_number(error)}" if isinstance(error, float) else value


def _marked(row: Mapping[str, Any]) -> str:
    """The units of a row, and the names of the controls that it belongs to."""
    controls = ", ".join(row.get("controls", ()))
    return format_record(row) + f" (control: {controls})" * bool(controls)


class _TaskMetric(Objective):
    """A metric of the harness, printed as `_number` prints it."""

    digits = 4


def difference_table(task: str, rows: Sequence[dict]) -> Table | None:
    """Make a table of a task's differences to the first row, paired over documents.

    None for a single row, and for a task whose metrics are no means.
    """
    metrics = list(rows[0].get("differences", {}).get(task, {}))
    if len(rows) < 2 or not metrics:
        return None
    title = f"{task}: difference to the first row, paired over documents"
    table = _metrics_table(title, task, metrics, rows)
    for row in rows[1:]:
        differences = [to_difference(row["differences"][task][name]) for name in metrics]
        table.add_row(_marked(row), *map(_TaskMetric.format_difference, differences))
    return table


def _number(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


@contextlib.contextmanager
def harness_on_stderr(quiet: bool) -> Iterator[None]:
    """Send the harness's output to stderr, errors only. Hide its bars without a terminal."""
    if quiet or not err.is_terminal:
        os.environ.setdefault("TQDM_DISABLE", "1")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with contextlib.redirect_stdout(sys.stderr):
        yield
