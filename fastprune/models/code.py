"""The code that runs a model: classes, functions, hooks, and forwards of single modules.

Foreign code is the part that does not come from the model's own package. A namespace is a
dictionary of functions by name: of a class, a Python module, or a registry such as transformers'
attention functions.
"""

from __future__ import annotations

import sys
import sysconfig
import types
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from inspect import unwrap
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

# attributes that tell how a model computes one thing, an entry of a registry
IMPLEMENTATIONS = ("_attn_implementation", "_experts_implementation")
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
# of hooks by their number: whether one takes arguments by name, or runs after an exception
HOOK_FLAGS = ("_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs")
GLOBAL_HOOKS = tuple(
    name
    for name, value in vars(nn.modules.module).items()
    if name.startswith("_global_") and name.endswith("_hooks") and isinstance(value, dict)
)
_FUNCTIONS = (types.FunctionType, staticmethod, classmethod, property)


class Namespace(NamedTuple):
    """Functions by name, and the class or Python module that they belong to (None: a registry)."""

    functions: Mapping[str, Any]
    owner: Any
    defines: bool = False  # whether a forward pass is defined in this Python module


def own_forward(module: nn.Module) -> Any:
    """The forward that was set on a module itself; None if its class's forward runs.

    A class's forward that was set again on the module counts as the class's.
    """
    forward = vars(module).get("forward")
    if isinstance(forward, types.MethodType) and forward.__self__ is module:
        return None if forward.__func__ is getattr(type(module), "forward", None) else forward
    return forward


def hooks_of(module: nn.Module) -> list[tuple[Any, bool]]:
    """The hooks of a module of all kinds, and whether each takes arguments by name."""
    flags = [getattr(module, name, {}) for name in HOOK_FLAGS]
    return [
        (hook, any(number in by_name for by_name in flags))
        for name in HOOKS
        for number, hook in getattr(module, name, {}).items()
    ]


def global_hooks() -> list[dict]:
    """torch's hooks on all modules of the process, by kind."""
    return [getattr(nn.modules.module, name) for name in GLOBAL_HOOKS]


def namespaces(modules: Iterable[nn.Module]) -> list[Namespace]:
    """The namespaces that the forward passes of these modules read.

    They are the modules' classes, the Python modules that define these, the Python modules of
    imported functions, and registries.
    """
    kinds = dict.fromkeys(map(type, modules))
    classes = dict.fromkeys(kind for leaf in kinds for kind in leaf.__mro__ if kind is not object)
    forwards = [kind for kind in classes if "forward" in vars(kind) and kind is not nn.Module]
    homes = dict.fromkeys(
        sys.modules[kind.__module__] for kind in forwards if kind.__module__ in sys.modules
    )
    registries: dict[int, Mapping] = {}
    called: dict[types.ModuleType, None] = {torch.nn.functional: None}
    for home in homes:
        package = home.__name__.partition(".")[0]
        for name, value in list(vars(home).items()):
            if name.startswith("__"):
                continue
            entries = _registry(value)
            registries |= {id(registry): registry for registry in entries}
            for function in [value, *(f for registry in entries for f in registry.values())]:
                where = getattr(function, "__module__", None) or ""
                if isinstance(function, types.FunctionType) and where.startswith(f"{package}."):
                    called[sys.modules.get(where, home)] = None
    return [
        *(Namespace(vars(kind), kind) for kind in classes),
        *(Namespace(vars(home), home, home in homes) for home in {**homes, **called}),
        *(Namespace(registry, None) for registry in registries.values()),
    ]


def _registry(value: Any) -> list[dict]:
    """The dictionaries of a registry of functions: itself, or those of its object and class."""
    if isinstance(value, dict):
        return [value] if any(isinstance(v, types.FunctionType) for v in value.values()) else []
    if not isinstance(value, Mapping):
        return []
    return [
        held
        for holder in (vars(value), *map(vars, type(value).__mro__[:2]))
        for held in holder.values()
        if isinstance(held, dict)
    ]


def sources(hf: nn.Module) -> list[str]:
    """The functions that a model's Python modules call, with the places of their definitions.

    The list is equal in all processes with equal, unchanged packages.
    """
    return sorted(
        f"{space.owner.__name__}.{name}: {value.__module__}.{value.__qualname__}"
        for space in namespaces(hf.modules())
        if space.defines
        for name, value in list(space.functions.items())
        if isinstance(value, types.FunctionType)
    )


def foreign_code(hf: Any) -> Iterator[tuple[str, Any]]:
    """Yield the functions of a model's forward pass from outside its own package.

    Examples are a replaced forward of a class, or a replaced function of its Python module.
    `own_forward` and `hooks_of` find forwards and hooks of single modules.

    Yields:
        The place of a function, and the function.
    """
    modules = list(hf.modules())
    configs = {id(c): c for m in modules if (c := getattr(m, "config", None)) is not None}
    chosen = {getattr(c, name, None) for c in configs.values() for name in IMPLEMENTATIONS}
    for functions, owner, _ in namespaces(modules):
        home = owner if isinstance(owner, types.ModuleType) else getattr(owner, "__module__", "")
        if str(getattr(home, "__name__", home)).startswith("fastprune."):
            continue  # a module of this package, put there as the model was opened
        for name, function in list(functions.items()):
            if owner is None:
                if name in chosen and callable(function) and not _is_own(name, function, None):
                    yield str(name), function
            elif isinstance(function, _FUNCTIONS) and not _is_own(name, function, owner):
                yield f"{owner.__name__}.{name}", function


def _is_own(name: str, value: Any, owner: Any) -> bool:
    """Whether a function is in its package's own place, by its code's file and its name."""
    function: Any = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
    code = getattr(function, "__code__", None)
    if code is None:
        return True
    if isinstance(owner, type) and owner is not nn.Module and name == "forward":
        inner = unwrap(function)
        if (inner.__module__, inner.__qualname__) != (
            owner.__module__,
            f"{owner.__qualname__}.forward",
        ):
            return False
    home = owner if isinstance(owner, types.ModuleType) else None
    home = home or sys.modules.get(getattr(owner, "__module__", ""))
    file, standard, installed = code.co_filename, *_installed()
    of_others = file.startswith(installed)  # below Python's own library, in some environments
    own = (_folder("transformers"), _folder("torch"), *_package_of(home))
    if file.startswith(own) or (file.startswith(standard) and not of_others):
        return True
    # another installed package's, imported by its own name
    return owner is not None and name == function.__name__ and of_others


@cache
def _folder(package: str) -> str:
    return str(Path(sys.modules[package].__file__ or "").parent)


@cache
def _package_of(home: types.ModuleType | None) -> tuple[str, ...]:
    """The folder of a Python module's package, or its own file if it is in none."""
    if home is None:
        return ()
    file = getattr(home, "__file__", None)
    if file is None:
        return ("<",)  # typed in: its functions have no file either
    top = sys.modules.get(home.__name__.partition(".")[0])
    package = getattr(top, "__file__", None)
    inside = "." in home.__name__
    return (str(Path(package).parent) if inside and package else file,)


@cache
def _installed() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The paths of Python's own library (generated code has no file) and of installed packages."""
    paths = sysconfig.get_paths()
    roots = {str(Path(_folder(package)).parent) for package in ("transformers", "torch")}
    return (paths["stdlib"], "<"), (*roots, paths["purelib"], paths["platlib"])
