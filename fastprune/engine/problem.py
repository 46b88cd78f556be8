"""A problem: all data and settings that decide the bits of a call's sums.

A problem never changes. Another layout, model or switch of torch makes another problem.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from ..data import TokenBatch
from ..models import Model, Runner
from ..models.attention import BACKEND_NAMES
from ..models.fingerprint import machine_fingerprint
from ..plan.layout import Layout
from .chunks import Chunks
from .measures import MEASURES, Measure

ARITHMETIC = 3  # raised by every change of the order or precision of operations


@dataclass(frozen=True, eq=False)
class Problem:
    """The data, measure and settings under which one call computes its sums.

    Attributes:
        batch: The calibration set as the model runs it.
        measure_name: A name of `MEASURES`.
        granularity: "block" or "sublayer".
        layout: The layout of the calibration set.
        numerics: Further settings that decide bits: path, dtype, device, software.
        digest: The model's digest; None if neither a store nor workers need it.
        number: A number that no other problem of this process has.
    """

    batch: TokenBatch
    measure_name: str
    granularity: str
    layout: Layout
    numerics: Mapping[str, object]
    digest: str | None = None
    number: int = field(default_factory=itertools.count().__next__, init=False)

    @property
    def measure(self) -> Measure:
        return MEASURES[self.measure_name]

    @property
    def num_tokens(self) -> int:
        """Tokens that run for a unit run; split trees count their trunk once for each branch."""
        return int(self.batch.read_tokens.sum())

    @cached_property
    def chunks(self) -> Chunks:
        """The rows of the calibration set that run together, and parts of rows."""
        return Chunks(self.batch, self.layout.chunks)

    @property
    def context(self) -> dict[str, object]:
        """The inputs that decide the bits of a sum besides its chunk and units, as plain values."""
        return {
            **self.numerics,
            "arithmetic": ARITHMETIC,
            "tile": self.layout.tile,
            "granularity": self.granularity,
            "measure": self.measure_name,
            "weights": self.digest,
        }


def numerics_of(model: Model, runner: Runner) -> dict[str, object]:
    """The settings that decide the bits of a sum besides weights, chunk and units, by name."""
    return {
        "path": runner.numerics(),
        "dtype": str(model.dtype),
        "attention": getattr(model.config, "_attn_implementation", None),
        "experts": getattr(model.config, "_experts_implementation", None),
        "sdpa": BACKEND_NAMES,
        "machine": machine_fingerprint(model.device),
    }
