"""The cost of threads that wait at barriers, alone and beside a process that takes a core.

    python bench/threads.py [--beside N] [--out bench/results/threads.json]

Scores the demo model without each of its blocks, on two windows, in fresh processes, for each
number of threads and each way of waiting, in turn and three times over. Prints every measurement,
and the median seconds of the clock and of the processors. --beside: so many processes that only
count run at the same time.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from record import save

WORK = """
import json, time
import fastprune as fp
from fastprune import demo
model = fp.load_model("demo")
ev = fp.Evaluator(model, fp.Perplexity(fp.load_text(demo.TEXT, model.tokenizer, 2, demo.WINDOW)))
masks = fp.from_removed([(unit,) for unit in range(model.num_blocks)], model.num_blocks)
ev.score(masks[:3])
wall, cpu = time.perf_counter(), time.process_time()
ev.score(masks)
print(json.dumps([time.perf_counter() - wall, time.process_time() - cpu]))
"""
WAITS = {
    "as libgomp does": {},
    "passive": {"OMP_WAIT_POLICY": "passive"},
    "1,000 spins": {"GOMP_SPINCOUNT": "1000"},
}


def measure(threads: int, environment: dict[str, str]) -> list[float]:
    """Seconds of the clock, and of the processors."""
    settings = {**os.environ, "OMP_NUM_THREADS": str(threads), **environment}
    out = subprocess.run(
        [sys.executable, "-c", WORK], env=settings, capture_output=True, text=True, check=True
    ).stdout
    return json.loads(out.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--beside", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    cases = [(1, "as libgomp does"), *((os.cpu_count(), how) for how in WAITS)]
    busy = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(given.beside)
    ]
    try:
        found = []
        for _, case in itertools.product(range(given.repeats), cases):
            found.append((case, measure(case[0], WAITS[case[1]])))
            print(*case, *(f"{seconds:.2f}" for seconds in found[-1][1]), flush=True)
    finally:
        for process in busy:
            process.kill()
    medians = []
    for case in cases:
        wall, cpu = zip(*(seconds for other, seconds in found if other == case))
        row = {"threads": case[0], "waiting": case[1], "seconds": statistics.median(wall)}
        medians.append(row | {"cpu_seconds": statistics.median(cpu)})
        print(json.dumps(medians[-1]))
    results = {"beside": given.beside, "medians": medians}
    save(given.out, results | {"runs": [[*case, *seconds] for case, seconds in found]})


if __name__ == "__main__":
    main()
