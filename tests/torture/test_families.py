"""Every family of the installed transformers: no number that comes out is wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "sweep_families.py"


@pytest.mark.nightly
@pytest.mark.skipif(
    "FASTPRUNE_TORTURE" not in os.environ, reason="make torture sweeps for half an hour"
)
def test_no_family_is_wrong(tmp_path):
    results = tmp_path / "results.json"
    subprocess.run([sys.executable, TOOL, "--json", results], check=True, capture_output=True)
    measured = json.loads(results.read_text())
    exact = 0
    for name, found in measured.items():
        errors = found.get("errors", {})
        numbers = {step: error for step, error in errors.items() if isinstance(error, float)}
        assert all(error <= 1e-5 for error in numbers.values()), (name, numbers)
        exact += "blocks" in numbers
    assert exact >= 150
