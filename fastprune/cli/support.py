"""The ways in which a model can be used, in a line each, for `fastprune info` and the docs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError
from ..exports import can_export

if TYPE_CHECKING:
    from ..models import Model

TEXT_ONLY = "text only, towers not loaded: exports copy them from the files"
TOWERS_LOADED = "text only, towers never run: exports keep them"
QUESTIONS_AS_ROWS = "rows: each choice runs behind a copy of its question"
TREES = "token trees"
BITS = {"float64": 64, "float32": 32, "bfloat16": 16, "float16": 16}
UNITS = {
    "hidden size": " values for each token",
    "vocabulary": " tokens",
    "positions": " tokens in a row",
}
SENTENCES = {
    ("tokenizer", "yes"): "found",
    ("questions", TREES): "the choices of a question share its tokens",
    ("questions", QUESTIONS_AS_ROWS): "each choice runs behind a copy of its question",
    ("path", "generic"): "generic: transformers' own code",
    ("path", "fused (native)"): "fused: operators of fastprune, in C++",
    ("path", "fused (torch)"): "fused: operators of fastprune, in torch",
    ("path", "fused (triton)"): "fused: operators of fastprune, in Triton",
    ("streaming", "yes: --weights-gb"): "a model larger than memory runs with --weights-gb",
    ("without blocks", "yes"): "the model without any block can be scored",
    ("without blocks", "no"): "at least one block must stay",
    ("export", "yes"): "fastprune export writes a checkpoint without the removed blocks",
}


def support_of(model: Model) -> dict[str, str]:
    """The units of a model, and the ways in which it can run, by name."""
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
        "questions": TREES if _runs_trees(model) else QUESTIONS_AS_ROWS,
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


def sentences(values: Mapping[str, object]) -> list[tuple[str, str]]:
    """Turn the values of `info` into lines for a reader: a name, and one fact with its unit."""
    lines = []
    for name, value in values.items():
        text = SENTENCES.get((name, str(value)), str(value))
        if name == "blocks":
            text = _numbered(str(value))
        elif name == "sublayers" and not text.startswith("no: "):
            text = f"{_numbered(text)} ({text.partition(': ')[2]}), with --granularity sublayer"
        elif isinstance(value, int):
            text = f"{value:,}"
        if name == "parameters" and isinstance(value, int):
            size = value * BITS[str(values["dtype"])] / 8 / 2**20
            text += f", {size:,.0f} MiB in {values['dtype']}"
        lines.append((name, f"{text}{UNITS.get(name, '')}"))
    return lines


def _numbered(listed: str) -> str:
    """The count of a list of units, and their numbers for options."""
    count = int(listed.partition(":")[0])
    return f"{count}, numbered 0 to {count - 1}"


def _streaming(model: Model) -> str:
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
