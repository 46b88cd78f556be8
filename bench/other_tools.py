"""Other tools' own scripts beside the same scripts with fastprune's recipes: CPU seconds.

    git clone https://github.com/IST-DASLab/EvoPress CLONES/EvoPress
    # likewise jiwonsong-dev/SLEB, MrGGLS/BlockPruner, Nota-NetsPresso/shortened-llm,
    # YaNgZhAnG-V5/llm_dissect (FinerCut) and dnhkng/RYS
    OMP_NUM_THREADS=1 python bench/other_tools.py CLONES [--model FOLDER --text FILE]
        [--tools evopress ...] [--rows 8] [--length 128] [--out bench/results/tools.json]

The rows are windows of the text, or random tokens. A tool whose row with this command is in the
results already is left out, so that an interrupted command can be run again.

The scripts run from their clones: on a CPU, on the same rows, without their evaluations
afterwards, and with the return values of layers that the installed transformers expects. Nothing
else of them is changed. `examples/recipes.py` has the lines that replace their loops.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import csv
import importlib
import io
import itertools
import json
import random
import shlex
import sys
import tempfile
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import record
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import recipes

import fastprune as fp

# newer releases of transformers: a layer returns a tensor, its attention two values
LAYER = (
    ("hidden_states, self_attn_weights, present_key_value = self", "hidden_states, _ = self"),
    ("outputs = (hidden_states,)", "return hidden_states"),
    ("return 0, None, None", "return 0, None"),
)
ON_CPU = (
    ("assert torch.cuda.is_available()", ""),
    ('device = f"cuda"', 'device = "cpu"'),
    ('torch.device("cuda:0")', 'torch.device("cpu")'),
)


def load(path: Path, name: str, changes=(), **values: Any) -> types.ModuleType:
    """A file of a clone as a module, with changes of its text, and values set before it runs."""
    text = path.read_text()
    for old, new in (*LAYER, *ON_CPU, *changes):
        text = text.replace(old, new)
    module = types.ModuleType(name)
    vars(module).update(values)
    sys.modules[name] = module
    exec(compile(text, str(path), "exec"), vars(module))
    return module


def stub(name: str, **values: Any) -> None:
    """A module of these values in place of one of the script's."""
    module = types.ModuleType(name)
    vars(module).update(values)
    sys.modules[name] = module


def nothing(*args: Any, **kwargs: Any) -> float:
    return 0.0


class Given:
    """Stands in for a class of transformers: from_pretrained returns the model."""

    def __init__(self, value: Any):
        self.value = value

    def from_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        return self.value


def run_evopress(clone: Path, model, rows, entire: bool, with_recipe: bool) -> Any:
    """The last lines that the script prints: a line for each block."""
    data = [row[None] for row in rows]
    removed = [("target_logits.append", "pass  # ")] if with_recipe else []
    sys.path.insert(0, str(clone))
    stub("src")
    sys.modules["src"].__path__ = [str(clone / "src")]
    stub("src.data_utils", get_data=lambda *args, **kwargs: data)
    load(clone / "src/model_utils.py", "src.model_utils")
    script = load(clone / "evo_drop_search.py", "evo_drop_search", removed)
    script.AutoModelForCausalLM, script.AutoTokenizer = Given(model), Given(None)
    script.compute_perplexity = nothing
    if with_recipe:
        script.load_states = nothing
        script.selection = recipes.evopress(model, data, entire)
    total = rows.numel()
    command = (
        "x --model_name_or_path x --calibration_data x --eval_datasets x --no_eval "
        f"--calibration_tokens {total} --calibration_sequence_length {rows.shape[1]} "
        "--sparsity 0.25 --generations 4 --offspring 16 --initially_generated 16 "
        f"--initial_tokens {total // 2} --survivors_per_selection 4 1 "
        f"--tokens_per_selection {total // 8} {total} --dtype float32"
    )
    sys.argv = command.split() + ["--drop_entire_block"] * entire
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        script.main()
    sys.path.remove(str(clone))
    return printed.getvalue().split("Final configuration:\n")[1].split()[: len(model.model.layers)]


def run_sleb(clone: Path, model, rows, with_recipe: bool) -> Any:
    if with_recipe:
        return recipes.sleb(model, rows, 2)
    model = copy.copy(model)
    model.name, model.seqlen = "llama", rows.shape[1]
    loader = types.SimpleNamespace(input_ids=rows.reshape(1, -1))
    stub("fire")
    for name in ("utils", "utils.onoff_utils", "utils.onoff_utils.onoff_opt"):
        stub(name)
    onoff = load(clone / "utils/onoff_utils/onoff_llama.py", "utils.onoff_utils.onoff_llama")
    sys.modules["utils.onoff_utils"].onoff_llama = onoff
    sys.modules["utils.onoff_utils"].onoff_opt = None
    load(clone / "utils/onoff_utils/onoff.py", "utils.onoff_utils.onoff")
    stub("utils.model_utils", get_llm=lambda name: model)
    stub("utils.data_utils", get_trainloaders=lambda *args, **kwargs: loader)
    stub("utils.block_remove", block_remove=nothing)
    stub("utils.eval_utils", load_and_eval_ppl=nothing, eval_zero_shot=nothing)
    script = load(clone / "sleb.py", "sleb_script", [("fire.Fire(sleb)", "pass")])
    layers = list(model.model.layers)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        script.sleb("llama", len(layers), 2, eval_ppl=False, result_folder=folder)
        text = Path(folder, "sleb_results.txt").read_text()
    for i, layer in enumerate(layers):
        model.model.layers[i] = layer
    return json.loads(text.split("Removal Order: ")[1].split("\n")[0])


