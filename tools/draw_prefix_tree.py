"""Draw the prefix tree of three masks: `python tools/draw_prefix_tree.py`.

Writes docs/figures/prefix-tree.svg. The tree comes from `make_trie`, so the picture shows the
nodes that a call runs. The figure has its own background, so it reads in dark pages too.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from xml.sax.saxutils import escape

from fastprune.masks import from_removed
from fastprune.plan.trie import kept_units, make_trie

NUM_UNITS = 6
REMOVED = (), (4,), (3,)  # one mask each
FIGURE = Path(__file__).resolve().parents[1] / "docs" / "figures" / "prefix-tree.svg"

COLUMN, ROW, RADIUS = 88, 64, 19  # pixels
LEFT, TOP, TREE_LEFT = 20, 40, 180
PAPER, INK, SHARED, OWN, LINE = "#ffffff", "#1f2933", "#2f6f9f", "#8fb8d6", "#7b8794"


def draw() -> str:
    """Return the figure as SVG text."""
    sequences = kept_units(from_removed(REMOVED, NUM_UNITS))
    trie = make_trie(sequences)
    paths = [trie_path(trie.parent, end) for end in trie.ends[trie.index]]
    rows: dict[int, int] = {}  # node -> line of the figure: that of the first mask through it
    users: dict[int, int] = {}  # node -> number of masks that pass through it
    for row, path in enumerate(paths):
        for node in path:
            rows.setdefault(node, row)
            users[node] = users.get(node, 0) + 1
    rows[0] = 0

    def place(node: int) -> tuple[int, int]:
        return TREE_LEFT + COLUMN * int(trie.depth[node]), TOP + ROW * rows[node]

    width = TREE_LEFT + COLUMN * (NUM_UNITS + 1) + 40
    height = TOP + ROW * len(paths) + 36
    shapes = [f'<rect width="{width}" height="{height}" rx="8" fill="{PAPER}"/>']
    nodes = range(1, len(trie.unit))  # 0 is the root: the embedded tokens
    for node in nodes:
        (x1, y1), (x2, y2) = place(int(trie.parent[node])), place(node)
        middle = x1 + COLUMN // 2
        shapes.append(
            f'<path d="M{x1} {y1} C{middle} {y1} {middle} {y2} {x2} {y2}" fill="none" '
            f'stroke="{LINE}" stroke-width="2"/>'
        )
    shapes.append(f'<circle cx="{TREE_LEFT}" cy="{TOP}" r="6" fill="{INK}"/>')
    for node in nodes:
        x, y = place(node)
        shared = users[node] > 1
        colour = SHARED if shared else OWN
        shapes.append(f'<circle cx="{x}" cy="{y}" r="{RADIUS}" fill="{colour}"/>')
        shapes.append(text(x, y + 5, str(trie.unit[node]), PAPER if shared else INK, "middle"))
    for row, (removed, path) in enumerate(zip(REMOVED, paths)):
        label = f"without {', '.join(map(str, removed))}" if removed else "the whole model"
        shapes.append(text(LEFT, TOP + ROW * row + 5, label))
        x, y = place(path[-1])
        shapes.append(text(x + RADIUS + 10, y + 5, "loss"))
    shapes.append(
        text(
            LEFT,
            height - 18,
            f"{len(paths)} masks: {trie.unit_runs} block runs instead of {trie.naive_unit_runs}. "
            "Dark blocks serve more than one mask.",
        )
    )
    lines = "\n".join(f"  {shape}" for shape in shapes)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        'font-family="system-ui, sans-serif" font-size="15" role="img" '
        f'aria-label="The prefix tree of {len(paths)} masks">\n{lines}\n</svg>\n'
    )


def trie_path(parent: Sequence[int], end: int) -> list[int]:
    """Return the nodes from the first unit to `end`."""
    path = []
    while end > 0:
        path.append(int(end))
        end = parent[end]
    return path[::-1]


def text(x: int, y: int, words: str, colour: str = INK, anchor: str = "start") -> str:
    """Return one text element, its baseline at y."""
    return f'<text x="{x}" y="{y}" fill="{colour}" text-anchor="{anchor}">{escape(words)}</text>'


if __name__ == "__main__":
    FIGURE.write_text(draw(), encoding="utf-8")
    print(FIGURE)
