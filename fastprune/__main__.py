"""The program `fastprune`, and `python -m fastprune`."""

import sys

from .errors import raise_upon_sigterm, word_and_status


def main() -> None:
    """Run the command line. Ctrl-C or SIGTERM while it is imported is an exit status, too."""
    raise_upon_sigterm()
    try:
        from .cli import main as run
    except KeyboardInterrupt as error:
        word, status = word_and_status(error)
        print(f"fastprune: {word}; nothing was begun", file=sys.stderr)
        sys.exit(status)
    run()


if __name__ == "__main__":
    main()
