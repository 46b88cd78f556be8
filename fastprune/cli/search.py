"""search: the command, its result and how it is printed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .. import __version__
from ..data import TASKS_READING, TEXT_READING
from ..errors import InputError
from ..exports import can_export
from ..io import file_marks, json_text, parse_json, write_json
from ..masks import format_removed, kept_by
from ..objectives import no_judge, objective_class
from ..search import (
    check_algorithm,
    check_racing,
    find_algorithm,
    known_algorithms,
    protected_units,
    run_search,
    units_to_remove,
)
from ..study.judging import format_judged, to_difference
from ..study.tables import (
    TABLE_NOTE,
    format_dense,
    format_races,
    pattern_text,
    results_table,
    units_header,
)
from ..validate import MOST_SEED, refuse_existing
from .budgets import (
    check_figure,
    check_gate,
    check_stepwise,
    cost_lines,
    cost_record,
    path_table,
    write_path_figure,
)
from .held_out import STEPS, beside_whole, judge, judged_lines, next_steps, score_beside_whole
from .opening import MakeEvaluator, check_gradients, evaluates, units_before_opening
from .options import (
    COST_BUDGET,
    FILE_NAME,
    PROTECTED,
    Budget,
    Command,
    LossIncrease,
    Name,
    held_out_options,
    json_option,
    naming,
    racing_option,
    split_options,
)
from .output import note, printing, progress_bar, say, say_json, written_somewhere

if TYPE_CHECKING:
    from ..costs import Budget as RemovalBudget
    from ..evaluator import Evaluator
    from ..models import Model
    from ..search import SearchResult

FILES = ("model", "calibration", "held_out")  # arguments with the names of files


@click.command(cls=Command)
@click.option(
    "--algorithm",
    type=Name(known_algorithms),
    default="greedy",
    show_default=True,
    help="Algorithm of the search; `fastprune algorithms` lists all. greedy scores about k U "
    "masks for k of U units; beam scores up to beam_width times as many, and may find a "
    "better result.",
)
@click.option(
    "--num-remove",
    type=Budget(),
    callback=lambda context, parameter, value: _check_sizes(context, parameter, value),
    help="Number of units to remove, or a share of them such as 25%, rounded down. A "
    "search over sequences, such as repeat, takes none.",
)
@click.option(
    "--budget",
    type=COST_BUDGET,
    callback=lambda context, parameter, value: _check_sizes(context, parameter, value),
    help="Limit of the pruned model, instead of --num-remove: params, bytes, kv_bytes (of "
    "the key-value cache, per token) or latency_ms (measured), as a number or a share"
    " of the whole model's, such as params=75% or bytes=1.5G.",
)
@click.option(
    "--option",
    "options",
    multiple=True,
    help="Option of the algorithm, such as beam_width=5. It may be repeated.",
)
@click.option(
    "--protect",
    type=PROTECTED,
    default="",
    help="Units that must stay, such as 0,1 or 0-3, or the name of a method that protects "
    "some: sleb or shortened-llama.",
)
@click.option(
    "--seed",
    type=click.IntRange(0, MOST_SEED),
    default=0,
    show_default=True,
    help="Seed of all random choices of the search.",
)
@click.option(
    "--out",
    "out_dir",
    type=FILE_NAME,
    help="Folder for result.json. If a result of the same arguments is there, it is printed again.",
)
@click.option(
    "--max-loss",
    type=LossIncrease(),
    help="Exit with status 1, after all is written, if the loss is above this: a loss such"
    " as 2.5, or an increase over the whole model's such as +5%.",
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
    type=FILE_NAME,
    help="Draw the loss against the cost after each unit that greedy or beam removed, with"
    " standard errors, into this .png or .svg file.",
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
    given: dict[str, Any] = dict(split_options(options))
    chosen, settings = check_algorithm(algorithm, given)
    check_stepwise({"--table": table, "--figure": figure}, chosen)
    check_figure(figure)
    chosen.check_num_remove(num_remove, budget)
    check_racing([algorithm], racing)
    parameters = click.get_current_context().params
    check_gradients([algorithm], parameters["objective"])
    target = Path(out_dir) / "result.json" if out_dir else None
    arguments = _arguments(parameters, settings)
    if target:
        with naming("--out"):
            kept = _kept_result(target, arguments)
            if kept is None:
                refuse_existing(target)
        if kept is not None:
            note(f"{target} exists already, of the same arguments; nothing was computed")
            _print_search(kept, target, as_json, written=False, table=table)
            write_path_figure(kept, figure)
            check_gate(kept, max_loss)
            return
    granularity = parameters["granularity"]
    num_units = units_before_opening(
        parameters["model"], parameters["trust_remote_code"], granularity
    )
    if num_units is not None:
        _check_removal(num_units, granularity, protect, num_remove)
    with progress_bar(quiet) as progress:
        evaluator = make_evaluator(progress)
        _check_removal(evaluator.num_units, granularity, protect, num_remove)
        unseen = make_evaluator.open_held_out(evaluator.model, quiet)
        result = run_search(
            evaluator, algorithm, num_remove, seed, protect, racing, budget=budget, **given
        )
        record = _search_record(evaluator, result, arguments)
        record |= cost_record(evaluator, result.removed, measure_speed)
        opened, searched = evaluator.model, evaluator.objective
        record["export_problem"] = _export_problem(opened, result)
        del evaluator  # its cache may hold a quarter of the free memory
        if unseen is not None:
            judging = make_evaluator.on(opened, unseen, progress)
            record["held_out"] = judge(judging, result.sequence, searched, parameters["held_out"])
    with written_somewhere(target, lambda path: write_json(path, record)) as (target, trouble):
        _print_search(record, target, as_json, written=not trouble, table=table)
        write_path_figure(record, figure)
    check_gate(record, max_loss)


def _check_sizes(context: click.Context, parameter: click.Parameter, value: Any) -> Any:
    """Check that one of --num-remove and --budget is given, before options that need files."""
    (other,) = {"num_remove", "budget"} - {parameter.name}
    if value is not None and context.params.get(other) is not None:
        raise InputError("--num-remove and --budget are two sizes; give one")
    if value is None and other in context.params and context.params[other] is None:
        try:  # click has read the algorithm by now
            find_algorithm(context.params["algorithm"]).check_num_remove(None)
        except InputError as error:
            message = error.message.replace("num_remove", "--num-remove")
            raise InputError(message.replace(" budget", " --budget")) from None
    return value


def _check_removal(
    num_units: int,
    granularity: str,
    protect: str | tuple[int, ...],
    num_remove: int | str | None,
) -> None:
    """Raise InputError for units that a model of num_units has not, or too many to remove."""
    with naming("--protect"):
        protected = protected_units(protect, num_units, granularity)
    if num_remove is not None:
        units_to_remove(num_remove, num_units, num_units - len(protected))


def _arguments(parameters: Mapping[str, Any], settings: Mapping[str, object]) -> dict[str, object]:
    """The arguments of a search that decide its result, with marks of their files.

    Args:
        parameters: The command's parameters.
        settings: The algorithm's options.
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
    """Read the result in a file that a search with the same arguments wrote; None without a file.

    Raises InputError, which lists the differing arguments, for the result of another search.
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
    """Yield the arguments in which two searches differ: flag, old value and new value."""
    for name in sorted({*before, *now}):
        old, new = before.get(name), now.get(name)
        if old == new:
            continue
        if name == "files" and isinstance(old, dict) and isinstance(new, dict):
            changed = [of for of in new if of in old and old[of] != new[of]]
            changed = [of for of in changed if before.get(of) == now.get(of)]  # or it is said so
            yield from (f"the files of {now[of]} have changed" for of in changed)
        elif name == "options" and isinstance(old, dict) and isinstance(new, dict):
            yield from _differing_options(old, new)
        else:
            flag = "MODEL" if name == "model" else f"--{name.replace('_', '-')}"
            yield f"{flag} {_shown(flag, old)}, now {_shown(flag, new)}"


def _differing_options(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Yield the options in which two runs of an algorithm differ."""
    for name in sorted({*before} & {*now}):
        if before[name] != now[name]:
            yield f"--option {name}={before[name]}, now {now[name]}"


