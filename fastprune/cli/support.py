"""All that can be done with a model, in a line each: `fastprune info`, and the docs' table."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ..errors import InputError

if TYPE_CHECKING:
    from ..models import Model

TEXT_ONLY = "text alone: its towers for other inputs are kept in exports and never run"
QUESTIONS_AS_ROWS = "rows: each choice runs behind a copy of its question"


def support_of(model: Model) -> dict[str, str]:
    """The units of a model, and whether and how it can be run, by name."""
    from ..exports import can_export
    from ..models import Needs, open_runner
    from ..models.surgery import runs_without_blocks
    from ..models.text import has_towers
    from ..models.verify import check_trees

    blocks, halves = model.unit_names("block"), model.unit_names("sublayer")
    generic = open_runner(model, "generic")
    return {
        "inputs": TEXT_ONLY if has_towers(model.hf) else "text",
        "blocks": f"{len(blocks)}: {_ends(blocks)}",
        "sublayers": _can(
            lambda: open_runner(model, "generic", Needs("sublayer")),
            f"{len(halves)}: {_ends(halves)}",
        ),
        "questions": "token trees" if _holds(lambda: check_trees(generic)) else QUESTIONS_AS_ROWS,
        "path": open_runner(model).path_name,
        "streaming": _streaming(model),
        "without blocks": "yes" if runs_without_blocks(model) else "no",
        "export": "yes" if (reason := can_export(model)) is None else f"no: {reason}",
    }


def _streaming(model: Model) -> str:
    from pathlib import Path

    if model.weights.streamed:
        return "yes: its blocks are read by turns"
    if model.opened is None:
        return "no: it is in memory"
    place = Path(str(model.opened[0][0]))
    if place.exists() and not (place / "config.json").is_file():
        return "no: its weights are made from other ones, and stay loaded"
    return "yes: --weights-gb"


def _ends(names: list[str]) -> str:
    return ", ".join(names) if len(names) < 4 else f"{names[0]}, {names[1]} to {names[-1]}"


def _holds(check: Callable[[], object]) -> bool:
    try:
        check()
    except InputError:
        return False
    return True


def _can(check: Callable[[], object], said: str) -> str:
    try:
        check()
    except InputError as error:
        return f"no: {error}"
    return said
