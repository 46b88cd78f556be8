"""Checks of a study that need no model, for a document and for `run_study` alike."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..costs import Budget
from ..errors import InputError, shown
from ..search import check_algorithm, find_algorithm, require_sklearn
from ..search.protect import check_budget
from ..search.sizes import RemovalSize
from ..validate import check_folder, check_integer


@contextmanager
def at(place: str) -> Iterator[None]:
    """Errors raised inside begin with a place, such as that in a document."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{place}: {error}") from None


def check_once(names: Sequence[object]) -> None:
    """Raise InputError if a name is given twice."""
    for name, count in Counter(names).items():
        if count > 1:
            raise InputError(f"{shown(name)} is given twice")


def check_study(
    algorithms: Sequence[str], options: Mapping[str, Mapping[str, object]], out_dir: str | Path
) -> None:
    """Check everything about a study's algorithms and folder that needs no model.

    Args:
        algorithms: Names of algorithms.
        options: Options of algorithms, by the algorithms' names.
        out_dir: The study's folder; it need not exist.

    Raises:
        InputError: An algorithm or option is unknown, wrong or repeated, scikit-learn is missing,
            or the folder cannot be made.

    Examples:
        >>> from fastprune.study import check_study
        >>> check_study(["beam"], {"beam": {"widht": 4}}, "runs")
        Traceback (most recent call last):
        fastprune.errors.InputError: beam has no option 'widht'; its options: beam_width=5
    """
    with at("algorithms"):
        _refuse_text(algorithms)
        if not algorithms:
            raise InputError("a study needs at least one")
        check_once(algorithms)
    for algorithm in dict.fromkeys([*algorithms, *options]):
        check_algorithm(algorithm, options.get(algorithm, {}))
        if algorithm not in algorithms:
            raise InputError(
                f"options are given for {algorithm}, which is not among the algorithms"
            )
    require_sklearn("a study")  # for the clusters of its summary
    check_folder(Path(out_dir))


def search_settings(
    algorithms: Iterable[str],
    options: Mapping[str, Mapping[str, object]],
    sizes: Iterable[int | str | Budget],
    seed: int,
    racing: float | None,
    protect: Iterable[int] | str,
) -> dict[str, Any]:
    """The settings of a study's searches, as its folder keeps them."""
    return {
        "algorithms": {
            name: check_algorithm(name, options.get(name, {}))[1] for name in algorithms
        },
        "budgets": [RemovalSize.of(size).key for size in sizes],
        "seed": seed,
        "racing": racing,
        "protect": protect if isinstance(protect, str) else [*protect],
    }


def check_sizes(algorithms: Sequence[str], sizes: Sequence[int | str | Budget]) -> None:
    """Check that a study names sizes of removals if an algorithm removes units, and only then.

    Args:
        algorithms: Names of algorithms, at least one.
        sizes: Numbers of units, shares and budgets.

    Raises:
        InputError: A size is wrong, missing, given twice, or has no meaning.

    Examples:
        >>> from fastprune.study.checks import check_sizes
        >>> check_sizes(["greedy"], [2, "25%"])
    """
    _refuse_text(sizes)
    asked = [RemovalSize.of(size) for size in sizes]
    for size in asked:
        if isinstance(size.num_remove, str):
            check_budget(size.num_remove)
        elif size.budget is None:
            check_integer("num_remove", size.num_remove, 0)
    removing = [name for name in algorithms if not find_algorithm(name).over_sequences]
    if removing and not sizes:
        raise InputError(
            f"{removing[0]} removes units, and no size is named: a number of units such as 3, a "
            f"share such as '25%', or a budget such as 'params=75%'"
        )
    if asked and not removing:
        find_algorithm(algorithms[0]).check_num_remove(**asked[0].arguments)
    check_once([size.key for size in asked])


def _refuse_text(values: object) -> None:
    """Raise InputError for a text in place of a list of values."""
    if isinstance(values, str):
        raise InputError(f"must be a list such as [{values!r}], not a text")
