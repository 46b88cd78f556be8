"""The Python of the pages that explain one concept runs as it is copied."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["index", "scoring", "racing", "questions", "sequences", "budgets", "variants", "optuna"],
)
def test_the_python_of_a_page_runs(name, tmp_path, monkeypatch):
    if name == "optuna":
        pytest.importorskip("optuna")
    monkeypatch.chdir(tmp_path)
    page = (DOCS / f"{name}.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert blocks
    exec(compile("\n".join(blocks), f"{name}.md", "exec"), {})
