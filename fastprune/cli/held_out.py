"""The result of a search on data that the search has not read, and the commands that follow."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import demo
from ..data import TASKS_READING, TEXT_READING
from ..masks import format_removed
from ..objectives import OBJECTIVES, Objective, no_judge, objective_class
from ..plan.progress import reporting
from ..study.judging import direction, format_judged, shared_rows, to_difference
from ..study.tables import unseen_notes
from .commands import score

if TYPE_CHECKING:
    import numpy as np

    from ..evaluator import Evaluator

LABEL = "held out"
STEPS = {"export": "next", "problem": "no checkpoint can be written", "judge": "judge"}


def score_beside_whole(
    evaluator: Evaluator, sequences: Sequence[Sequence[int]], stage: str
) -> np.ndarray:
    """Score sequences and the whole model in one call.

    Args:
        evaluator: The evaluator.
        sequences: N sequences of units.
        stage: The name of this work, for reports of progress.

    Returns:
        The loss of each sample, float64[N + 1, S]; the whole model's row is the last.
    """
    with reporting(lambda event: replace(event, cell=stage)):
        return evaluator.score_samples(sequences=[*sequences, range(evaluator.num_units)])


def beside_whole(objective: Objective, sample_losses: np.ndarray) -> dict[str, Any]:
    """Compare a sequence with the whole model: losses, standard errors, and paired difference.

    Args:
        objective: The objective.
        sample_losses: float64[2, S], the losses of the sequence and of the whole model.

    Returns:
        Plain values. The names of the whole model's begin with `dense_`.
    """
    loss, dense_loss = objective.mean(sample_losses).tolist()
    error, dense_error = objective.standard_error(sample_losses).tolist()
    return {
        **objective.record(loss),
        "standard_error": error,
        **objective.record(dense_loss, "dense_"),
        "dense_standard_error": dense_error,
        "difference": dataclasses.asdict(objective.compare(*sample_losses)),
        "chance": objective.chance,
    }


def dense_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """The whole model's loss and standard error in a record of `beside_whole`."""
    return {name: record[f"dense_{name}"] for name in ("loss", "standard_error")}


def judge(
    evaluator: Evaluator, sequence: Sequence[int], calibration: Objective, file: str
) -> dict[str, Any]:
    """Make the record of a search's result on held-out data.

    Args:
        evaluator: An evaluator on the held-out data.
        sequence: The units that run, in order.
        calibration: The objective of the search.
        file: The held-out data.
    """
    objective = evaluator.objective
    losses = score_beside_whole(evaluator, [sequence], "judging on held-out data")
    questions = objective.data == "tasks"
    return {
        "file": file,
        "objective": objective.name,
        "num_samples": objective.num_samples,
        "shared_rows": shared_rows(objective.batch, [calibration.batch], questions),
        **beside_whole(objective, losses),
    }


def judged_lines(held_out: Mapping[str, Any]) -> list[str]:
    """The lines about a result on held-out data."""
    objective = objective_class(held_out["objective"])
    described = {"name": held_out["objective"], **held_out}
    dense = dense_of(held_out)
    data = f"{Path(held_out['file']).name}, {held_out['num_samples']} samples"
    value = f"{objective.metric_name} {format_judged(objective, held_out)} ({direction(objective)})"
    line = f"{LABEL} ({data}): {value}"
    if not objective.compares_with_dense:
        difference = objective.format_difference(to_difference(held_out["difference"]))
        line += f", whole model {format_judged(objective, dense)}; difference {difference}"
    lines = [line, *unseen_notes({"held_out": {LABEL: described}})]
    if guesses := no_judge(described, float(dense["loss"])):
        lines.append(f"{LABEL}: {guesses}")
    return lines


