"""A 16-bit checkpoint on a CPU without instructions for it.

    OMP_NUM_THREADS=1 python bench/bench_precision.py FOLDER [--out bench/results/precision.json]

FOLDER's model is written in bfloat16 to a temporary folder. CPU seconds of the same masks, medians
of three in turn: in float32, with weights widened as they are used, and in bfloat16 by name (on a
quarter of the rows, times four). On a CPU that has the instructions,
`ATEN_CPU_CAPABILITY=avx2 OPENBLAS_CORETYPE=Haswell ONEDNN_MAX_CPU_ISA=AVX2` hides them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from unittest.mock import patch  # an attribute that has moved is an error

import numpy as np
from record import save
from transformers import AutoModelForCausalLM

import fastprune as fp
from fastprune.models import folder as checkpoint
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
    patch.object(precision, "capabilities", dict).start()  # whatever this processor has
    with tempfile.TemporaryDirectory() as narrow:
        AutoModelForCausalLM.from_pretrained(folder, dtype="bfloat16").save_pretrained(narrow)
        models = {"float32": fp.load_model(narrow)}
        patch.object(checkpoint, "available_bytes", lambda device: 0).start()
        models["widened as used"] = fp.load_model(narrow)
        models["bfloat16"] = fp.load_model(narrow, dtype="bfloat16")
    sizes = {
        name: sum(parameter.nbytes for parameter in model.hf.parameters())
        for name, model in models.items()
    }
    for name in ("widened as used", "bfloat16"):
        assert sizes[name] < 0.51 * sizes["float32"], f"{name}: the weights are wide"
    ids = np.random.default_rng(0).integers(0, models["float32"].vocab_size, (rows, length))
    seconds: dict[str, list[float]] = {name: [] for name in models}
    losses = {}
    for _, (name, model) in itertools.product(range(3), models.items()):
        few = name == "bfloat16"
        batch = fp.TokenBatch.from_ids(ids[: rows // 4] if few else ids)
        ev = fp.Evaluator(model, fp.Perplexity(batch))
        masks = fp.from_removed([(), (20,)], ev.num_units)
        started = time.process_time()
        losses[name] = ev.score(masks)
        seconds[name].append((time.process_time() - started) * (4 if few else 1))
    assert np.array_equal(losses["float32"], losses["widened as used"])
    for name, spent in seconds.items():
        found = {"weights": name, "MB": sizes[name] / 1e6, "cpu_s": statistics.median(spent)}
        found["of_float32s_speed"] = statistics.median(seconds["float32"]) / found["cpu_s"]
        rows_found.append(found)
        print(json.dumps(found), spent, flush=True)
    save(path, {"tokens": f"{rows} x {length}", "weights": rows_found})


if __name__ == "__main__":
    main()
