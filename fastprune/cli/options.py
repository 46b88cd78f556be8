"""Options that several commands share, and their values."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from ..costs import Budget as RemovalBudget
from ..data import is_data
from ..engine.store import SumStore
from ..errors import InputError, shown
from ..masks import ALL, check_named, parse_removed
from ..objectives import OBJECTIVES, Perplexity
from ..search import PRESETS, check_budget
from ..validate import MOST, MOST_SEED, check_folder, check_one_of, check_path, refuse_existing
from ..workers.processes import MOST_WORKERS
from .output import decisions_noted

# Headings of help: the subjects of options.
MODEL, DATA, RUNNING, OUTPUT = "Model", "Data", "Running", "Output"


def group(*options: Callable, concern: str = "") -> Callable:
    """Make one decorator of several click options. Help lists them in this order.

    Args:
        options: The decorators of options.
        concern: The heading under which help lists them.
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
    """A command that spells the arguments of errors as its flags.

    It refuses an option that is given twice, unless the option is a list.
    """

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except InputError as error:
            raise InputError(self._spell(error)) from error

    def _spell(self, error: InputError) -> str:
        """The error's message with flags instead of arguments, and limits in the flags' units."""
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
        for parameter in order:
            single = isinstance(parameter, click.Option) and not (
                parameter.multiple or parameter.is_flag or parameter.count
            )
            if single and order.count(parameter) > 1:
                raise InputError(f"{parameter.opts[0]} is given twice")
        return super().parse_args(context, arguments)


class Known(click.Choice):
    """A choice whose error suggests the nearest name."""

    def convert(self, value: Any, parameter: Any, context: click.Context | None) -> Any:
        return check_one_of(parameter.opts[0], value, self.choices)


class Parsed(click.ParamType):
    """A value that a function makes of a text. Errors begin with the flag.

    Args:
        name: The kind of the value, for help.
        parse: The function.
        completes: The shell completes names of a "file" or a "dir"; None for other values.
    """

    def __init__(self, name: str, parse: Callable[[str], Any], completes: str | None = None):
        self.name, self._parse, self._completes = name, parse, completes

    def convert(self, value: Any, parameter: Any, context: click.Context | None) -> Any:
        argument = str(parameter.metavar or parameter.name).upper()
        with naming(parameter.opts[0] if isinstance(parameter, click.Option) else argument):
            return self._parse(value)

    def shell_complete(
        self, context: click.Context, parameter: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        return [CompletionItem(incomplete, type=self._completes)] if self._completes else []


class Budget(click.ParamType):
    """The number of units to remove: an integer, or a share such as 25%."""

    name = "integer or share"

    def convert(self, value: Any, parameter: Any, context: click.Context | None) -> Any:
        if "%" in value:
            try:
                check_budget(value)
            except InputError as error:
                raise InputError(error.message.replace("num_remove", parameter.opts[0])) from None
            return value.strip()
        return click.IntRange(0, MOST).convert(value, parameter, context)


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

    `known` is a function that returns the names.
    """

    name = "text"

    def __init__(self, known: Callable[[], Iterable[str]]):
        self.known = known

    def shell_complete(
        self, context: click.Context, parameter: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        return [CompletionItem(name) for name in self.known() if name.startswith(incomplete)]


@contextmanager
def naming(flag: str) -> Iterator[None]:
    """Errors raised inside begin with the name of their flag."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{flag}: {error}") from None
    except OSError as error:  # such as a folder without permission
        raise InputError(f"{flag}: {error.filename}: {error.strerror}") from None


def _units(text: str) -> tuple[int, ...] | str:
    return text if text.strip() == ALL else parse_removed(text)


def _protected(text: str) -> tuple[int, ...] | str:
    """Unit indices, or the name of a preset, whose units depend on the model."""
    if text in PRESETS:
        return text
    try:
        if text.strip() == ALL:
            raise InputError("with all units protected, none can go")
        return parse_removed(text)
    except InputError as error:
        raise InputError(f"{error}; or one of the presets {', '.join(PRESETS)}") from None


def _data_file(text: str) -> str:
    if not is_data(check_path(text)):
        raise InputError(f"{text}: no such file")
    return text


