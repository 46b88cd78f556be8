"""The registry of search algorithms, the checking of their options, and their description.

An algorithm is a function whose keyword parameters are its options. Its docstring is its
description: a first line, then `Source:`, `Cost:` (in masks, for U units of which k are removed)
and `Options:` with a line per option. A search over sequences removes nothing; its cost counts
sequences.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import inspect
import math
import re
import typing
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from typing import Annotated, Any

from ..errors import InputError
from ..validate import check_one_of, check_probability


@dataclass(frozen=True)
class Allowed:
    """The values that an option may have: numbers from `least` to `most`, or one of `choices`."""

    least: float = -math.inf
    most: float = math.inf
    choices: tuple[str, ...] = ()

    def __contains__(self, value: Any) -> bool:
        return value in self.choices if self.choices else self.least <= value <= self.most

    def __str__(self) -> str:
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        return (
            f"from {self.least} to {self.most}"
            if self.most < math.inf
            else f"at least {self.least}"
        )


Count = Annotated[int, Allowed(least=1)]
CountOrAuto = Annotated[int, Allowed(least=0)]  # 0 lets the algorithm decide
Share = Annotated[float, Allowed(least=0, most=1)]


@dataclass(frozen=True)
class Option:
    """An option of an algorithm: its type, its default, and its allowed values (None: all of its
    type)."""

    kind: type
    default: object
    allowed: Allowed | None

    def __str__(self) -> str:
        return f"{self.kind.__name__}, {self.allowed}" if self.allowed else self.kind.__name__


@dataclass(frozen=True)
class Algorithm:
    """A registered search: its function, and its options.

    check_size(candidates, num_remove, granularity, **options) raises InputError for a problem that
    it cannot take.
    needs_gradients: of the objective at the dense model (Objective.differentiable). needs_weights:
    all at once, so that none can stay in files. races: whether its selections may be races.
    over_sequences: whether its candidates are sequences; it then takes no num_remove, and its
    function gets a SequenceSearch.
    limits: whether it keeps a budget of units that save unlike amounts. weighs: whether it then
    compares losses by what is saved, which does not race. studied: whether a study runs it unless
    others are named.
    """

    name: str
    function: Callable
    options: Mapping[str, Option]
    check_size: Callable[..., None] | None
    needs_sklearn: bool
    needs_gradients: bool
    needs_weights: bool
    races: bool
    over_sequences: bool
    studied: bool
    limits: bool
    weighs: bool

    def check_num_remove(self, num_remove: object, budget: object = None) -> None:
        """Raise InputError unless the size of the removal is given as one of the two, or as none
        where it has no meaning."""
        sizes = {"num_remove": num_remove, "budget": budget}
        given = [name for name, value in sizes.items() if value is not None]
        if self.over_sequences and given:
            raise InputError(
                f"{given[0]} has no meaning for {self.name}, which removes nothing: leave it out",
                argument=given[0],
            )
        if len(given) == 2:
            raise InputError("num_remove and budget are two sizes; give one", argument="num_remove")
        if not self.over_sequences and not given:
            raise InputError(
                f"num_remove is missing: how many units {self.name} removes, such as 3 or '25%'; "
                f"or give a budget",
                argument="num_remove",
            )

    def describe(self) -> dict:
        """Plain values: name, summary, source, cost, and for each option its name, type, default
        and meaning."""
        sections = _sections(inspect.getdoc(self.function) or "")
        meanings = dict(re.findall(r"^(\w+): (.*?)\.?$", sections["Options"], re.MULTILINE))
        return {
            "name": self.name,
            "summary": sections["Summary"],
            "method": sections["Method"],
            "source": sections["Source"].rstrip("."),
            "cost": sections["Cost"].rstrip("."),
            "options": [
                {
                    "name": name,
                    "type": option.kind.__name__,
                    "allowed": str(option.allowed or ""),
                    "default": option.default,
                    "meaning": meanings.get(name, ""),
                }
                for name, option in self.options.items()
            ],
        }

    def describe_options(self) -> str:
        return (
            ", ".join(f"{name}={option.default!r}" for name, option in self.options.items())
            or "none"
        )

    def check_options(self, given: Mapping[str, object]) -> dict[str, object]:
        """Every option with its value. Strings, as from a command line, are converted to the
        option's type."""
        for name in given:
            if name not in self.options:
                raise InputError(
                    f"{self.name} has no option {name!r}; its options: {self.describe_options()}"
                )
        return {
            name: self._convert(name, option, given[name]) if name in given else option.default
            for name, option in self.options.items()
        }

    def _convert(self, name: str, option: Option, value: Any) -> object:
        kind = option.kind
        if isinstance(value, str) and kind is bool and value.lower() in ("true", "false"):
            value = value.lower() == "true"
        elif isinstance(value, str) and kind in (int, float):
            with suppress(ValueError):  # named below, as it was given
                value = kind(value)
        elif kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise InputError(
                f"option {name} of {self.name} takes {kind.__name__}, not {value!r}; "
                f"its options: {self.describe_options()}"
            )
        if option.allowed and value not in option.allowed:
            raise InputError(
                f"option {name} of {self.name} must be {option.allowed}, not {value!r}"
            )
        return value


ALGORITHMS: dict[str, Algorithm] = {}  # registered so far; known_algorithms() has all
GROUP = "fastprune.algorithms"  # of entry points