def _shown(flag: str, value: object) -> str:
    """A flag's value as a user types it."""
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
    """Make a search's result.json: the result, the whole model beside it, and the arguments."""
    plain, objective = result.to_dict(), evaluator.objective
    path = [kept_by(removed, evaluator.num_units) for removed, _, _ in result.path]
    losses = score_beside_whole(
        evaluator, [*path, result.sequence], "comparing the result with the whole model"
    )
    errors = objective.standard_error(losses[: len(path)])
    for step, error in zip(plain["path"], errors.tolist(), strict=True):
        step["standard_error"] = error
    calibration = {"file": arguments["calibration"], "num_samples": evaluator.num_samples}
    return {
        **beside_whole(objective, losses[len(path) :]),
        **plain,
        "store_hits": result.cost.store_hits,
        "model": evaluator.model.name,
        "held_out": None,
        "removed_names": [evaluator.unit_names[unit] for unit in result.removed or ()],
        "calibration": calibration | {name: arguments[name] for name in ("seq_len", "sample_seed")},
        "fastprune": __version__,
        "arguments": dict(arguments),
    }


def _export_problem(model: Model, result: SearchResult) -> str | None:
    """The reason why a result cannot be exported; None if it can."""
    if result.granularity == "sublayer":
        return "half a block cannot be left out of a checkpoint; fp.masked runs it in Python"
    return can_export(model, result.sequence)


