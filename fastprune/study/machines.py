"""The machines of a study: their fingerprints, and a note if one table compares several.

Two machines round differently, so their losses of one mask differ in the last digits, and a search
may choose another mask.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..errors import brief

if TYPE_CHECKING:
    from ..models import Model


def fingerprint(model: Model, backend: str) -> tuple[str, dict[str, object]]:
    """A short key and the plain values that decide the bits of a model's scores on this machine."""
    from ..models import open_runner
    from ..models.fingerprint import machine_fingerprint  # only now: they bring torch

    values = {
        **machine_fingerprint(model.device),
        "numerics": open_runner(model, backend).numerics(),
    }
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12], values


def machines_note(study: Mapping) -> str:
    """A note for readers of a study whose losses come from several machines; else empty."""
    notes = []
    for model in study["num_units"]:
        counts = Counter(cell["machine"] for cell in study["cells"] if cell["model"] == model)
        if len(counts) > 1:
            first, *others = (study["inputs"]["machines"].get(key, {}) for key in counts)
            names = sorted(set().union(*(_differing(first, other) for other in others)))
            ran = ", ".join(f"{count} on {key or 'unknown'}" for key, count in counts.items())
            notes.append(
                f"The searches of {brief(model, 80)} ran on {len(counts)} machines ({ran}), which "
                f"differ in {', '.join(names) or 'unknown ways'}. Their search losses compare "
                f"scores of several machines, whose rounding differs. The losses under all "
                f"objectives come from one machine, {study['machine'][model]}."
            )
    return " ".join(notes)


def _differing(a: object, b: object, name: str = "unknown") -> set[str]:
    """The names of the innermost values that differ."""
    if not isinstance(a, dict) or not isinstance(b, dict):
        return {name} if a != b else set()
    return {inner for key in {*a, *b} for inner in _differing(a.get(key), b.get(key), str(key))}
