"""The tables of docs/tutorial.md: the rows that its own commands print.

    OMP_NUM_THREADS=1 python bench/tutorial.py [--out bench/results/tutorial.json]

Every block of the page runs in an empty folder, in order. The rows of each `fastprune score` are
kept as they are printed, in the order of the page.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from record import ROOT, save

PAGE = ROOT / "docs" / "tutorial.md"
BLOCK = re.compile(r"```(sh|python)\n(.*?)```", re.DOTALL)


def run(language: str, text: str, folder: Path) -> list[dict[str, object]]:
    """Run a block of the page, and keep the rows of the scores that it prints."""
    found = []
    lines = [text] if language == "python" else text.replace("\\\n", "").splitlines()
    for line in lines:
        words = [sys.executable, "-c", line] if language == "python" else shlex.split(line)
        if words[0] == "fastprune":
            words[:1] = [sys.executable, "-m", "fastprune"]
        environment = {**os.environ, "COLUMNS": "200"}
        done = subprocess.run(
            words, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=True
        )
        if "score" in words:
            command = " ".join(line.split())
            found.append({"command": command, "rows": printed_rows(done.stdout)})
            print(json.dumps(found[-1], ensure_ascii=False), flush=True)
    return found


def printed_rows(output: str) -> list[list[str]]:
    """The cells of the rows of a printed table."""
    rows = [line.strip("│") for line in output.splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in row.split("│")] for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    scores = []
    with tempfile.TemporaryDirectory() as folder:
        for language, text in BLOCK.findall(PAGE.read_text(encoding="utf-8")):
            scores += run(language, text, Path(folder))
    save(given.out, {"scores": scores})


if __name__ == "__main__":
    main()
