"""The command line: demo, info, env, algorithms, score, search, study, eval, export, store.

Exit status: 0 done, 1 the run failed, 2 the arguments or the files were wrong, 130 interrupted, 143
terminated. An error is one line, and so is a warning.
"""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import click
from click.shell_completion import get_completion_class, shell_complete

from .. import __version__
from ..engine.store import holds_sums
from ..errors import InputError, word_and_status
from ..study.folder import STORE
from . import commands, environment, evaluation, search, stores, studies
from .output import cannot_print, is_of_printing, note, prepare_streams

# Threads that wait at a barrier spin by default. If another process takes a core, a spinning thread
# blocks the thread for which it waits, and the work takes twenty times as long.
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")

LONGEST = 400  # characters of the line of an error or a warning
COMPLETE = "_FASTPRUNE_COMPLETE"  # set by the shell that asks for completions


def main() -> None:
    """Run the command line; every error becomes one line and an exit status."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not any(name in os.environ for name in WAITING):  # before torch is imported, which reads it
        os.environ["OMP_WAIT_POLICY"] = "passive"
    prepare_streams()
    warnings.showwarning = _show_warning
    if instruction := os.environ.get(COMPLETE):
        sys.exit(shell_complete(cli, {}, "fastprune", COMPLETE, instruction))
    try:
        # not cli.main, which treats every broken pipe as a reader that closed, and gives status 1
        with cli.make_context("fastprune", sys.argv[1:]) as context:
            cli.invoke(context)
        sys.exit(0)
    except click.exceptions.Exit as done:  # --help and --version
        sys.exit(done.exit_code)
    except InputError as error:
        _fail(str(error), 2)
    except click.ClickException as error:  # 2 of wrong arguments, else 1
        _fail(error.format_message(), error.exit_code)
    except (KeyboardInterrupt, click.Abort) as error:
        with suppress(ValueError):  # only the main thread can handle signals
            for number in (signal.SIGINT, signal.SIGTERM):  # ending the workers may take seconds
                signal.signal(number, _end_at_once)
        word, status = word_and_status(error)
        _fail(f"{word}; {_how_to_continue(sys.argv[1:])}", status)
    except Exception as error:
        if is_of_printing(error):
            sys.exit(0) if isinstance(error, BrokenPipeError) else _fail(cannot_print(error), 1)
        if isinstance(error, PermissionError):
            _fail(f"{error.filename}: {error.strerror}", 2)
        if os.environ.get("FASTPRUNE_TRACEBACK"):
            raise
        _fail(f"{type(error).__name__}: {error} (FASTPRUNE_TRACEBACK=1 shows where)", 1)


def _how_to_continue(arguments: Sequence[str]) -> str:
    """The end of the line after Ctrl-C or SIGTERM: the files that keep finished work, and the way
    to continue."""
    command, *rest = arguments or [""]
    if command == "study" or (command == "demo" and _value_of("--files", rest) is None):
        folder = Path(_value_of("--out", rest) or studies.demo_folder("--quick" in rest))
        if holds_sums(folder / STORE):
            return (
                f"{folder} keeps all finished searches and sums; the same command continues there"
            )
        return "no sum was finished; the same command begins again"
    if command in ("score", "search", "eval"):
        if store := _value_of("--store", rest):
            if holds_sums(store):
                return f"{store} keeps all finished sums; the same command continues from them"
            return "no sum was finished; the same command begins again"
        return "nothing is kept; with --store FILE the same command would continue"
    if command == "export":
        return "nothing is written; the same command begins again"
    if command == "store":
        return "the store is whole; the same command begins again"
    return "nothing is kept; the same command begins again"


def _value_of(flag: str, arguments: Sequence[str]) -> str | None:
    """The value of an option, as --flag VALUE or --flag=VALUE."""
    for argument, following in zip(arguments, [*arguments[1:], ""]):
        name, equals, value = argument.partition("=")
        if name == flag:
            return value if equals else following
    return None


def _end_at_once(number: int, frame: object = None) -> None:
    """Handle a second Ctrl-C or SIGTERM during the shutdown of the first."""
    with suppress(OSError):
        os.write(2, b"fastprune: interrupted twice; ended at once\n")
    os._exit(128 + number)


def _line(message: str) -> str:
    """A message as one line that any terminal shows."""
    line = f"fastprune: {' '.join(message.split())}"
    line = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in line)
    if len(line) > LONGEST:
        # a value of thousands of characters: the error is named before it, the remedy after
        line = f"{line[: LONGEST // 2]} ... {line[5 - LONGEST // 2 :]}"
    return line


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    """Print a warning for a user, who has no use for a file and a line of code."""
    note(_line(f"warning: {message}"))


def _fail(message: str, status: int) -> None:
    with suppress(OSError):
        print(_line(message), file=sys.stderr)
        sys.stderr.flush()
    sys.exit(status)


def _print_completion(context: click.Context, parameter: click.Parameter, shell: str) -> None:
    """Print a shell's code for completion, and end."""
    if not shell or context.resilient_parsing:
        return
    known: Any = get_completion_class(shell)  # never None: the choice has only shells of click
    click.echo(known(cli, {}, "fastprune", COMPLETE).source())
    context.exit()


@click.group(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
@click.option(
    "--completion",
    type=click.Choice(["bash", "zsh", "fish"]),
    is_eager=True,
    expose_value=False,
    callback=_print_completion,
    help='Print code for a shell\'s completion: eval "$(fastprune --completion bash)".',
)
@click.pass_context
def cli(context: click.Context) -> None:
    """Find the blocks of a language model that can be removed: score depth masks exactly, and
    search for the best one.

    MODEL is 'demo', a folder with a safetensors checkpoint, or a hub id.
    """
    if context.invoked_subcommand is None:
        raise InputError(f"name a command: {', '.join(cli.commands)}; --help says what each does")


for command in (
    studies.demo,
    commands.info,
    environment.env,
    commands.algorithms,
    commands.score,
    search.search,
    studies.study,
    evaluation.evaluate,
    commands.export,
    stores.store,
):
    cli.add_command(command)
