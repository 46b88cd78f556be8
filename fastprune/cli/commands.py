"""info, algorithms, score, search, export."""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np
from rich.markup import escape
from rich.table import Table

from ..errors import InputError
from ..masks import check_removed, from_removed, load_masks, parse_removed, to_removed
from ..records import refuse_existing, write_json, write_jsonl
from .options import evaluates, model_options, open_model, out, split_option


@click.command()
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


@click.command()
def algorithms() -> None:
    """List the search algorithms: their cost, source and options."""
    from ..search import describe_algorithms

    for row in describe_algorithms():
        out.print(f"[bold]{row['name']}[/bold]  {escape(row['summary'])}", highlight=False)
        out.print(f"    masks: {escape(row['cost'])}   source: {escape(row['source'])}", style="dim", highlight=False)
        for option in row["options"]:
            text = f"    {option['name']}={option['default']} ({option['type']}): {option['meaning']}"
            out.print(escape(text), highlight=False)


@click.command()
@click.option("--masks", "masks_file", help='.npy (bool or 0/1, [N, U]) or .jsonl rows {"removed": [9, 10]}.')
@click.option("--removed", multiple=True, help="Units to remove, such as 9,10; give it once per mask.")
@click.option("--out", "out_file", help='Write rows {"removed", "loss"} to this new .jsonl file.')
@evaluates
def score(make_evaluator, masks_file, removed, out_file) -> None:
    """Score depth masks of MODEL: the loss of the model with these units removed."""
    from ..report import format_loss, format_removed

    if bool(masks_file) == bool(removed):
        raise InputError("give masks either as --masks FILE or as --removed, once per mask")
    subsets = [parse_removed(text) for text in removed]
    if masks_file and not Path(masks_file).is_file():
        raise InputError(f"--masks: {masks_file}: no such masks file")
    if out_file:
        refuse_existing(Path(out_file))
    evaluator = make_evaluator()
    masks = load_masks(masks_file, evaluator.num_units) if masks_file else from_removed(subsets, evaluator.num_units)
    losses = evaluator.score(masks).tolist()
    rows = [(to_removed(mask), loss) for mask, loss in zip(masks, losses)]
    if out_file:
        write_jsonl(Path(out_file), ({"removed": list(units), "loss": loss} for units, loss in rows))
    else:
        in_nats = evaluator.objective.name == "perplexity"
        table = Table("removed", f"{evaluator.objective.name} loss", *["perplexity"] * in_nats)
        for units, loss in rows:
            table.add_row(format_removed(units), format_loss(loss), *[f"{np.exp(loss):.3f}"] * in_nats)
        out.print(table)
    _print_cost(evaluator.stats)


@click.command()
@click.option("--algorithm", default="beam", show_default=True, help="A name that `fastprune algorithms` lists.")
@click.option("--num-remove", type=int, required=True, help="Units to remove.")
@click.option("--option", "options", multiple=True, help="An option of the algorithm, such as beam_width=5.")
@click.option("--protect", default="", help="Units that must stay, such as 0,1.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--out", "out_dir", help="Write result.json into this folder.")
@evaluates
def search(make_evaluator, algorithm, num_remove, options, protect, seed, out_dir) -> None:
    """Search MODEL for the units whose removal hurts least."""
    from ..report import format_removed, pattern_text, results_table
    from ..search import check_algorithm, run_search

    given = dict(split_option(text) for text in options)
    check_algorithm(algorithm, given)
    protected = parse_removed(protect)
    if num_remove < 0:
        raise InputError(f"--num-remove must be at least 0, not {num_remove}")
    target = refuse_existing(Path(out_dir) / "result.json") if out_dir else None
    evaluator = make_evaluator()
    check_removed(protected, evaluator.num_units)
    result = run_search(evaluator, algorithm, num_remove, seed, protected, **given)
    title = f"{evaluator.model.name}, {result.objective}, {num_remove} removed"
    row = (algorithm, result.removed, result.loss, result.evaluations, result.layer_runs, result.naive_layer_runs)
    out.print(results_table(title, [(*row, result.seconds)]))
    pattern = (result.objective, algorithm, result.removed)
    out.print(pattern_text([pattern], evaluator.num_units), highlight=False)
    if target:
        write_json(target, {**result.to_dict(), "model": evaluator.model.name, "dense_loss": evaluator.dense_loss})
        out.print(f"written: {target}", highlight=False)
    else:
        out.print(f"removed: {format_removed(result.removed)}", highlight=False)


@click.command()
@click.option("--removed", required=True, help="Blocks to remove, such as 9,10,11.")
@click.option("--out", "out_dir", required=True, help="The new checkpoint's folder.")
@model_options
def export(model, device, dtype, trust_remote_code, removed, out_dir) -> None:
    """Write MODEL without some blocks as a checkpoint that transformers loads."""
    from ..checkpoint import export as write_checkpoint

    units = parse_removed(removed)
    opened = open_model(model, device, dtype, trust_remote_code)
    folder = write_checkpoint(opened, units, out_dir)
    out.print(f"written: {folder} ({opened.num_blocks - len(units)} blocks of {opened.num_blocks})", highlight=False)


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