def next_steps(record: Mapping[str, Any], target: Path | None) -> dict[str, str]:
    """Make the commands that follow a search, by their purpose.

    They fit the files that are there when they are made, so no file keeps them.

    Args:
        record: The search's record, with its arguments.
        target: The file that holds the record, or None.

    Returns:
        "export" writes the checkpoint; "problem" has the reason if it cannot. "judge" scores the
        checkpoint on the held-out data. Without such data, it scores the result beside the whole
        model on a file that the user names.
    """
    arguments = record["arguments"]
    opening = _flags(arguments, "trust_remote_code", "device")
    is_sequence = "sequence" in record
    kind = "sequence" if is_sequence else "removed"
    units = _spelled(record[kind])
    if not is_sequence and not record[kind]:
        return {}
    steps = {}
    model = arguments["model"]
    out = _free_folder(model, target)
    if record["export_problem"] is not None:
        steps["problem"] = record["export_problem"]
    else:
        candidate = [f"--{kind}", units] if target is None else ["--result", str(target)]
        steps["export"] = _command("export", model, *candidate, "--out", str(out), *opening)
    held_out = record["held_out"]
    if held_out and "export" in steps:
        own = {"objective": held_out["objective"], "num_samples": arguments["held_out_samples"]}
        column = arguments["held_out_column"] or arguments["column"]
        read = {**arguments, **own, "column": column}
        data = ["--calibration", held_out["file"], *_data_flags(read)]
        opening += _flags(arguments, "dtype")
        steps["judge"] = _command("score", str(out), "--removed", "-", *data, *opening)
        return steps
    whole = _spelled(range(record["num_units"])) if is_sequence else "-"
    pair = [f"--{kind}", whole, f"--{kind}", units]
    file = arguments["held_out"] or _unseen_file(model, arguments["objective"])
    data = ["--calibration", file, *_data_flags(arguments)]
    opening += _flags(arguments, "dtype", "granularity", "backend")
    steps["judge"] = _command("score", model, *pair, *data, *opening)
    return steps


FILE = "FILE"  # the user replaces it by a name


def _unseen_file(model: str, objective: str) -> str:
    """The held-out data of the demo model; for other models, a word for the user's file."""
    if model != "demo":
        return FILE
    return str(
        demo.TEXT_HELDOUT if OBJECTIVES[objective].data == "text" else demo.QUESTIONS_HELDOUT
    )


def _free_folder(model: str, target: Path | None) -> Path:
    """A new folder for the checkpoint: beside the result, or with the model's name."""
    name = Path(model).resolve().name.removesuffix(".gguf") or "model"
    first = Path(f"{name}-pruned") if target is None else target.parent / "pruned"
    folder, number = first, 2
    while folder.exists():
        folder, number = first.with_name(f"{first.name}-{number}"), number + 1
    return folder


def _data_flags(arguments: Mapping[str, Any]) -> list[str]:
    """The flags that read the data, for its objective."""
    kind = OBJECTIVES[arguments["objective"]]
    cut = ("num_samples", "seq_len", "sample_seed") if kind.data == "text" else ("num_samples",)
    reading = TEXT_READING if kind.data == "text" else TASKS_READING
    settings = ("normalization",) * ("normalization" in kind.settings)
    return _flags(arguments, "objective", *reading, *settings, *cut)


def _flags(arguments: Mapping[str, Any], *names: str) -> list[str]:
    """The flags of arguments with other values than the defaults of `score`.

    Commands that share an option share its default.
    """
    defaults = {option.name: option.default for option in score.params}
    flags: list[str] = []
    for name in names:
        value, flag = arguments[name], f"--{name.replace('_', '-')}"
        if value is True:
            flags.append(flag)
        elif value is False:
            flags += ["--no-bos"] * (name == "bos")
        elif value is not None and value != defaults[name]:
            flags += [flag, str(value)]
    return flags


def _spelled(units: Sequence[int]) -> str:
    return format_removed(units).replace(" ", ",")


def _command(*words: str) -> str:
    return shlex.join(["fastprune", *words])
