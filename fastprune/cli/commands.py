"""info, algorithms, score, search, export."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click
import numpy as np
from rich.table import Table
from rich.text import Text

from .._version import __version__
from ..errors import InputError
from ..io import parse_json, write_json, write_jsonl
from ..masks import check_removed, check_sequences, from_removed, load_masks, to_removed
from ..objectives import no_judge
from ..study.tables import (
    TABLE_NOTE,
    format_dense,
    format_races,
    format_removed,
    format_saved,
    pattern_text,
    results_table,
)
from ..validate import refuse_existing
from .options import (
    MOST,
    MOST_SEED,
    Command,
    FileName,
    Protected,
    Units,
    check_gradients,
    evaluates,
    model_options,
    naming,
    open_model,
    racing_option,
    split_options,
    weights_option,
)
from .output import printing, say, written_somewhere

if TYPE_CHECKING:
    from ..evaluator import Evaluator
    from ..models import Model
    from ..plan.bands import Room

MOST_TOGETHER = 1_000  # masks whose losses of all samples are computed in one call


@click.command(cls=Command)
@model_options
@weights_option
def info(
    model: str,
    device: str | None,
    dtype: str | None,
    trust_remote_code: bool,
    weights_bytes: int | None,
) -> None:
    """Show a model's units, and whether and how it can be run.

    With --weights-gb: which of its weights stay loaded, and how the others are read.
    """
    from ..models import open_runner
    from ..models.surgery import runs_without_blocks
    from ..models.verify import check_trees

    opened = open_model(model, device, dtype, trust_remote_code, weights_bytes)
    table = Table(show_header=False, box=None)
    blocks, halves = opened.unit_names("block"), opened.unit_names("sublayer")
    rows: dict[str, object] = {
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
        "backend": open_runner(opened).path_name,
        "units": f"0 to {len(blocks) - 1}: {blocks[0]} to {blocks[-1]}",
        "sublayers": _can(
            lambda: open_runner(opened, "generic", "sublayer"),
            f"0 to {len(halves) - 1}: {halves[0]}, {halves[1]} to {halves[-2]}, {halves[-1]}",
        ),
        "token trees": _can(lambda: check_trees(open_runner(opened, "generic"))),
        "without blocks": "yes" if runs_without_blocks(opened) else "no",
    }
    if opened.weights.streamed:
        rows |= _streaming_rows(opened, opened.weights.room)
    for name, value in rows.items():
        table.add_row(name, str(value))
    with printing():
        say(table)


def _streaming_rows(opened: Model, room: Room) -> dict[str, str]:
    """The weights that stay loaded, and the bands that the others are read in."""
    bands = opened.bands
    return {
        "stay loaded": f"{_gib(room.always)}: embeddings, norm, head, and what reading needs",
        "read by turns": f"{room.num_blocks} blocks of up to {_gib(room.block_bytes)}; room for "
        f"{room.places}",
        "bands": f"{len(bands)} of up to {max(map(len, bands))} blocks",
    }


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


@click.command(cls=Command)
@click.argument("names", nargs=-1, metavar="[NAME]...")
def algorithms(names: tuple[str, ...]) -> None:
    """List the search algorithms and their options.

    With names: these, and how they work. k units of U are removed; a cost is the number of masks
    that are scored.
    """
    from ..search import find_algorithm, known_algorithms

    chosen = [find_algorithm(name) for name in names] or known_algorithms().values()
    with printing():
        for known in chosen:
            row = known.describe()
            say(Text.assemble((row["name"], "bold"), f"  {row['summary']}"))
            if names and row["method"]:
                say(f"\n{row['method']}\n")
            say(f"    masks: {row['cost']}", style="dim")
            say(f"    source: {row['source']}", style="dim")
            for option in row["options"]:
                kind = (
                    f"{option['type']}, {option['allowed']}"
                    if option["allowed"]
                    else option["type"]
                )
                say(f"    {option['name']}={option['default']} ({kind}): {option['meaning']}")


@click.command(cls=Command)
@click.option(
    "--masks",
    "masks_file",
    type=FileName(),
    help='.npy [N, U] of 1 = kept, 0 = removed, or .jsonl rows {"removed": [9, 10]}.',
)
@click.option(
    "--removed",
    multiple=True,
    type=Units(),
    help="Units to remove, such as 9,10 or 9-11; - for none; once per mask.",
)
@click.option(
    "--out",
    "out_file",
    type=FileName(),
    help='Write rows {"removed", "loss", METRIC}, such as "perplexity", to this new .jsonl file.',
)
@evaluates
def score(
    make_evaluator: Callable[[], Evaluator],
    masks_file: str | None,
    removed: tuple[tuple[int, ...], ...],
    out_file: str | None,
) -> None:
    """Score depth masks of MODEL.

    A mask's score is how good the model is without the units that it removes. It is printed as the
    objective's metric with its standard error over samples; of several masks also as the difference
    to the whole model, with the paired standard error. A difference below two of them is marked.
    """
    if bool(masks_file) == bool(removed):
        raise InputError("give masks either as --masks FILE or as --removed, once per mask")
    with naming("--masks"):
        if masks_file and not Path(masks_file).is_file():
            raise InputError(f"{masks_file}: no such masks file")
    if out_file:
        with naming("--out"):
            refuse_existing(Path(out_file))
    evaluator = make_evaluator()
    if masks_file:
        masks = load_masks(masks_file, evaluator.num_units)
    else:
        with naming("--removed"):
            masks = from_removed(removed, evaluator.num_units)
    removed_units = [to_removed(mask) for mask in masks]
    if out_file:
        _write_scores(evaluator, masks, removed_units, Path(out_file))
        return
    _print_scores(evaluator, masks, removed_units)


@click.command(cls=Command)
@click.option(
    "--algorithm",
    default="beam",
    show_default=True,
    help="A name that `fastprune algorithms` lists.",
)
@click.option(
    "--num-remove", type=click.IntRange(0, MOST), required=True, help="How many units to remove."
)
@click.option(
    "--option", "options", multiple=True, help="An option of the algorithm, such as beam_width=5."
)
@click.option(
    "--protect",
    type=Protected(),
    default="",
    help="Units that must stay, such as 0,1 or 0-3, or what a method never removes: sleb or "
    "shortened-llama.",
)
@click.option("--seed", type=click.IntRange(0, MOST_SEED), default=0, show_default=True)
@click.option("--out", "out_dir", type=FileName(), help="Write result.json into this folder.")
@racing_option
@evaluates
def search(
    make_evaluator: Callable[[], Evaluator],
    algorithm: str,
    num_remove: int,
    options: tuple[str, ...],
    protect: str | tuple[int, ...],
    seed: int,
    out_dir: str | None,
    racing: float | None,
) -> None:
    """Search MODEL for the units whose removal hurts least."""
    from ..search import check_algorithm, check_racing, protected_units, run_search

    given = split_options(options)
    check_algorithm(algorithm, given)
    check_racing([algorithm], racing)
    check_gradients([algorithm], click.get_current_context().params["objective"])
    target = Path(out_dir) / "result.json" if out_dir else None
    if target:
        with naming("--out"):
            refuse_existing(target)
    trouble = ""
    evaluator = make_evaluator()
    with naming("--protect"):
        protected_units(protect, evaluator.num_units, evaluator.granularity)
    result = run_search(evaluator, algorithm, num_remove, seed, protect, racing, **given)
    objective = evaluator.objective
    pair = np.stack([result.mask, np.ones(evaluator.num_units, dtype=bool)])
    sample_losses = evaluator.score_samples(pair)
    dense_loss = float(objective.mean(sample_losses)[1])
    if target:
        names = [evaluator.unit_names[unit] for unit in result.removed]
        of = {
            "model": evaluator.model.name,
            **objective.record(dense_loss, "dense_"),
            "chance": objective.chance,
            "removed_names": names,
        }
        data = click.get_current_context().params
        settings = {name: data[name] for name in ("seq_len", "sample_seed")}
        of["calibration"] = {
            "file": data["calibration"],
            "num_samples": evaluator.num_samples,
            **settings,
        }
        of["fastprune"] = __version__
        record = {**result.to_dict(), **of}
        target, trouble = written_somewhere(target, lambda path: write_json(path, record))
    error, dense_error = objective.standard_error(sample_losses).tolist()
    dense = format_dense(objective, dense_loss, dense_error)
    title = (
        f"{evaluator.model.name}, {result.objective}, {num_remove} of {evaluator.num_units} "
        f"removed ({dense})"
    )
    row = (
        algorithm,
        result.removed,
        objective.format(result.loss, error, named=False),
        result.evaluations,
        result.unit_runs,
        result.naive_unit_runs,
    )
    dense_pass = f" Under {result.objective}, runs include one pass of the whole model."
    dense_pass *= evaluator.objective.compares_with_dense
    with printing(target):
        say(results_table(title, objective.header(), [row]))
        say(f"{TABLE_NOTE}{dense_pass} {result.seconds:.1f} s.", style="dim")
        say(pattern_text([(result.objective, algorithm, result.removed)], evaluator.num_units))
        say(f"removed: {format_removed(result.removed)}")
        if result.removed and not objective.compares_with_dense:
            difference = objective.format_difference(objective.compare(*sample_losses))
            say(f"{objective.metric_name}, difference to the whole model: {difference}")
        _print_no_judge(evaluator, dense_loss)
        if racing:
            say(format_races(result.decided_early))
        if result.granularity == "sublayer":
            say(f"sublayers: {_names(evaluator, result.removed)}")
        if target and not trouble:
            say(f"written: {target}")
    if trouble:
        raise click.ClickException(trouble)


@click.command(cls=Command)
@click.option(
    "--removed",
    type=Units(),
    help="Blocks to remove, such as 9,10,11 or 9-11. Not sublayers: half a block cannot be left "
    "out of a checkpoint.",
)
@click.option(
    "--sequence",
    type=Units(),
    help="Blocks in the order in which they are to run, such as 0-8,8-11.",
)
@click.option(
    "--result",
    type=FileName(),
    help="A search's result.json: its blocks are removed, its losses reported.",
)
@click.option(
    "--base-model", help="Hub id of the base model, for the model card; default: the name of MODEL."
)
@click.option(
    "--out", "out_dir", required=True, type=FileName(), help="The new checkpoint's folder."
)
@model_options
def export(
    model: str,
    device: str | None,
    dtype: str | None,
    trust_remote_code: bool,
    removed: Sequence[int] | None,
    sequence: tuple[int, ...] | None,
    result: str | None,
    base_model: str | None,
    out_dir: str,
) -> None:
    """Write MODEL without some blocks, or with others repeated, for transformers.

    Transformers loads the new checkpoint as it is. Its README.md is a model card; recipes/ holds
    the same for mergekit, llama.cpp, EvoPress and LLM-Drop. Only blocks can be left out, not
    sublayers.
    """
    from ..exports import checkpoint

    if sum(given is not None for given in (removed, sequence, result)) != 1:
        raise InputError(
            "say what to write: one of --removed BLOCKS, --sequence BLOCKS and --result FILE"
        )
    with naming("--out"):
        checkpoint.check_target(out_dir)
    with naming("--base-model"):
        checkpoint.check_base_model(base_model)
    losses = None
    notes: list[str] = []
    if result is not None:
        with naming("--result"):
            removed, losses, notes, num_units, searched = _read_result(Path(result))
    opened = open_model(model, device, dtype or "auto", trust_remote_code)
    if sequence is not None:
        with naming("--sequence"):
            check_sequences([sequence], opened.num_blocks)
        folder = checkpoint.export_sequence(opened, sequence, out_dir, base_model=base_model)
        what = (
            f"{len(sequence)} blocks, made of {opened.num_blocks}: {','.join(map(str, sequence))}"
        )
    elif removed is not None:
        with naming("--removed" if result is None else "--result"):
            if result is not None and num_units != opened.num_blocks:
                raise InputError(
                    f"{result}: of a model of {num_units} blocks; {opened.name} has "
                    f"{opened.num_blocks}"
                )
            check_removed(removed, opened.num_blocks)
        folder = checkpoint.export(
            opened, removed, out_dir, base_model=base_model, losses=losses, notes=notes
        )
        left = opened.num_blocks - len(removed)
        what = f"{left} blocks of {opened.num_blocks}, without {format_removed(removed)}"
    warning = (
        checkpoint.llama_cpp_warning(opened)
        if (folder / "recipes" / "llama.cpp.txt").exists()
        else None
    )
    with printing(folder):
        say(f"written: {folder} ({what})")
        say(
            "for other tools: "
            + ", ".join(f"recipes/{path.name}" for path in sorted((folder / "recipes").iterdir()))
        )
        if warning:
            say(f"llama.cpp: {warning}")
        if result is not None and Path(searched).name != Path(opened.name).name:
            say(f"its card has the losses of {result}, where the model is called {searched}")


def _read_result(
    path: Path,
) -> tuple[list[int], dict[str, tuple[float, float]], list[str], object, str]:
    """The removed blocks of a search's result.json, its losses (before, after) by objective and
    what that was calibrated on, notes on these, how many units the model had, and its name."""
    if not path.is_file():
        raise InputError(
            f"{path}: {'a folder; name its result.json' if path.is_dir() else 'no such file'}"
        )
    value = parse_json(path.read_bytes(), str(path))
    names = ("removed", "objective", "granularity", "dense_loss", "loss", "num_units")
    if (
        not isinstance(value, dict)
        or not set(names) <= set(value)
        or not isinstance(value["removed"], list)
    ):
        raise InputError(f"{path}: not the result.json of a search (it has {', '.join(names)})")
    if value["granularity"] != "block":
        raise InputError(
            f"{path}: its units are sublayers, and half a block cannot be left out of a checkpoint"
        )
    try:
        losses = float(value["dense_loss"]), float(value["loss"])
    except (TypeError, ValueError):
        raise InputError(f"{path}: dense_loss and loss must be numbers") from None
    found, name = value.get("calibration"), str(value["objective"])
    chance, samples = value.get("chance"), None
    notes: list[str] = []
    if isinstance(found, dict):
        samples = found.get("num_samples")
    if isinstance(chance, float) and isinstance(samples, int):
        note = no_judge({"name": name, "chance": chance, "num_samples": samples}, losses[0])
        notes += [note] * bool(note)
    if isinstance(found, dict) and {"file", "num_samples"} <= set(found):
        name += f", {found['num_samples']} samples" + (
            f" of {Path(str(found['file'])).name}" if found["file"] else ""
        )
    searched = str(value.get("model", ""))
    return value["removed"], {name: losses}, notes, value["num_units"], searched


def _needs_whole_model(evaluator: Evaluator, num_masks: int) -> bool:
    """Whether the whole model is scored beside so many masks: several are compared with it, and an
    accuracy judges nothing where the whole model only guesses."""
    objective = evaluator.objective
    several = num_masks > 1 and not objective.compares_with_dense
    return several or objective.chance is not None


def _write_scores(
    evaluator: Evaluator, masks: np.ndarray, removed_units: list[tuple[int, ...]], target: Path
) -> None:
    """Write the losses of masks with their metrics; print them where the file cannot be written."""
    losses = evaluator.score(masks).tolist()
    record = evaluator.objective.record
    rows = [{"removed": list(units), **record(loss)} for units, loss in zip(removed_units, losses)]
    written, trouble = written_somewhere(target, lambda path: write_jsonl(path, rows))
    if trouble:
        _print_scores(evaluator, masks, removed_units)
        raise click.ClickException(trouble)
    with printing(written):
        say(f"written: {written}")
        _print_cost(evaluator, removed_units)


def _print_scores(
    evaluator: Evaluator, masks: np.ndarray, removed_units: list[tuple[int, ...]]
) -> None:
    """Print the metrics of masks with their errors, beside the whole model where that helps."""
    whole = _needs_whole_model(evaluator, len(masks))
    if whole and () not in removed_units:
        masks = np.concatenate([masks, np.ones((1, evaluator.num_units), dtype=bool)])
    parts = np.array_split(masks, -(-len(masks) // MOST_TOGETHER))
    sample_losses = np.concatenate([evaluator.score_samples(part) for part in parts])
    dense = sample_losses[(*removed_units, ()).index(())] if whole else None
    with printing():
        say(_score_table(evaluator, removed_units, sample_losses, dense))
        if dense is not None:
            _print_no_judge(evaluator, float(evaluator.objective.mean(dense[None])[0]))
        _print_cost(evaluator, removed_units, added=len(masks) > len(removed_units))


def _score_table(
    evaluator: Evaluator,
    removed: Sequence[tuple[int, ...]],
    sample_losses: np.ndarray,
    dense: np.ndarray | None,
) -> Table:
    """A row for each mask, with the difference to the whole model where its losses are known."""
    objective = evaluator.objective
    halves, compares = evaluator.granularity == "sublayer", dense is not None and len(removed) > 1
    table = Table("removed", *["sublayers"] * halves, objective.header())
    if compares:
        table.add_column("difference to the whole model")
    losses, errors = objective.mean(sample_losses), objective.standard_error(sample_losses)
    for i, units in enumerate(removed):
        row = [format_removed(units), *[_names(evaluator, units)] * halves]
        row.append(objective.format(float(losses[i]), float(errors[i]), named=False))
        if compares and dense is not None:
            difference = objective.compare(sample_losses[i], dense)
            row.append(objective.format_difference(difference) if units else "-")
        table.add_row(*row)
    return table


def _print_no_judge(evaluator: Evaluator, dense_loss: float) -> None:
    if note := no_judge(evaluator.objective.describe(), dense_loss):
        say(note)


def _print_cost(
    evaluator: Evaluator, removed_units: Sequence[tuple[int, ...]], added: bool = False
) -> None:
    """What scoring masks has cost. added: the whole model was scored besides."""
    stats = evaluator.stats
    sizes, count = [len(units) for units in removed_units], len(removed_units)
    least, most = min(sizes), max(sizes)
    removed = f"{least}" if least == most else f"{least} to {most}"
    saved = format_saved(stats.naive_unit_runs, stats.unit_runs)
    compares = evaluator.objective.compares_with_dense and stats.unit_runs
    dense = f"; {evaluator.objective.name} runs the whole model once" if compares else ""
    known = f"; {stats.store_hits} scores were in the store" if stats.store_hits else ""
    say(
        f"{count} mask{'s' * (count != 1)} that remove{'s' * (count == 1)} {removed} of "
        f"{evaluator.num_units} units{', and the whole model' * added}: "
        f"{stats.unit_runs:.0f} unit runs where one pass per mask takes "
        f"{stats.naive_unit_runs:.0f}{saved and f' ({saved})'}{dense}{known}, "
        f"{stats.seconds:.1f} s; "
        f"{stats.cache_bytes / 2**20:.0f} MiB of states were kept"
    )


def _names(evaluator: Evaluator, units: Iterable[int]) -> str:
    return ", ".join(evaluator.unit_names[unit] for unit in units) or "-"


def _can(check: Callable[[], object], what: str = "yes") -> str:
    try:
        check()
    except InputError as error:
        return f"no: {error}"
    return what
