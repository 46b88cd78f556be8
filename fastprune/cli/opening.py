"""Models, objectives and evaluators, as options describe them."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import demo
from ..data import TASKS_READING, Tasks, TokenBatch, load_tasks, load_text
from ..engine.store import SumStore
from ..errors import InputError
from ..objectives import OBJECTIVES, Objective
from ..plan.progress import ProgressCallback
from ..search import find_algorithm
from ..validate import check_one_of
from ..workers.processes import Processes, Workers
from .options import evaluator_settings, model_options, naming, objective_options
from .output import note, waiting

if TYPE_CHECKING:
    from ..evaluator import Backend, Evaluator
    from ..models import Granularity, Model


def check_gradients(algorithms: Iterable[str], objective: str, label: str | None = None) -> None:
    """Raise InputError for an algorithm on gradients if the objective, here called by its label,
    has none."""
    having = [name for name, known in OBJECTIVES.items() if known.differentiable]
    for name in algorithms:
        find_algorithm(name).check_gradients(objective in having, repr(label or objective), having)


@dataclass(frozen=True)
class Data:
    """Data to score on, as options or a study's document name it.

    `title` begins the line about the data's form. `reading` has further arguments of the loader,
    and `settings` those of the objective.
    """

    title: str
    objective: str
    file: str
    num_samples: int | None
    seq_len: int | None
    seed: int
    reading: Mapping[str, Any]
    settings: Mapping[str, Any]

    def open(self, model: Model, quiet: bool = False) -> Objective:
        """Open the objective on this data. quiet: show nothing while it is read."""
        kind: Any = OBJECTIVES[self.objective]
        with waiting(f"reading {self.file}", quiet):
            batch, origin = self._tasks(model) if kind.data == "tasks" else self._text(model)
        if batch.source != self.file:
            note(f"{self.title}: {batch.source}")
        objective = kind(batch, **self.settings)
        objective.source = origin
        return objective

    def _tasks(self, model: Model) -> tuple[Tasks, str]:
        """Read questions; return them with their origin in words."""
        count, name = self.num_samples, Path(self.file).name
        tasks = load_tasks(self.file, model.tokenizer, limit=count, **self.reading)
        if count is not None and tasks.num_questions < count:
            raise InputError(
                f"{self.file}: holds {tasks.num_questions} questions, but {count} samples were "
                f"asked for",
                fits={"num_samples": tasks.num_questions},
            )
        return tasks, name if count is None else f"{name}, the first questions"

    def _text(self, model: Model) -> tuple[TokenBatch, str]:
        """Read text; return its samples with their origin in words.

        Text has the defaults of the field, 64 samples of 2048 tokens; the demo's text has its own.
        """
        path, seq_len, reading = Path(self.file), self.seq_len, dict(self.reading)
        is_demo = path.resolve().parent == demo.TEXT.parent  # in any spelling of its path
        if is_demo:  # the demo model was trained on windows that begin anywhere
            reading.setdefault("bos", False)
        if seq_len is None and path.suffix not in (".npy", ".safetensors"):
            seq_len = demo.WINDOW if is_demo else min(2048, model.max_positions or 2048)
        if seq_len is not None and model.max_positions and seq_len > model.max_positions:
            raise InputError(
                f"seq_len {seq_len} is longer than the model's {model.max_positions} positions",
                argument="seq_len",
                most=model.max_positions,
            )
        tokenizer, seed = model.tokenizer, self.seed
        batch = load_text(self.file, tokenizer, self.num_samples, seq_len, seed, **reading)
        return batch, f"{batch.source}, drawn by seed {seed}"


class MakeEvaluator:
    """Makes the evaluators of a command from its options. They share the store and the workers.

    `data` is the calibration data, and `held_out` the data that judges the result, or None.
    `opening` has the arguments of `open_model`, and `options` those of `Evaluator`. `store` is the
    file of the store.
    """

    def __init__(
        self,
        data: Data,
        held_out: Data | None,
        opening: Mapping[str, Any],
        options: Mapping[str, Any],
        store: str | None,
        workers: int | None,
        ray: str | None,
    ):
        self.data, self.held_out = data, held_out
        self._opening, self._options = opening, dict(options)
        self.store, self._workers, self._ray = store, workers, ray

    def __call__(self, progress: ProgressCallback | None) -> Evaluator:
        """Open the model, and make its evaluator on the calibration data."""
        quiet = progress is None
        opened = open_model(**self._opening, quiet=quiet)
        objective = self.data.open(opened, quiet)
        self._options["workers"] = open_workers(self._workers, self._ray, opened)
        if self.store is not None:
            self._options["store"] = SumStore(self.store)
        with waiting(f"checking {opened.name}", quiet):
            return self.on(opened, objective, progress)

    def open_held_out(self, model: Model, quiet: bool) -> Objective | None:
        """Open the held-out data, if there are any; errors name their own options."""
        if self.held_out is None:
            return None
        try:
            return self.held_out.open(model, quiet)
        except InputError as error:
            own = {"num_samples": "held_out_samples", "column": "held_out_column"}
            fits = {own.get(name, name): value for name, value in error.fits.items()}
            raise InputError(f"--held-out: {error.message}", fits=fits) from error

    def on(
        self, model: Model, objective: Objective, progress: ProgressCallback | None
    ) -> Evaluator:
        """Make an evaluator of an open model on other data."""
        from ..evaluator import Evaluator

        return Evaluator(model, objective, **self._options, progress=progress)


def evaluates(command: Callable) -> Callable:
    """Add the shared options to a command; its first argument is their `MakeEvaluator`."""

    @model_options
    @objective_options
    @evaluator_settings
    @functools.wraps(command)
    def wrapped(
        model: str, device: str | None, dtype: str | None, trust_remote_code: bool,
        objective: str, calibration: str | None,
        bos: bool | None, column: str | None, chat_template: str | None, loss_on: str | None,
        delimiter: str | None, normalization: str | None, store: str | None,
        num_samples: int | None, seq_len: int | None, sample_seed: int,
        granularity: Granularity, backend: Backend,
        memory_bytes: int | None, weights_bytes: int | None,
        cache_bytes: int | None, cache_dir: Path | None,
        workers: int | None, ray: str | None,
        held_out: str | None = None, held_out_objective: str | None = None,
        held_out_column: str | None = None, held_out_samples: int | None = None, **own: Any,
    ) -> Any:  # fmt: skip
        calibration = check_calibration(model, objective, calibration)
        judge = check_held_out(
            calibration,
            held_out,
            held_out_objective or objective,
            objective=held_out_objective,
            column=held_out_column,
            samples=held_out_samples,
        )
        names = [objective] if judge is None else [objective, judge]
        refuse_text_sizes(names, seq_len, sample_seed)
        reading = check_reading(
            names,
            bos=bos,
            column=column,
            chat_template=chat_template,
            loss_on=loss_on,
            delimiter=delimiter,
        )
        settings = check_normalization(names, normalization)
        check_workers(workers, ray)
        data = Data(
            title="calibration",
            objective=objective,
            file=calibration,
            num_samples=num_samples,
            reading=reading[objective],
            settings=settings[objective],
            seq_len=seq_len,
            seed=sample_seed,
        )
        unseen = None
        if held_out is not None and judge is not None:
            own_column = {} if held_out_column is None else {"column": held_out_column}
            unseen = Data(
                title="held-out",
                objective=judge,
                file=held_out,
                num_samples=held_out_samples,
                reading=reading[judge] | own_column,
                settings=settings[judge],
                seq_len=seq_len,
                seed=sample_seed,
            )
        options = {
            "backend": backend,
            "granularity": granularity,
            "memory_bytes": memory_bytes,
            "cache_bytes": cache_bytes,
            "cache_dir": cache_dir,
        }
        opening = {
            "model": model,
            "device": device,
            "dtype": dtype,
            "trust_remote_code": trust_remote_code,
            "weights_bytes": weights_bytes,
        }
        make = MakeEvaluator(data, unseen, opening, options, store, workers, ray)
        return command(make, **own)

    return wrapped


def open_model(
    model: str,
    device: str | None = None,
    dtype: str | None = None,
    trust_remote_code: bool = False,
    weights_bytes: int | None = None,
    quiet: bool = False,
) -> Model:
    """The model of a command's options. quiet: show nothing while it opens."""
    with waiting(f"opening {model}", quiet):
        import torch
        from transformers.utils import logging

        from ..models import load_model
        from ..models.imports import import_transformers

        import_transformers()
        logging.disable_progress_bar()
        logging.set_verbosity_error()
        try:
            device and torch.device(device)
        except (RuntimeError, ValueError, TypeError):  # the last two for text that is not UTF-8
            raise InputError(
                f"--device: {device!r} is no kind of device; such as cpu, cuda or cuda:0"
            ) from None
        return load_model(
            model, device, dtype, trust_remote_code=trust_remote_code, weights_bytes=weights_bytes
        )


