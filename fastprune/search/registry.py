"""The registry of search algorithms, and the checking of their options."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..errors import InputError, nearest


@dataclass(frozen=True)
class Algorithm:
    """A registered search: its function, and its options with their types and defaults."""

    name: str
    function: Callable
    options: Mapping[str, tuple[type, object]]

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


def algorithm(function: Callable) -> Callable:
    """Register a search under its function's name; its keyword parameters are its options."""
    types = typing.get_type_hints(function)
    _, *parameters = inspect.signature(function).parameters.values()
    options = {parameter.name: (types[parameter.name], parameter.default) for parameter in parameters}
    ALGORITHMS[function.__name__] = Algorithm(function.__name__, function, options)
    return function


def check_algorithm(name: str, options: Mapping[str, object]) -> tuple[Algorithm, dict[str, object]]:
    """The algorithm of this name, and all its options. Raises InputError for a name or an option it does not know."""
    if name not in ALGORITHMS:
        raise InputError(f"unknown algorithm {name!r}; {nearest(str(name), ALGORITHMS)}")
    return ALGORITHMS[name], ALGORITHMS[name].check_options(options)
