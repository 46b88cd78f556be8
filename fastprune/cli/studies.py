"""study and demo: many searches, compared, as a study document asks for."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import click

from ..demo import MODEL_DIR, QUICK_STUDY, STUDY, TEXT
from ..errors import InputError
from ..masks import format_removed
from ..study import check_study, check_study_folder, figures, read_document, run_study, write_report
from ..study.config import EXAMPLE, DataConfig, Document, at
from ..study.tables import answers, best_cells, comparison_lines
from ..validate import check_folder, refuse_existing
from .evaluation import (
    difference_table,
    evaluate_study,
    harness_on_stderr,
    open_tasks,
    task_table,
)
from .opening import Data, check_gradients, check_workers, open_model, open_workers
from .options import (
    FILE_NAME,
    FOLDER,
    Command,
    json_option,
    naming,
    output_options,
    workers_options,
)
from .output import note_progress, printing, progress_bar, say, say_json
from .study_tables import controls_table, held_out_table, print_cells, print_pattern

if TYPE_CHECKING:
    from ..models import Model
    from ..objectives import Objective

OUT = "give the study's folder, as in: fastprune study study.toml --out DIR"


@click.command(cls=Command)
@click.argument("document", required=False, type=FILE_NAME, metavar="STUDY.TOML")
@click.option("--out", "out_dir", type=FOLDER, help="Folder of the study.")
@click.option("--example", is_flag=True, help="Print a commented document and exit.")
@workers_options
@json_option
@output_options
def study(
    document: str | None,
    out_dir: Path | None,
    example: bool,
    workers: int | None,
    ray: str | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Compare search algorithms, objectives and calibration sets, as the document STUDY.TOML says.

    Its folder gets study.json and report.html. The same command continues an interrupted
    study there; a document with more algorithms, budgets or calibration sets extends it.
    """
    if example:
        with printing():
            click.echo(EXAMPLE.read_text(encoding="utf-8"), nl=False)
        return
    if document is None:
        raise InputError("name a study document; fastprune study --example prints one")
    if out_dir is None:
        raise InputError(f"--out is missing; {OUT}")
    read = read_document(Path(document))
    found, evaluated = _run(read, out_dir, workers, ray, quiet)
    with printing(out_dir):
        if as_json:
            say_json({**found, "tasks": evaluated} if evaluated else found)
            return
        print_cells(found)
        if found["held_out"]:
            say(held_out_table(found))
        if found["controls"]:
            say(controls_table(found))
        for line in comparison_lines(found):
            say(line)
        for line in answers(found):
            say(line, style="bold")
        for model, rows in evaluated.items():
            for task in rows[0]["results"]:
                say(task_table(f"{Path(model).name}, {task}", task, rows))
                if table := difference_table(task, rows):
                    say(table)
        say(f"written to {out_dir}: report.html, {'tasks.json, ' * bool(evaluated)}study.json")


@click.command(cls=Command)
@click.option(
    "--out",
    "out_dir",
    type=FOLDER,
    help="Folder of the study.",
)
@click.option(
    "--quick",
    is_flag=True,
    help="Run three algorithms on a part of the data, in seconds instead of minutes.",
)
@click.option(
    "--files",
    type=FOLDER,
    help="Run no study; write the model and its data into this folder, as model/ and data/.",
)
@output_options
def demo(out_dir: Path | None, quick: bool, files: Path | None, quiet: bool) -> None:
    """Run a study of a small built-in model, without downloads.

    Seven algorithms search for the blocks to remove, under two objectives. The folder's study.toml
    is the document to change and run again, by `fastprune study`.
    """
    if files is not None:
        if out_dir is not None or quick:
            raise InputError(
                "--files writes the model and its data; give it no --out and no --quick"
            )
        _write_files(files)
        return
    with naming("--out"):
        out_dir = out_dir or check_folder(demo_folder(quick))
    found, _ = _run(read_document(QUICK_STUDY if quick else STUDY), out_dir, quiet=quiet)
    removed = next(iter(best_cells(found)))["removed"]
    units = format_removed(removed).replace(" ", ",")
    with printing(out_dir):
        print_cells(found)
        print_pattern(found)
        say(held_out_table(found))
        say("")
        for line in comparison_lines(found):
            say(line)
        for line in answers(found):
            say(line, style="bold")
        say(f"written to {out_dir}: report.html, study.json, study.toml")
        say(f"next: fastprune export demo --removed {units} --out {out_dir / 'pruned'}")


