"""An extension of griffe, for the API pages: bare examples in docstrings get a section."""

from __future__ import annotations

import re
from typing import Any

import griffe

EXAMPLE = re.compile(r"(?:\A|\n\n)(>>> .*?)(?=\n\n(?!>>> )|\Z)", re.DOTALL)


class Examples(griffe.Extension):
    """Put paragraphs that begin with `>>>` at the left margin under `Examples:`."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = EXAMPLE.sub(_section, obj.docstring.value)


def _section(match: re.Match) -> str:
    lines = "\n".join(f"    {line}" if line else "" for line in match[1].splitlines())
    return f"\n\nExamples:\n{lines}"
