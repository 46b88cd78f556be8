"""Options that several commands share, and how they become models, objectives and evaluators."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from ..costs import Budget as RemovalBudget
from ..data import TASKS_READING
from ..errors import InputError, shown
from ..masks import ALL, parse_removed
from ..objectives import OBJECTIVES, Objective, Perplexity
from ..plan.progress import ProgressCallback
from ..validate import check_folder, check_one_of, check_path
from ..workers.processes import MOST_WORKERS, Processes, Workers
from .output import decisions_noted, note

if TYPE_CHECKING:
    from ..evaluator import Backend, Evaluator
    from ..models import Granularity, Model

MOST = 2**31 - 1  # of any count
MOST_SEED = 2**63 - 1

# Headings of help: the subjects of options.
MODEL, DATA, RUNNING, OUTPUT = "Model", "Data", "Running", "Output"


def group(*options: Callable, concern: str = "") -> Callable:
    """One decorator for several click options, listed in help in the order given.

    concern: the heading that help lists them under.
    """

    def decorate(command: Any) -> Callable:
        for option in reversed(options):
            command = option(command)
            own = command.__click_params__[-1]
            if concern and isinstance(own, click.Option) and not hasattr(own, "concern"):
                own.concern = concern  # type: ignore[attr-defined]
        return command

    return decorate


def _to_bytes(
    context: click.Context, parameter: click.Parameter, gigabytes: float | None
) -> int | None:
    if gigabytes is None or (gigabytes == 0 and parameter.name == "cache_bytes"):
        return gigabytes if gigabytes is None else 0
    if not 2**-30 <= gigabytes <= 2**20:
        raise InputError(
            f"{parameter.opts[0]} must be above 0 and at most {2**20}, not {gigabytes}"
        )
    return int(gigabytes * 2**30)


class Command(click.Command):
    """A command that spells the arguments of errors as its flags, and takes no option twice except
    lists: the last would win unseen."""

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except InputError as error:
            raise InputError(self._spell(error)) from error

    def _spell(self, error: InputError) -> str:
        """The error's message with flags in the place of arguments, and limits in their units."""
        options = {own.name: own for own in self.params if isinstance(own, click.Option)}
        message = error.message
        if error.argument in options:
            option = options[error.argument]
            flag, rest = option.opts[0], message.removeprefix(error.argument)
            message = f"{flag}: {message}" if rest == message else f"{flag}{rest}"
            if option.callback is _to_bytes and error.least is not None:
                message += f" ({flag} {math.ceil(error.least / 2**30 * 1e6) / 1e6:.6f})"
        flags = {name: options[name].opts[0] for name in error.fits if name in options}
        fits = [f"{flags.get(name, name)} {value}" for name, value in error.fits.items()]
        return f"{message}; what fits: {' or '.join(fits)}" if fits else message

    def format_options(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        """List the options under their concerns, the command's own first."""
        concerns: dict[str, list[tuple[str, str]]] = {"Options": []}
        for option in self.get_params(context):
            record = option.get_help_record(context)
            if record is not None and isinstance(option, click.Option):
                concerns.setdefault(getattr(option, "concern", "Options"), []).append(record)
        for concern, records in concerns.items():
            if records:
                with formatter.section(concern):
                    formatter.write_dl(records)

    def parse_args(self, context: click.Context, arguments: list[str]) -> list[str]:
        *_, order = self.make_parser(context).parse_args(args=list(arguments))
        for given in order:
            single = isinstance(given, click.Option) and not (
                given.multiple or given.is_flag or given.count
            )
            if single and order.count(given) > 1:
                raise InputError(f"{given.opts[0]} is given twice")
        return super().parse_args(context, arguments)


class Known(click.Choice):
    """A choice whose error suggests the nearest name."""

    def convert(self, value: Any, parameter: Any, context: click.Context | None) -> Any:
        return check_one_of(parameter.opts[0], value, self.choices)


class Units(click.ParamType):
    """Unit indices as tables print them: 9,10 or 9-11 14."""

    name = "units"

    def convert(self, value: Any, parameter: Any, context: click.Context | None) -> Any:
        if isinstance(value, tuple) or value.strip() == ALL:
            return value
        with naming(parameter.opts[0]):
            return parse_removed(value)


class Budget(click.ParamType):
    """How many units to remove: an integer, or a share of them such as 25%."""

    name = "integer or share"

    def convert(self, value: Any, parameter: Any, context: click.Context | None) -> Any:
        from ..search import check_budget

        if "%" in value:
            try:
                check_budget(value)
            except InputError as error:
                raise InputError(error.message.replace("num_remove", parameter.opts[0])) from None
            return value.strip()
        return click.IntRange(0, MOST).convert(value, parameter, context)


class CostBudget(click.ParamType):
    """The most that the pruned model may have, as KIND=AMOUNT."""

    name = "kind=amount"

    def convert(self, value: Any, parameter: Any, context: click.Context | None) -> Any:
        with naming(parameter.opts[0]):
            return RemovalBudget.parse(value)


class LossIncrease(click.ParamType):
    """A loss, or an increase over the whole model's loss such as +5%."""

    name = "loss or increase"

    def convert(self, value: Any, parameter: Any, context: click.Context | None) -> Any:
        text = value.strip()
        number = text.removeprefix("+").removesuffix("%")
        is_share = text.startswith("+") and text.endswith("%")
        try:
            amount = float(number)
        except ValueError:
            amount = math.nan
        if not math.isfinite(amount) or (is_share and amount < 0) or ("%" in text) != is_share:
            raise InputError(
                f"{parameter.opts[0]} must be an increase over the whole model's loss such as +5%, "
                f"or a loss such as 2.5, not {shown(value)}"
            )
        return f"+{number}%" if is_share else number


class Name(click.ParamType):
    """A name that the shell completes; the command itself checks it.

    known: gives the names, when they are asked for.
    """

    name = "text"

    def __init__(self, known: Callable[[], Iterable[str]]):
        self.known = known

    def shell_complete(
        self, context: click.Context, parameter: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        return [CompletionItem(name) for name in self.known() if name.startswith(incomplete)]


def algorithm_names() -> list[str]:
    from ..search import known_algorithms

    return list(known_algorithms())


class Protected(Units):
    """Unit indices, or the name of a preset, whose units are known once the model is."""

    name = "units or preset"

    def convert(self, value: Any, parameter: Any, context: click.Context | None) -> Any:
        from ..search import PRESETS

        if value in PRESETS:
            return value
        try:
            if value.strip() == ALL:
                raise InputError(f"{parameter.opts[0]}: with all units protected, none can go")
            return super().convert(value, parameter, context)
        except InputError as error:
            raise InputError(f"{error}; or one of the presets {', '.join(PRESETS)}") from None


class FileName(click.ParamType):
    """The path of a file or a folder, as text that the file system can take."""

    name = "text"

    def convert(self, value: Any, parameter: Any, context: click.Context | None) -> Any:
        argument = str(parameter.metavar or parameter.name).upper()
        with naming(parameter.opts[0] if isinstance(parameter, click.Option) else argument):
            return check_path(value)

    def shell_complete(
        self, context: click.Context, parameter: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        return [CompletionItem(incomplete, type="file")]


class Folder(click.ParamType):
    """A folder that can be written to, or be made."""

    name = "folder"

    def convert(self, value: Any, parameter: Any, context: click.Context | None) -> Any:
        with naming(parameter.opts[0]):
            return check_folder(Path(check_path(value)))

    def shell_complete(
        self, context: click.Context, parameter: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        return [CompletionItem(incomplete, type="dir")]


@contextmanager
def naming(flag: str) -> Iterator[None]:
    """Errors raised inside begin with the name of their flag."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{flag}: {error}") from None
    except OSError as error:  # a place that must not be looked at, for one
        raise InputError(f"{flag}: {error.filename}: {error.strerror}") from None


model_settings = group(
    click.option("--device", help="Such as cpu or cuda:0; default: a GPU where there is one."),
    click.option(
        "--dtype",
        type=Known(["float32", "bfloat16", "float16", "float64"]),
        help="Default: the checkpoint's own, or float32 where a CPU has no instructions for it. "
        "Exports keep its own.",
    ),
    click.option(
        "--trust-remote-code",
        is_flag=True,
        help="Run model code that a hub repository brings along.",
    ),
    concern=MODEL,
)

model_options = group(click.argument("model", type=FileName()), model_settings)

running_settings = group(
    click.option(
        "--granularity",
        type=Known(["block", "sublayer"]),
        default="block",
        show_default=True,
        help="What a unit is: a block, or its attention (unit 2i) and its MLP (unit 2i + 1).",
    ),
    click.option(
        "--backend",
        type=Known(["auto", "generic", "fused"]),
        default="auto",
        show_default=True,
        help="generic: transformers' own code; fused: fused operators for Llama-like models; "
        "auto: the faster.",
    ),
    click.option(
        "--memory-gb",
        "memory_bytes",
        type=float,
        callback=_to_bytes,
        help="Budget of one call's activations in GiB; default 4 on a CPU, 16 on a GPU.",
    ),
    concern=RUNNING,
)

weights_option = group(
    click.option(
        "--weights-gb",
        "weights_bytes",
        type=float,
        callback=_to_bytes,
        help="For a model larger than memory: GiB of weights that may be loaded at once; blocks "
        "are read from their files a band at a time, while the band before computes. Default: all "
        "stay loaded.",
    ),
    concern=RUNNING,
)

workers_options = group(
    click.option(
        "--workers",
        type=click.IntRange(1, MOST_WORKERS),
        help="Processes of this machine that share the work, each with the model. Its cores are "
        "shared out as "
        "threads, unless OMP_NUM_THREADS says how many each has.",
    ),
    click.option(
        "--ray",
        metavar="ADDRESS",
        help="Share the work by Ray: local for this machine, auto for the cluster that it belongs "
        "to, or HOST:PORT.",
    ),
    concern=RUNNING,
)

racing_option = click.option(
    "--racing",
    type=float,
    help="Drop clearly worse candidates early, at this confidence (e.g. 0.99). It assumes that a "
    "paired mean difference, corrected for skewness to first order, is t distributed, and that of "
    "the samples not seen at most one in 200 (at least one) is an outlier, none larger than the "
    "range of the losses seen.",
)

json_option = group(
    click.option(
        "--json", "as_json", is_flag=True, help="Print one JSON document instead of tables."
    ),
    concern=OUTPUT,
)


def _note_decisions(context: click.Context, parameter: click.Parameter, verbosity: int) -> None:
    context.with_resource(decisions_noted(verbosity))


output_options = group(
    click.option("--quiet", is_flag=True, help="Show no progress."),
    click.option(
        "-v",
        "--verbose",
        count=True,
        expose_value=False,
        callback=_note_decisions,
        help="Show decisions on stderr: which samples are drawn, how they are cut, races, "
        "fallbacks; -vv: every call.",
    ),
    concern=OUTPUT,
)

data_settings = group(
    click.option(
        "--num-samples",
        type=click.IntRange(1, MOST),
        help="Text samples (default 64, or all of a shorter text) or questions (default all).",
    ),
    click.option(
        "--seq-len",
        type=click.IntRange(2, MOST),
        help="Tokens of a text sample; default 2048, or what the model can take (256 for the demo "
        "model's own text).",
    ),
    click.option(
        "--sample-seed",
        type=click.IntRange(0, MOST_SEED),
        default=0,
        show_default=True,
        help="Which windows of a text are drawn.",
    ),
    concern=DATA,
)

cache_settings = group(
    click.option(
        "--cache-gb",
        "cache_bytes",
        type=float,
        callback=_to_bytes,
        help="Budget in GiB of the prefix cache, states that later calls need not run again; 0 "
        "for none; default a "
        "quarter of the free memory.",
    ),
    click.option(
        "--cache-dir",
        type=Folder(),
        help="A folder on a fast disk for states that do not fit into memory, gone with the "
        "process.",
    ),
    concern=RUNNING,
)

evaluator_settings = group(
    data_settings, running_settings, weights_option, cache_settings, workers_options, output_options
)

store_option = group(
    click.option(
        "--store",
        type=FileName(),
        callback=lambda context, parameter, value: _check_store(value),
        help="File of finished sums; what is in it is not computed again, and what is finished is "
        "kept.",
    ),
    concern=RUNNING,
)

_objective_options = group(
    click.option(
        "--objective",
        type=Name(lambda: OBJECTIVES),
        default=Perplexity.name,
        show_default=True,
        help=f"One of {', '.join(OBJECTIVES)}.",
    ),
    click.option(
        "--calibration",
        type=FileName(),
        help="Text, chats or questions to score on: a .txt, .jsonl, .json, .csv or .parquet file, "
        "also as .gz or .zst; a data set folder, or one of the hub as NAME:CONFIG:SPLIT. The demo "
        "model has its own.",
    ),
    click.option(
        "--bos/--no-bos",
        default=None,
        help="Begin each window of text with the token that begins a text. Default: where the "
        "tokenizer puts one before a text; the demo model's own text keeps its windows.",
    ),
    click.option("--column", help="The field of a row that holds the text; default text."),
    click.option(
        "--chat-template",
        help="File of a chat template, or the name of one of the tokenizer's, for rows of messages "
        "or of prompt and completion. Default: the tokenizer's own.",
    ),
    click.option(
        "--loss-on",
        type=Known(["completion", "all"]),
        help="The tokens of a chat that count: those of its last answer (default), or all.",
    ),
    click.option(
        "--delimiter",
        help="Text between prompt and choice, no part of a choice's length; default a space.",
    ),
    click.option(
        "--normalization",
        type=Known(["sum", "mean", "characters", "bytes"]),
        help="Divide a choice's log-likelihood by nothing, its tokens, characters or bytes. "
        "accuracy: sum (acc, default), characters (acc_norm), bytes (acc_bytes), mean; margin and "
        "likelihood: mean (default), sum.",
    ),
    store_option,
    concern=DATA,
)


held_out_options = group(
    click.option(
        "--held-out",
        type=FileName(),
        help="Text or questions that the search does not read, in the forms of --calibration. The "
        "result is judged on it beside the whole model. The options of reading are for both.",
    ),
    click.option(
        "--held-out-objective",
        type=Name(lambda: OBJECTIVES),
        help="The objective that judges; default: the search's.",
    ),
    click.option(
        "--held-out-samples",
        type=click.IntRange(1, MOST),
        help="Text samples (default 64, or all of a shorter text) or questions (default all).",
    ),
    click.option(
        "--held-out-column", help="The field of a row that holds the text; default: --column."
    ),
    concern=DATA,
)


def _check_store(store: str | None) -> str | None:
    if store:
        with naming("--store"):
            check_store(Path(store))
    return store


def check_store(path: Path) -> None:
    """Raise InputError for a file that cannot be a store of scores; a missing file is not
    created."""
    folder = path.parent
    if not folder.is_dir():
        raise InputError(f"{path}: its folder does not exist")
    if path.exists() and not path.is_file():
        raise InputError(f"{path}: is not a file; name a file for the store of scores")
    # SQLite writes beside its file, too
    for place, access in ((folder, os.W_OK | os.X_OK), (path, os.R_OK | os.W_OK)):
        if place.exists() and not os.access(place, access):
            raise InputError(f"{path}: {place} cannot be written to")
    if path.exists() and path.stat().st_size:
        from ..engine.store import SumStore

        SumStore(path).close()


def check_gradients(algorithms: Iterable[str], objective: str, label: str | None = None) -> None:
    """Raise InputError for an algorithm on the gradients of an objective that has none."""
    from ..search import find_algorithm

    for name in algorithms:
        if find_algorithm(name).needs_gradients and not OBJECTIVES[objective].differentiable:
            raise InputError(
                f"{name} needs gradients, which the objective {label or objective!r} has not; "
                f"take {', '.join(n for n, o in OBJECTIVES.items() if o.differentiable)}, or "
                f"another algorithm"
            )


@dataclass(frozen=True)
class Data:
    """Data to score on, as options name it.

    flag: of its file. reading: further arguments of the loader. settings: of the objective.
    spelled: the options that other data has names of its own for, by those of the calibration data.
    """

    flag: str
    objective: str
    file: str
    num_samples: int | None
    seq_len: int | None
    seed: int
    reading: Mapping[str, Any]
    settings: Mapping[str, Any]
    spelled: Mapping[str, str] = field(default_factory=dict)

    def open(self, model: Model) -> Objective:
        """The objective on this data."""
        try:
            return open_objective(
                self.objective,
                self.file,
                self.num_samples,
                self.seq_len,
                self.seed,
                model,
                self.reading,
                self.settings,
                title=self.flag.removeprefix("--"),
            )
        except InputError as error:
            if not self.spelled:
                raise
            fits = {self.spelled.get(name, name): value for name, value in error.fits.items()}
            raise InputError(f"{self.flag}: {error.message}", fits=fits) from error


class MakeEvaluator:
    """Makes the evaluators of a command from its options; they share the store and the workers.

    data: of the calibration. held_out: of data that judges the result, if the command has some.
    opening: arguments of `open_model`. options: of `Evaluator`. store: its file.
    """

    def __init__(
        self,
        data: Data,
        held_out: Data | None,
        opening: Sequence[Any],
        options: Mapping[str, Any],
        store: str | None,
        workers: int | None,
        ray: str | None,
    ):
        self.data, self.held_out = data, held_out
        self._opening, self._options = opening, dict(options)
        self.store, self._workers, self._ray = store, workers, ray

    def __call__(self, progress: ProgressCallback | None) -> Evaluator:
        """The evaluator on the calibration data, of the model, which it opens."""
        opened = open_model(*self._opening)
        objective = self.data.open(opened)
        self._options["workers"] = open_workers(self._workers, self._ray, opened)
        if self.store is not None:
            from ..engine.store import SumStore

            self._options["store"] = SumStore(self.store)
        return self.on(opened, objective, progress)

    def on(
        self, model: Model, objective: Objective, progress: ProgressCallback | None
    ) -> Evaluator:
        """An evaluator of an open model, on other data."""
        from ..evaluator import Evaluator

        return Evaluator(model, objective, **self._options, progress=progress)


def evaluates(command: Callable) -> Callable:
    """Give a command the shared options, and as its first argument the `MakeEvaluator` that they
    describe."""

    @model_options
    @_objective_options
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
        names = [objective, *[judge] * (judge is not None)]
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
        sizes = (seq_len, sample_seed)
        data = Data(
            *("--calibration", objective, calibration, num_samples, *sizes),
            *(reading[objective], settings[objective]),
        )
        unseen = None
        if held_out is not None and judge is not None:
            own_column = {} if held_out_column is None else {"column": held_out_column}
            unseen = Data(
                *("--held-out", judge, held_out, held_out_samples, *sizes),
                *(reading[judge] | own_column, settings[judge]),
                spelled={"num_samples": "held_out_samples", "column": "held_out_column"},
            )
        options = {
            "backend": backend,
            "granularity": granularity,
            "memory_bytes": memory_bytes,
            "cache_bytes": cache_bytes,
            "cache_dir": cache_dir,
        }
        opening = (model, device, dtype, trust_remote_code, weights_bytes)
        make = MakeEvaluator(data, unseen, opening, options, store, workers, ray)
        return command(make, **own)

    return wrapped


def open_model(
    model: str,
    device: str | None = None,
    dtype: str | None = None,
    trust_remote_code: bool = False,
    weights_bytes: int | None = None,
) -> Model:
    import torch
    from transformers.utils import logging

    from ..models import load_model
    from ..models.imports import import_transformers

    import_transformers()

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        device and torch.device(device)
    except (RuntimeError, ValueError, TypeError):  # the last two of text not in UTF-8
        raise InputError(
            f"--device: {device!r} is no kind of device; such as cpu, cuda or cuda:0"
        ) from None
    return load_model(
        model, device, dtype, trust_remote_code=trust_remote_code, weights_bytes=weights_bytes
    )


def check_workers(workers: int | None, ray: str | None) -> None:
    """Raise InputError for workers of two kinds, and for a Ray not installed or not answering."""
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
    """Workers of evaluators, started. The cores of this machine are shared out as threads over its
    processes."""
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
    from .. import demo

    check_one_of("--objective", objective, OBJECTIVES)
    if calibration is None and model == "demo":
        return str(demo.QUESTIONS if OBJECTIVES[objective].data == "tasks" else demo.TEXT)
    if calibration is None:
        raise InputError("--calibration: name a file of text or questions to score on")
    from ..data import is_data

    with naming("--calibration"):
        if not is_data(check_path(calibration)):
            raise InputError(f"{calibration}: no such file")
    return calibration


def open_objective(
    name: str,
    calibration: str,
    num_samples: int | None,
    seq_len: int | None,
    seed: int,
    model: Model,
    reading: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    title: str = "calibration",
) -> Objective:
    """The objective on its calibration data. Text gets the defaults of the field, 64 samples of
    2048 tokens, and the demo's own text its own. `reading`: further arguments of the loader;
    `settings`: of the objective; `title`: of the line that says which form the data has."""
    from .. import demo
    from ..data import load_tasks, load_text

    file = Path(calibration).name
    kind: Any = OBJECTIVES[name]
    make: Callable[[Any], Objective] = functools.partial(kind, **settings or {})
    if OBJECTIVES[name].data == "tasks":
        tasks = load_tasks(calibration, model.tokenizer, limit=num_samples, **reading or {})
        if num_samples is not None and tasks.num_questions < num_samples:
            raise InputError(
                f"{calibration}: holds {tasks.num_questions} questions, but {num_samples} samples "
                f"were asked for",
                fits={"num_samples": tasks.num_questions},
            )
        if tasks.source != calibration:
            note(f"{title}: {tasks.source}")
        objective = make(tasks)
        objective.source = file if num_samples is None else f"{file}, the first questions"
        return objective
    reading = dict(reading or {})
    is_demo = Path(calibration).resolve().parent == demo.TEXT.parent  # however its path is written
    if is_demo:  # its model was trained on windows that begin anywhere
        reading.setdefault("bos", False)
    if seq_len is None and Path(calibration).suffix not in (".npy", ".safetensors"):
        seq_len = demo.WINDOW if is_demo else min(2048, model.max_positions or 2048)
    if seq_len is not None and model.max_positions and seq_len > model.max_positions:
        raise InputError(
            f"seq_len {seq_len} is longer than the model's {model.max_positions} positions",
            argument="seq_len",
            most=model.max_positions,
        )
    batch = load_text(calibration, model.tokenizer, num_samples, seq_len, seed, **reading)
    if batch.source != calibration:
        note(f"{title}: {batch.source}")
    objective = make(batch)
    objective.source = f"{batch.source}, drawn by seed {seed}"
    return objective


def check_held_out(
    calibration: str, held_out: str | None, judge: str, **options: Any
) -> str | None:
    """The objective of held-out data, None without such data.

    options: the further options of held-out data, by the end of their names. Raises InputError for
    one of these without the data, and for data that the search reads.
    """
    if held_out is None:
        for name, value in options.items():
            if value is not None:
                raise InputError(f"--held-out-{name} is of held-out data; name it by --held-out")
        return None
    check_one_of("--held-out-objective", judge, OBJECTIVES)
    from ..data import is_data

    with naming("--held-out"):
        if not is_data(check_path(held_out)):
            raise InputError(f"{held_out}: no such file")
    if held_out == calibration or Path(held_out).resolve() == Path(calibration).resolve():
        raise InputError(
            f"--held-out: {held_out} is the calibration data; name data that the search does not "
            "read"
        )
    if options["column"] is not None and OBJECTIVES[judge].data != "text":
        raise InputError(f"--held-out-column is of text; {judge} reads questions")
    return judge


def check_reading(objectives: Sequence[str], **reading: Any) -> dict[str, dict[str, Any]]:
    """By objective, the options for reading its data, less those not given. Raises InputError for
    one of text if only questions are read, and the other way round."""
    given = {name: value for name, value in reading.items() if value is not None}
    kinds = {name: OBJECTIVES[name].data for name in objectives}
    for name in given:
        if _kind_read(name) not in kinds.values():
            own, read = ("text", "questions")[:: 1 if _kind_read(name) == "text" else -1]
            flag = f"--{name.replace('_', '-')}"
            raise InputError(f"{flag} is of {own}; {objectives[0]} reads {read}")
    return {
        objective: {name: value for name, value in given.items() if _kind_read(name) == kind}
        for objective, kind in kinds.items()
    }


def _kind_read(option: str) -> str:
    """The kind of data that an option of reading is about."""
    return "tasks" if option in TASKS_READING else "text"


def check_normalization(
    objectives: Sequence[str], normalization: str | None
) -> dict[str, dict[str, str]]:
    """By objective, its settings. Raises InputError where none can be normalised so."""
    allowed = {name: OBJECTIVES[name].settings.get("normalization") for name in objectives}
    if normalization is not None and not any(allowed.values()):
        having = [name for name, of in OBJECTIVES.items() if "normalization" in of.settings]
        raise InputError(f"--normalization is for {', '.join(having)}, not for {objectives[0]}")
    settings: dict[str, dict[str, str]] = {name: {} for name in objectives}
    for name, values in allowed.items():
        if normalization is not None and values:
            check_one_of("--normalization", normalization, values)
            settings[name] = {"normalization": normalization}
    return settings


def refuse_text_sizes(objectives: Iterable[str], seq_len: int | None, seed: int) -> None:
    """Raise InputError for options that cut text, if no objective is on text."""
    if any(OBJECTIVES[name].data == "text" for name in objectives):
        return
    for flag, given in (("--seq-len", seq_len is not None), ("--sample-seed", seed != 0)):
        if given:
            raise InputError(f"{flag} is of text; of questions, --num-samples says how many")


def _split_option(text: str) -> tuple[str, str]:
    """NAME=VALUE as its two parts."""
    name, equals, value = text.partition("=")
    if not equals:
        raise InputError(f"--option takes NAME=VALUE, such as beam_width=5, not {text!r}")
    return name.strip().replace("-", "_"), value.strip()


def split_options(texts: Sequence[str]) -> dict[str, str]:
    """NAME=VALUEs by their names. Raises InputError for one given twice."""
    found: dict[str, str] = {}
    for text in texts:
        name, value = _split_option(text)
        if name in found:
            raise InputError(
                f"--option: {name} is given twice, as {found[name]!r} and as {value!r}"
            )
        found[name] = value
    return found
