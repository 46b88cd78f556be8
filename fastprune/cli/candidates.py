"""The options that name masks and sequences, as the units that run."""

from __future__ import annotations

from pathlib import Path

import click

from ..errors import InputError
from ..masks import check_removed, check_sequences, kept_by, load_sequences
from .options import FILE_NAME, UNIT_SEQUENCE, UNITS, group, naming

Removed = tuple[tuple[int, ...] | str, ...]
Sequences = tuple[tuple[int, ...], ...]


candidate_options = group(
    click.option(
        "--masks",
        "masks_file",
        type=FILE_NAME,
        help='File of masks: .npy [N, U] of 1 = kept, 0 = removed; .jsonl rows {"removed": [9,'
        ' 10]} or {"sequence": [0, 1, 1, 2]}; or a .txt configuration of EvoPress.',
    ),
    click.option(
        "--removed",
        multiple=True,
        type=UNITS,
        help="Units to remove, such as 9,10 or 9-11; - for none, all for all. Give it once for"
        " each mask.",
    ),
    click.option(
        "--sequence",
        "sequences",
        multiple=True,
        type=UNIT_SEQUENCE,
        help="Units in the order in which they run, such as 0-8,8-11, which runs unit 8 twice."
        " Give it once for each sequence.",
    ),
)


def check_candidates(masks_file: str | None, removed: Removed, sequences: Sequences) -> None:
    """Raise InputError unless candidates are named in one way, in a file that exists."""
    if sum(map(bool, (masks_file, removed, sequences))) != 1:
        raise InputError(
            "give masks either as --masks FILE, or as --removed or --sequence, once per mask"
        )
    with naming("--masks"):
        if masks_file and not Path(masks_file).is_file():
            raise InputError(f"{masks_file}: no such masks file")


def read_candidates(
    masks_file: str | None, removed: Removed, sequences: Sequences, num_units: int
) -> list[tuple[int, ...]]:
    """Read masks or sequences: the units of each that run, in order."""
    if masks_file:
        return load_sequences(masks_file, num_units)
    if sequences:
        with naming("--sequence"):
            return check_sequences(sequences, num_units)
    with naming("--removed"):
        return [kept_by(check_removed(units, num_units), num_units) for units in removed]