def check_store(text: str) -> str:
    """Return the path of a file that can be a store of scores; a missing file is not created."""
    path = Path(check_path(text))
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
        SumStore(path).close()
    return text


FILE_NAME = Parsed("text", check_path, completes="file")
DATA_FILE = Parsed("text", _data_file, completes="file")
NEW_FILE = Parsed("text", lambda text: refuse_existing(Path(check_path(text))), completes="file")
FOLDER = Parsed("folder", lambda text: check_folder(Path(check_path(text))), completes="dir")
STORE = Parsed("text", check_store, completes="file")
UNITS = Parsed("units", _units)  # as tables print them: 9,10 or 9-11 14
UNIT_SEQUENCE = Parsed("units", lambda text: check_named(parse_removed(text)))
PROTECTED = Parsed("units or preset", _protected)
COST_BUDGET = Parsed("kind=amount", RemovalBudget.parse)  # the most that the pruned model may have

model_settings = group(
    click.option(
        "--device", help="Device to run on, such as cpu or cuda:0. Default: a GPU if there is one."
    ),
    click.option(
        "--dtype",
        type=Known(["float32", "bfloat16", "float16", "float64"]),
        help="Precision of the weights. Default: the checkpoint's own, or float32 if the CPU "
        "has no instructions for that. `export` keeps the checkpoint's own.",
    ),
    click.option(
        "--trust-remote-code",
        is_flag=True,
        help="Run model code that comes with a hub repository.",
    ),
    concern=MODEL,
)

model_options = group(click.argument("model", type=FILE_NAME), model_settings)

running_settings = group(
    click.option(
        "--granularity",
        type=Known(["block", "sublayer"]),
        default="block",
        show_default=True,
        help="Kind of a unit: a block, or a sublayer, which is the attention (unit 2i) or the "
        "MLP (unit 2i + 1) of a block.",
    ),
    click.option(
        "--backend",
        type=Known(["auto", "generic", "fused"]),
        default="auto",
        show_default=True,
        help="Code that runs the model: generic is transformers' own, fused has fused "
        "operators for Llama-like models, auto takes the faster.",
    ),
    click.option(
        "--memory-gb",
        "memory_bytes",
        type=float,
        callback=_to_bytes,
        help="Limit in GiB of one call's activations. Default: 4 on a CPU, 16 on a GPU.",
    ),
    concern=RUNNING,
)

weights_option = group(
    click.option(
        "--weights-gb",
        "weights_bytes",
        type=float,
        callback=_to_bytes,
        help="Limit in GiB of the weights that are loaded at once, for a model larger than "
        "memory. Bands of blocks are read from their files, the next one while one "
        "computes. Default: all weights stay loaded.",
    ),
    concern=RUNNING,
)

workers_options = group(
    click.option(
        "--workers",
        type=click.IntRange(1, MOST_WORKERS),
        help="Number of processes on this machine that share the work, each with the model. "
        "Each gets an equal part of the cores as threads, unless OMP_NUM_THREADS sets "
        "their number.",
    ),
    click.option(
        "--ray",
        metavar="ADDRESS",
        help="Share the work by Ray at this address: local for this machine, auto for the "
        "cluster that it belongs to, or HOST:PORT.",
    ),
    concern=RUNNING,
)

racing_option = click.option(
    "--racing",
    type=float,
    help="Drop clearly worse candidates early, at this confidence (e.g. 0.99). Races "
    "assume that a mean of paired differences, corrected for skewness to first order,"
    " is t distributed. They also assume that at most one in 200 of the samples not "
    "seen (at least one) is an outlier, none larger than the range of the losses "
    "seen.",
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
        help="Show decisions on stderr: the samples drawn and how they are cut, races, "
        "fallbacks. -vv shows every call, too.",
    ),
    concern=OUTPUT,
)

data_settings = group(
    click.option(
        "--num-samples",
        type=click.IntRange(1, MOST),
        help="Number of text samples (default 64, or all of a shorter text) or of questions "
        "(default all).",
    ),
    click.option(
        "--seq-len",
        type=click.IntRange(2, MOST),
        help="Tokens of a text sample. Default: 2048, or as many as the model can take; 256 "
        "for the demo model's own text.",
    ),
    click.option(
        "--sample-seed",
        type=click.IntRange(0, MOST_SEED),
        default=0,
        show_default=True,
        help="Seed by which the windows of a text are drawn.",
    ),
    concern=DATA,
)

