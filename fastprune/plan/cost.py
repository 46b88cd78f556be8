"""Costs: one way to count the work of calls, races, searches and studies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace


@dataclass(frozen=True)
class Cost:
    """Work that was done. Costs add up; the cost of a part is the difference of two costs.

    Runs are counted over the whole calibration set: a run on half of its tokens counts one half.

    Attributes:
        masks: Requested scores.
        unit_runs: Unit runs, counted as they happen. Runs of the whole model, to compare with, are
            included.
        asked_unit_runs: Unit runs without caches and store: the distinct prefixes of each call.
        naive_unit_runs: Unit runs of a forward pass for each requested mask.
        head_runs: Masks whose loss was computed.
        store_hits: Requested scores that came from the store.
        weight_loads: Blocks read from files, with streamed weights.
        weight_bytes: Bytes read for these blocks.
        seconds: Wall time.

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
        """Convert runs counted in tokens into runs counted in calibration sets.

        Args:
            num_tokens: Tokens of the calibration set.

        Returns:
            The cost with converted unit runs and head runs.

        Examples:
            >>> from fastprune import Cost
            >>> Cost(unit_runs=300).of_tokens(100).unit_runs
            3
        """
        unit_runs, head_runs = self.unit_runs / num_tokens, self.head_runs / num_tokens
        return replace(self, unit_runs=whole(unit_runs), head_runs=whole(head_runs))


_COUNTS = tuple(entry.name for entry in fields(Cost))


@dataclass(frozen=True)
class Stats(Cost):
    """The cost of an evaluator's calls so far, and their bytes.

    Attributes:
        peak_activation_bytes: The most bytes of activations at once, besides the prefix cache.
        cache_bytes: Bytes in the prefix cache now.
        cache_hits: States of chunks that the cache has served, by tier.

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
    """Return a whole number as an integer, any other count unchanged."""
    return int(count) if count == int(count) else count