def algorithm(
    function: Callable | None = None,
    *,
    name: str | None = None,
    check_size: Callable[..., None] | None = None,
    needs_sklearn: bool = False,
    needs_gradients: bool = False,
    needs_weights: bool = False,
    races: bool = False,
    over_sequences: bool = False,
    studied: bool = False,
    limits: bool = False,
    weighs: bool = False,
) -> Callable:
    """Register a search under its function's name, or another; its keyword parameters are its
    options.

    An option's annotation holds its allowed values: `trials: Count`, `variant: Annotated[str,
    Allowed(...)]`. check_size(candidates, num_remove, granularity, **options) raises InputError for
    a problem that it cannot take. Raises InputError for a name that another algorithm has.
    """
    if function is None:
        given: dict[str, Any] = {
            "check_size": check_size,
            "needs_sklearn": needs_sklearn,
            "needs_gradients": needs_gradients,
            "needs_weights": needs_weights,
            "races": races,
            "over_sequences": over_sequences,
            "studied": studied,
            "limits": limits,
            "weighs": weighs,
        }
        return partial(algorithm, name=name, **given)
    name = name or function.__name__
    types = typing.get_type_hints(function, include_extras=True)
    _, *parameters = inspect.signature(function).parameters.values()
    options = {}
    for parameter in parameters:
        annotation = types[parameter.name]
        (allowed,) = getattr(annotation, "__metadata__", (None,))
        options[parameter.name] = Option(
            getattr(annotation, "__origin__", annotation), parameter.default, allowed
        )
    known = ALGORITHMS[name].function if name in ALGORITHMS else function
    if (known.__module__, known.__qualname__) != (function.__module__, function.__qualname__):
        raise InputError(
            f"an algorithm {name!r} is there already, from {known.__module__}; choose another name"
        )
    needs = {
        "needs_sklearn": needs_sklearn,
        "needs_gradients": needs_gradients,
        "needs_weights": needs_weights,
        "over_sequences": over_sequences,
    }
    budgets = {"limits": limits, "weighs": weighs}
    ALGORITHMS[name] = Algorithm(
        name, function, options, check_size, **needs, races=races, studied=studied, **budgets
    )
    return function


def load_plugins() -> None:
    """Import the modules that installed packages name in the entry point group
    `fastprune.algorithms`; the import registers their algorithms.

    One that cannot be imported is named in a warning and left out.
    """
    for point in importlib.metadata.entry_points(group=GROUP):
        try:
            point.load()
        except Exception as error:
            warnings.warn(
                f"the algorithms of {point.value!r} are left out: {error}",
                RuntimeWarning,
                stacklevel=2,
            )


_load_plugins_once = cache(load_plugins)


def known_algorithms() -> Mapping[str, Algorithm]:
    """All algorithms by name. The first call loads those of installed packages."""
    _load_plugins_once()
    return ALGORITHMS


def find_algorithm(name: str) -> Algorithm:
    """The algorithm of this name. Raises InputError for an unknown one."""
    if name in ALGORITHMS:  # one of ours needs no plugins
        return ALGORITHMS[name]
    known = known_algorithms()
    return known[check_one_of("algorithm", name, known)]


def check_algorithm(
    name: str, options: Mapping[str, object]
) -> tuple[Algorithm, dict[str, object]]:
    """The algorithm of this name, and all its options, checked as far as possible without a model.

    Raises InputError for a name it does not know, an option unknown or out of its range, and when
    the algorithm needs a missing library.
    """
    chosen = find_algorithm(name)
    options = chosen.check_options(options)
    if chosen.needs_sklearn:
        require_sklearn(name)
    return chosen, options


def check_racing(algorithms: Sequence[str], racing: float | None) -> None:
    """Raise InputError for a confidence outside (0, 1), or algorithms none of which races."""
    if racing is None:
        return
    check_probability("racing", racing)
    racers = [known.name for known in known_algorithms().values() if known.races]
    if not set(racers) & set(algorithms):
        what = (
            "needs every loss it asks for and does not race"
            if len(algorithms) == 1
            else "do not race"
        )
        raise InputError(
            f"{', '.join(algorithms)} {what}; these do: {', '.join(racers)}", argument="racing"
        )


def check_limits(chosen: Algorithm, racing: float | None) -> None:
    """Raise InputError for an algorithm that only removes a number of units, and for a race of one
    that compares losses by what is saved."""
    if not chosen.limits:
        able = [known.name for known in known_algorithms().values() if known.limits]
        raise InputError(
            f"{chosen.name} removes a number of units and cannot keep a budget of units that save "
            f"unlike amounts; these can: {', '.join(able)}",
            argument="budget",
        )
    if chosen.weighs and racing is not None:
        raise InputError(
            f"{chosen.name} compares losses by what is saved, which does not race, under a budget "
            f"of units that save unlike amounts; leave out racing",
            argument="racing",
        )


def require_sklearn(what: str) -> None:
    """Raise InputError, before any work, when scikit-learn is not installed."""
    if importlib.util.find_spec("sklearn") is None:
        raise InputError(
            f"{what} needs scikit-learn, which is not installed: pip install 'fastprune[search]'"
        )


def describe_algorithms() -> list[dict]:
    """The result of Algorithm.describe for every algorithm, in the order of known_algorithms()."""
    return [known.describe() for known in known_algorithms().values()]


def _sections(doc: str) -> dict[str, str]:
    """The sections of a docstring: its first line as Summary, the next paragraphs as Method, and
    the texts of Source:, Cost:, Options:."""
    parts = re.split(r"^(Source|Cost|Options):", doc, flags=re.MULTILINE)
    method = parts[0].strip().partition("\n")[2].strip()
    sections = {
        "Summary": doc.partition("\n")[0],
        "Method": method,
        "Source": "",
        "Cost": "",
        "Options": "",
    }
    for field, text in zip(parts[1::2], parts[2::2]):
        sections[field] = re.sub(
            r"\n +", " ", inspect.cleandoc(text)
        )  # an indented line continues the one before
    return sections
