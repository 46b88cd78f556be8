"""Controls of a study: masks and sequences that no search chose, judged beside those that were."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, NamedTuple

import numpy as np

from ..errors import InputError, shown
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
from ..validate import MOST, check_integer, check_kind, check_one_of
from .checks import at, check_once
from .folder import check_label

WAYS = ("removed", "sequence", "random", "worst_of", "backwards")
RANKED = ("one_shot",)  # algorithms whose worst units a control removes
MOST_DRAWN = 1000  # random masks of a control and size
Unit = Annotated[int, Allowed(least=0, most=MOST)]
Sizes = Mapping[Key, tuple[Size, list[int]]]  # of removals, each with the units that may go


@dataclass(frozen=True, kw_only=True)
class Control:
    """[[control]]: masks or sequences that no search chooses.

    A control has a name and exactly one of the other attributes.

    Attributes:
        name: Its name in tables.
        removed: The units that a mask removes: a tuple, or text such as "9,10".
        sequence: The units that run, in order.
        random: The number of random masks of each studied size.
        worst_of: An algorithm, whose worst units are removed, for each objective and studied size.
            With "one_shot", these are the units whose removal alone costs most, and first those
            without which no loss is finite.
        backwards: Whether all units run, from the last to the first.

    Examples:
        >>> from fastprune.study import Control
        >>> Control(name="last-two", removed=(10, 11)).fixed(12).removed
        (10, 11)
    """

    name: str
    removed: str | tuple[Unit, ...] | None = None
    sequence: str | tuple[Unit, ...] | None = None
    random: Annotated[int, Allowed(least=1, most=MOST_DRAWN)] | None = None
    worst_of: Annotated[str, Allowed(choices=RANKED)] | None = None
    backwards: bool = False

    def check(self) -> None:
        """Check the control as far as no model is needed.

        Raises:
            InputError: It has none or several of the attributes, or a wrong value.

        Examples:
            >>> from fastprune.study import Control
            >>> Control(name="random", random=20).check()
        """
        if not isinstance(self.backwards, bool):
            raise InputError(f"backwards must be true or false, not {shown(self.backwards)}")
        given = {way: getattr(self, way) for way in WAYS}
        ways = [way for way, value in given.items() if value is not None and value is not False]
        if len(ways) != 1:
            raise InputError(
                f"a control has one of {', '.join(WAYS)}, not {' and '.join(ways) or 'none'}"
            )
        if self.random is not None:
            check_integer("random", self.random, 1, MOST_DRAWN)
        if self.worst_of is not None:
            check_one_of("worst_of", self.worst_of, RANKED)
        for way in ("removed", "sequence"):
            if isinstance(units := getattr(self, way), str):
                parse_removed(units)

    @property
    def of_sizes(self) -> bool:
        """Whether it has candidates for each studied size."""
        return self.random is not None or self.worst_of is not None

    def fixed(self, num_units: int) -> Candidate | None:
        """Compute the candidate of a control that has the same for every size and objective.

        Args:
            num_units: U.

        Returns:
            The candidate; None for `random` and `worst_of`.

        Raises:
            InputError: The model has no such unit.

        Examples:
            >>> from fastprune.study import Control
            >>> Control(name="backwards", backwards=True).fixed(3).sequence
            (2, 1, 0)
        """
        if self.removed is not None:
            return Candidate(removed=check_removed(self.removed, num_units))
        sequence = self.sequence
        if self.backwards:
            sequence = tuple(reversed(range(num_units)))
        if sequence is None:
            return None
        units = parse_removed(sequence) if isinstance(sequence, str) else sequence
        sequence = check_named(check_sequence(units, num_units))
        removed = removed_by(sequence, num_units)
        return Candidate(sequence=sequence) if removed is None else Candidate(removed=removed)


def check_controls(controls: Sequence[Control], algorithms: Sequence[str], has_sizes: bool) -> None:
    """Check a study's controls as far as no model is needed.

    Args:
        controls: The controls.
        algorithms: The names of the study's algorithms; no control has one of these names.
        has_sizes: Whether the study names a size of removals.

    Raises:
        InputError: A name is no label, is given twice or is an algorithm's; a control has a wrong
            value, or needs a size and the study names none.

    Examples:
        >>> from fastprune.study import Control
        >>> from fastprune.study.controls import check_controls
        >>> check_controls([Control(name="drawn", random=20)], ["greedy"], has_sizes=True)
    """
    with at("control"):
        for control in controls:
            check_kind("a control", control, Control, "a Control")
            check_label(control.name)
        check_once([control.name for control in controls])
    for control in controls:
        with at(f"control.{control.name}"):
            if control.name in algorithms:
                raise InputError("an algorithm of the study has this name")
            control.check()
            if control.of_sizes and not has_sizes:
                raise InputError("has masks of each studied size, and the study names none")


class Placed(NamedTuple):
    """A candidate of a control.

    Attributes:
        name: The control's name.
        candidate: The mask or sequence.
        size: The size of removal; candidates of one size are compared.
        under: The label of the objective that it depends on; None if it depends on none.
    """

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
    """Yield all candidates of a model's controls.

    Args:
        controls: The controls, checked.
        num_units: U.
        sizes: The studied sizes of removals.
        labels: The labels of the objectives that searches minimise.
        singles: A function from a label to the loss without each unit alone, by unit.
        seed: The study's seed. Other controls do not change the masks that a control draws.
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
            elif control.worst_of is not None:
                for label in labels:
                    losses = singles(label)
                    worst = sorted(candidates, key=lambda unit: _harm(losses[unit]), reverse=True)
                    mask = size_of.fill((), worst)
                    yield Placed(control.name, Candidate(removed=mask), key, label)


def _random(rng: np.random.Generator, size: Size, candidates: Sequence[int]) -> Removed:
    return size.fill((), rng.permutation(candidates).tolist())


def _harm(loss: float) -> float:
    """A sort key: a unit whose removal leaves no finite loss costs more than all others."""
    return loss if np.isfinite(loss) else np.inf
