"""The registry of search algorithms, the checks of their options, and their description.

An algorithm is a function whose keyword parameters are its options. Its docstring describes it: a
first line, then `Source:`, `Cost:` (in masks, to remove k of U units) and `Options:` with a line
for each option. A search over sequences removes no unit; its cost counts sequences.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import inspect
import math
import re
import typing
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from typing import Annotated, Any

from ..errors import InputError
from ..validate import check_one_of, check_probability


@dataclass(frozen=True)
class Allowed:
    """The allowed values of an option: numbers from `least` to `most`, or one of `choices`."""

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
    """An option of an algorithm: its type, its default, and its allowed values (None for all)."""

    kind: type
    default: object
    allowed: Allowed | None


@dataclass(frozen=True)
class Algorithm:
    """A registered search; `algorithm` documents the flags.

    Attributes:
        name: The name by which users call it.
        function: The search.
        options: Its options by name.
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
    stepwise: bool

    def check_num_remove(self, num_remove: object, budget: object = None) -> None:
        """Raise InputError unless exactly one size of the removal is given; none over sequences."""
        arguments = {"num_remove": num_remove, "budget": budget}
        sizes = [name for name, value in arguments.items() if value is not None]
        if self.over_sequences and sizes:
            raise InputError(
                f"{sizes[0]} has no meaning for {self.name}, which removes nothing: leave it out",
                argument=sizes[0],
            )
        if len(sizes) == 2:
            raise InputError("num_remove and budget are two sizes; give one", argument="num_remove")
        if not self.over_sequences and not sizes:
            raise InputError(
                f"num_remove is missing: how many units {self.name} removes, such as 3 or '25%'; "
                f"or give a budget",
                argument="num_remove",
            )

    def check_gradients(
        self, differentiable: bool, objective: str, others: Iterable[str] = ()
    ) -> None:
        """Raise InputError if the search needs gradients and the objective has none.

        Args:
            differentiable: Whether the objective has a gradient.
            objective: The objective, as the message names it.
            others: Objectives with gradients, which the message proposes.
        """
        if self.needs_gradients and not differentiable:
            proposed = ", ".join(others) or "one that has"
            raise InputError(
                f"{self.name} needs gradients, which the objective {objective} has not; take "
                f"{proposed}, or another algorithm"
            )

    def confidence(self, racing: float | None) -> float | None:
        """The confidence of its races, if `racing` is asked of several algorithms; None if it does
        not race."""
        return racing if self.races else None

    def describe(self) -> dict:
        """Describe the algorithm in plain values: name, summary, method, source, cost, options."""
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
        """Return every option with its value, defaults included.

        Strings, as from a command line, are converted to the option's type.
        """
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
            with suppress(ValueError):  # the error below quotes the text itself
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


ALGORITHMS: dict[str, Algorithm] = {}  # registered so far; known_algorithms() adds plugins
GROUP = "fastprune.algorithms"  # the group of entry points


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
    stepwise: bool = False,
) -> Callable:
    """Register a function as a search algorithm. Use it as a decorator.

    The function gets a `Search`. Its keyword parameters are its options. An option's annotation
    holds its allowed values, as in `trials: Count` or `variant: Annotated[str, Allowed(...)]`.

    Args:
        function: The search.
        name: Its name; by default the function's.
        check_size: A function of (candidates, num_remove, granularity, **options), which raises
            InputError for a problem that the search cannot take. Candidates are the units that may
            go.
        needs_sklearn: The search imports scikit-learn.
        needs_gradients: The search needs a gradient of the objective at the whole model.
        needs_weights: The search needs all weights at once, so that none can stay in files.
        races: The search selects by `Search.select`, so that its selections may be races.
        over_sequences: Candidates are sequences. The function gets a `SequenceSearch`, and the
            search takes no num_remove.
        studied: A study runs the search by default.
        limits: The search keeps a budget of units that save unlike amounts.
        weighs: Under such a budget the search compares losses relative to savings, and cannot race.
        stepwise: The search removes units one by one by `Search.extend`, so that its result has a
            path.

    Returns:
        The function.

    Raises:
        InputError: Another algorithm has this name.

    Examples:
        >>> import fastprune as fp
        >>> from fastprune.search import algorithm
        >>> from fastprune.testing import SyntheticEvaluator
        >>> @algorithm(name="first_units")
        ... def first_units(search):
        ...     search.score([tuple(search.candidates[: search.num_remove])])
        >>> fp.run_search(SyntheticEvaluator(8), "first_units", num_remove=2).removed
        (0, 1)
    """
    flags: dict[str, Any] = {
        "check_size": check_size,
        "needs_sklearn": needs_sklearn,
        "needs_gradients": needs_gradients,
        "needs_weights": needs_weights,
        "races": races,
        "over_sequences": over_sequences,
        "studied": studied,
        "limits": limits,
        "weighs": weighs,
        "stepwise": stepwise,
    }
    if function is None:
        return partial(algorithm, name=name, **flags)
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
    ALGORITHMS[name] = Algorithm(name, function, options, **flags)
    return function


