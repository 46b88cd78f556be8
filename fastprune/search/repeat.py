"""A search over sequences in which windows of units run several times in a row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from ..errors import InputError, shown
from ..masks import ALL, parse_removed, repeated
from .registry import Allowed, Count, algorithm
from .task import SequenceSearch

Window = tuple[int, int]  # its first unit, and the unit after its last


def _fits(
    candidates: Sequence[int], num_remove: int, granularity: str, lengths: str, **_: object
) -> None:
    if not candidates:
        raise InputError("repeat runs windows of units without a protected one; all are protected")
    if not _windows(candidates, _lengths(lengths, len(candidates))):
        raise InputError(
            f"option lengths of repeat is {shown(lengths)}, but no such window is without a "
            f"protected unit"
        )


@algorithm(check_size=_fits, races=True, over_sequences=True)
def repeat(
    search: SequenceSearch,
    lengths: str = ALL,
    times: Annotated[int, Allowed(least=2, most=16)] = 2,
    num_windows: Count = 1,
    beam_width: Count = 5,
) -> None:
    """Run a window of adjacent units several times in a row: the window that lowers the loss most.

    The first round scores every window. Each further round adds a window to each of the beam_width
    best sequences, without overlap. The result is the best sequence of all rounds, so it has at
    most num_windows windows. The whole model and windows with a protected unit are no candidates;
    compare the result with the whole model.

    Source: RYS (github.com/dnhkng/RYS), which runs a window twice.
    Cost: U (U + 1) / 2, and at most beam_width times that for each further window.
    Options:
        lengths: units of a window, such as 1-8 or 1,2,4; all for every length.
        times: the number of times that a window runs.
        num_windows: the most windows that run several times.
        beam_width: sequences to which a round adds a window.
    """
    windows = _windows(search.candidates, _lengths(lengths, len(search.candidates)))
    kept: list[tuple[Window, ...]] = [()]
    search.plan([len(windows), *[beam_width * len(windows)] * (num_windows - 1)])
    for number in range(num_windows):
        extended = {
            repeated(search.num_units, chosen, times): chosen
            for before in kept
            for window in windows
            if all(window[1] <= first or stop <= window[0] for first, stop in before)
            for chosen in [(*before, window)]
        }
        if not extended:
            return
        is_last = number + 1 == num_windows
        kept = [extended[units] for units in search.select(extended, 1 if is_last else beam_width)]


def _lengths(text: str, most: int) -> list[int]:
    """Read the lengths that a text names, ascending; each must be from 1 to most."""
    if text == ALL:
        return list(range(1, most + 1))
    try:
        lengths = sorted(set(parse_removed(text)))
    except InputError:
        lengths = []
    if not lengths or lengths[0] < 1 or lengths[-1] > most:
        raise InputError(
            f"option lengths of repeat must be all, or lengths from 1 to {most} such as 1-3, "
            f"not {shown(text)}"
        )
    return lengths


def _windows(candidates: Sequence[int], lengths: list[int]) -> list[Window]:
    """List the windows of these lengths that hold candidates only."""
    allowed = set(candidates)
    return [
        (first, first + length)
        for length in lengths
        for first in candidates
        if allowed.issuperset(range(first, first + length))
    ]