def units_before_opening(model: str, trust_remote_code: bool, granularity: str) -> int | None:
    """The number of units of a model that is not open yet; None where its config does not surely
    say it."""
    from ..models.files import stated_depth

    depth = stated_depth(demo.MODEL_DIR if model == "demo" else Path(model))
    if depth is None or trust_remote_code:  # code of its own may make any number of layers
        return None
    return 2 * depth if granularity == "sublayer" else depth


def check_workers(workers: int | None, ray: str | None) -> None:
    """Raise InputError for workers of two kinds, or if Ray is missing or does not answer."""
    if ray is None:
        return
    if workers is not None:
        raise InputError(
            "--workers are processes of this machine, --ray those of a cluster; give one of them"
        )
    from ..workers.ray import check_address

    with naming("--ray"):
        check_address(ray)


def open_workers(workers: int | None, ray: str | None, model: Model) -> Workers | None:
    """Start the workers of evaluators. The machine's cores are divided among them as threads."""
    if ray is not None:
        from ..workers.ray import RayWorkers

        return RayWorkers(ray, model.device)
    if workers is None:
        return None
    if "OMP_NUM_THREADS" not in os.environ:
        import torch

        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // workers))
    return Processes(workers)


def check_calibration(model: str, objective: str, calibration: str | None) -> str:
    """The calibration file, before the model is loaded; the demo model's own if none is given."""
    check_one_of("--objective", objective, OBJECTIVES)
    if calibration is not None:
        return calibration
    if model != "demo":
        raise InputError("--calibration: name a file of text or questions to score on")
    return str(demo.QUESTIONS if OBJECTIVES[objective].data == "tasks" else demo.TEXT)


