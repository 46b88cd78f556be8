"""The command: writes the pages, or prints the registry."""

from __future__ import annotations

import argparse

from .markers import PAGES, updated
from .registry import print_evidence


def main(arguments: list[str] | None = None) -> None:
    """Write every table in its page, or print where each comes from.

    Args:
        arguments: Of the command line; None for the process's own.
    """
    parser = argparse.ArgumentParser(
        prog="python -m tools.tables",
        description="Write the tables of README and docs from bench/results.",
    )
    parser.add_argument("--evidence", action="store_true", help="print the registry instead")
    if parser.parse_args(arguments).evidence:
        print_evidence()
        return
    for path in PAGES:
        page = path.read_text(encoding="utf-8")
        if updated(page) != page:
            path.write_text(updated(page), encoding="utf-8")


if __name__ == "__main__":
    main()
