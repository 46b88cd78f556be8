"""Planning alone: masks to ordered steps, for 10,000 random masks of 80 units."""

from __future__ import annotations

import numpy as np

from fastprune.plan import kept_units, make_plan, max_slots


def test_plan_10000_masks_of_80_units(benchmark):
    masks = np.random.default_rng(0).random((10_000, 80)) < 0.8
    plan = benchmark(lambda: make_plan(kept_units(masks)))
    assert plan.num_slots <= max_slots(80, 10_000)
    benchmark.extra_info["layer_runs"] = plan.layer_runs