def load_plugins() -> None:
    """Import the modules of the entry point group `fastprune.algorithms`.

    The import registers their algorithms. A module that cannot be imported is left out with a
    warning.
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
    """Return the algorithm of a name, or raise InputError."""
    if name in ALGORITHMS:  # our own algorithms need no plugins
        return ALGORITHMS[name]
    known = known_algorithms()
    return known[check_one_of("algorithm", name, known)]


def check_algorithm(
    name: str, options: Mapping[str, object]
) -> tuple[Algorithm, dict[str, object]]:
    """Check an algorithm and its options as far as possible without a model.

    Returns:
        The algorithm, and all of its options with their values.

    Raises:
        InputError: The name or an option is unknown, an option is out of its range, or the
            algorithm needs a missing library.
    """
    chosen = find_algorithm(name)
    options = chosen.check_options(options)
    if chosen.needs_sklearn:
        require_sklearn(name)
    return chosen, options


def check_racing(algorithms: Sequence[str], racing: float | None) -> None:
    """Raise InputError for a confidence outside (0, 1), or if none of the algorithms races."""
    if racing is None:
        return
    check_probability("racing", racing)
    racers = [known.name for known in known_algorithms().values() if known.races]
    if not set(racers) & set(algorithms):
        reason = (
            "needs every loss it asks for and does not race"
            if len(algorithms) == 1
            else "do not race"
        )
        raise InputError(
            f"{', '.join(algorithms)} {reason}; these do: {', '.join(racers)}", argument="racing"
        )


def check_limits(chosen: Algorithm, racing: float | None) -> None:
    """Check that an algorithm takes a budget of units that save unlike amounts.

    Args:
        chosen: The algorithm.
        racing: The confidence that is asked for. One that does not race ignores it. The size of the
            calibration set, which may be too small for races, does not matter.

    Raises:
        InputError: The algorithm can only remove a fixed number of units, or would have to race
            while it compares losses relative to savings.
    """
    if not chosen.limits:
        able = [known.name for known in known_algorithms().values() if known.limits]
        raise InputError(
            f"{chosen.name} removes a number of units and cannot keep a budget of units that save "
            f"unlike amounts; these can: {', '.join(able)}",
            argument="budget",
        )
    if chosen.weighs and chosen.confidence(racing) is not None:
        raise InputError(
            f"{chosen.name} cannot race under a budget of units that save unlike amounts, since it "
            f"compares losses relative to savings; leave out racing",
            argument="racing",
        )


def require_sklearn(what: str) -> None:
    """Raise InputError, before any work, when scikit-learn is not installed."""
    if importlib.util.find_spec("sklearn") is None:
        raise InputError(
            f"{what} needs scikit-learn, which is not installed: pip install 'fastprune[search]'"
        )


def describe_algorithms() -> list[dict]:
    """Describe all algorithms, those of installed packages included.

    Returns:
        For each algorithm its name, summary, method, source, cost and options, in plain values.

    Examples:
        >>> from fastprune.search import describe_algorithms
        >>> describe_algorithms()[0]["name"]
        'one_shot'
    """
    return [known.describe() for known in known_algorithms().values()]


def _sections(doc: str) -> dict[str, str]:
    """Split a docstring: its first line as Summary, then Method, Source, Cost and Options."""
    first, *parts = re.split(r"^(Source|Cost|Options):", doc, flags=re.MULTILINE)
    summary, _, method = first.strip().partition("\n")
    sections = {"Summary": summary, "Method": method.strip()}
    sections |= dict.fromkeys(("Source", "Cost", "Options"), "")
    for field, text in zip(parts[::2], parts[1::2]):
        # an indented line continues the line before
        sections[field] = re.sub(r"\n +", " ", inspect.cleandoc(text))
    return sections
