"""What every search finds for one seed; as a script, prints it as JSON, for comparison across processes."""

from __future__ import annotations

import json

from synthetic import SyntheticEvaluator

import fastprune as fp
from fastprune.search import ALGORITHMS


def outcomes() -> dict[str, list]:
    """By algorithm: the removed units, the loss to the bit, and the history."""
    found = {}
    for name in ALGORITHMS:
        options = {"trials": 20} if name == "bayesian" else {}
        result = fp.run_search(SyntheticEvaluator(9, seed=8, num_samples=20), name, 4, seed=11, **options)
        history = [[list(removed), loss.hex()] for removed, loss in result.history]
        found[name] = [list(result.removed), result.loss.hex(), history]
    return found


if __name__ == "__main__":
    print(json.dumps(outcomes()))
