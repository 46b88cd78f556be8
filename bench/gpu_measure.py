"""Shared by the parts of the GPU benchmark: the clock, the results, timings, and the card's own
ceilings."""

from __future__ import annotations

import gc
import json
import os
import signal
import statistics
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch

FLUSH_BYTES = (
    512 << 20
)  # well over any L2; clearing it also gives the host time to queue what is timed
TIMED_MS, MOST_REPEATS = 400, 30  # of one measurement


class Bench:
    """One run: where it measures, what time it has left, and what it found, on disk after every
    finding.

    tiny: shapes that an interpreter can run, everything once, so that no line goes unrun where
    there is no GPU.
    """

    def __init__(self, device: str, tiny: bool, minutes: float, out: Path, tune: bool = False):
        self.device, self.tiny, self.out, self.tune = torch.device(device), tiny, out, tune
        self.is_cuda = self.device.type == "cuda"
        self.compiles = self.is_cuda and not tiny
        self.dtype = torch.bfloat16
        self._end = self._section_end = time.monotonic() + 60 * minutes
        self.results: dict = json.loads(out.read_text())
        self._flush: torch.Tensor | None = None
        self._models: dict[str, torch.nn.Module] = {}

    # -- time and results --------------------------------------------------------------------------

    def begin(self, limit: float) -> float:
        """A section begins that may take `limit` seconds; fewer where fewer are left, which is
        returned."""
        now = time.monotonic()
        self._section_end = min(self._end, now + limit)
        return self._section_end - now

    def left(self) -> float:
        """Seconds that the section has left."""
        return self._section_end - time.monotonic()

    def left_in_all(self) -> float:
        """Seconds."""
        return self._end - time.monotonic()

    def save(self, section: str, found: dict) -> None:
        """Keep what a section has found so far. A run that is cut short leaves a whole file."""
        self.results[section] = found
        self.out.parent.mkdir(parents=True, exist_ok=True)
        part = self.out.with_name(self.out.name + ".part")
        part.write_text(json.dumps(self.results, indent=1) + "\n")
        os.replace(part, self.out)

    def pick(self, full, tiny):
        return tiny if self.tiny else full

    # -- data --------------------------------------------------------------------------------------

    def random(
        self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        return torch.randn(shape, device=self.device, dtype=dtype or self.dtype) * scale

    def nans(self, *shape: int) -> torch.Tensor:
        """An output in which what was not written shows."""
        return torch.full(shape, torch.nan, device=self.device, dtype=self.dtype)

    def integers(self, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(high, shape, device=self.device)

    def model(self, name: str, make: Callable[[], torch.nn.Module]) -> torch.nn.Module:
        """The model of that name, made when it is first asked for; another one makes room for
        it."""
        if name not in self._models:
            self._models.clear()
            gc.collect()
            self.free()
            self._models[name] = make()
        return self._models[name]

    def free(self) -> None:
        if self.is_cuda:
            torch.cuda.empty_cache()

    # -- timing ------------------------------------------------------------------------------------

    def synchronize(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize(self.device)

    def time(self, work: Callable[[], object], cold: bool = True) -> dict[str, float]:
        """Median milliseconds, and the spread between the 10th and 90th percentile over it. Warmed
        up.

        cold: nothing of the operands is in the cache.
        """
        if self.tiny:
            return {"ms": self.times(work, 1, cold)[0], "spread": 0.0, "repeats": 1}
        work()
        self.synchronize()
        once = self.times(work, 1, cold)[0]
        found = sorted(self.times(work, max(3, min(MOST_REPEATS, int(TIMED_MS / once))), cold))
        median, tenth = statistics.median(found), len(found) // 10
        return {
            "ms": median,
            "spread": (found[-1 - tenth] - found[tenth]) / median,
            "repeats": len(found),
        }

    def times(self, work: Callable[[], object], repeats: int, cold: bool) -> list[float]:
        """Milliseconds of each repetition, by events on the device."""
        if not self.is_cuda:
            return [1000 * self.seconds(work) for _ in range(repeats)]
        if cold and self._flush is None:
            self._flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=self.device)
        pairs = []
        for _ in range(repeats):
            if cold:
                self._flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            work()
            end.record()
            pairs.append((start, end))
        self.synchronize()
        return [start.elapsed_time(end) for start, end in pairs]

    def seconds(self, work: Callable[[], object]) -> float:
        """Seconds of the wall clock until the work is done on the device."""
        self.synchronize()
        started = time.perf_counter()
        work()
        self.synchronize()
        return time.perf_counter() - started

    # -- ceilings ----------------------------------------------------------------------------------

    def ceilings(self) -> dict[str, float]:
        """Bytes and FLOPs a second that the card itself reaches; floors of kernels are reckoned by
        them."""
        count = self.pick(512 << 20, 1 << 20)  # float32 numbers, 2 GiB
        source = self.random(count, dtype=torch.float32)
        target = torch.empty_like(source)
        copy = self.time(lambda: target.copy_(source))
        size = self.pick(8192, 256)
        a, b = self.random(size, size), self.random(size, size)
        matmul = self.time(lambda: a @ b, cold=False)
        return {
            "copy_bytes_per_s": 2 * source.nbytes / copy["ms"] * 1e3,
            "copy": copy,
            "matmul_flops_per_s": 2 * size**3 / matmul["ms"] * 1e3,
            "matmul": matmul,
        }

    def floor_ms(self, moved: float, flops: float) -> float | None:
        """The least time for so many bytes and FLOPs at the ceilings; None where these were not
        measured."""
        ceilings = self.results.get("ceilings", {})
        if "matmul_flops_per_s" not in ceilings:
            return None
        return 1e3 * max(
            moved / ceilings["copy_bytes_per_s"], flops / ceilings["matmul_flops_per_s"]
        )

    def against_floor(self, ms: float, moved: float, flops: float) -> dict[str, float]:
        floor = self.floor_ms(moved, flops)
        return {} if floor is None else {"floor_ms": floor, "of_floor": floor / ms}

    def is_broken(self) -> bool:
        """Whether an earlier error has left the device unusable for this process."""
        try:
            self.synchronize()
            torch.zeros(1, device=self.device).add_(1).item()
        except RuntimeError:
            return True
        return False


@contextmanager
def time_limit(seconds: float):
    """Raises TimeoutError in the block after so many seconds; an outer limit goes on running."""
    started = time.monotonic()

    def stop(*_):
        raise TimeoutError(f"not done within {seconds:.3g} s")

    before = signal.signal(signal.SIGALRM, stop)
    outer, _ = signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.1))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if outer:
            signal.setitimer(signal.ITIMER_REAL, max(outer - (time.monotonic() - started), 0.1))


def relative_error(found: torch.Tensor, truth: torch.Tensor) -> float:
    """||found - truth|| / ||truth||, in float64; NaN where anything is."""
    return ((found.double() - truth.double()).norm() / truth.double().norm()).item()
