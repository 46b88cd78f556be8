"""The study document: its schema, and the checks that need no model.

A study is a TOML document with the tables below. Every wrong key, type or value is named with its
place in the document, such as `study.toml: search.racing must be a number between 0 and 1, not 2`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from .. import demo
from ..costs import Budget as RemovalBudget
from ..data import LOSS_ON, TASKS_READING, TEXT_READING, is_data
from ..errors import InputError, nearest, shown
from ..masks import parse_removed
from ..objectives import OBJECTIVES
from ..search import (
    ALGORITHMS,
    PRESETS,
    Allowed,
    check_algorithm,
    check_budget,
    check_racing,
    find_algorithm,
)
from ..validate import MOST, MOST_SEED, check_folder, check_path
from .checks import at, check_once, check_sizes, search_settings
from .controls import Control, check_controls
from .folder import check_label

EXAMPLE = Path(__file__).with_name("example.toml")
STUDIED = tuple(name for name, algorithm in ALGORITHMS.items() if algorithm.studied)


@dataclass(frozen=True)
class Between(Allowed):
    """Numbers between two bounds, neither of which is allowed."""

    def __contains__(self, value: Any) -> bool:
        return self.least < value < self.most

    def __str__(self) -> str:
        return f"between {self.least:g} and {self.most:g}"


class OrShare(Allowed):
    """Integers within the bounds, or shares such as "25%"."""

    def __contains__(self, value: Any) -> bool:
        if not isinstance(value, str):
            return super().__contains__(value)
        with suppress(InputError):
            return check_budget(value) is not None
        return False


def _one_of(*choices: str) -> Allowed:
    return Allowed(choices=choices)


def _values_of(table: Any, names: Iterable[str]) -> dict[str, Any]:
    """The values of those keys that a table has."""
    values = {name: getattr(table, name) for name in names}
    return {name: value for name, value in values.items() if value is not None}


Samples = Annotated[int, Allowed(least=1, most=MOST)]
Tokens = Annotated[int, Allowed(least=2, most=MOST)]
Seed = Annotated[int, Allowed(least=0, most=MOST_SEED)]
Number = Annotated[int, Allowed(least=0, most=MOST)]
Budget = Annotated[int | str, OrShare(least=0, most=MOST)]
Gigabytes = Annotated[float, Between(least=0, most=2**20)]


@dataclass(frozen=True)
class ModelConfig:
    """[model]: "demo", folders or hub ids, and how they are loaded and run."""

    path: str | tuple[str, ...]
    device: str | None = None
    dtype: Annotated[str, _one_of("float32", "bfloat16", "float16", "float64")] | None = None
    trust_remote_code: bool = False
    backend: Annotated[str, _one_of("auto", "generic", "fused")] = "auto"

    @property
    def paths(self) -> tuple[str, ...]:
        """The models, as the document spells them."""
        return (self.path,) if isinstance(self.path, str) else self.path


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """A table of data: its file, the number of samples, and the options of reading.

    `delimiter` is for tasks. seq_len, seed, bos, column, chat_template and loss_on are for text.
    """

    name: str
    file: str = ""
    num_samples: Samples | None = None
    seq_len: Tokens | None = None
    seed: Seed | None = None
    bos: bool | None = None
    column: str | None = None
    chat_template: str | None = None
    loss_on: Annotated[str, _one_of(*LOSS_ON)] | None = None
    delimiter: str | None = None

    @property
    def reading(self) -> dict[str, Any]:
        """The loader's arguments that the table sets."""
        return _values_of(self, (*TEXT_READING, *TASKS_READING))


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The settings of an objective. Each objective takes some of them."""

    normalization: str | None = None
    weighting: str | None = None
    flatten: bool | None = None
    decoding: str | None = None
    positions: str | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that the table sets."""
        return _values_of(self, (of.name for of in dataclasses.fields(LossConfig)))


@dataclass(frozen=True, kw_only=True)
class CalibrationConfig(DataConfig):
    """[[calibration]]: data that searches score on."""

    kind: Annotated[str, _one_of("text", "tasks")]


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig(LossConfig):
    """[[objective]]: a loss, on the calibration sets named by `on`; on all of its kind if none."""

    name: str
    on: tuple[str, ...] = ()


