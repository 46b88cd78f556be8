"""The command line: demo, info, score, search, export.

Exit status: 0 done, 1 the run failed, 2 the arguments or the files were wrong. An error is one line.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from . import __version__
from .errors import InputError, nearest
from .masks import check_removed, from_removed, load_masks, parse_removed, to_removed
from .records import refuse_existing, write_json, write_jsonl

out = Console()
err = Console(stderr=True)


def main() -> None:
    """Run the command line; every error becomes one line and an exit status."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        status = cli.main(prog_name="fastprune", standalone_mode=False)
        sys.exit(status if isinstance(status, int) else 0)
    except (InputError, click.UsageError) as error:
        message = error.format_message() if isinstance(error, click.UsageError) else str(error)
        _fail(message, 2)
    except (KeyboardInterrupt, click.Abort):
        _fail("interrupted", 1)
    except BrokenPipeError:  # the reader of the output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if os.environ.get("FASTPRUNE_TRACEBACK"):
            raise
        _fail(f"{type(error).__name__}: {error} (FASTPRUNE_TRACEBACK=1 shows where)", 1)


def _fail(message: str, status: int) -> None:
    print(f"fastprune: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def cli() -> None:
    """Score depth masks of language models exactly, and search for the blocks that can go.

    MODEL is 'demo', a folder with a safetensors checkpoint, or a hub id.
    """


# -- options that several commands share -----------------------------------------------------------------------------


def model_options(command):
    """MODEL and how it is loaded."""
    for option in (
        click.option("--trust-remote-code", is_flag=True, help="Run model code that a hub repository brings along."),
        click.option("--dtype", help="float32, bfloat16, float16 or float64; default: the checkpoint's own."),
        click.option("--device", help="Such as cpu or cuda:0; default: a GPU where there is one."),
        click.argument("model"),
    ):
        command = option(command)
    return command


def evaluator_options(command):
    """The calibration set, the objective, and how masks are evaluated."""
    for option in (
        click.option("--quiet", is_flag=True, help="No progress bars."),
        click.option("--granularity", default="block", show_default=True, help="block or sublayer."),
        click.option("--store", help="File of finished scores; what is in it is not computed again."),
        click.option("--cache-gb", type=float, help="Activation budget in GiB; default 4 on a CPU, 16 on a GPU."),
        click.option("--backend", default="auto", show_default=True, help="auto or generic."),
        click.option("--sample-seed", default=0, show_default=True, help="Which windows of a text are drawn."),
        click.option("--seq-len", type=int, help="Tokens of a text sample; default 2048, or what the model can take."),
        click.option("--num-samples", type=int, help="Text samples (default 64) or questions (default all)."),
        click.option("--calibration", help="Text or questions to score on; the demo model has its own."),
        click.option(
            "--objective", default="perplexity", show_default=True, help="perplexity, margin, accuracy or kl."
        ),
    ):
        command = option(command)
    return command


def open_model(model: str, device: str | None, dtype: str | None, trust_remote_code: bool):
    from transformers.utils import logging

    from .models import load_model

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    return load_model(model, device, dtype, trust_remote_code=trust_remote_code)


def open_objective(name: str, calibration: str | None, num_samples: int | None, seq_len: int | None, seed: int, model):
    """The objective on its calibration file. Text gets the defaults of the field: 64 samples of 2048 tokens."""
    from .calibration import load_tasks, load_text
    from .objectives import OBJECTIVES

    objective = OBJECTIVES[name]
    if name in ("margin", "accuracy"):
        return objective(load_tasks(calibration, model.tokenizer, limit=num_samples))
    is_text = Path(calibration).suffix not in (".npy", ".safetensors")
    if is_text and seq_len is None:
        seq_len = min(2048, model.max_positions or 2048)
    return objective(load_text(calibration, model.tokenizer, num_samples, seq_len, seed))


@contextmanager
def progress_bar(quiet: bool) -> Iterator:
    """A callback (done, total) that moves a bar on stderr, from the first call of a run to its last."""
    if quiet or not err.is_terminal:
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task("unit runs", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def check_calibration(model: str, objective: str, calibration: str | None) -> str:
    """The calibration file, before the model is loaded; the demo model's own where none is given."""
    from .objectives import OBJECTIVES

    if objective not in OBJECTIVES:
        raise InputError(f"--objective: unknown objective {objective!r}; {nearest(objective, OBJECTIVES)}")
    if calibration is None and model == "demo":
        from . import demo

        return str(demo.QUESTIONS if objective in ("margin", "accuracy") else demo.TEXT)
    if calibration is None:
        raise InputError("--calibration: name a file of text or questions to score on")
    if not Path(calibration).is_file():
        raise InputError(f"--calibration: {calibration}: no such file")
    return calibration


def evaluates(command):
    """Give a command, instead of the shared options, a function that loads everything and makes the evaluator."""

    @model_options
    @evaluator_options
    @functools.wraps(command)
    def wrapped(
        model, device, dtype, trust_remote_code, objective, calibration, num_samples, seq_len, sample_seed,
        backend, store, cache_gb, granularity, quiet, **own,
    ):  # fmt: skip
        calibration = check_calibration(model, objective, calibration)
        if cache_gb is not None and not cache_gb > 0:
            raise InputError(f"--cache-gb must be above 0, not {cache_gb}")

        def make(progress):
            from .evaluator import Evaluator

            loaded = open_model(model, device, dtype, trust_remote_code)
            return Evaluator(
                loaded,
                open_objective(objective, calibration, num_samples, seq_len, sample_seed, loaded),
                backend,
                None if cache_gb is None else int(cache_gb * 2**30),
                store,
                granularity=granularity,
                progress=progress,
            )

        with progress_bar(quiet) as progress:
            return command(functools.partial(make, progress), **own)

    return wrapped


# -- commands --------------------------------------------------------------------------------------------------------


@cli.command()
@model_options
def info(model, device, dtype, trust_remote_code) -> None:
    """Show a model's units, and whether and how it can be run."""
    opened = open_model(model, device, dtype, trust_remote_code)
    table = Table(show_header=False, box=None)
    rows = {
        "model": opened.name,
        "family": opened.family,
        "blocks": opened.num_blocks,
        "hidden size": opened.hidden_size,
        "vocabulary": opened.vocab_size,
        "positions": opened.max_positions or "unlimited",
        "parameters": f"{sum(p.numel() for p in opened.hf.parameters()):,}",
        "dtype": str(opened.dtype).removeprefix("torch."),
        "device": opened.device,
        "tokenizer": "yes" if opened.tokenizer is not None else "none: give token ids",
        "backend": "generic",
        "sublayers": _can(lambda: opened.require("sublayer")),
        "token trees": _can(opened.check_trees),
        "without blocks": "yes" if opened.runs_without_blocks else "no",
    }
    for name, value in rows.items():
        table.add_row(name, str(value))
    out.print(table)


@cli.command()
@click.option("--masks", "masks_file", help='.npy (bool or 0/1, [N, U]) or .jsonl rows {"removed": [9, 10]}.')
@click.option("--removed", multiple=True, help="Units to remove, such as 9,10; give it once per mask.")
@click.option("--out", "out_file", help='Write rows {"removed", "loss"} to this new .jsonl file.')
@evaluates
def score(make_evaluator, masks_file, removed, out_file) -> None:
    """Score depth masks of MODEL: the loss of the model with these units removed."""
    from .report import format_loss, format_removed

    if bool(masks_file) == bool(removed):
        raise InputError("give masks either as --masks FILE or as --removed, once per mask")
    subsets = [parse_removed(text) for text in removed]
    if out_file:
        refuse_existing(Path(out_file))
    evaluator = make_evaluator()
    masks = load_masks(masks_file, evaluator.num_units) if masks_file else from_removed(subsets, evaluator.num_units)
    losses = evaluator.score(masks).tolist()
    rows = [(to_removed(mask), loss) for mask, loss in zip(masks, losses)]
    if out_file:
        write_jsonl(Path(out_file), ({"removed": list(units), "loss": loss} for units, loss in rows))
    else:
        table = Table("removed", evaluator.objective.name)
        for units, loss in rows:
            table.add_row(format_removed(units), format_loss(loss))
        out.print(table)
    _print_cost(evaluator.stats)


@cli.command()
@click.option("--algorithm", default="beam", show_default=True, help="one_shot, greedy or beam.")
@click.option("--num-remove", type=int, required=True, help="Units to remove.")
@click.option("--option", "options", multiple=True, help="An option of the algorithm, such as beam_width=5.")
@click.option("--protect", default="", help="Units that must stay, such as 0,1.")
@click.option("--seed", default=0, show_default=True)
@click.option("--out", "out_dir", help="Write result.json into this folder.")
@evaluates
def search(make_evaluator, algorithm, num_remove, options, protect, seed, out_dir) -> None:
    """Search MODEL for the units whose removal hurts least."""
    from .report import format_removed, pattern_text, results_table
    from .search import check_algorithm, run_search

    given = _parse_options(options)
    check_algorithm(algorithm, given)
    protected = parse_removed(protect)
    if num_remove < 0:
        raise InputError(f"--num-remove must be at least 0, not {num_remove}")
    target = refuse_existing(Path(out_dir) / "result.json") if out_dir else None
    evaluator = make_evaluator()
    check_removed(protected, evaluator.num_units)
    result = run_search(evaluator, algorithm, num_remove, seed, protected, **given)
    out.print(results_table([result], f"{evaluator.model.name}, {result.objective}, {num_remove} units removed"))
    out.print(pattern_text([result]), highlight=False)
    if target:
        write_json(target, {**result.to_dict(), "model": evaluator.model.name, "dense_loss": evaluator.dense_loss})
        out.print(f"written: {target}", highlight=False)
    else:
        out.print(f"removed: {format_removed(result.removed)}", highlight=False)


@cli.command()
@click.option("--removed", required=True, help="Blocks to remove, such as 9,10,11.")
@click.option("--out", "out_dir", required=True, help="The new checkpoint's folder.")
@model_options
def export(model, device, dtype, trust_remote_code, removed, out_dir) -> None:
    """Write MODEL without some blocks as a checkpoint that transformers loads."""
    from .checkpoint import export as write_checkpoint

    units = parse_removed(removed)
    opened = open_model(model, device, dtype, trust_remote_code)
    folder = write_checkpoint(opened, units, out_dir)
    out.print(f"written: {folder} ({opened.num_blocks - len(units)} blocks of {opened.num_blocks})", highlight=False)


@cli.command()
@click.option("--num-remove", default=3, show_default=True, help="Blocks to remove.")
@click.option("--out", "out_dir", default="fastprune-demo", show_default=True, help="Folder for figure and results.")
@click.option("--quiet", is_flag=True, help="No progress bars.")
def demo(num_remove, out_dir, quiet) -> None:
    """Search the embedded model under two objectives with every algorithm. No downloads."""
    from .evaluator import Evaluator
    from .report import pattern_figure, pattern_text, results_table
    from .search import ALGORITHMS, run_search

    model = open_model("demo", None, None, False)
    out.print(f"The demo model: a {model.family} of {model.num_blocks} blocks, searched for {num_remove} to remove.\n")
    results = []
    for name in ("perplexity", "margin"):
        objective = open_objective(name, check_calibration("demo", name, None), None, 256, 0, model)
        with progress_bar(quiet) as progress:
            evaluator = Evaluator(model, objective, progress=progress)
            found = [run_search(evaluator, algorithm, num_remove) for algorithm in ALGORITHMS]
            dense = evaluator.dense_loss
        out.print(results_table(found, f"{name} (dense model: {dense:.5f})"))
        results += found
    out.print("\nRemoved blocks (filled), by objective and algorithm:\n")
    out.print(pattern_text(results), highlight=False)
    _print_held_out(model, results, quiet)
    folder = Path(out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if importlib.util.find_spec("matplotlib"):
        pattern_figure(
            results, folder / "pattern.png", f"Demo model: {num_remove} of {model.num_blocks} blocks removed"
        )
        out.print(f"\nfigure: {folder / 'pattern.png'}", highlight=False)
    else:
        out.print("\nno figure: matplotlib is missing (pip install 'fastprune[plots]')")


def _print_held_out(model, results, quiet: bool) -> None:
    """What the removals cost on data that no search has seen."""
    import math

    from . import demo
    from .evaluator import Evaluator
    from .report import format_removed

    distinct = list(dict.fromkeys([(), *(r.removed for r in results)]))
    columns = []
    for name, file in (("perplexity", demo.TEXT_HELDOUT), ("accuracy", demo.QUESTIONS_HELDOUT)):
        objective = open_objective(name, str(file), None, 256, 0, model)
        with progress_bar(quiet) as progress:
            losses = Evaluator(model, objective, progress=progress).score(from_removed(distinct, model.num_blocks))
        columns.append(losses.tolist())
    table = Table("removed", "chosen by", title="\nHeld-out text and questions", title_justify="left")
    table.add_column("perplexity", justify="right")
    table.add_column("accuracy", justify="right")
    for removed, nll, wrong in zip(distinct, *columns):
        by = ", ".join(f"{r.objective} {r.algorithm}" for r in results if r.removed == removed) or "(dense)"
        table.add_row(format_removed(removed), by, f"{math.exp(nll):.2f}", f"{1 - wrong:.1%}")
    out.print(table)


def _parse_options(options: tuple[str, ...]) -> dict[str, str]:
    given = {}
    for option in options:
        name, equals, value = option.partition("=")
        if not equals:
            raise InputError(f"--option takes NAME=VALUE, such as beam_width=5, not {option!r}")
        given[name.strip().replace("-", "_")] = value.strip()
    return given


def _print_cost(stats) -> None:
    saved = f" ({stats.naive_layer_runs / stats.layer_runs:.1f}x fewer)" if stats.layer_runs else ""
    out.print(
        f"{stats.masks} masks, {stats.layer_runs:.0f} layer runs where one pass per mask takes "
        f"{stats.naive_layer_runs:.0f}{saved}, {stats.seconds:.1f} s",
        highlight=False,
    )


def _can(check) -> str:
    try:
        check()
    except InputError as error:
        return f"no: {error}"
    return "yes"


if __name__ == "__main__":
    main()
