"""Places of tables in pages: from `<!-- table: NAME -->` to `<!-- end -->`."""

from __future__ import annotations

import re

from .pages import TABLES
from .render import ROOT

PAGES = [
    ROOT / "README.md",
    ROOT / "bench" / "README.md",
    ROOT / "examples" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
PLACE = re.compile(r"(<!-- table: (?P<name>\w+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def updated(page: str) -> str:
    """A page with every table as the results have it."""
    return PLACE.sub(lambda found: f"{found[1]}{TABLES[found['name']].write()}{found[4]}", page)
