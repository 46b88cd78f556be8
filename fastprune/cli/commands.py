"""info, algorithms, score, search, export."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
from rich.table import Table
from rich.text import Text

from .. import __version__
from ..data import TASKS_READING, TEXT_READING
from ..errors import InputError
from ..io import file_marks, json_text, parse_json, write_json, write_jsonl
from ..masks import check_removed, check_sequences, kept_by, record_units, removed_by
from ..objectives import no_judge, objective_class
from ..plan.progress import ProgressEvent, reporting
from ..study.tables import (
    TABLE_NOTE,
    format_dense,
    format_races,
    format_record,
    format_removed,
    format_saved,
    pattern_text,
    results_table,
    units_header,
)
from ..validate import refuse_existing
from .candidates import UnitSequence, candidate_options, check_candidates, read_candidates
from .held_out import beside_whole, format_difference, judge, judged_lines, next_lines, next_steps
from .options import (
    MOST_SEED,
    Budget,
    Command,
    CostBudget,
    FileName,
    LossIncrease,
    MakeEvaluator,
    Name,
    Protected,
    Units,
    algorithm_names,
    check_gradients,
    evaluates,
    held_out_options,
    json_option,
    model_options,
    naming,
    open_model,
    racing_option,
    split_options,
    weights_option,
)
from .output import note, printing, progress_bar, say, say_json, written_somewhere

if TYPE_CHECKING:
    from ..costs import Budget as RemovalBudget
    from ..evaluator import Evaluator
    from ..models import Model
    from ..plan.bands import Room
    from ..search import SearchResult

FILES = ("model", "calibration", "held_out")  # arguments that name files
ADVICE = (
    "Begin with greedy: about k U masks. Then try beam, up to beam_width times as many: of four "
    "cases whose optimum is known (the demo model, docs/study.md), greedy found three and beam all."
)
MOST_TOGETHER = 1_000  # masks whose losses of all samples are computed in one call


@click.command(cls=Command)
@json_option
@model_options
@weights_option
def info(
    model: str,
    device: str | None,
    dtype: str | None,
    trust_remote_code: bool,
    weights_bytes: int | None,
    as_json: bool,
) -> None:
    """Show a model's units, and whether and how it can be run.

    With --weights-gb: which of its weights stay loaded, and how the others are read.
    """
    from .support import sentences, support_of

    opened = open_model(model, device, dtype, trust_remote_code, weights_bytes)
    table = Table(show_header=False, box=None)
    rows: dict[str, object] = {
        "model": opened.name,
        "family": opened.family,
        "hidden size": opened.hidden_size,
        "vocabulary": opened.vocab_size,
        "positions": opened.max_positions or "unlimited",
        "parameters": sum(p.numel() for p in opened.hf.parameters()),
        "dtype": str(opened.dtype).removeprefix("torch."),
        "device": str(opened.device),
        "tokenizer": opened.tokenizer_problem
        or ("yes" if opened.tokenizer is not None else "none: give token ids"),
        **support_of(opened),
    }
    if opened.weights.streamed:
        rows |= _streaming_rows(opened, opened.weights.room)
    with printing():
        if as_json:
            sizes = {"blocks": opened.num_blocks}
            say_json({name.replace(" ", "_"): value for name, value in (rows | sizes).items()})
            return
        for name, text in sentences(rows):
            table.add_row(name, text)
        say(table)


def _streaming_rows(opened: Model, room: Room) -> dict[str, str]:
    """The weights that stay loaded, and the bands that the others are read in."""
    bands = opened.weights.bands
    return {
        "stay loaded": f"{_mib(room.always)}: embeddings, norm, head, and room to read into",
        "read by turns": f"{room.num_blocks} blocks of up to {_mib(room.block_bytes)}; room for "
        f"{room.places}",
        "bands": f"{len(bands)} of up to {max(map(len, bands))} blocks",
    }


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"


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
        if not names:
            say(f"{ADVICE}\n")
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
@candidate_options
@click.option(
    "--out",
    "out_file",
    type=FileName(),
    help='Write rows {"removed" or "sequence", "loss", METRIC}, such as "perplexity", to this new '
    ".jsonl file.",
)
@json_option
@evaluates
def score(
    make_evaluator: MakeEvaluator,
    masks_file: str | None,
    removed: tuple[tuple[int, ...] | str, ...],
    sequences: tuple[tuple[int, ...], ...],
    out_file: str | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Score depth masks of MODEL, or sequences of its units.

    A mask's score is how good the model is without the units that it removes; a sequence runs units
    in any order, some of them several times. It is printed as the
    objective's metric with its standard error over samples; of several masks also as the difference
    to the whole model, with the paired standard error. A difference below two of them is marked.
    """
    check_candidates(masks_file, removed, sequences)
    if out_file:
        with naming("--out"):
            refuse_existing(Path(out_file))
    with progress_bar(quiet) as progress:
        evaluator = make_evaluator(progress)
        chosen = read_candidates(masks_file, removed, sequences, evaluator.num_units)
        score_all = _Scores.only_losses if out_file and not as_json else _Scores.by_sample
        scores = score_all(evaluator, chosen)
    written, trouble = None, ""
    if out_file:
        rows = scores.rows()
        written, trouble = written_somewhere(Path(out_file), lambda path: write_jsonl(path, rows))
        if trouble:  # all is printed instead
            scores = _Scores.by_sample(evaluator, chosen)
    with printing(written):
        if as_json:
            say_json(scores.to_dict())
        elif written and not trouble:
            say(f"written: {written}")
            scores.say_cost()
        else:
            scores.say_all()
    if trouble:
        raise click.ClickException(trouble)


