"""The registry of search algorithms, the checking of their options, and their description.

An algorithm is a function whose keyword parameters are its options. Its docstring is its description: a first line,
then `Source:`, `Cost:` (in masks, for U units of which k are removed) and `Options:` with a line per option.
"""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from ..errors import InputError, nearest


@dataclass(frozen=True)
class Algorithm:
    """A registered search: its function, and its options with their types and defaults."""

    name: str
    function: Callable
    options: Mapping[str, tuple[type, object]]

    def describe(self) -> dict:
        """Plain values: name, summary, source, cost, and for each option its name, type, default and meaning."""
        sections = _sections(inspect.getdoc(self.function) or "")
        meanings = dict(re.findall(r"^(\w+): (.*?)\.?$", sections["Options"], re.MULTILINE))
        return {
            "name": self.name,
            "summary": sections["Summary"],
            "source": sections["Source"].rstrip("."),
            "cost": sections["Cost"].rstrip("."),
            "options": [
                {"name": name, "type": kind.__name__, "default": default, "meaning": meanings.get(name, "")}
                for name, (kind, default) in self.options.items()
            ],
        }

    def describe_options(self) -> str:
        return ", ".join(f"{name}={default!r}" for name, (_, default) in self.options.items()) or "none"

    def check_options(self, given: Mapping[str, object]) -> dict[str, object]:
        """Every option with its value. Strings, as from a command line, are converted to the option's type."""
        for name in given:
            if name not in self.options:
                raise InputError(f"{self.name} has no option {name!r}; its options: {self.describe_options()}")
        return {
            name: self._convert(name, kind, given[name]) if name in given else default
            for name, (kind, default) in self.options.items()
        }

    def _convert(self, name: str, kind: type, value):
        wrong = InputError(
            f"option {name} of {self.name} takes {kind.__name__}, not {value!r}; its options: {self.describe_options()}"
        )
        if isinstance(value, str) and kind is bool:
            if value.lower() not in ("true", "false"):
                raise wrong
            return value.lower() == "true"
        if isinstance(value, str) and kind in (int, float):
            try:
                return kind(value)
            except ValueError:
                raise wrong from None
        if kind is float and type(value) is int:
            return float(value)
        if type(value) is not kind:
            raise wrong
        return value


ALGORITHMS: dict[str, Algorithm] = {}


def algorithm(function: Callable | None = None, *, name: str | None = None) -> Callable:
    """Register a search under its function's name, or another; its keyword parameters are its options."""
    if function is None:
        return partial(algorithm, name=name)
    name = name or function.__name__
    types = typing.get_type_hints(function)
    _, *parameters = inspect.signature(function).parameters.values()
    options = {parameter.name: (types[parameter.name], parameter.default) for parameter in parameters}
    ALGORITHMS[name] = Algorithm(name, function, options)
    return function


def check_algorithm(name: str, options: Mapping[str, object]) -> tuple[Algorithm, dict[str, object]]:
    """The algorithm of this name, and all its options. Raises InputError for a name or an option it does not know."""
    if name not in ALGORITHMS:
        raise InputError(f"unknown algorithm {name!r}; {nearest(str(name), ALGORITHMS)}")
    return ALGORITHMS[name], ALGORITHMS[name].check_options(options)


def describe_algorithms() -> list[dict]:
    """What Algorithm.describe says of every algorithm, in the order of ALGORITHMS."""
    return [known.describe() for known in ALGORITHMS.values()]


def check_at_least(algorithm: str, least: float, **options: float) -> None:
    """Raise InputError for an option below `least`."""
    for name, value in options.items():
        if not value >= least:
            raise InputError(f"option {name} of {algorithm} must be at least {least}, not {value}")


def check_share(algorithm: str, **options: float) -> None:
    """Raise InputError for an option that is not from 0 to 1."""
    for name, value in options.items():
        if not 0 <= value <= 1:
            raise InputError(f"option {name} of {algorithm} must be from 0 to 1, not {value}")


def check_choice(algorithm: str, choices: tuple[str, ...], **options: str) -> None:
    """Raise InputError for an option that is none of the choices."""
    for name, value in options.items():
        if value not in choices:
            raise InputError(f"option {name} of {algorithm} must be one of {', '.join(choices)}, not {value!r}")


def _sections(doc: str) -> dict[str, str]:
    """Of a docstring: its first line as Summary, and the text after each of Source:, Cost: and Options:."""
    parts = re.split(r"^(Source|Cost|Options):", doc, flags=re.MULTILINE)
    sections = {"Summary": doc.partition("\n")[0], "Source": "", "Cost": "", "Options": ""}
    for field, text in zip(parts[1::2], parts[2::2]):
        sections[field] = re.sub(r"\n +", " ", inspect.cleandoc(text))  # an indented line continues the one before
    return sections
