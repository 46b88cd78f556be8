"""The command line: demo, info, algorithms, score, search, study, export.

Exit status: 0 done, 1 the run failed, 2 the arguments or the files were wrong. An error is one line.
"""

from __future__ import annotations

import os
import re
import sys

import click

from .. import __version__
from ..errors import InputError
from . import commands, studies

# parameters of the library that its messages name, where the command line has a flag of that name
FLAGS = re.compile(r"(?<![\w/.-])(num_samples|seq_len|num_remove)(?![\w/.-])")


def main() -> None:
    """Run the command line; every error becomes one line and an exit status."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        status = cli.main(prog_name="fastprune", standalone_mode=False)
        sys.exit(status if isinstance(status, int) else 0)
    except (InputError, click.UsageError) as error:
        message = error.format_message() if isinstance(error, click.UsageError) else str(error)
        _fail(message, 2)
    except (KeyboardInterrupt, click.Abort):
        _fail("interrupted", 1)
    except BrokenPipeError:  # the reader of the output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if os.environ.get("FASTPRUNE_TRACEBACK"):
            raise
        _fail(f"{type(error).__name__}: {error} (FASTPRUNE_TRACEBACK=1 shows where)", 1)


def _fail(message: str, status: int) -> None:
    message = FLAGS.sub(lambda name: f"--{name[0].replace('_', '-')}", message)
    print(f"fastprune: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def cli() -> None:
    """Which blocks of a language model can go? Scores depth masks exactly, and searches for the best one.

    MODEL is 'demo', a folder with a safetensors checkpoint, or a hub id.
    """


for command in (studies.demo, commands.info, commands.algorithms, commands.score, commands.search, studies.study):
    cli.add_command(command)
cli.add_command(commands.export)
