"""All that can be done with a model, in a line each: `fastprune info`, and the docs' table."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ..errors import InputError

if TYPE_CHECKING:
    from ..models import Model

TEXT_ONLY = "text only, towers not loaded: exports copy them from the files"
TOWERS_LOADED = "text only, towers never run: exports keep them"
QUESTIONS_AS_ROWS = "rows: each choice runs behind a copy of its question"


def support_of(model: Model) -> dict[str, str]:
    """The units of a model, and whether and how it can be run, by name."""
    from ..exports import can_export
    from ..models import Needs, open_runner
    from ..models.surgery import runs_without_blocks

    blocks, halves = model.unit_names("block"), model.unit_names("sublayer")
    return {
        "inputs": _inputs(model),
        "blocks": f"{len(blocks)}: {_ends(blocks)}",
        "sublayers": _can(
            lambda: open_runner(model, "generic", Needs("sublayer")),
            f"{len(halves)}: {_ends(halves)}",
        ),
        "questions": "token trees" if _runs_trees(model) else QUESTIONS_AS_ROWS,
        "path": open_runner(model).path_name,
        "streaming": _streaming(model),
        "without blocks": "yes" if runs_without_blocks(model) else "no",
        "export": "yes" if (reason := can_export(model)) is None else f"no: {reason}",
    }


def _inputs(model: Model) -> str:
    from ..models.text import has_towers

    if not has_towers(model.hf):
        return "text"
    return TOWERS_LOADED if model.towers is None else TEXT_ONLY


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


def _runs_trees(model: Model) -> bool:
    """Whether a question of up to 40 tokens with two choices runs as a tree."""
    import torch

    from ..models import open_runner
    from ..models.verify import check_trees

    trunk = min(40, (model.max_positions or 64) * 5 // 8)
    ends = (trunk, trunk + trunk // 4, trunk + trunk // 3)
    positions = torch.tensor([*range(ends[0]), *range(trunk, ends[1]), *range(trunk, ends[2])])
    branch = torch.tensor([0] * trunk + [1] * (ends[1] - trunk) + [2] * (ends[2] - trunk))
    ids = torch.arange(1, len(branch) + 1) * 7919 % model.vocab_size
    tree = [part[None].to(model.device) for part in (ids, positions, branch)]
    try:
        check_trees(open_runner(model, "generic"), *tree)
    except InputError:
        return False
    return True


def _can(check: Callable[[], object], said: str) -> str:
    try:
        check()
    except InputError as error:
        return f"no: {error}"
    return said
