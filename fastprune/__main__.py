"""The program `fastprune`, and `python -m fastprune`."""

import sys


def main() -> None:
    """Run the command line. Ctrl-C while it is imported is an exit status, too."""
    try:
        from .cli import main as run
    except KeyboardInterrupt:
        print("fastprune: interrupted; nothing was begun", file=sys.stderr)
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