@click.command(cls=Command)
@click.option(
    "--algorithm",
    type=Name(algorithm_names),
    default="beam",
    show_default=True,
    help="A name that `fastprune algorithms` lists. Begin with greedy, which scores about k U "
    "masks for k of U units; beam scores up to beam_width times as many, and may find a better "
    "result.",
)
@click.option(
    "--num-remove",
    type=Budget(),
    callback=lambda context, parameter, value: _check_sizes(context, parameter, value),
    help="How many units to remove, or a share of them such as 25%, rounded down. Not for a search "
    "over sequences, such as repeat.",
)
@click.option(
    "--budget",
    type=CostBudget(),
    callback=lambda context, parameter, value: _check_sizes(context, parameter, value),
    help="Instead: the most that the pruned model may have, of params, bytes, kv_bytes (of the "
    "key-value cache, per token) or latency_ms (measured); a number or a share of the whole "
    "model's, such as params=75% or bytes=1.5G.",
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
@click.option(
    "--out",
    "out_dir",
    type=FileName(),
    help="Write result.json into this folder. A result of the same arguments there is printed "
    "again.",
)
@click.option(
    "--max-loss",
    type=LossIncrease(),
    help="Exit with status 1, after all is written, if the loss is above this: a loss, or an "
    "increase over the whole model's such as +5%.",
)
@click.option(
    "--measure-speed",
    is_flag=True,
    help="Measure the tokens per second of the whole and of the pruned model.",
)
@click.option(
    "--table",
    is_flag=True,
    help="Print the loss and the cost after each unit that greedy or beam removed.",
)
@click.option(
    "--figure",
    type=FileName(),
    help="Write the same as a figure, loss against cost with standard errors, into this .png or "
    ".svg file.",
)
@racing_option
@held_out_options
@json_option
@evaluates
def search(
    make_evaluator: MakeEvaluator,
    algorithm: str,
    num_remove: int | str | None,
    budget: RemovalBudget | None,
    max_loss: str | None,
    measure_speed: bool,
    table: bool,
    figure: str | None,
    options: tuple[str, ...],
    protect: str | tuple[int, ...],
    seed: int,
    out_dir: str | None,
    racing: float | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Search MODEL for the units whose removal hurts least, or for a sequence of units that
    helps."""
    from ..exports import can_export
    from ..search import check_algorithm, check_racing, protected_units, run_search
    from .budgets import check_figure, check_gate, check_stepwise, cost_record, write_path_figure

    check_stepwise({"--table": table, "--figure": figure}, algorithm)
    check_figure(figure)
    given: dict[str, Any] = dict(split_options(options))
    chosen, settings = check_algorithm(algorithm, given)
    chosen.check_num_remove(num_remove, budget)
    check_racing([algorithm], racing)
    parameters = click.get_current_context().params
    check_gradients([algorithm], parameters["objective"])
    target = Path(out_dir) / "result.json" if out_dir else None
    arguments = _arguments(parameters, settings)
    if target:
        with naming("--out"):
            if kept := _kept_result(target, arguments):
                note(f"{target} exists already, of the same arguments; nothing was computed")
                _print_search(kept, target, as_json, written=False, table=table)
                write_path_figure(kept, figure)
                check_gate(kept, max_loss)
                return
            refuse_existing(target)
    with progress_bar(quiet) as progress:
        evaluator = make_evaluator(progress)
        with naming("--protect"):
            protected_units(protect, evaluator.num_units, evaluator.granularity)
        unseen = make_evaluator.held_out and make_evaluator.held_out.open(evaluator.model)
        result = run_search(
            evaluator, algorithm, num_remove, seed, protect, racing, budget=budget, **given
        )
        record = _search_record(evaluator, result, arguments)
        record |= cost_record(evaluator, result.removed, measure_speed)
        opened, searched = evaluator.model, evaluator.objective
        del evaluator  # its cache may hold a quarter of the free memory
        if unseen is not None:
            judging = make_evaluator.on(opened, unseen, progress)
            record["held_out"] = judge(judging, result.sequence, searched, arguments["held_out"])
    problem = can_export(opened, result.sequence) if result.granularity == "block" else None
    record["next"] = next_steps(record, target, problem)
    trouble = ""
    if target:
        target, trouble = written_somewhere(target, lambda path: write_json(path, record))
    _print_search(record, target, as_json, written=not trouble, table=table)
    write_path_figure(record, figure)
    if trouble:
        raise click.ClickException(trouble)
    check_gate(record, max_loss)


def _check_sizes(context: click.Context, parameter: click.Parameter, value: Any) -> Any:
    """The option's value. If --num-remove and --budget are both missing, or both given, this is
    said before the options that need files."""
    (other,) = {"num_remove", "budget"} - {parameter.name}
    if value is not None and context.params.get(other) is not None:
        raise InputError("--num-remove and --budget are two sizes; give one")
    if value is None and other in context.params and context.params[other] is None:
        from ..search import find_algorithm  # click reads the algorithm before missing options

        try:
            find_algorithm(context.params["algorithm"]).check_num_remove(None)
        except InputError as error:
            message = error.message.replace("num_remove", "--num-remove")
            raise InputError(message.replace(" budget", " --budget")) from None
    return value


def _arguments(parameters: Mapping[str, Any], settings: Mapping[str, object]) -> dict[str, object]:
    """The arguments of a search that decide its result, with marks of the files they name.

    parameters: of the command. settings: the algorithm's options.
    """
    names = (
        *("model", "device", "dtype", "trust_remote_code", "objective", "calibration"),
        *TEXT_READING,
        *TASKS_READING,
        *("normalization", "num_samples", "seq_len", "sample_seed", "granularity", "backend"),
        *("algorithm", "num_remove", "protect", "seed", "racing", "measure_speed"),
        *("held_out", "held_out_objective", "held_out_samples", "held_out_column"),
    )
    files = {name: file_marks(str(parameters[name])) for name in FILES if parameters[name]}
    budget = parameters["budget"] and str(parameters["budget"])
    plain = {name: parameters[name] for name in names} | {"budget": budget}
    return plain | {"options": settings, "files": files}


def _kept_result(path: Path, arguments: Mapping[str, object]) -> dict | None:
    """The result in a file, if a search with the same arguments has written it.

    Raises InputError that says how the arguments of another search differ.
    """
    if not path.is_file():
        return None
    try:
        record = parse_json(path.read_bytes(), str(path))
    except (InputError, OSError):
        return None
    before = record.get("arguments") if isinstance(record, dict) else None
    if not isinstance(before, dict):
        return None
    differing = list(_differing(before, json.loads(json_text(arguments))))
    if record.get("fastprune") != __version__:
        differing.append(f"fastprune {record.get('fastprune')}, now {__version__}")
    if differing:
        raise InputError(
            f"{path}: exists already and is not overwritten: it is the result of other arguments "
            f"({'; '.join(differing)}); name another folder or remove it"
        )
    return record


def _differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """How the arguments of two searches differ, each as its flag, its value and its value now."""
    for name in sorted({*before, *now}):
        old, new = before.get(name), now.get(name)
        if old == new:
            continue
        if name == "files" and isinstance(old, dict):
            changed = [of for of in new if of in old and old[of] != new[of]]
            changed = [of for of in changed if before.get(of) == now.get(of)]  # or it is said so
            yield from (f"the files of {now[of]} have changed" for of in changed)
        elif name == "options" and isinstance(old, dict):
            yield from _differing_options(old, new)
        else:
            flag = "MODEL" if name == "model" else f"--{name.replace('_', '-')}"
            yield f"{flag} {_shown(flag, old)}, now {_shown(flag, new)}"


def _differing_options(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """How the options of an algorithm differ."""
    for name in sorted({*before} & {*now}):
        if before[name] != now[name]:
            yield f"--option {name}={before[name]}, now {now[name]}"


def _shown(flag: str, value: object) -> str:
    """The value of a flag, as a user gives it."""
    if isinstance(value, list) and value:
        return format_removed(value)
    if value is False and flag == "--bos":
        return "as --no-bos"
    if value is None or value is False or value == []:
        return "not given"
    return "given" if value is True else str(value)


def _search_record(
    evaluator: Evaluator, result: SearchResult, arguments: Mapping[str, object]
) -> dict:
    """A search's result.json: the result, the whole model beside it, and the arguments."""
    plain, num_units = result.to_dict(), evaluator.num_units
    path = [kept_by(removed, num_units) for removed, _, _ in result.path]
    errors = evaluator.objective.standard_error(evaluator.score_samples(sequences=path))
    for step, error in zip(plain["path"], errors.tolist(), strict=True):
        step["standard_error"] = error
    calibration = {"file": arguments["calibration"], "num_samples": evaluator.num_samples}
    return {
        **beside_whole(evaluator, result.sequence),
        **plain,
        "store_hits": result.cost.store_hits,
        "model": evaluator.model.name,
        "held_out": None,
        "removed_names": [evaluator.unit_names[unit] for unit in result.removed or ()],
        "calibration": calibration | {name: arguments[name] for name in ("seq_len", "sample_seed")},
        "fastprune": __version__,
        "arguments": dict(arguments),
    }


def _print_search(
    record: Mapping[str, Any],
    target: Path | None,
    as_json: bool,
    written: bool = True,
    table: bool = False,
) -> None:
    """Print a search's record. target: its file, if it has one; written: whether the file is new;
    table: with the loss and cost of each size."""
    from .budgets import cost_lines, path_table

    objective = objective_class(record["objective"])
    algorithm, num_units = record["algorithm"], record["num_units"]
    is_sequence = "sequence" in record
    units = record["sequence" if is_sequence else "removed"]
    shape = f"{len(units)} unit runs" if is_sequence else f"{len(units)} of {num_units} removed"
    loss, error, dense_loss, dense_error = (
        float(record[name])  # inf and nan are texts in a file
        for name in ("loss", "standard_error", "dense_loss", "dense_standard_error")
    )
    title = (
        f"{record['model']}, {record['objective']}, {shape} "
        f"({format_dense(objective, dense_loss, dense_error)})"
    )
    counts = (record[name] for name in ("evaluations", "unit_runs", "naive_unit_runs"))
    row = (algorithm, units, objective.format(loss, error, named=False), *counts)
    dense_pass = f" Under {record['objective']}, runs include one pass of the whole model."
    dense_pass *= objective.compares_with_dense
    with printing(target):
        if as_json:
            say_json(record)
            return
        say(results_table(title, objective.header(), [row], units_header([record])))
        say(f"{TABLE_NOTE}{dense_pass} {record['seconds']:.1f} s.", style="dim")
        if is_sequence:
            say(f"sequence: {format_removed(units)}")
        else:
            say(pattern_text([(record["objective"], algorithm, units)], num_units))
            say(f"removed: {format_removed(units)}")
        if units and not objective.compares_with_dense:
            said = format_difference(objective, record)
            say(f"{objective.metric_name}, difference to the whole model: {said}")
        for line in cost_lines(record):
            say(line)
        if table:
            say(path_table(record))
        num_samples = record["calibration"]["num_samples"]
        judged = {"name": record["objective"], "chance": record["chance"]}
        if note_ := no_judge(judged | {"num_samples": num_samples}, dense_loss):
            say(note_)
        if record["racing"]:
            say(format_races(record["decided_early"]))
        if record["granularity"] == "sublayer" and not is_sequence:
            say(f"sublayers: {', '.join(record['removed_names']) or '-'}")
        for line in judged_lines(record["held_out"]) if record["held_out"] else ():
            say(line)
        if record["store_hits"]:
            say(f"{record['store_hits']} of the scores were in the store already")
        if target and written:
            say(f"written: {target}")
        for line in next_lines(record["next"]):
            say(line)


@click.command(cls=Command)
@click.option(
    "--removed",
    type=Units(),
    help="Blocks to remove, such as 9,10,11 or 9-11. Not sublayers: half a block cannot be left "
    "out of a checkpoint.",
)
@click.option(
    "--sequence",
    type=UnitSequence(),
    help="Blocks in the order in which they are to run, such as 0-8,8-11.",
)
@click.option(
    "--result",
    type=FileName(),
    help="A search's result.json: its blocks are removed, or run in its sequence, and its losses "
    "reported.",
)
@click.option(
    "--base-model", help="Hub id of the base model, for the model card; default: the name of MODEL."
)
@click.option(
    "--out", "out_dir", required=True, type=FileName(), help="The new checkpoint's folder."
)
@click.option(
    "--measure-speed",
    is_flag=True,
    help="Measure the tokens per second of both models, for the model card.",
)
@model_options
def export(
    model: str,
    device: str | None,
    dtype: str | None,
    trust_remote_code: bool,
    removed: Iterable[int] | str | None,
    sequence: Sequence[int] | None,
    result: str | None,
    base_model: str | None,
    out_dir: str,
    measure_speed: bool,
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
            removed, sequence, losses, notes, num_units, searched = _read_result(Path(result))
    opened = open_model(model, device, dtype or "auto", trust_remote_code)
    if result is not None and num_units != opened.num_blocks:
        raise InputError(
            f"--result: {result}: of a model of {num_units} blocks; {opened.name} has "
            f"{opened.num_blocks}"
        )
    gone = None
    if sequence is not None:
        with naming("--sequence" if result is None else "--result"):
            (sequence,) = check_sequences([sequence], opened.num_blocks)
        what = (
            f"{len(sequence)} blocks, made of {opened.num_blocks}: {','.join(map(str, sequence))}"
        )
    elif removed is not None:
        with naming("--removed" if result is None else "--result"):
            gone = check_removed(removed, opened.num_blocks)
        left = opened.num_blocks - len(gone)
        what = f"{left} blocks of {opened.num_blocks}, without {format_removed(gone)}"
    folder = checkpoint.export(
        opened,
        out_dir,
        removed=gone,
        sequence=sequence,
        base_model=base_model,
        losses=losses,
        notes=notes,
        measure_speed=measure_speed,
    )
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
) -> tuple[
    list[int] | None,
    list[int] | None,
    dict[str, tuple[float, float]],
    list[str],
    object,
    str,
]:
    """The removed blocks of a search's result.json, or its sequence of blocks, its losses (before,
    after) by objective and its calibration data, notes on these, how many units the model had, and
    its name."""
    if not path.is_file():
        raise InputError(
            f"{path}: {'a folder; name its result.json' if path.is_dir() else 'no such file'}"
        )
    value = parse_json(path.read_bytes(), str(path))
    names = ("objective", "granularity", "dense_loss", "loss", "num_units")
    units = [value.get(name) for name in ("removed", "sequence")] if isinstance(value, dict) else []
    if [isinstance(listed, list) for listed in units].count(True) != 1 or not set(names) <= {
        *value
    }:
        needed = ", ".join(("removed or sequence", *names))
        raise InputError(f"{path}: not the result.json of a search (it has {needed})")
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
    by_data = {name: losses}
    if isinstance(held_out := value.get("held_out"), dict):
        with suppress(KeyError, TypeError, ValueError):  # a card without it is right, too
            data = f"{held_out['num_samples']} samples of {Path(held_out['file']).name}"
            judged = float(held_out["dense_loss"]), float(held_out["loss"])
            by_data[f"{held_out['objective']}, {data}, held out"] = judged
    removed, sequence = units
    return removed, sequence, by_data, notes, value["num_units"], searched


def _needs_whole_model(evaluator: Evaluator, num_masks: int) -> bool:
    """Whether the whole model is scored beside the masks: several are compared with it, and an
    accuracy judges nothing if the whole model only guesses."""
    objective = evaluator.objective
    several = num_masks > 1 and not objective.compares_with_dense
    return several or objective.chance is not None


@dataclasses.dataclass
class _Scores:
    """The losses of masks and sequences, with those of the whole model if they help.

    chosen: the units that run of each, in order.

    losses float64[N]; sample_losses float64[N, S], empty if only losses were asked for; dense
    float64[S], or None. added: the whole model was scored besides the masks.
    """

    evaluator: Evaluator
    chosen: list[tuple[int, ...]]
    losses: np.ndarray
    sample_losses: np.ndarray
    dense: np.ndarray | None = None
    added: bool = False

    @classmethod
    def only_losses(cls, evaluator: Evaluator, chosen: list[tuple[int, ...]]) -> _Scores:
        """Score any number of masks, without their errors and the whole model."""
        return cls(evaluator, chosen, evaluator.score(sequences=chosen), np.empty((0, 0)))

    @classmethod
    def by_sample(cls, evaluator: Evaluator, chosen: list[tuple[int, ...]]) -> _Scores:
        """Score masks on every sample, and the whole model beside them if it helps."""
        whole_model = tuple(range(evaluator.num_units))
        whole = _needs_whole_model(evaluator, len(chosen))
        added = whole and whole_model not in chosen
        asked = [*chosen, whole_model] if added else chosen
        parts = [
            asked[start : start + MOST_TOGETHER] for start in range(0, len(asked), MOST_TOGETHER)
        ]
        by_part = []
        for number, part in enumerate(parts):

            def describe(event: ProgressEvent, before: int = number) -> ProgressEvent:
                return replace(event, share=(before + (event.share or 0)) / len(parts))

            with reporting(describe):
                by_part.append(evaluator.score_samples(sequences=part))
        sample_losses = np.concatenate(by_part)
        dense = sample_losses[asked.index(whole_model)] if whole else None
        sample_losses = sample_losses[: len(chosen)]
        losses = evaluator.objective.mean(sample_losses)
        return cls(evaluator, chosen, losses, sample_losses, dense, added)

    def rows(self) -> list[dict]:
        """For each mask its loss and metric."""
        record = self.evaluator.objective.record
        return [
            {**record_units(units, self.evaluator.num_units), **record(loss)}
            for units, loss in zip(self.chosen, self.losses.tolist())
        ]

    def to_dict(self) -> dict:
        """Plain values, as --json prints them."""
        evaluator, objective = self.evaluator, self.evaluator.objective
        rows = self.rows()
        errors = objective.standard_error(self.sample_losses).tolist()
        for row, error, losses in zip(rows, errors, self.sample_losses):
            row["standard_error"] = error
            if self.dense is not None and not objective.compares_with_dense:
                row["difference"] = dataclasses.asdict(objective.compare(losses, self.dense))
        dense = None
        if self.dense is not None:
            dense = objective.record(float(objective.mean(self.dense[None])[0]))
        stats = evaluator.stats
        return {
            "model": evaluator.model.name,
            "objective": objective.describe(),
            "granularity": evaluator.granularity,
            "num_units": evaluator.num_units,
            "whole_model": dense,
            "masks": rows,
            "unit_runs": stats.unit_runs,
            "naive_unit_runs": stats.naive_unit_runs,
            "store_hits": stats.store_hits,
            "seconds": stats.seconds,
            "fastprune": __version__,
        }

    def say_all(self) -> None:
        """Print the metrics with their errors, beside the whole model if it helps."""
        say(self._table())
        if self.dense is not None:
            objective = self.evaluator.objective
            dense_loss = float(objective.mean(self.dense[None])[0])
            if judged := no_judge(objective.describe(), dense_loss):
                say(judged)
        self.say_cost()

    def _table(self) -> Table:
        """A row for each mask, with the difference to the whole model if its losses are known."""
        evaluator, objective = self.evaluator, self.evaluator.objective
        halves = evaluator.granularity == "sublayer"
        compares = self.dense is not None and len(self.chosen) > 1
        records = [record_units(units, evaluator.num_units) for units in self.chosen]
        table = Table(units_header(records), *["sublayers"] * halves, objective.header())
        if compares:
            table.add_column("difference to the whole model")
        errors = objective.standard_error(self.sample_losses)
        for i, record in enumerate(records):
            names = _names(evaluator, record.get("removed", ()))
            row = [format_record(record), *[names] * halves]
            loss, error = float(self.losses[i]), float(errors[i])
            row.append(objective.format(loss, error, named=False))
            if compares and self.dense is not None:
                difference = objective.compare(self.sample_losses[i], self.dense)
                is_whole = record.get("removed") == []
                row.append("-" if is_whole else objective.format_difference(difference))
            table.add_row(*row)
        return table

    def say_cost(self) -> None:
        """Print the cost of the scores."""
        evaluator, stats = self.evaluator, self.evaluator.stats
        num_units = evaluator.num_units
        removed = [removed_by(units, num_units) for units in self.chosen]
        sizes = [len(units) for units in removed if units is not None]
        asked = [_counted(sizes, "mask", "remove", f" of {num_units} units")] if sizes else []
        if None in removed:
            lengths = [len(units) for units, gone in zip(self.chosen, removed) if gone is None]
            asked.append(_counted(lengths, "sequence", "run", f" units of {num_units}"))
        saved = format_saved(stats.naive_unit_runs, stats.unit_runs)
        compares = evaluator.objective.compares_with_dense and stats.unit_runs
        dense = f"; {evaluator.objective.name} runs the whole model once" if compares else ""
        known = f"; {stats.store_hits} scores were in the store" if stats.store_hits else ""
        say(
            f"{', '.join(asked)}{', and the whole model' * self.added}: "
            f"{stats.unit_runs:.0f} unit runs where one pass per mask takes "
            f"{stats.naive_unit_runs:.0f}{saved and f' ({saved})'}{dense}{known}, "
            f"{stats.seconds:.1f} s; "
            f"{stats.cache_bytes / 2**20:.0f} MiB of states were kept"
        )


def _counted(sizes: Sequence[int], name: str, verb: str, of: str) -> str:
    """How many masks or sequences, and how many units they remove or run."""
    count, least, most = len(sizes), min(sizes), max(sizes)
    size = f"{least}" if least == most else f"{least} to {most}"
    return f"{count} {name}{'s' * (count != 1)} that {verb}{'s' * (count == 1)} {size}{of}"


def _names(evaluator: Evaluator, units: Iterable[int]) -> str:
    return ", ".join(evaluator.unit_names[unit] for unit in units) or "-"
