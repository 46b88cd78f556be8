"""Reports of long work: one type of event, from a call up to the study around it.

A call counts its unit runs. Each stage around it (race, search, study) adds its own fields through
`reporting`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True)
class ProgressEvent:
    """A report of long work, passed to `progress=` of Evaluator, `run_search` and `run_study`.

    Attributes:
        done: Unit runs that the present call has made. A run on each chunk counts.
        total: Unit runs of the present call.
        share: The finished part of the call, or of the search around it, from 0 to 1; None if
            unknown. The searches of a study cost too differently for a share of the study.
        algorithm: The algorithm of a search.
        round: The present round of a search, from 1 on.
        rounds: The rounds of a search, if its algorithm knows their number.
        best: The lowest loss of a search so far, as the objective formats it.
        candidates: Masks that remain in a race.
        cell: The present search of a study, such as "3/16 demo: perplexity-text, 3 removed, beam".

    Examples:
        >>> import fastprune as fp
        >>> events = []
        >>> batch = fp.TokenBatch.from_ids([[5, 6, 7, 8, 9], [10, 11, 12]])
        >>> ev = fp.Evaluator(fp.load_model("demo"), fp.Perplexity(batch), progress=events.append)
        >>> _ = fp.run_search(ev, "greedy", num_remove=1)
        >>> events[-1].algorithm, events[-1].share
        ('greedy', 1.0)
    """

    done: int
    total: int
    share: float | None = None
    algorithm: str | None = None
    round: int | None = None
    rounds: int | None = None
    best: str | None = None
    candidates: int | None = None
    cell: str | None = None


Progress = Callable[[int, int], None]  # of one call: (unit runs done, unit runs in total)
ProgressCallback = Callable[[ProgressEvent], None]


# work around a call, such as a race or a search: adds its fields to an event; its listener
_Stage = tuple[Callable[[ProgressEvent], ProgressEvent], ProgressCallback | None]
# a context variable, so that searches in several threads do not mix; outermost stage first
_STAGES: ContextVar[tuple[_Stage, ...]] = ContextVar("fastprune_stages", default=())


@contextmanager
def reporting(
    describe: Callable[[ProgressEvent], ProgressEvent], listener: ProgressCallback | None = None
) -> Iterator[None]:
    """Pass the events of calls made inside through `describe`, then to the listener."""
    token = _STAGES.set((*_STAGES.get(), (describe, listener)))
    try:
        yield
    finally:
        _STAGES.reset(token)


def event_reporter(listener: ProgressCallback | None) -> Progress:
    """Make a function of (done, total) that reports events to all listeners, this one last."""
    stages = _STAGES.get()
    if listener is None and all(own is None for _, own in stages):
        return lambda done, total: None

    def report(done: int, total: int) -> None:
        share = done / total if total else 1.0  # of a call whose states are all in the cache
        event = ProgressEvent(done, total, share)
        for describe, own in reversed(stages):
            event = describe(event)
            if own is not None:
                own(event)
        if listener is not None:
            listener(event)

    return report