def check_held_out(
    calibration: str, held_out: str | None, judge: str, **options: Any
) -> str | None:
    """Choose the objective of held-out data; None without such data.

    `options` has the further options of held-out data, by the end of their names. Raises InputError
    for such an option without the data, and for data that the search reads.
    """
    if held_out is None:
        for name, value in options.items():
            if value is not None:
                raise InputError(f"--held-out-{name} is of held-out data; name it by --held-out")
        return None
    check_one_of("--held-out-objective", judge, OBJECTIVES)
    if held_out == calibration or Path(held_out).resolve() == Path(calibration).resolve():
        raise InputError(
            f"--held-out: {held_out} is the calibration data; name data that the search does not "
            "read"
        )
    if options["column"] is not None and OBJECTIVES[judge].data != "text":
        raise InputError(f"--held-out-column is of text; {judge} reads questions")
    return judge


def check_reading(objectives: Sequence[str], **reading: Any) -> dict[str, dict[str, Any]]:
    """The options for reading each objective's data, by its name, without missing ones.

    Raises InputError for an option of text if only questions are read, and the other way round.
    """
    options = {name: value for name, value in reading.items() if value is not None}
    kinds = {name: OBJECTIVES[name].data for name in objectives}
    for name in options:
        if _kind_read(name) not in kinds.values():
            own, read = ("text", "questions")[:: 1 if _kind_read(name) == "text" else -1]
            flag = f"--{name.replace('_', '-')}"
            raise InputError(f"{flag} is of {own}; {objectives[0]} reads {read}")
    return {
        objective: {name: value for name, value in options.items() if _kind_read(name) == kind}
        for objective, kind in kinds.items()
    }


def _kind_read(option: str) -> str:
    """The kind of data, text or tasks, to which an option of reading belongs."""
    return "tasks" if option in TASKS_READING else "text"


def check_normalization(
    objectives: Sequence[str], normalization: str | None
) -> dict[str, dict[str, str]]:
    """The settings of each objective. Raises InputError if no objective has this normalization."""
    settings: dict[str, dict[str, str]] = {name: {} for name in objectives}
    if normalization is None:
        return settings
    having = [name for name, known in OBJECTIVES.items() if "normalization" in known.settings]
    fitting = [name for name in objectives if name in having]
    if not fitting:
        raise InputError(f"--normalization is for {', '.join(having)}, not for {objectives[0]}")
    for name in fitting:
        check_one_of("--normalization", normalization, OBJECTIVES[name].settings["normalization"])
        settings[name] = {"normalization": normalization}
    return settings


def refuse_text_sizes(objectives: Iterable[str], seq_len: int | None, seed: int) -> None:
    """Raise InputError for options that cut text, if no objective is on text."""
    if any(OBJECTIVES[name].data == "text" for name in objectives):
        return
    for flag, given in (("--seq-len", seq_len is not None), ("--sample-seed", seed != 0)):
        if given:
            raise InputError(f"{flag} is of text; of questions, --num-samples says how many")
