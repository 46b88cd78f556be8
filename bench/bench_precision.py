"""A 16-bit checkpoint on a CPU without instructions for it: `python bench/bench_precision.py
FOLDER`.

CPU seconds of the same masks in float32, with weights widened as they are used, and in bfloat16 by
name (on a quarter of the rows, times four).
"""

from __future__ import annotations

import argparse
import json
import time
import warnings

import numpy as np

import fastprune as fp
from fastprune.models import open as load
from fastprune.models import precision


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    folder, rows, length = vars(parser.parse_args()).values()
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
        print(
            json.dumps({**found, "of_float32s_speed": seconds["float32"] / seconds[name]}),
            flush=True,
        )
    assert np.array_equal(losses["float32"], losses["widened as used"])


if __name__ == "__main__":
    main()
