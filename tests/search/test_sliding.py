"""sliding_window_merge against the walk of its paper's code, one threshold after the other."""

from __future__ import annotations

import numpy as np
import pytest

import fastprune as fp
from fastprune.testing import SyntheticEvaluator


def walk(loss, layers: list[int], threshold: float, k: int, keep: str) -> list[int]:
    """The layers, at most k, that a walk from the last one down to the first removes; loss: of a
    list of removed layers."""
    gone: list[int] = []
    high = len(layers) - 1
    low = high - 1
    while low >= 0 and len(gone) < k:
        window = layers[low : high + 1]
        without = gone + (window[1:] if keep == "low" else window[:-1])
        acceptable = low == high or loss(without) <= threshold
        if acceptable and len(without) == k:
            return without
        if acceptable:
            low -= 1
            continue
        merged = layers[low + 1 : high + 1]
        if len(merged) > 1:
            gone = gone + (merged[1:] if keep == "low" else merged[:-1])
            high = low
        else:
            high -= 1
            low -= 1
    if low < 0:  # the first layer ended the last window
        merged = layers[: high + 1]
        gone = gone + (merged[1:] if keep == "low" else merged[:-1])
    return gone


@pytest.mark.parametrize("keep", ["low", "high"])
@pytest.mark.parametrize("seed", range(4))
def test_the_lowest_threshold_whose_walk_removes_enough(seed, keep):
    size = 9
    known = SyntheticEvaluator(size, seed)

    def loss(gone) -> float:
        return float(known.score(fp.from_removed([gone], size))[0])

    def noting(tried):
        return lambda gone: tried.append(gone) or loss(gone)

    for protect in ((), (3, 4)):
        layers = [unit for unit in range(size - 1) if unit not in protect]
        for k in range(2, len(layers)):
            arguments = {"keep": keep, "protect": protect}
            result = fp.run_search(
                SyntheticEvaluator(size, seed), "sliding_window_merge", k, **arguments
            )
            # a walk depends on nothing of a threshold but which losses are above it
            tried: list[list[int]] = [[unit] for unit in layers]
            for threshold in sorted({value for _, value in result.history}):
                gone = walk(noting(tried), layers, threshold, k, keep)
                if len(gone) == k:
                    break
            assert {removed for removed, _ in result.history} == {
                tuple(sorted(units)) for units in tried
            }
            assert result.removed == tuple(sorted(gone))
            assert result.choice == "method's"


def test_windows_of_what_changes_little():
    """Neighbours that stand in for one another go, all but one; what matters alone stays."""

    class Patches(SyntheticEvaluator):
        def loss(self, units: np.ndarray) -> float:
            gone = {*units.tolist()}
            patches = ({1, 2, 3}, {5, 6, 7})
            return float(sum(patch <= gone for patch in patches) + len(gone & {0, 4, 8, 9}))

    assert fp.run_search(Patches(10), "sliding_window_merge", 4).removed == (2, 3, 6, 7)
    low = fp.run_search(Patches(10), "sliding_window_merge", 4, keep="low")
    assert low.removed == (2, 3, 6, 7)


def test_without_room_everything_goes_that_can():
    assert fp.run_search(SyntheticEvaluator(5), "sliding_window_merge", 4).removed == (0, 1, 2, 3)
    assert fp.run_search(
        SyntheticEvaluator(5), "sliding_window_merge", 4, protect=(1,)
    ).removed == (0, 2, 3, 4)