def run_block_pruner(clone: Path, model, rows, with_recipe: bool, racing=None) -> Any:
    if with_recipe:
        return recipes.block_pruner(model, rows, 1, racing)
    load(clone / "utils.py", "utils", [("import datasets", "import types as datasets")])
    sys.modules["utils"].datasets.Dataset = object
    script = load(clone / "block_search.py", "block_search")
    loader = [
        {"input_ids": part, "attention_mask": torch.ones_like(part)} for part in rows.split(8)
    ]
    with tempfile.TemporaryDirectory() as folder:
        options = types.SimpleNamespace(
            block_type="mix", del_block_num=1, cal_dataset="x", ppl_search_path=folder,
            model_path="x", cal_nsamples=0,
        )  # fmt: skip
        with contextlib.redirect_stdout(io.StringIO()):
            script.block_search_by_ppl(options, model, loader)
        (path,) = Path(folder).glob("*.json")
        return [tuple(half) for half in json.loads(path.read_text())["1"]]


def run_shortened_llama(clone: Path, model, rows, with_recipe: bool) -> Any:
    if with_recipe:
        return np.argsort(recipes.shortened_llama(model, rows), kind="stable").tolist()
    for name in ("LLMPruner", "LLMPruner.peft"):
        stub(name, PeftModel=None)
    load(clone / "src/utils.py", "utils", get_model=None)
    sys.modules["utils"].get_model = lambda **options: (model, None, "")
    stub("dataset", get_examples=lambda **options: rows)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        sys.argv = ["x", "--device", "cpu", "--num_calib_data", str(len(rows))]
        sys.argv += ["--output_dir", folder]
        script = clone / "src/anal_block_sensitivity_ppl.py"
        load(script, "sensitivity", [('if __name__ == "__main__":', "if True:")])
        with Path(folder, "block_order.csv").open() as file:
            return [int(block) for block in next(csv.reader(file))]


class Settings(dict):
    """Stands in for mmengine's configuration: keys are attributes, too."""

    __getattr__ = dict.__getitem__


class Registry(dict):
    """Stands in for mmengine's registry of classes by name."""

    def __init__(self, name: str):
        super().__init__()

    def register_module(self) -> Callable[[type], type]:
        return lambda of: self.setdefault(of.__name__, of)

    def build(self, settings: dict[str, Any], default_args: Any = None) -> Any:
        values = dict(settings)
        return self[values.pop("type")](**values)