def _print_search(
    record: Mapping[str, Any],
    target: Path | None,
    as_json: bool,
    written: bool = True,
    table: bool = False,
) -> None:
    """Print a search's record, and the commands that follow.

    Args:
        target: The file that holds the record, or None.
        written: Whether the file is new.
        table: Whether to print the loss and cost of each size.
    """
    objective = objective_class(record["objective"])
    algorithm, num_units = record["algorithm"], record["num_units"]
    is_sequence = "sequence" in record
    units = record["sequence" if is_sequence else "removed"]
    shape = f"{len(units)} unit runs" if is_sequence else f"{len(units)} of {num_units} removed"
    dense_loss = float(record["dense_loss"])  # inf and nan are texts in a file
    dense = format_dense(objective, dense_loss, float(record["dense_standard_error"]))
    title = f"{record['model']}, {record['objective']}, {shape} ({dense})"
    counts = (record[name] for name in ("evaluations", "unit_runs", "naive_unit_runs"))
    row = (algorithm, units, format_judged(objective, record), *counts)
    dense_pass = f" Under {record['objective']}, runs include one pass of the whole model."
    dense_pass *= objective.compares_with_dense
    steps = next_steps(record, target)
    with printing(target):
        if as_json:
            say_json({**record, "next": steps})
            return
        say(results_table(title, objective.header(), [row], units_header([record])))
        say(f"{TABLE_NOTE}{dense_pass} {record['seconds']:.1f} s.", style="dim")
        if is_sequence:
            say(f"sequence: {format_removed(units)}")
        else:
            say(pattern_text([(record["objective"], algorithm, units)], num_units))
            say(f"removed: {format_removed(units)}")
        if units and not objective.compares_with_dense:
            said = objective.format_difference(to_difference(record["difference"]))
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
        elif record["arguments"]["racing"]:
            say(f"nothing raced: {num_samples} samples are too few for races")
        if record["granularity"] == "sublayer" and not is_sequence:
            say(f"sublayers: {', '.join(record['removed_names']) or '-'}")
        for line in judged_lines(record["held_out"]) if record["held_out"] else ():
            say(line)
        if record["store_hits"]:
            say(f"{record['store_hits']} of the scores were in the store already")
        if target and written:
            say(f"written: {target}")
        for step, text in steps.items():
            say(f"{STEPS[step]}: {text}")
