"""Costs: work as it is counted everywhere, by calls, races, searches and studies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace


@dataclass(frozen=True)
class Cost:
    """Work that was done. Costs add up, and the cost of a part is a difference of two.

    Runs are counted over the whole calibration set: one on half of its tokens counts one half.

    Attributes:
        masks: Scores that were asked for.
        unit_runs: Unit runs that were made, the dense model's to compare with too, counted as they
            happen.
        asked_unit_runs: Distinct prefixes of each call: its unit runs, had nothing been known
            before.
        naive_unit_runs: Unit runs of one forward pass per mask that was asked for.
        head_runs: Masks whose loss was computed.
        store_hits: Scores that were asked for and came from the store.
        weight_loads: Blocks read from files, with streamed weights.
        weight_bytes: Bytes read for them.
        seconds: Wall time spent.

    Examples:
        >>> from fastprune import Cost
        >>> (Cost(masks=3, unit_runs=21) - Cost(masks=1, unit_runs=7)).unit_runs
        14
    """

    masks: int = 0
    unit_runs: float = 0
    asked_unit_runs: float = 0
    naive_unit_runs: float = 0
    head_runs: float = 0
    store_hits: int = 0
    weight_loads: int = 0
    weight_bytes: int = 0
    seconds: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return self._plus(other, 1)

    def __sub__(self, other: Cost) -> Cost:
        return self._plus(other, -1)

    def _plus(self, other: Cost, sign: int) -> Cost:
        return Cost(*[getattr(self, name) + sign * getattr(other, name) for name in _COUNTS])

    def of_tokens(self, num_tokens: int) -> Cost:
        """Counts of single tokens as counts of the whole calibration set."""
        unit_runs, head_runs = self.unit_runs / num_tokens, self.head_runs / num_tokens
        return replace(self, unit_runs=whole(unit_runs), head_runs=whole(head_runs))


_COUNTS = tuple(entry.name for entry in fields(Cost))


@dataclass(frozen=True)
class Stats(Cost):
    """The cost of an evaluator's calls so far, and the bytes that they took.

    Attributes:
        peak_activation_bytes: The most held at once, besides the prefix cache.
        cache_bytes: Held by the prefix cache now.
        cache_hits: States of chunks that it served, by tier.

    Examples:
        >>> import fastprune as fp
        >>> batch = fp.TokenBatch.from_ids([[5, 6, 7, 8, 9], [10, 11, 12]])
        >>> ev = fp.Evaluator(fp.load_model("demo"), fp.Perplexity(batch))
        >>> _ = ev.score(fp.from_removed([(3,), (3, 7)], ev.num_units))
        >>> ev.stats.unit_runs, ev.stats.naive_unit_runs  # shared: 0, 1, 2, 4, 5, 6
        (15, 21)
    """

    peak_activation_bytes: int = 0
    cache_bytes: int = 0
    cache_hits: Mapping[str, int] = field(default_factory=dict)


def whole(count: float) -> float:
    """The count as an integer, if it is one."""
    return int(count) if count == int(count) else count