def run_finercut(clone: Path, model, rows, with_recipe: bool, perplexity: bool = False) -> Any:
    """The first 2 halves removed; the script's loop, which removes them all, ends there."""
    if with_recipe:
        return recipes.finercut(model, rows, 2, perplexity=perplexity)
    data = [
        {"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in rows
    ]
    output = {"type": "Output", "distance_metric": "kl_divergence"}
    config = Settings(
        model=None,
        pruning_dataset=data,
        test_dataset=data,
        data_loader={"batch_size": 1},
        test_cfg=Settings(
            evaluator={"type": "Perplexity"} if perplexity else output,
            testing_manager={
                "type": "ForwardPrunerTestingManager", "prune_input": ["NoItem"], "in_place": False
            },
        ),
    )  # fmt: skip
    for name in ("mmengine.device", "mmengine.dist.utils", "dissect.dissectors"):
        sys.modules[name] = mock.MagicMock()
    sys.modules["mmengine"] = mock.MagicMock(Registry=Registry, DictAction=argparse.Action)
    sys.modules["mmengine"].Config.fromfile.return_value = config
    stub("alive_progress", alive_it=lambda steps, **options: steps)
    for name in ("dissect", "dissect.models", "dissect.pruners", "dissect.evaluators"):
        stub(name, __path__=[str(clone / name.replace(".", "/"))])
    stub("dissect.datasets", build_dataset=lambda dataset, **options: dataset)
    models = sys.modules["dissect.models"]
    models.build_model_and_tokenizer = lambda *args, **options: (model, None)
    models.MaskingHook = importlib.import_module("dissect.models.masking_hook").MaskingHook
    modeling_llama.LlamaSdpaAttention = None  # older releases of transformers
    pruner = importlib.import_module("dissect.pruners.forward_pruner")
    sys.modules["dissect.pruners"].TESTING_MANAGER = pruner.TESTING_MANAGER
    for name in ("perplexity", "output"):
        evaluators = importlib.import_module(f"dissect.evaluators.{name}").EVALUATORS
    sys.modules["dissect.evaluators"].EVALUATORS = evaluators
    script = load(
        clone / "scripts/prune_layer.py",
        "prune_layer",
        [("range(5, 100, 5)", "()"), ('torch.device(f"cuda:{args.gpu_id}")', '"cpu"')],
    )
    script.alive_it = lambda steps, **options: itertools.islice(steps, 2)
    greedy, removed = script.greedy_pruning, []

    def noted(target_layers: list[str], **options: Any) -> int:
        index = greedy(target_layers=target_layers, **options)
        _, _, block, _, half = target_layers[index].split(".")
        removed.append(2 * int(block) + (half == "down_proj"))
        return index

    script.greedy_pruning = noted
    with tempfile.TemporaryDirectory() as folder:
        sys.argv = ["x", "--workdir", folder, "--eval", ""]
        sys.argv += ["--layer-dim", str(model.config.hidden_size)]
        script.main()
    return removed


def run_rys(clone: Path, model, rows, with_recipe: bool) -> Any:
    """The 10 windows of least loss. RYS asks probes, so the loop around its own models is ours."""
    if with_recipe:
        losses = recipes.rys(model, rows)
    else:
        for name in ("src", "src.core"):
            stub(name, __path__=[str(clone / name.replace(".", "/"))])
        sys.modules.pop("src.core.layer_duplicator", None)
        rys = importlib.import_module("src.core.layer_duplicator")
        losses = {}
        for window, layers in rys.generate_layer_dict(len(model.model.layers)).items():
            relayered = rys.build_model_with_layers(model, layers)
            each = [relayered(row[None], labels=row[None]).loss.item() for row in rows]
            losses[window] = np.mean(each)
    return sorted(losses, key=losses.get)[:10]


TOOLS: dict[str, tuple[str, Callable]] = {
    "evopress, blocks": ("EvoPress", lambda *a: run_evopress(*a[:3], True, a[3])),
    "evopress, sublayers": ("EvoPress", lambda *a: run_evopress(*a[:3], False, a[3])),
    "sleb": ("SLEB", run_sleb),
    "blockpruner": ("BlockPruner", run_block_pruner),
    "blockpruner, raced": ("BlockPruner", lambda *a: run_block_pruner(*a, racing=0.99)),
    "shortened llama": ("shortened-llm", run_shortened_llama),
    "finercut, kl": ("llm_dissect", run_finercut),
    "finercut, perplexity": ("llm_dissect", lambda *a: run_finercut(*a, perplexity=True)),
    "rys": ("RYS", run_rys),
}


def random_model() -> LlamaForCausalLM:
    """32 blocks of width 256, of weights large enough that subsets differ beyond rounding."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=32,
        num_attention_heads=4,
        num_key_value_heads=4,
        initializer_range=0.1,
    )
    return LlamaForCausalLM(config).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("clones", type=Path, help="the folder that holds the clones")
    parser.add_argument("--model", help="a folder of a Llama-like model; a random one by default")
    parser.add_argument("--text", help="a file of text for the rows, with --model")
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS))
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    places = {str(options.clones): "CLONES", options.model: "MODEL", options.text: "TEXT"}
    command = shlex.join(["python", *(places.get(arg, arg) for arg in sys.argv)])
    if options.model:
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    else:
        model = random_model()
    model.config.use_cache = False
    rng = np.random.default_rng(0)
    rows = torch.from_numpy(rng.integers(5, 4000, (options.rows, options.length)))
    if options.text:
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        batch = fp.load_text(options.text, tokenizer, options.rows, options.length)
        rows = torch.from_numpy(batch.ids.reshape(options.rows, options.length))
    entries = []
    if options.out and options.out.exists():
        entries = json.loads(options.out.read_text())
    entry = next((entry for entry in entries if entry["command"] == command), None)
    known = dict(entry or {})
    if entry is None:
        model_name = Path(options.model).name if options.model else "random"
        entry = {"model": model_name, "rows": []}
        entries.append(entry)
    results = entry["rows"]
    log = io.StringIO()  # the scripts' progress bars
    finished = [row["tool"] for row in results]
    for name in [tool for tool in options.tools if tool not in finished]:
        folder, run = TOOLS[name]
        seconds, chosen = [], []
        for with_recipe in (False, True):
            random.seed(0)
            own = copy.deepcopy(model)  # a script leaves its last mask on the model
            started = time.process_time()
            with torch.no_grad(), contextlib.redirect_stderr(log):
                chosen.append(run(options.clones / folder, own, rows, with_recipe))
            seconds.append(time.process_time() - started)
        row = {
            "tool": name,
            "theirs": round(seconds[0], 1),
            "fastprune": round(seconds[1], 1),
            "ratio": round(seconds[0] / seconds[1], 2),
            "same": chosen[0] == chosen[1],
        }
        results.append(row)
        print(json.dumps(row), *([] if row["same"] else chosen), flush=True)
        if options.out:  # after each tool: an interrupted run keeps those before
            entry.update(record.origin(goes_on=known) | {"command": command})
            record.write(options.out, entries)


if __name__ == "__main__":
    main()