cache_settings = group(
    click.option(
        "--cache-gb",
        "cache_bytes",
        type=float,
        callback=_to_bytes,
        help="Limit in GiB of the prefix cache, which keeps states for later calls; 0 for no "
        "cache. Default: a quarter of the free memory.",
    ),
    click.option(
        "--cache-dir",
        type=FOLDER,
        help="Folder on a fast disk for states that do not fit into memory. They are deleted "
        "when the process ends.",
    ),
    concern=RUNNING,
)

evaluator_settings = group(
    data_settings, running_settings, weights_option, cache_settings, workers_options, output_options
)

store_option = group(
    click.option(
        "--store",
        type=STORE,
        help="File that keeps finished sums. A sum in it is not computed again.",
    ),
    concern=RUNNING,
)

objective_options = group(
    click.option(
        "--objective",
        type=Name(lambda: OBJECTIVES),
        default=Perplexity.name,
        show_default=True,
        help=f"Objective to score by: one of {', '.join(OBJECTIVES)}.",
    ),
    click.option(
        "--calibration",
        type=DATA_FILE,
        help="Text, chats or questions to score on: a .txt, .jsonl, .json, .csv or .parquet file, "
        "also as .gz or .zst; a data set folder, or one of the hub as NAME:CONFIG:SPLIT. The demo "
        "model has its own.",
    ),
    click.option(
        "--bos/--no-bos",
        default=None,
        help="Begin each window of text with the token that begins a text. Default: if the "
        "tokenizer puts one before a text, except for the demo model's own text.",
    ),
    click.option("--column", help="Field of a row that holds the text. Default: text."),
    click.option(
        "--chat-template",
        help="File of a chat template, or the name of one of the tokenizer's, for rows of messages "
        "or of prompt and completion. Default: the tokenizer's own.",
    ),
    click.option(
        "--loss-on",
        type=Known(["completion", "all"]),
        help="Tokens of a chat that count: those of its last answer (completion, the default),"
        " or all.",
    ),
    click.option(
        "--delimiter",
        help="Text between prompt and choice. The length of a choice does not include it. "
        "Default: a space.",
    ),
    click.option(
        "--normalization",
        type=Known(["sum", "mean", "characters", "bytes"]),
        help="Divide a choice's log-likelihood by its tokens (mean), characters or bytes, or "
        "by nothing (sum). accuracy takes sum (acc, default), characters (acc_norm), "
        "bytes (acc_bytes) and mean; margin and likelihood take mean (default) and sum.",
    ),
    store_option,
    concern=DATA,
)


held_out_options = group(
    click.option(
        "--held-out",
        type=DATA_FILE,
        help="Text or questions that the search does not read, in the forms of --calibration. "
        "The result is compared with the whole model on them. Options that say how data "
        "is read apply to both.",
    ),
    click.option(
        "--held-out-objective",
        type=Name(lambda: OBJECTIVES),
        help="Objective on the held-out data. Default: --objective.",
    ),
    click.option(
        "--held-out-samples",
        type=click.IntRange(1, MOST),
        help="Number of held-out text samples (default 64, or all of a shorter text) or of "
        "questions (default all).",
    ),
    click.option(
        "--held-out-column", help="Field of a held-out row that holds the text. Default: --column."
    ),
    concern=DATA,
)


def split_options(texts: Sequence[str]) -> dict[str, str]:
    """Split NAME=VALUEs, by name. Raises InputError for a repeated name."""
    options: dict[str, str] = {}
    for text in texts:
        name, equals, value = (part.strip() for part in text.partition("="))
        if not equals:
            raise InputError(f"--option takes NAME=VALUE, such as beam_width=5, not {text!r}")
        name = name.replace("-", "_")
        if name in options:
            raise InputError(
                f"--option: {name} is given twice, as {options[name]!r} and as {value!r}"
            )
        options[name] = value
    return options
