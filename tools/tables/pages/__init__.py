"""The tables of each page, in a module of its name, and all of them together."""

from __future__ import annotations

from ..render import Table
from . import (
    bench,
    benchmarks,
    demo_model,
    examples,
    healing,
    kernels,
    readme,
    reliability,
    scale,
    sequences,
    solver,
    study,
    tutorial,
)

MODULES = (
    bench,
    benchmarks,
    demo_model,
    examples,
    healing,
    kernels,
    readme,
    reliability,
    scale,
    sequences,
    solver,
    study,
    tutorial,
)
TABLES: dict[str, Table] = {
    name: table for module in MODULES for name, table in module.TABLES.items()
}
