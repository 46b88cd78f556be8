"""Every example, one after the other, in one process: the table of README.md.

python examples/all.py [MODEL] [--text FILE] [--rows N] [--length T]
    [--out bench/results/examples.json]
"""

import importlib
import sys
from pathlib import Path

from shared import compare, open_rows, options, report

sys.path.append(str(Path(__file__).parents[1] / "bench"))
from record import save

NAMES = ("sleb", "evopress", "block_halves", "shapley", "pruneme", "replace_one_block", "duplicate")

if __name__ == "__main__":
    parser = options("all")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    hf, rows = open_rows(given)
    found = []
    for name in NAMES:
        example = importlib.import_module(name)
        row = compare(example.loop, example.fast, hf, rows)
        report(name, row)
        found.append({"example": name, **{key: row[key] for key in row if key != "chosen"}})
        results = {"rows": given.rows, "length": given.length, "examples": found}
        save(given.out, results, part=Path(given.model).name)
