"""Controls of a study: masks and sequences that no search chose, judged beside those that were."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, NamedTuple

import numpy as np

from ..errors import InputError
from ..masks import (
    Candidate,
    check_named,
    check_removed,
    check_sequence,
    parse_removed,
    removed_by,
)
from ..search import Allowed
from ..search.draws import distinct
from ..search.sizes import Key, Removed, Size
from ..validate import check_integer, check_one_of

WAYS = ("removed", "sequence", "random", "reverse")
REVERSED = ("one_shot", "order")
MOST_DRAWN = 1000  # random masks of a control and size
Unit = Annotated[int, Allowed(least=0, most=2**31 - 1)]
Sizes = Mapping[Key, tuple[Size, list[int]]]  # of removals, each with the units that may go


@dataclass(frozen=True, kw_only=True)
class Control:
    """[[control]]: a mask or sequence, or several, that no search chooses. One of:

    removed: the units that a mask removes. sequence: the units that run, in order. random: as many
    random masks of each studied size. reverse: "one_shot" removes the units whose removal alone
    costs most, of each objective and studied size; "order" runs all units from the last to the
    first.
    """

    name: str
    removed: str | tuple[Unit, ...] | None = None
    sequence: str | tuple[Unit, ...] | None = None
    random: Annotated[int, Allowed(least=1, most=MOST_DRAWN)] | None = None
    reverse: Annotated[str, Allowed(choices=REVERSED)] | None = None

    def check(self) -> None:
        """Check all that needs no model. Raises InputError."""
        ways = [way for way in WAYS if getattr(self, way) is not None]
        if len(ways) != 1:
            raise InputError(
                f"a control has one of {', '.join(WAYS)}, not {' and '.join(ways) or 'none'}"
            )
        if self.random is not None:
            check_integer("random", self.random, 1, MOST_DRAWN)
        if self.reverse is not None:
            check_one_of("reverse", self.reverse, REVERSED)
        for way in ("removed", "sequence"):
            if isinstance(units := getattr(self, way), str):
                parse_removed(units)

    @property
    def of_sizes(self) -> bool:
        """Whether it has candidates for each studied size."""
        return self.random is not None or self.reverse == "one_shot"

    def fixed(self, num_units: int) -> Candidate | None:
        """Its candidate if that is the same for every size and objective, else None. Raises
        InputError for a unit that the model does not have."""
        if self.removed is not None:
            return Candidate(removed=check_removed(self.removed, num_units))
        sequence = self.sequence
        if self.reverse == "order":
            sequence = tuple(reversed(range(num_units)))
        if sequence is None:
            return None
        units = parse_removed(sequence) if isinstance(sequence, str) else sequence
        sequence = check_named(check_sequence(units, num_units))
        removed = removed_by(sequence, num_units)
        return Candidate(sequence=sequence) if removed is None else Candidate(removed=removed)


class Placed(NamedTuple):
    """A control's candidate: the control's name, the size that it is compared within, and the
    objective that it depends on, if any."""

    name: str
    candidate: Candidate
    size: Key
    under: str | None = None


def place_controls(
    controls: Sequence[Control],
    num_units: int,
    sizes: Sizes,
    labels: Sequence[str],
    singles: Callable[[str], Mapping[int, float]],
    seed: int,
) -> Iterator[Placed]:
    """All candidates of a model's controls.

    Args:
        controls: Checked ones.
        num_units: U.
        sizes: The studied sizes of removals.
        labels: Of the objectives that are searched under.
        singles: The loss without each unit alone, under the objective of a label.
        seed: The study's. Other controls do not change the masks that a control draws.
    """
    for control in controls:
        fixed = control.fixed(num_units)
        if fixed is not None:
            size = None if fixed.removed is None else len(fixed.removed)
            yield Placed(control.name, fixed, size)
        for key, (size_of, candidates) in sizes.items():
            if control.random is not None:
                stream = zlib.crc32(f"{control.name} {key}".encode())
                rng = np.random.default_rng([seed, stream])
                for mask in distinct(partial(_random, rng, size_of, candidates), control.random):
                    yield Placed(control.name, Candidate(removed=mask), key)
            elif control.reverse == "one_shot":
                for label in labels:
                    losses = singles(label)
                    worst = sorted(candidates, key=lambda unit: _harm(losses[unit]), reverse=True)
                    mask = size_of.fill((), worst)
                    yield Placed(control.name, Candidate(removed=mask), key, label)


def _random(rng: np.random.Generator, size: Size, candidates: Sequence[int]) -> Removed:
    return size.fill((), rng.permutation(candidates).tolist())


def _harm(loss: float) -> float:
    """Losses that are not finite sort as the lowest: such a unit says nothing about the others."""
    return loss if np.isfinite(loss) else -np.inf
