"""A 16-bit checkpoint on a CPU without instructions for it.

    OMP_NUM_THREADS=1 python bench/bench_precision.py FOLDER [--out bench/results/precision.json]

CPU seconds of the same masks in float32, with weights widened as they are used, and in bfloat16 by
name (on a quarter of the rows, times four). On a CPU that has the instructions,
`ATEN_CPU_CAPABILITY=avx2 OPENBLAS_CORETYPE=Haswell ONEDNN_MAX_CPU_ISA=AVX2` hides them.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from pathlib import Path

import numpy as np
from record import save

import fastprune as fp
from fastprune.models import open as load
from fastprune.models import precision


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--out", type=Path)
    folder, rows, length, path = vars(parser.parse_args()).values()
    rows_found = []
    warnings.simplefilter("ignore")
    precision.capabilities = dict  # whatever this processor has
    models = {"float32": fp.load_model(folder)}
    load.available_bytes = lambda device: 0
    models["widened as used"] = fp.load_model(folder)
    models["bfloat16"] = fp.load_model(folder, dtype="bfloat16")
    ids = np.random.default_rng(0).integers(0, models["float32"].vocab_size, (rows, length))
    seconds, losses = {}, {}
    for name, model in models.items():
        few = name == "bfloat16"
        ev = fp.Evaluator(
            model, fp.Perplexity(fp.TokenBatch.from_ids(ids[: rows // 4] if few else ids))
        )
        masks = fp.from_removed([(), (20,)], ev.num_units)
        started = time.process_time()
        losses[name] = ev.score(masks)
        seconds[name] = (time.process_time() - started) * (4 if few else 1)
        megabytes = sum(parameter.nbytes for parameter in model.hf.parameters()) / 1e6
        found = {"weights": name, "MB": megabytes, "cpu_s": seconds[name]}
        rows_found.append({**found, "of_float32s_speed": seconds["float32"] / seconds[name]})
        print(json.dumps(rows_found[-1]), flush=True)
    assert np.array_equal(losses["float32"], losses["widened as used"])
    save(path, {"tokens": f"{rows} x {length}", "weights": rows_found})


if __name__ == "__main__":
    main()