@dataclass(frozen=True)
class SearchConfig:
    """[search]: every algorithm runs for every objective and every size of the removal.

    A size is a number of units, a share of them, or a budget on the pruned model. Algorithms over
    sequences remove nothing, and run once for every objective.
    """

    num_remove: tuple[Budget, ...] = ()
    budget: tuple[str, ...] = ()  # such as "params=75%"
    algorithms: str | tuple[str, ...] = STUDIED
    racing: Annotated[float, Between(least=0, most=1)] | None = None
    seed: Seed = 0
    granularity: Annotated[str, _one_of("block", "sublayer")] = "block"
    protect: str | tuple[Number, ...] = ()
    options: Mapping[str, Mapping[str, object]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class HeldOutConfig(DataConfig, LossConfig):
    """[[held_out]]: an objective that no search sees; it judges all that searches chose."""

    objective: str


@dataclass(frozen=True)
class ResourcesConfig:
    """[resources]: limits in GiB. They change no score, and may change between runs of a study."""

    memory_gb: Gigabytes | None = None
    weights_gb: Gigabytes | None = None
    cache_gb: Annotated[float, Allowed(least=0, most=2**20)] | None = None
    cache_dir: str | None = None

    def in_bytes(self, name: str) -> int | None:
        """One of the limits, in bytes."""
        gigabytes = getattr(self, f"{name}_gb")
        return None if gigabytes is None else int(gigabytes * 2**30)


@dataclass(frozen=True)
class EvaluateConfig:
    """[evaluate]: tasks of lm-evaluation-harness for every chosen mask and control."""

    tasks: tuple[str, ...]
    include_path: str | None = None
    limit: Annotated[float, Between(least=0, most=MOST)] | None = None
    num_fewshot: Number | None = None
    apply_chat_template: bool = False
    system_instruction: str | None = None
    fewshot_as_multiturn: bool = True

    @property
    def settings(self) -> dict[str, Any]:
        """The harness's settings, less the tasks and the folder that holds them."""
        names = {of.name for of in dataclasses.fields(self)} - {"tasks", "include_path"}
        return {name: getattr(self, name) for name in sorted(names)}


@dataclass(frozen=True)
class StudyConfig:
    """A study document. Relative paths start from `base`, by default the document's folder."""

    model: ModelConfig
    calibration: tuple[CalibrationConfig, ...]
    search: SearchConfig
    objective: tuple[ObjectiveConfig, ...] = ()
    held_out: tuple[HeldOutConfig, ...] = ()
    control: tuple[Control, ...] = ()
    resources: ResourcesConfig = ResourcesConfig()
    evaluate: EvaluateConfig | None = None
    base: str | None = None

    @property
    def objectives(self) -> dict[str, tuple[ObjectiveConfig, CalibrationConfig]]:
        """Each objective with its calibration set, by a label such as perplexity-c4."""
        sets = {data.name: data for data in self.calibration}
        return {
            f"{objective.name}-{name}": (objective, sets[name])
            for objective in self.objective
            for name in objective.on
        }

    @property
    def algorithms(self) -> tuple[str, ...]:
        """The names of the algorithms. "all" means every algorithm that removes units."""
        names = self.search.algorithms
        if not isinstance(names, str):
            return names
        return tuple(name for name, known in ALGORITHMS.items() if not known.over_sequences)

    @property
    def settings(self) -> dict[str, object]:
        """The settings by which a study's folder is checked before a model is loaded."""
        search, sizes = self.search, (*self.search.num_remove, *self.search.budget)
        return {
            **search_settings(
                self.algorithms, search.options, sizes, search.seed, search.racing, search.protect
            ),
            "granularity": search.granularity,
            "backend": self.model.backend,
        }


@dataclass(frozen=True)
class Document:
    """A checked study document: its path, settings, text and folder."""

    path: Path
    config: StudyConfig
    text: str
    folder: Path

    @property
    def models(self) -> dict[str, str]:
        """The path or name to load for each model, by the name in the document."""
        base, names = Path(self.config.base or self.folder), self.config.model.paths
        local = {name for name in names if name != "demo" and (base / name).exists()}
        return {name: str(base / name) if name in local else name for name in names}

    def text_for(self, folder: Path) -> str:
        """The text to keep in a study's folder. `base` keeps its relative paths valid there."""
        is_own = folder.exists() and folder.samefile(self.folder)
        if self.config.base is not None or is_own:
            return self.text
        base = json.dumps(str(self.folder), ensure_ascii=False).replace("\x7f", "\\u007f")
        return f"base = {base}  # relative paths start here\n\n{self.text}"


def read_document(path: Path) -> Document:
    """Read a study document and check everything that needs no model.

    Args:
        path: A TOML file; its relative paths start from its folder.

    Returns:
        The document.

    Raises:
        InputError: The file is no TOML, or holds an unknown key, a wrong type or a wrong value.

    Examples:
        >>> from fastprune.study import read_document
        >>> from fastprune.study.config import EXAMPLE
        >>> read_document(EXAMPLE).config.search.num_remove
        (2, 3)
    """
    if not path.is_file():
        raise InputError(
            f"{path}: no such file; fastprune study --example prints one to start from"
        )
    try:
        text = path.read_bytes().decode("utf-8-sig")
        table = tomllib.loads(text)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not a text file in UTF-8") from None
    except RecursionError:
        raise InputError(f"{path}: not valid TOML (nested too deeply)") from None
    except ValueError as error:  # TOMLDecodeError, and Python's own about thousands of digits
        raise InputError(f"{path}: not valid TOML ({error})") from None
    folder = path.absolute().parent
    with at(str(path)):
        config = _check(_parse(StudyConfig, table, ""), folder)
    return Document(path, config, text, folder)


# -- a table to dataclasses ----------------------------------------------------------------------

_KINDS: dict[Any, str] = {
    str: "a text",
    int: "an integer",
    float: "a number",
    bool: "true or false",
    tuple: "a list",
    dict: "a table",
    int | str: 'a share such as "25%", or an integer',
}


def _parse(kind: Any, value: Any, place: str) -> Any:
    """A TOML value as an annotated type. Raises InputError that names its place."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _parse_table(kind, _expect(dict, value, place), place)
    if origin in (typing.Union, types.UnionType):
        kinds = [part for part in parts if part is not type(None)]
        fitting = [of for of in kinds if typing.get_origin(of) is tuple and isinstance(value, list)]
        if len(kinds) > 1 and not fitting and not isinstance(value, str):
            raise InputError(f"{place} must be a text or a list, not {shown(value)}")
        return _parse((fitting or kinds)[0], value, place)
    if origin is Annotated:
        return _parse_limited(parts[0], parts[1], value, place)
    if origin is tuple:
        tables = dataclasses.is_dataclass(parts[0])
        items = _expect(tuple, value, place)
        return tuple(
            _parse(parts[0], item, f"{place}.{_name_of(item, number)}" if tables else place)
            for number, item in enumerate(items, 1)
        )
    if origin is not None:  # search.options: a table of tables, which the registry checks
        options = _expect(dict, value, place)
        return {name: _expect(dict, of, f"{place}.{name}") for name, of in options.items()}
    return _expect(kind, value, place)


def _parse_table(kind: Any, table: Mapping[str, Any], place: str) -> Any:
    known = typing.get_type_hints(kind, include_extras=True)
    prefix = f"{place}." if place else ""
    for name in table:
        if name not in known:
            raise InputError(f"{prefix}{_key(name)} is no known key; {nearest(name, known)}")
    for of in dataclasses.fields(kind):
        required = of.default is MISSING and of.default_factory is MISSING
        if required and of.name not in table:
            raise InputError(f"{prefix}{of.name} is missing")
    return kind(**{name: _parse(known[name], table[name], prefix + name) for name in table})


def _parse_limited(kind: Any, allowed: Allowed, value: Any, place: str) -> Any:
    if allowed.choices:
        value = _expect(kind, value, place)
        if value not in allowed:
            raise InputError(
                f"{place}: unknown value {shown(value)}; {nearest(value, allowed.choices)}"
            )
        return value
    if kind == int | str and not isinstance(value, str):
        kind = int
    if not _is(kind, value) or value not in allowed:
        raise InputError(f"{place} must be {_KINDS[kind]} {allowed}, not {shown(value)}")
    return value if kind == int | str else kind(value)


def _expect(kind: Any, value: Any, place: str) -> Any:
    if not _is(kind, value):
        raise InputError(f"{place} must be {_KINDS[kind]}, not {shown(value)}")
    return value


def _is(kind: Any, value: Any) -> bool:
    if kind is float:
        return type(value) is int or (type(value) is float and math.isfinite(value))
    if kind == int | str:
        return type(value) in (int, str)
    return type(value) is (list if kind is tuple else kind)


def _name_of(table: object, number: int) -> str:
    """A table in a list: its name, or its number from 1 if it has no fitting one."""
    name = table.get("name") if isinstance(table, dict) else None
    return _key(name) if isinstance(name, str) and name else str(number)


def _key(name: str) -> str:
    """A key as TOML spells it: bare, or quoted and shortened."""
    bare = name.replace("-", "").replace("_", "").isalnum() and name.isascii() and len(name) <= 40
    return name if bare else shown(name)


# -- what no single key shows --------------------------------------------------------------------


def _check(config: StudyConfig, folder: Path) -> StudyConfig:
    """Check the document; make paths absolute, and name every objective's calibration sets."""
    if config.base is not None:
        with at("base"):
            if not Path(check_path(config.base)).is_absolute():
                raise InputError(f"must be an absolute path, not {shown(config.base)}")
    base = Path(config.base or folder)
    for path in _once("model.path", config.model.paths, least=1):
        with at("model.path"):
            check_path(path)
    protect = config.search.protect
    if isinstance(protect, str) and protect[:1].isdigit():  # such as "0-3"
        with at("search.protect"):
            config = replace(config, search=replace(config.search, protect=parse_removed(protect)))
    _check_search(config)
    _once("calibration", [data.name for data in config.calibration], least=1)
    sets = tuple(_check_data(data, "calibration", config, base) for data in config.calibration)
    config = replace(config, calibration=sets)
    config = replace(config, objective=_objectives_on_sets(config))
    with at("objective"):
        for label in config.objectives:
            check_label(label)
    held_out = tuple(_check_data(data, "held_out", config, base) for data in config.held_out)
    for label in _once("held_out", [data.name for data in held_out]):
        if label in config.objectives:
            raise InputError(f"held_out.{label}: {label!r} is searched with; name it differently")
    has_sizes = bool(config.search.num_remove or config.search.budget)
    check_controls(config.control, config.algorithms, has_sizes)
    resources, evaluate = config.resources, config.evaluate
    if resources.cache_dir is not None:
        with at("resources.cache_dir"):
            place = check_folder(base / check_path(resources.cache_dir))
        resources = replace(resources, cache_dir=str(place))
    if evaluate:
        _once("evaluate.tasks", evaluate.tasks, least=1)
        if evaluate.include_path is not None:
            with at("evaluate.include_path"):
                place = base / check_path(evaluate.include_path)
            evaluate = replace(evaluate, include_path=str(place))
    return replace(config, held_out=held_out, resources=resources, evaluate=evaluate)


def _once(place: str, names: Sequence[Any], least: int = 0) -> Sequence[Any]:
    """Return the names. Raises InputError for a repeated name, or too few."""
    if len(names) < least:
        raise InputError(f"{place} must name at least one")
    with at(place):
        check_once(names)
    return names


def _check_search(config: StudyConfig) -> None:
    search = config.search
    if isinstance(search.algorithms, str) and search.algorithms != "all":
        raise InputError(
            f'search.algorithms must be a list of names or "all", not {shown(search.algorithms)}'
        )
    if isinstance(search.protect, str) and search.protect not in PRESETS:
        raise InputError(
            f"search.protect: unknown preset {shown(search.protect)}; "
            f"{nearest(search.protect, PRESETS)}; or a list of units, such as [0, 1]"
        )
    with at("search.budget"):
        check_once([str(RemovalBudget.parse(text)) for text in search.budget])
    for name in _once("search.algorithms", config.algorithms, least=1):
        with at("search.algorithms"):
            check_algorithm(name, {})
    only_budgets = search.budget and not search.num_remove
    with at("search.budget" if only_budgets else "search.num_remove"):
        check_sizes(config.algorithms, [*search.num_remove, *search.budget])
    for name, options in search.options.items():
        with at(f"search.options.{_key(name)}"):
            find_algorithm(name)
            if name not in config.algorithms:
                raise InputError(f"{name} is not among search.algorithms")
            known = check_algorithm(name, options)[0].options
            for option, value in options.items():  # only a command line's texts are converted
                kind = known[option].kind
                if isinstance(value, str) and kind is not str:
                    raise InputError(f"{option} must be {_KINDS[kind]}, not {shown(value)}")
    with at("search.racing"):
        check_racing(config.algorithms, search.racing)


def _check_data(data: Any, table: str, config: StudyConfig, base: Path) -> Any:
    """Check a table of data, and set the path of its file; the demo model has its own files."""
    with at(table):
        check_label(data.name)
    place, held_out = f"{table}.{data.name}", isinstance(data, HeldOutConfig)
    if held_out:
        _known_objective(f"{place}.objective", data.objective)
        _check_settings(place, data.objective, data.settings)
    kind = OBJECTIVES[data.objective].data if held_out else data.kind
    _check_reading(place, kind, data)
    if data.chat_template is not None and (base / data.chat_template).is_file():
        data = replace(data, chat_template=str(base / data.chat_template))
    if data.file:
        with at(f"{place}.file"):
            file = os.path.join(base, check_path(data.file))
            file = file if is_data(file) else data.file  # a data set of the hub
            if not is_data(file):
                raise InputError(f"{data.file}: no such file")
    elif set(config.model.paths) != {"demo"}:
        raise InputError(f"{place}.file is missing; only the demo model has data of its own")
    else:
        files = {
            "text": (demo.TEXT, demo.TEXT_HELDOUT),
            "tasks": (demo.QUESTIONS, demo.QUESTIONS_HELDOUT),
        }
        file = str(files[kind][held_out])
    return replace(data, file=file)


def _check_reading(place: str, kind: str, data: DataConfig) -> None:
    """Raise InputError for a key of text in a table of tasks, and the other way round."""
    foreign = TASKS_READING if kind == "text" else ("seq_len", "seed", *TEXT_READING)
    for name in _values_of(data, foreign):
        own = f"for {'tasks' if kind == 'text' else 'text'}"
        hint = "; num_samples says how many questions are used" * (name in ("seq_len", "seed"))
        raise InputError(f"{place}.{name} is {own}{hint}")


def _check_settings(place: str, name: str, settings: Mapping[str, object]) -> None:
    """Raise InputError for a setting that the objective does not have, or a wrong value of it."""
    known = OBJECTIVES[name].settings
    for key, value in settings.items():
        if key not in known:
            own = f"; it has {', '.join(known)}" if known else ""
            raise InputError(f"{place}.{key}: {name} has no such setting{own}")
        if value not in known[key]:
            fits = nearest(str(value), [str(choice) for choice in known[key]])
            raise InputError(f"{place}.{key}: unknown value {shown(value)}; {fits}")


def _objectives_on_sets(config: StudyConfig) -> tuple[ObjectiveConfig, ...]:
    """Every objective with its sets. Without objectives, each kind of data gets one."""
    sets = {data.name: data.kind for data in config.calibration}
    first = {known.data: name for name, known in reversed(OBJECTIVES.items())}  # of each kind
    default = [ObjectiveConfig(name=first[kind]) for kind in dict.fromkeys(sets.values())]
    objectives = []
    for objective in config.objective or default:
        _known_objective("objective", objective.name)
        place, kind = f"objective.{objective.name}", OBJECTIVES[objective.name].data
        _check_settings(place, objective.name, objective.settings)
        for name in objective.on:
            if name not in sets:
                raise InputError(
                    f"{place}.on: unknown calibration set {shown(name)}; {nearest(name, sets)}"
                )
            if sets[name] != kind:
                raise InputError(f"{place}.on: takes {kind}, and {name!r} is {sets[name]}")
        on = objective.on or tuple(name for name in sets if sets[name] == kind)
        if not on:
            raise InputError(f"{place}: takes {kind}, of which no [[calibration]] is")
        objectives.append(replace(objective, on=on))
    _once("objective", [f"{of.name} on {name}" for of in objectives for name in of.on])
    for unused in sets.keys() - {name for objective in objectives for name in objective.on}:
        raise InputError(f"calibration.{unused}: no [[objective]] uses it; name it in `on` of one")
    return tuple(objectives)


def _known_objective(place: str, name: str) -> None:
    if name not in OBJECTIVES:
        raise InputError(f"{place}: unknown objective {shown(name)}; {nearest(name, OBJECTIVES)}")
