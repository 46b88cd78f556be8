"""The speed of kernels and fused path on a GPU: `python bench/gpu.py --resume`, from a source tree,
in 14 minutes.

First the promise: scores are the same to the bit in whatever company. Then the card's own ceilings,
one block, the loss kernels, every other kernel against its floor and against torch, and the tests.
Then whole searches with random weights: pairs and margins against one transformers forward pass per
mask, and a beam search. Last comes what may be cut: another model, and torch.compile.

Sections run in a process of their own, and every finding is on disk as it is made: one that hangs
is killed at its limit, and the others go on in a new process. Sections that time does not allow are
skipped, and said to be. The same command runs later what the file lacks. A table is printed at the
end. `--device cpu --tiny` runs every line of it at shapes that Triton's interpreter can run; its
times mean nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [
    str(ROOT),
    str(ROOT / "kernels"),
    str(ROOT / "bench"),
    str(ROOT / "tests" / "kernels"),
]

# In order of importance: what comes later is what time may run out for. Seconds that must be left
# to begin a section, and that it may take at most.
SECTIONS = {
    "bits": (20, 120),
    "ceilings": (5, 30),
    "block": (20, 60),
    "loss": (20, 90),
    "kernels": (20, 75),
    "tests": (20, 130),
    "pairs": (60, 120),
    "margin": (30, 60),
    "beam": (45, 150),
    "margin, Qwen3": (30, 60),
    "pairs, Qwen3": (60, 120),
    "compiled": (30, 150),
}
TESTS = (
    "kernels/test_fused_model",
    "kernels/test_triton_ops",
)
TESTS += ("kernels/test_linear_loss", "kernels/test_attention", "kernels/test_reference")
UNUSABLE = 3  # exit status of a worker whose device a fault has left unusable


def main() -> int:
    arguments = parse()
    if arguments.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton
    if arguments.reports is not None:
        return work(arguments)
    from gpu_watch import failure, watch

    held = json.loads(arguments.out.read_text()) if resumes(arguments) else {}
    again = {name for name in arguments.only if is_whole(held.get(name, {}))}
    save(arguments.out, {name: found for name, found in held.items() if name not in again})
    started = time.monotonic()

    def command(sections: list[str], descriptor: int) -> list[str]:
        minutes = arguments.minutes - (time.monotonic() - started) / 60
        words = [
            sys.executable,
            __file__,
            "--device",
            arguments.device,
            "--out",
            str(arguments.out),
            "--resume",
        ]
        words += [
            "--minutes",
            f"{minutes:.3f}",
            "--only",
            "+".join(sections),
            "--reports",
            str(descriptor),
        ]
        return words + ["--tiny"] * arguments.tiny + ["--tune"] * arguments.tune

    def failed(section: str, error: Exception) -> None:
        print(f"{section}: {error}", flush=True)
        results = json.loads(arguments.out.read_text())
        results[section] = failure(error) | results.get(section, {})
        save(arguments.out, results)

    began = watch(command, arguments.only, failed)
    results = json.loads(arguments.out.read_text())
    if "machine" in results:
        save(arguments.out, results | {"goals": {"rows": goals(results)}})
        print(table(json.loads(arguments.out.read_text())))
    return 0 if began else 1


def save(out: Path, results: dict) -> None:
    """A run that is cut short leaves a whole file."""
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(out.name + ".part")
    part.write_text(json.dumps(results, indent=1) + "\n")
    os.replace(part, out)


def work(arguments: argparse.Namespace) -> int:
    """Run the sections, in this process, and report each to the one that watches."""
    from gpu_measure import Bench, time_limit
    from gpu_watch import Reports, failure

    bench = Bench(
        arguments.device, arguments.tiny, arguments.minutes, arguments.out, arguments.tune
    )
    reports = Reports(arguments.reports)
    if arguments.device == "cpu":
        _interpret()
    if "machine" not in bench.results:
        bench.save("machine", machine(bench))
    for section in arguments.only:
        least, most = SECTIONS[section]
        if bench.left_in_all() < (0 if bench.tiny else least):
            bench.save(section, {"skipped": f"{bench.left_in_all():.0f} s were left"})
            continue
        limit = bench.begin(most)
        reports.begins(section, limit)
        print(f"{section} ({bench.left_in_all():.0f} s left)", flush=True)
        started = time.monotonic()
        try:
            with time_limit(limit):
                run(bench, section)
        except Exception as error:
            traceback.print_exc()
            bench.save(section, {**bench.results.get(section, {}), **failure(error)})
            if bench.is_broken():
                return UNUSABLE
        bench.save(section, {**bench.results[section], "section_s": time.monotonic() - started})
        bench.free()
    return 0


def _interpret() -> None:
    """Kernels under Triton's interpreter; whole searches with torch's operators, since interpreted
    ones crawl."""
    import numpy
    import triton
    import triton_interpreter

    from fastprune.models import fused

    patch.object(fused, "fast_operators", lambda device, dtype: None).start()
    if triton_interpreter.mend():
        print(
            f"the interpreter of Triton {triton.__version__} is mended to run with NumPy "
            f"{numpy.__version__}"
        )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--device", default="cuda", help="cuda, or cpu: Triton's interpreter, for tiny shapes only"
    )
    parser.add_argument(
        "--tiny", action="store_true", help="tiny shapes, everything once, no tests"
    )
    parser.add_argument("--minutes", type=float, default=14, help="wall clock for all of it")
    parser.add_argument(
        "--out", type=Path, default=Path(os.environ.get("OUT", "bench/results")) / "gpu.json"
    )
    parser.add_argument(
        "--only", type=lambda text: text.split("+"), help=f"sections: {'+'.join(SECTIONS)}"
    )
    parser.add_argument(
        "--tune", action="store_true", help="time other configurations of the kernels as well"
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="add to what the file holds: the sections of --only, else those that it lacks",
    )
    parser.add_argument(
        "--reports", type=int, help=argparse.SUPPRESS
    )  # of a worker: the descriptor it reports to
    arguments = parser.parse_args()
    wanted = arguments.only or list(SECTIONS)
    unknown = set(wanted) - set(SECTIONS)
    if unknown:
        parser.error(f"--only: no section {sorted(unknown)[0]!r}; they are {'+'.join(SECTIONS)}")
    if arguments.device == "cpu" and not arguments.tiny:
        parser.error("--device cpu runs an interpreter: it needs --tiny")
    if arguments.minutes <= 0:
        parser.error(f"--minutes must be above 0, not {arguments.minutes:g}")
    held = json.loads(arguments.out.read_text()) if resumes(arguments) else {}
    if arguments.only is None:
        wanted = [section for section in wanted if not is_whole(held.get(section, {}))]
    if "ceilings" not in held and "ceilings" not in wanted:
        wanted = ["ceilings", *wanted]  # floors are reckoned by them
    arguments.only = [section for section in SECTIONS if section in wanted]
    if arguments.tiny:
        arguments.only = [section for section in arguments.only if section != "tests"]
    return arguments


def resumes(arguments: argparse.Namespace) -> bool:
    return arguments.resume and arguments.out.is_file()


def is_whole(found: dict) -> bool:
    """Whether a section has run to its end, and nothing in it has failed, ran out of time or was
    skipped."""
    parts = [found, *(part for part in found.values() if isinstance(part, dict))]
    cut = {"failed", "skipped", "extrapolated"}
    return "section_s" in found and not any(cut & set(part) for part in parts)


def run(bench, section: str) -> None:
    import gpu_bits
    import gpu_kernels
    import gpu_models

    name = "Qwen3 8B" if section.endswith("Qwen3") else "LLaMA-3 8B"
    part = section.removesuffix(", Qwen3")
    if part in ("loss", "kernels", "compiled"):
        gpu_kernels.run(bench, section)
    elif part == "tests":
        bench.save(section, tests(bench.left() - 5))
    elif part == "ceilings":
        bench.save(section, bench.ceilings())
    else:
        module = gpu_bits if part == "bits" else gpu_models
        bench.save(section, {"model": name, **getattr(module, part)(bench, name)})


def tests(limit: float) -> dict:
    """The kernels' tests and the fused model's, on the GPU, in a process of their own."""
    if importlib.util.find_spec("pytest") is None:
        return {"skipped": "pytest is not installed"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--tb=line",
        "--maxfail=20",
        "-p",
        "no:cacheprovider",
    ]
    command += [f"tests/{name}.py" for name in TESTS]
    if importlib.util.find_spec("xdist") is not None:
        command += [
            "-n",
            str(max(1, min(8, (os.cpu_count() or 2) // 2))),
        ]  # most of the time is compilation
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    started = time.monotonic()
    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **pipes)
    try:
        output, _ = process.communicate(timeout=limit)
        status = process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # its workers too: they hold memory of the device
        output, _ = process.communicate()
        status = f"cut off after {limit:.0f} s"
    lines = output.strip().splitlines()
    print("\n".join(lines[-15:]), flush=True)
    return {"status": status, "seconds": time.monotonic() - started, "tail": lines[-60:]}


def machine(bench) -> dict:
    import torch
    import transformers

    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    if importlib.util.find_spec("triton"):
        import triton

        found["triton"] = triton.__version__
    found |= {"device": platform.processor() or platform.machine(), "tiny": bench.tiny}
    if bench.is_cuda:
        card = torch.cuda.get_device_properties(bench.device)
        found |= {
            "device": card.name,
            "memory_bytes": card.total_memory,
            "multiprocessors": card.multi_processor_count,
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
        }
    return found


# -- what was found --------------------------------------------------------------------------------


def goals(results: dict) -> list[list[str]]:
    """[goal, measured, verdict], a row for each goal.

    The verdict is "met" or "missed" of measured figures alone. Others are "open", "timed out" or
    "extrapolated".
    """

    def of(*path: str):
        found = results
        for name in path:
            found = found.get(name) if isinstance(found, dict) else None
        return found

    rows = []

    def row(goal: str, path: tuple[str, ...], verdict, unit: str = "", scale: float = 1) -> None:
        value = of(*path)
        if value is None:
            late = any((of(*path[:i]) or {}).get("timed_out") for i in range(1, len(path)))
            rows.append([goal, "not measured", "timed out" if late else "open"])
            return
        value /= scale
        judged = "extrapolated" if "extrapolated" in of(*path[:-1]) else verdict(value)
        rows.append([goal, f"{value:.3g}{unit}", judged])

    def at_least(least: float):
        return lambda value: "met" if value >= least else f"missed: {value / least:.2f} of it"

    def at_most(most: float):
        return lambda value: "met" if value <= most else f"missed: {value / most:.2f} times it"

    def head(value: float) -> str:
        """The goal is met by the rate, or by stating the price of fixed bits."""
        price = price_of_fixed_bits(of("loss", "linear_nll"))
        return "met" if value >= 0.95 else price or at_least(0.95)(value)

    rows.append(_bits_goal(of("bits") or {}))
    for name in ("add_rms_norm", "gated_mlp", "rotary", "rotary, q/k norm"):
        goal = f"{name}: 0.9 of the copy bandwidth"
        row(goal, ("kernels", name, "of_floor"), at_least(0.9))
    goal = "linear_nll: 0.95 of the matrix product's rate, or the price of fixed bits"
    row(goal, ("loss", "linear_nll", "of_floor"), head)
    goal = "linear_nll: less than 1 GB besides its operands"
    row(goal, ("loss", "linear_nll", "extra_bytes"), at_most(1), " GB", 1e9)
    goal = "one block: 0.85 of the matrix product's rate"
    row(goal, ("block", "of_floor"), at_least(0.85))
    for section in ("pairs", "pairs, Qwen3"):
        goal = f"{section}: 1.3 times what sharing gives"
        row(goal, (section, "beyond_sharing"), at_least(1.3))
    for section in ("margin", "margin, Qwen3"):
        goal = f"{section}: trees 2 times as fast as separate sequences"
        row(goal, (section, "speedup"), at_least(2))
    row("beam: under 60 s", ("beam", "seconds"), at_most(60), " s")
    goal = "beam of the divergence, raced at 0.99: under 20 s"
    row(goal, ("beam", "raced", "seconds"), at_most(20), " s")
    return rows


def price_of_fixed_bits(found: dict) -> str | None:
    """The time of linear_nll over that of the fastest other code for its loss, none of which
    promises the same bits in whatever company; None if no other code was timed."""
    others = {name: of["ms"] for name, of in found.items() if isinstance(of, dict) and "ms" in of}
    if not others:
        return None
    fastest = min(others, key=lambda name: others[name])
    return f"price of fixed bits: {found['ms'] / others[fastest]:.2f} times {fastest}"


def _bits_goal(found: dict) -> list[str]:
    """A number that differs decides at once; that none does, only the last case."""
    equal = [
        case["finite"] and not any(d["numbers"] for d in case["different"].values())
        for case in found.get("cases", {}).values()
    ]
    if not all(equal):
        verdict = "missed"
    elif found.get("equal"):
        verdict = "met"
    else:
        verdict = "timed out" if found.get("timed_out") else "open"
    measured = f"{sum(equal)} of {len(equal)} cases" if equal else "not measured"
    return ["bits: the same scores in whatever company", measured, verdict]


def table(results: dict) -> str:
    """The results in short: kernels beside their floors, the searches, the goals."""
    ceilings = results.get("ceilings", {})
    lines = [f"{results['machine']['device']}, torch {results['machine']['torch']}"]
    if "copy_bytes_per_s" in ceilings:
        copy, rate = ceilings["copy_bytes_per_s"] * 1e-9, ceilings["matmul_flops_per_s"] * 1e-12
        lines.append(f"ceilings: copy {copy:.0f} GB/s, matrix product {rate:.0f} TFLOP/s")
    if "tests" in results:
        said = results["tests"]
        lines.append(
            f"tests: {said.get('skipped') or said.get('failed') or said['tail'][-1:]} "
            f"({said.get('status')})"
        )
    rows = [["kernel", "floor ms", "ms", "of floor", "beside it, ms"]]
    compiled = results.get("compiled", {})
    for name, found in (results.get("loss", {}) | results.get("kernels", {})).items():
        if isinstance(found, dict):
            beside = {"torch.compile": compiled[name]} if name in compiled else {}
            rows.append(_timing_row(name, found | beside))
    if "ms" in results.get("block", {}):
        rows.append(_timing_row("one block", results["block"]))
    lines += ["", *_aligned(rows)]
    for section in SECTIONS:
        found = results.get(section)
        if found is not None and section != "tests":
            shown = (
                "equal",
                "masks",
                "loop_s",
                "transformers_s",
                "fastprune_s",
                "speedup",
                "flop_ratio",
                "agrees",
            )
            shown += ("seconds", "floor_s", "extrapolated", "skipped", "failed")
            said = [f"{key} {_format(found[key])}" for key in shown if key in found]
            lines += [f"{section}: {', '.join(said)}"] * bool(said)
    skipped = [section for section in SECTIONS if "skipped" in results.get(section, {})]
    lines += ["", *_aligned([["goal", "measured", ""], *results["goals"]["rows"]])]
    return "\n".join(lines + [f"skipped: {', '.join(skipped)}"] * bool(skipped))


def _timing_row(name: str, found: dict) -> list[str]:
    if "ms" not in found:
        return [name, "", "", "", found.get("failed") or found.get("skipped", "")]
    beside = [
        f"{other} {_format(timing['ms']) if 'ms' in timing else 'failed'}"
        for other, timing in found.items()
        if isinstance(timing, dict) and ("ms" in timing or "failed" in timing)
    ]
    return [
        name,
        *(_format(found.get(key, "")) for key in ("floor_ms", "ms", "of_floor")),
        "; ".join(beside),
    ]


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    return [
        "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths)), row[-1]]).rstrip()
        for row in rows
    ]


def _format(value) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
