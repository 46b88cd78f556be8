"""Check the words of docstrings and comments: `python tools/check_words.py`; make lint runs it.

No docstring may begin with What, Who, Where, Which, Of, How, That or a relative clause: it names
its subject first. Some phrases that hide a subject are counted per 1,000 words of the package.
Their rates may fall, never rise: when a rate has fallen, lower its ceiling below.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "fastprune", "kernels"
FOLDERS = *PACKAGE, "bench", "examples", "tests", "tools"
HEADLESS = re.compile(
    r"(What|Who|Where|Which|How)(ever)?\b|(Of|That|Whose|Whom)\b"
    r"|(Those|All|Anything|Everything) (that|which|who)\b"
)
CEILINGS = {"what": 0.3, "where": 0.3, "that (is|are)": 0.6}  # pattern -> uses per 1,000 words


def main() -> int:
    words, headless = [], []
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            source = path.read_text(encoding="utf-8")
            for line, text in docstrings(source):
                if folder in PACKAGE:
                    words.append(text)
                if HEADLESS.match(text):
                    headless.append(f"{path.relative_to(ROOT)}:{line}: {text.splitlines()[0]}")
            if folder in PACKAGE:
                words.extend(comments(source))
    text = " ".join(words)
    total = len(re.findall(r"[A-Za-z]+(?:'[a-z]+)?", text))
    failures = []
    for pattern, ceiling in CEILINGS.items():
        rate = 1000 * len(re.findall(rf"\b{pattern}\b", text, re.IGNORECASE)) / total
        print(f'"{pattern}": {rate:.2f} per 1,000 words (at most {ceiling})')
        if rate > ceiling:
            failures.append(f'"{pattern}" is used {rate:.2f} times in 1,000 words, above {ceiling}')
    print(f"docstrings that do not begin with their subject: {len(headless)}")
    if headless:
        failures += [*headless, "begin these docstrings with their subject"]
    print("\n".join(failures), file=sys.stderr, end="\n" if failures else "")
    return bool(failures)


def docstrings(source: str) -> Iterator[tuple[int, str]]:
    """Yield (line, text) of each docstring, examples left out."""
    kinds = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, kinds) and (text := ast.get_docstring(node)):
            prose = re.sub(r"(?m)^\s*>>>.*(\n(?!\s*\n).*)*", "", text)
            yield node.body[0].lineno, prose


def comments(source: str) -> Iterator[str]:
    """Yield the text of each comment."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.string.lstrip("# ")


if __name__ == "__main__":
    sys.exit(main())