def demo_folder(quick: bool) -> Path:
    """The folder of the demo's study if none is named."""
    return Path(f"fastprune-demo{'-quick' * quick}")


def _write_files(folder: Path) -> None:
    """Copy the demo model and its data, for commands and scripts that want paths."""
    with naming("--files"):
        places = {MODEL_DIR: folder / "model", TEXT.parent: folder / "data"}
        for place in places.values():
            refuse_existing(place)
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".demo.", dir=folder) as partial:  # none is left half written
        copies = [
            shutil.copytree(source, Path(partial) / place.name) for source, place in places.items()
        ]
        for copy, place in zip(copies, places.values(), strict=True):
            copy.rename(place)
    say(f"written: {', '.join(map(str, places.values()))}")
    say(f"next: fastprune info {folder / 'model'}")


def _run(
    document: Document,
    out_dir: Path,
    workers: int | None = None,
    ray: str | None = None,
    quiet: bool = False,
) -> tuple[dict, dict[str, list[dict]]]:
    """Run a document's study; return its results, and the harness's rows by model."""
    config, resources, tasks = document.config, document.config.resources, document.config.evaluate
    with at(str(document.path)):
        for label, (objective, _) in config.objectives.items():
            check_gradients(config.algorithms, objective.name, label)
    check_study(config.algorithms, config.search.options, out_dir)
    with naming("--out"):
        check_study_folder(out_dir, config.settings, document.text_for(out_dir))
    figures.check_installed()
    check_workers(workers, ray)
    weights_bytes = resources.in_bytes("weights")
    if tasks:
        of = f"{document.path}: evaluate.tasks"
        streamed = weights_bytes is not None
        names, manager = open_tasks(
            of, ",".join(tasks.tasks), tasks.include_path, streamed, load=True
        )
    model = config.model
    models = []
    for name, place in document.models.items():
        opened = open_model(
            place, model.device, model.dtype, model.trust_remote_code, weights_bytes, quiet
        )
        opened.name = name  # the same on every machine, in any folder
        models.append(opened)
    shared: Mapping[str, Any] = {
        "backend": model.backend,
        "memory_bytes": resources.in_bytes("memory"),
        "workers": open_workers(workers, ray, models[0]),
    }
    notify: Callable[[str], None] = (lambda message: None) if quiet else note_progress
    with progress_bar(quiet) as progress:
        found = run_study(
            models,
            {
                label: partial(_open, f"calibration.{data.name}", of.name, of.settings, data, quiet)
                for label, (of, data) in config.objectives.items()
            },
            config.algorithms,
            [*config.search.num_remove, *config.search.budget],
            out_dir,
            options=config.search.options,
            seed=config.search.seed,
            racing=config.search.racing,
            protect=config.search.protect,
            notify=notify,
            held_out={
                data.name: partial(
                    _open, f"held_out.{data.name}", data.objective, data.settings, data, quiet
                )
                for data in config.held_out
            },
            controls=config.control,
            document=document.text_for(out_dir),
            granularity=config.search.granularity,
            cache_bytes=resources.in_bytes("cache"),
            cache_dir=resources.cache_dir,
            progress=progress,
            **shared,
        )
    write_report(found, out_dir / "report.html")
    if not tasks:
        return found, {}
    notify("running tasks on every chosen mask and control")
    with harness_on_stderr(quiet):
        settings = {**tasks.settings, "task_manager": manager}
        granularity = config.search.granularity
        rows = evaluate_study(models, found, out_dir, names, granularity, **settings, **shared)
    return found, rows


def _open(
    place: str,
    name: str,
    settings: Mapping[str, object],
    data: DataConfig,
    quiet: bool,
    model: Model,
) -> Objective:
    """Open an objective of a model on the data of a table in the document."""
    of = Data(
        title="calibration",
        objective=name,
        file=data.file,
        num_samples=data.num_samples,
        seq_len=data.seq_len,
        seed=data.seed or 0,
        reading=data.reading,
        settings=settings,
    )
    with naming(place):
        return of.open(model, quiet)
