"""info, algorithms, score, export."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click
import numpy as np
from rich.table import Table
from rich.text import Text

from .. import __version__
from ..errors import InputError
from ..exports import checkpoint
from ..io import parse_json, write_jsonl
from ..masks import check_removed, check_sequences, format_removed, record_units, removed_by
from ..objectives import no_judge
from ..plan.progress import ProgressEvent, reporting
from ..search import find_algorithm, known_algorithms
from ..study.tables import (
    format_dense,
    format_record,
    format_saved,
    units_header,
)
from ..validate import check_path
from .candidates import candidate_options, check_candidates, read_candidates
from .opening import MakeEvaluator, evaluates, open_model
from .options import (
    FILE_NAME,
    NEW_FILE,
    UNIT_SEQUENCE,
    UNITS,
    Command,
    Parsed,
    json_option,
    model_options,
    naming,
    weights_option,
)
from .output import printing, progress_bar, say, say_json, say_values, written_somewhere
from .support import sentences, support_of

if TYPE_CHECKING:
    from ..evaluator import Evaluator
    from ..models import Model
    from ..plan.bands import Room

ADVICE = (
    "Begin with greedy: about k U masks. Then try beam, up to beam_width times as many: of six "
    "cases whose optimum is known (docs/findings.md), greedy found five and beam all."
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

    With --weights-gb, also show the weights that stay loaded, and how the others are read.
    """
    opened = open_model(model, device, dtype, trust_remote_code, weights_bytes)
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
        else:
            say_values(sentences(rows))


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

    With names, show these algorithms and how they work. A cost is the number of masks that are
    scored to remove k of U units.
    """
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
    type=NEW_FILE,
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
    out_file: Path | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Score depth masks of MODEL, or sequences of its units.

    A mask's score is how good the model is without the units that it removes; a sequence runs units
    in any order, some of them several times. A score is printed as the objective's metric with its
    standard error over samples. Several masks are also compared with the whole model: differences
    have paired standard errors, and those below two of these errors are marked.
    """
    check_candidates(masks_file, removed, sequences)
    with progress_bar(quiet) as progress:
        evaluator = make_evaluator(progress)
        chosen = read_candidates(masks_file, removed, sequences, evaluator.num_units)
        score_all = _Scores.only_losses if out_file and not as_json else _Scores.by_sample
        scores = score_all(evaluator, chosen)
    rows = scores.rows()
    with written_somewhere(out_file, lambda path: write_jsonl(path, rows)) as (written, trouble):
        if trouble:  # print everything instead
            scores = _Scores.by_sample(evaluator, chosen)
        with printing(written):
            if as_json:
                say_json(scores.to_dict())
            elif written and not trouble:
                say(f"written: {written}")
                scores.say_cost()
            else:
                scores.say_all()


@click.command(cls=Command)
@click.option(
    "--removed",
    type=UNITS,
    help="Blocks to remove, such as 9,10,11 or 9-11. A checkpoint cannot leave out half a "
    "block, so sublayers cannot be named.",
)
@click.option(
    "--sequence",
    type=UNIT_SEQUENCE,
    help="Blocks in the order in which they are to run, such as 0-8,8-11.",
)
@click.option(
    "--result",
    type=FILE_NAME,
    help="File result.json of a search. Its blocks are removed, or run in its sequence; "
    "the model card reports its losses.",
)
@click.option(
    "--base-model",
    type=Parsed("text", checkpoint.check_base_model),
    help="Hub id of the base model, for the model card. Default: the name of MODEL.",
)
@click.option(
    "--out",
    "out_dir",
    required=True,
    type=Parsed("text", lambda text: checkpoint.check_target(check_path(text)), completes="file"),
    help="Folder of the new checkpoint.",
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
    out_dir: Path,
    measure_speed: bool,
) -> None:
    """Write MODEL without some blocks, or with others repeated, for transformers.

    Transformers loads the new checkpoint as it is. Its README.md is a model card; recipes/ holds
    the same for mergekit, llama.cpp, EvoPress and LLM-Drop. Only blocks can be left out, not
    sublayers.
    """
    if sum(given is not None for given in (removed, sequence, result)) != 1:
        raise InputError(
            "say what to write: one of --removed BLOCKS, --sequence BLOCKS and --result FILE"
        )
    flag = "--removed" if sequence is None else "--sequence"
    losses = None
    notes: list[str] = []
    if result is not None:
        flag = "--result"
        with naming(flag):
            removed, sequence, losses, notes, num_units, searched = _read_result(Path(result))
    opened = open_model(model, device, dtype or "auto", trust_remote_code)
    if result is not None and num_units != opened.num_blocks:
        raise InputError(
            f"--result: {result}: of a model of {num_units} blocks; {opened.name} has "
            f"{opened.num_blocks}"
        )
    gone, blocks = None, opened.num_blocks
    with naming(flag):
        if sequence is None:
            gone = check_removed(removed or (), blocks)
            left = blocks - len(gone)
            content = f"{left} blocks of {blocks}, without {format_removed(gone)}"
        else:
            (sequence,) = check_sequences([sequence], blocks)
            content = f"{len(sequence)} blocks, made of {blocks}: {','.join(map(str, sequence))}"
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
        say(f"written: {folder} ({content})")
        say(
            "for other tools: "
            + ", ".join(str(path) for path in sorted((folder / "recipes").iterdir()))
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
    """Read a search's result.json.

    Returns:
        The removed blocks or None, the sequence of blocks or None, the losses (before, after) by
        objective and data, notes on these, the model's number of units, and its name.
    """
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
    calibration, name = value.get("calibration"), str(value["objective"])
    calibration = calibration if isinstance(calibration, dict) else {}
    chance, samples = value.get("chance"), calibration.get("num_samples")
    notes: list[str] = []
    if isinstance(chance, float) and isinstance(samples, int):
        note = no_judge({"name": name, "chance": chance, "num_samples": samples}, losses[0])
        notes += [note] * bool(note)
    if {"file", "num_samples"} <= set(calibration):
        name += f", {calibration['num_samples']} samples" + (
            f" of {Path(str(calibration['file'])).name}" if calibration["file"] else ""
        )
    searched = str(value.get("model", ""))
    by_data = {name: losses}
    if isinstance(held_out := value.get("held_out"), dict):
        with suppress(KeyError, TypeError, ValueError):  # a card may leave it out
            data = f"{held_out['num_samples']} samples of {Path(held_out['file']).name}"
            judged = float(held_out["dense_loss"]), float(held_out["loss"])
            by_data[f"{held_out['objective']}, {data}, held out"] = judged
    removed, sequence = units
    return removed, sequence, by_data, notes, value["num_units"], searched


@dataclasses.dataclass
class _Scores:
    """The losses of masks and sequences, beside those of the whole model if they help.

    Attributes:
        chosen: The units that run of each mask or sequence, in order.
        losses: float64[N].
        sample_losses: float64[N, S]; empty if only losses are needed.
        dense: The whole model's losses, float64[S], or None.
        added: Whether the whole model was scored in addition to the masks.
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
        """Score masks on every sample, and the whole model beside them if it helps.

        Several masks are compared with it. It also shows whether an accuracy is a judge.
        """
        whole_model, objective = tuple(range(evaluator.num_units)), evaluator.objective
        several = len(chosen) > 1 and not objective.compares_with_dense
        whole = several or objective.chance is not None
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
        losses = objective.mean(sample_losses)
        return cls(evaluator, chosen, losses, sample_losses, dense, added)

    def rows(self) -> list[dict]:
        """The loss and metric of each mask."""
        record = self.evaluator.objective.record
        return [
            {**record_units(units, self.evaluator.num_units), **record(loss)}
            for units, loss in zip(self.chosen, self.losses.tolist())
        ]

    def to_dict(self) -> dict:
        """Convert the losses to plain values, for --json."""
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
            error = float(objective.standard_error(self.dense[None])[0])
            if self.added:
                say(format_dense(objective, dense_loss, error))
            if judged := no_judge(objective.describe(), dense_loss):
                say(judged)
        self.say_cost()

    def _table(self) -> Table:
        """A row for each mask, with the difference to the whole model if its losses are known."""
        evaluator, objective = self.evaluator, self.evaluator.objective
        halves = evaluator.granularity == "sublayer"
        compares = self.dense is not None and (self.added or len(self.chosen) > 1)
        records = [record_units(units, evaluator.num_units) for units in self.chosen]
        table = Table(units_header(records), *["sublayers"] * halves, objective.header())
        if compares:
            table.add_column("difference to the whole model")
        errors = objective.standard_error(self.sample_losses)
        for i, record in enumerate(records):
            names = [evaluator.unit_names[unit] for unit in record.get("removed", ())]
            row = [format_record(record), *[", ".join(names) or "-"] * halves]
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
        dense = (
            f", {evaluator.objective.name}'s run of the whole model among them," if compares else ""
        )
        known = f"; {stats.store_hits} scores were in the store" if stats.store_hits else ""
        say(
            f"{', '.join(asked)}{', and the whole model' * self.added}: "
            f"{stats.unit_runs:.0f} unit runs{dense} where one pass per mask takes "
            f"{stats.naive_unit_runs:.0f}{saved and f' ({saved})'}{known}, "
            f"{stats.seconds:.1f} s; "
            f"{stats.cache_bytes / 2**20:.0f} MiB of states are cached"
        )


def _counted(sizes: Sequence[int], name: str, verb: str, of: str) -> str:
    """Count masks or sequences, and the units that they remove or run, in words."""
    count, least, most = len(sizes), min(sizes), max(sizes)
    size = f"{least}" if least == most else f"{least} to {most}"
    return f"{count} {name}{'s' * (count != 1)} that {verb}{'s' * (count == 1)} {size}{of}"
