"""Metrics are those that the harness's own `hf` model has on the exported checkpoints."""

from __future__ import annotations

import copy
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from documents import text_study, write_document
from families import build
from huggingface_hub.errors import LocalEntryNotFoundError
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager
from requests import ConnectionError as RequestError
from requests import ReadTimeout
from workers_for_tests import InThisProcess

import fastprune as fp
from fastprune.integrations.lm_eval import MaskedLM, evaluate_masks, main
from fastprune.models import FusedRunner, GenericRunner

TASKS = Path(__file__).parent / "tasks"
NAMES = ["demo_choices", "demo_next", "demo_text", "demo_answer"]
LIKELIHOODS = ["demo_choices", "demo_next", "demo_text"]
FAMILIES = ["llama", "gemma3", "gpt-neox", "gpt2", "mixtral"]
SETTINGS = {"limit": 6, "bootstrap_iters": 0}


@pytest.fixture(autouse=True)
def unasked(monkeypatch):
    """The harness asks the machine about itself after every run, which takes seconds and says
    nothing here."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)


@pytest.fixture(scope="session")
def manager():
    return TaskManager(include_path=str(TASKS), include_defaults=False)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """folder(family): a checkpoint of a random model of 5 or 6 blocks with the demo model's
    tokenizer."""
    made: dict[str, Path] = {}

    def make(family: str, **config) -> Path:
        key = f"{family}{config}"
        if key not in made:
            made[key] = tmp_path_factory.mktemp(family)
            build(family, vocab_size=832, **config).save_pretrained(made[key])
            fp.load_model("demo").tokenizer.save_pretrained(made[key])
        return made[key]

    return make


def close(found: dict, expected: dict) -> None:
    """Equal answers, but for the last bits of likelihoods; equal metrics, but for those of
    perplexities."""
    assert found["results"].keys() == expected["results"].keys()
    for task, rows in expected["samples"].items():
        for mine, theirs in zip(found["samples"][task], rows, strict=True):
            assert mine["arguments"] == theirs["arguments"]
            if isinstance(theirs["resps"][0][0], str):
                assert mine["resps"] == theirs["resps"]
            else:
                numbers = (np.array(sample["resps"], dtype=float) for sample in (mine, theirs))
                np.testing.assert_allclose(*numbers, rtol=1e-5, atol=1e-5)
        for name, value in expected["results"][task].items():
            if isinstance(value, float):
                tolerance = 1e-3 if "perplexity" in name or "bits" in name else 0
                assert found["results"][task][name] == pytest.approx(value, rel=tolerance), (
                    task,
                    name,
                )


def by_hf(folder, manager, tasks=NAMES, **settings) -> dict:
    lm_settings = {
        name: settings.pop(name) for name in ("max_length", "add_bos_token") if name in settings
    }
    arguments = {"pretrained": str(folder), "device": "cpu", **lm_settings}
    return simple_evaluate("hf", arguments, tasks, task_manager=manager, **SETTINGS, **settings)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_metrics_are_those_of_hf_on_the_exported_checkpoint(family, folder, manager, tmp_path):
    removed = [(1, 3), (), (0,)]
    model = fp.load_model(folder(family))
    masks = fp.from_removed(removed, model.num_blocks)
    found = evaluate_masks(model, masks, NAMES, task_manager=manager, **SETTINGS)
    assert [result["config"]["removed"] for result in found] == [list(units) for units in removed]
    for units, result in zip(removed, found, strict=True):
        exported = fp.export(model, tmp_path / f"without-{len(units)}", removed=units)
        close(result, by_hf(exported, manager))


@pytest.mark.slow
def test_sequences_have_the_metrics_of_their_exported_checkpoints(folder, manager, tmp_path):
    model = fp.load_model(folder("llama"))
    sequences = [(0, 1, 2, 1, 2, 3, 4), (0, 2, 4)]
    found = evaluate_masks(
        model, None, NAMES, sequences=sequences, task_manager=manager, **SETTINGS
    )
    named = [result["config"] for result in found]
    assert named[0]["sequence"] == [0, 1, 2, 1, 2, 3, 4]
    assert named[1]["removed"] == [1, 3]
    for sequence, result in zip(sequences, found, strict=True):
        exported = fp.export(model, tmp_path / f"{len(sequence)}", sequence=sequence)
        close(result, by_hf(exported, manager))


def test_the_harness_model_takes_a_sequence(folder):
    lm = MaskedLM(str(folder("llama")), sequence="0-2 1-4")
    assert lm.sequences == [(0, 1, 2, 1, 2, 3, 4)]
    assert lm.get_model_info()["sequence"] == [0, 1, 2, 1, 2, 3, 4]
    for arguments, message in [
        ({"sequence": "0-1", "removed": "2"}, "give either removed or sequence"),
        ({"sequence": []}, "a sequence names at least one unit"),
        ({"sequence": "0-9"}, "is no unit"),
    ]:
        with pytest.raises(fp.InputError, match=message):
            MaskedLM(lm.opened, **arguments)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"max_length": 24},
        {"add_bos_token": False},
        {"num_fewshot": 2},
        {"max_length": 9, "num_fewshot": 1},
    ],
)
def test_settings_mean_what_they_mean_to_hf(settings, folder, manager, tmp_path):
    model = fp.load_model(folder("llama"))
    exported = fp.export(model, tmp_path / "without", removed=(2,))
    tasks = ["demo_choices", "demo_next", "demo_text"]
    (found,) = evaluate_masks(
        model, fp.from_removed([(2,)], 5), tasks, task_manager=manager, **SETTINGS, **settings
    )
    close(found, by_hf(exported, manager, tasks, **settings))


TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"system_instruction": "Answer."},
        {"num_fewshot": 2, "fewshot_as_multiturn": True},
        {"num_fewshot": 2, "fewshot_as_multiturn": False, "system_instruction": "Answer."},
    ],
)
def test_chat_templates_are_those_of_the_harness(settings, manager, tmp_path):
    build("llama", vocab_size=832).save_pretrained(tmp_path / "m")
    tokenizer = copy.deepcopy(fp.load_model("demo").tokenizer)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path / "m")
    model = fp.load_model(tmp_path / "m")
    exported = fp.export(model, tmp_path / "without", removed=(2,))
    masks = fp.from_removed([(2,)], 5)
    settings = {**settings, "apply_chat_template": True}
    (found,) = evaluate_masks(
        model, masks, ["demo_choices"], task_manager=manager, **SETTINGS, **settings
    )
    assert "<assistant>" in found["samples"]["demo_choices"][0]["arguments"][0][0]
    close(found, by_hf(exported, manager, ["demo_choices"], **settings))


def test_a_chat_template_that_is_missing_is_refused(folder):
    model = fp.load_model(folder("llama"))
    with pytest.raises(fp.InputError, match="apply_chat_template: the tokenizer"):
        evaluate_masks(
            model,
            fp.from_removed([(2,)], 5),
            ["demo_choices"],
            include_path=TASKS,
            apply_chat_template=True,
        )


@pytest.mark.slow
def test_the_demo_model_answers_as_under_hf(manager, tmp_path):
    """A trained model without its second block: its flags are not all alike, and it generates
    words."""
    exported = fp.export(fp.load_model("demo"), tmp_path / "without", removed=(1,))
    settings = {"task_manager": manager, **SETTINGS, "limit": 30}
    (found,) = evaluate_masks("demo", fp.from_removed([(1,)], 12), NAMES, batch_size=4, **settings)
    close(
        found,
        simple_evaluate("hf", {"pretrained": str(exported), "device": "cpu"}, NAMES, **settings),
    )
    flags = [sample["resps"][0][0][1] for sample in found["samples"]["demo_next"]]
    assert 0 < sum(flags) < len(flags)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_what_a_mask_gets_does_not_depend_on_the_others(family, folder, manager):
    model = fp.load_model(folder(family))
    masks = fp.from_removed([(), (1,), (1, 2), (4,), (0, 4), (1,)], model.num_blocks)
    settings = {"task_manager": manager, **SETTINGS}
    together = evaluate_masks(model, masks, LIKELIHOODS, **settings)
    for mask, result in zip(masks, together, strict=True):
        (alone,) = evaluate_masks(model, mask, LIKELIHOODS, **settings)
        for task in LIKELIHOODS:
            assert result["results"][task] == alone["results"][task]
            for mine, theirs in zip(result["samples"][task], alone["samples"][task], strict=True):
                assert mine["resps"] == theirs["resps"]


@pytest.mark.slow
def test_differences_are_paired_over_documents(folder, manager):
    model = fp.load_model(folder("llama"))
    masks = fp.from_removed([(), (1,), (2, 4)], model.num_blocks)
    settings = {"task_manager": manager, **SETTINGS, "limit": 12}
    found = evaluate_masks(model, masks, ["demo_choices", "demo_text"], **settings)
    accuracy = np.array([[s["acc"] for s in r["samples"]["demo_choices"]] for r in found])
    for result, own in zip(found, accuracy, strict=True):
        difference = own - accuracy[0]
        expected = {
            "value": pytest.approx(difference.mean()),
            "error": pytest.approx(difference.std(ddof=1) / np.sqrt(12)),
            "num_samples": 12,
        }
        assert result["differences"]["demo_choices"]["acc,none"] == expected
        assert "demo_text" not in result["differences"]  # its metrics are no means
    settings["log_samples"] = False
    again = evaluate_masks(model, masks, ["demo_choices"], **settings)
    assert all("samples" not in result for result in again)
    key = "demo_choices"
    assert [r["differences"][key] for r in again] == [r["differences"][key] for r in found]


@pytest.mark.slow
def test_a_family_that_runs_no_trees_is_run_row_by_row(folder, manager, tmp_path):
    """Beyond 8 tokens this one's rotary frequencies change, so that trees are refused."""
    factors = {
        "short_factor": [1.0] * 5,
        "long_factor": [2.0] * 5,
        "original_max_position_embeddings": 8,
    }
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, **factors}
    model = fp.load_model(folder("llama", rope_parameters=rope))
    exported = fp.export(model, tmp_path / "without", removed=(2,))
    settings = {"task_manager": manager, **SETTINGS}
    (found,) = evaluate_masks(model, fp.from_removed([(2,)], 5), ["demo_choices"], **settings)
    close(found, by_hf(exported, manager, ["demo_choices"]))


@pytest.mark.slow
def test_half_blocks(folder, manager):
    model = fp.load_model(folder("llama"))
    settings = {"task_manager": manager, **SETTINGS}
    masks = fp.from_removed([(2, 3, 8), (2, 3, 8, 9)], 10)
    halves, whole = evaluate_masks(model, masks, LIKELIHOODS, granularity="sublayer", **settings)
    (blocks,) = evaluate_masks(model, fp.from_removed([(1, 4)], 5), LIKELIHOODS, **settings)
    close(whole, blocks)
    assert halves["results"]["demo_text"] != whole["results"]["demo_text"]
    with pytest.raises(fp.InputError, match="half a block"):
        evaluate_masks(model, masks, NAMES, granularity="sublayer", **settings)


@pytest.mark.slow
def test_the_callers_model_and_tokenizer_are_left_as_they_were(folder, manager):
    tokenizer = fp.load_model("demo").tokenizer
    tokenizer.pad_token = None
    hf = build("llama", vocab_size=832).train()
    before = {name: tensor.clone() for name, tensor in hf.state_dict().items()}
    modules = [(module, dict(vars(module)), module.training) for module in hf.modules()]
    masks = fp.from_removed([(1,)], 5)
    evaluate_masks(hf, masks, NAMES, tokenizer=tokenizer, task_manager=manager, **SETTINGS)
    assert tokenizer.pad_token is None
    assert all(torch.equal(tensor, before[name]) for name, tensor in hf.state_dict().items())
    assert all(vars(module) == attributes and module.training for module, attributes, _ in modules)


def requests(*pairs) -> list[Instance]:
    return [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]


@pytest.mark.slow
def test_contexts_that_are_shared_run_once(folder, monkeypatch):
    """Four choices of a token each cost what the question alone costs."""
    question, runs = "Tom is 27 years old. Paul is 30 years old. Who is older? Answer:", []
    harnesses = [MaskedLM(str(folder("llama")), "1-2") for _ in range(2)]
    for kind in (GenericRunner, FusedRunner):

        def spy(self, unit, state, *rest, run=kind.run):
            runs[-1].append(state.shape)
            return run(self, unit, state, *rest)

        monkeypatch.setattr(kind, "run", spy)
    for lm, choices in zip(harnesses, ([" Paul"], [" Paul", " Tom", " Max", " Anna"])):
        runs.append([])
        lm.loglikelihood(requests(*((question, choice) for choice in choices)))
    assert len(runs[0]) == len(runs[1]) > 0


@pytest.mark.slow
def test_requests_are_answered_as_they_were_asked(folder):
    hf = get_model("hf")(str(folder("llama")), device="cpu")
    lm = MaskedLM(str(folder("llama")))
    pairs = [
        ("Tom is ", "old"),
        ("", "The hat"),
        ("Tom is", " old"),
        ("The hat is at", " the harbour. The"),
        ("", "x"),
    ]
    pairs = [pairs[0], *pairs, *reversed(pairs)]
    found, expected = lm.loglikelihood(requests(*pairs)), hf.loglikelihood(requests(*pairs))
    np.testing.assert_allclose([n for n, _ in found], [n for n, _ in expected], rtol=1e-5)
    assert [flag for _, flag in found] == [flag for _, flag in expected]
    assert all(isinstance(n, float) and isinstance(flag, bool) for n, flag in found)
    texts = requests(("",), ("The hat is at the harbour. " * 40,), ("Tom",))
    np.testing.assert_allclose(
        lm.loglikelihood_rolling(texts), hf.loglikelihood_rolling(texts), rtol=1e-5
    )


# -- wrong input -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"removed": "3-5"}, "unit 5 is out of range"),
        ({"removed": [1, 1]}, "given twice"),
        ({"removed": "x"}, "units must be integers"),
        ({"removed": 9}, "unit 9 is out of range"),
        (
            {"removed": 1, "10": ""},
            r"'10' has no value; write units as removed=9-11 or removed=\[9,10\]",
        ),
        ({"peft": "x"}, "not 'peft'"),
        ({"max_lenght": 5}, "did you mean 'max_length'"),
        ({"tokenizer": "/nowhere/at/all"}, "cannot be read as a tokenizer"),
        ({"granularity": "heads"}, "granularity must be one of"),
    ],
)
def test_wrong_arguments_of_the_model(folder, settings, message):
    with pytest.raises(fp.InputError, match=message) as error:
        get_model("fastprune").create_from_arg_obj({"pretrained": str(folder("llama")), **settings})
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_a_model_without_a_tokenizer(manager):
    with pytest.raises(fp.InputError, match="need a tokenizer"):
        evaluate_masks(build("llama"), np.ones(5), NAMES, task_manager=manager)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tasks", "settings", "message"),
    [
        (["demo_choics"], {}, "unknown task 'demo_choics'; did you mean 'demo_choices'"),
        (["nothing_*"], {}, "unknown task"),
        ("demo_choices", {}, "list of names"),
        ([], {}, "list of names"),
        (["demo_choices"], {"limits": 3}, "not 'limits'; did you mean 'limit'"),
        (["demo_choices"], {"use_cache": "x"}, "not 'use_cache'"),
        (["demo_choices"], {"include_path": "/nowhere/at/all"}, "no such folder of tasks"),
    ],
)
def test_wrong_arguments_of_an_evaluation(folder, manager, tasks, settings, message):
    with pytest.raises(fp.InputError, match=message):
        evaluate_masks(str(folder("llama")), np.ones(5), tasks, task_manager=manager, **settings)
    with pytest.raises(fp.InputError, match="5 units"):
        evaluate_masks(str(folder("llama")), np.ones((1, 4)), NAMES, task_manager=manager)


@pytest.mark.slow
def test_a_mask_that_cannot_generate_is_refused_before_anything_runs(folder, manager):
    """GPT-2 knows from its cache of keys and values how far it is, and without blocks there is
    none."""
    model = fp.load_model(folder("gpt2"))
    masks, ran = fp.from_removed([(5,), range(6)], 6), []
    settings = {
        "task_manager": manager,
        "progress": lambda event: ran.append(event.done),
        **SETTINGS,
    }
    with pytest.raises(fp.InputError, match=r"cannot generate without blocks \(0, 1, 2, 3, 4, 5\)"):
        evaluate_masks(model, masks, NAMES, **settings)
    assert not ran
    evaluate_masks(model, masks, LIKELIHOODS, **settings)


@pytest.mark.slow
def test_continuations_that_cannot_be_scored(folder):
    lm = MaskedLM(str(folder("llama")), max_length=4)
    with pytest.raises(fp.InputError, match=r"from 1 to 4 \(max_length\)"):
        lm.loglikelihood(requests(("Tom", " is at the harbour of the town")))
    with pytest.raises(fp.InputError, match="has 0 tokens"):
        lm.loglikelihood(requests(("Tom", "")))


@pytest.mark.slow
def test_an_entry_point_names_the_model():
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((TASKS.parents[2] / "pyproject.toml").read_text())["project"]
    ((name, value),) = project["entry-points"]["lm_eval.models"].items()
    assert (
        importlib.metadata.EntryPoint(name, value, "lm_eval.models").load()
        is get_model(name)
        is MaskedLM
    )


# -- command lines ---------------------------------------------------------------------------------


@pytest.mark.nightly  # the harness indexes 14,000 tasks, for 20 s each time
def test_the_harness_own_command_line(folder, tmp_path, manager):
    """`lm_eval --model fastprune`, through the module for releases that read no entry points."""
    command = [
        sys.executable,
        "-m",
        "fastprune.integrations.lm_eval",
        "--model",
        "fastprune",
        "--limit",
        "5",
    ]
    command += ["--device", "cpu"]
    command += [
        "--include_path",
        str(TASKS),
        "--tasks",
        "demo_choices",
        "--output_path",
        str(tmp_path / "out.json"),
    ]
    arguments = f"pretrained={folder('llama')},removed="
    done = subprocess.run(
        [*command, "--model_args", f"{arguments}1-2"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (written,) = tmp_path.glob("out*.json")
    found = json.loads(written.read_text())
    settings = {"task_manager": manager, **SETTINGS, "limit": 5}
    (expected,) = evaluate_masks(
        str(folder("llama")), fp.from_removed([(1, 2)], 5), ["demo_choices"], **settings
    )
    assert found["config"]["removed"] == [1, 2]
    assert (
        found["results"]["demo_choices"]["acc,none"]
        == expected["results"]["demo_choices"]["acc,none"]
    )
    done = subprocess.run(
        [*command, "--model_args", f"{arguments}[7,8]"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("fastprune: removed unit 7 is out of range")


@pytest.mark.slow
def test_eval_prints_one_json_document(run, folder):
    arguments = ("--tasks", "demo_next", "--include-path", TASKS, "--limit", 4)
    eval_ = ("eval", folder("llama"), *arguments, "--bootstrap-iters", 0)
    status, out, err = run(*eval_, "--removed", "all", "--removed", "1-2", "--json")
    assert status == 0, err
    assert [row["removed"] for row in json.loads(out)["masks"]] == [[0, 1, 2, 3, 4], [1, 2]]


@pytest.mark.slow
def test_eval_says_what_came_from_the_store(run, folder, tmp_path):
    arguments = ("--tasks", "demo_next", "--include-path", TASKS, "--limit", 4)
    masks = ("--removed", "-", "--removed", "1", "--store", tmp_path / "s.db")
    eval_ = ("eval", folder("llama"), *arguments, "--bootstrap-iters", 0, *masks)
    status, out, err = run(*eval_)
    assert status == 0, err
    line = "likelihoods: 8 unit runs where one pass per mask takes 9 (1.1x fewer)"
    assert line in out
    assert "in the store" not in out
    status, out, err = run(*eval_)
    assert status == 0, err
    assert "likelihoods: 0 unit runs where one pass per mask takes 9; 2 of 2 scores were in" in out
    cost = json.loads(run(*eval_, "--json")[1])["cost"]
    assert (cost["masks"], cost["unit_runs"], cost["store_hits"]) == (2, 0, 2)


@pytest.mark.slow
def test_eval_writes_what_the_library_computes(run, folder, manager, tmp_path):
    out_file = tmp_path / "out.jsonl"
    status, out, err = run(
        "eval",
        folder("llama"),
        "--removed",
        "1,2",
        "--removed",
        "",
        "--tasks",
        "demo_choices, demo_text",
        "--include-path",
        TASKS,
        "--limit",
        6,
        "--bootstrap-iters",
        0,
        "--out",
        out_file,
    )
    assert status == 0, err
    rows = [json.loads(line) for line in out_file.read_text().splitlines()]
    masks = fp.from_removed([(1, 2), ()], 5)
    tasks = ["demo_choices", "demo_text"]
    expected = evaluate_masks(str(folder("llama")), masks, tasks, task_manager=manager, **SETTINGS)
    assert [row["removed"] for row in rows] == [[1, 2], []]
    for row, result in zip(rows, expected, strict=True):
        assert row["results"]["demo_text"] == result["results"]["demo_text"]
        assert "samples" not in row
    for text in ("demo_choices", "acc_norm", "word_perplexity", "1-2", str(out_file)):
        assert text in out


def least_gigabytes(folder) -> str:
    """The smallest --weights-gb that works."""
    with pytest.raises(fp.InputError, match="weights_bytes") as error:
        fp.load_model(folder, weights_bytes=1)
    return str(error.value.least / 2**30)


@pytest.mark.slow
def test_workers_and_streamed_weights_give_the_same_answers(run, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("fastprune.cli.opening.Processes", InThisProcess)
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))
    streamed = "--weights-gb", least_gigabytes(folder("llama"))
    found = []
    for number, more in enumerate([(), ("--workers", 2), streamed]):
        out_file = tmp_path / f"{number}.jsonl"
        status, _, err = run(
            "eval",
            folder("llama"),
            "--removed",
            "1,2",
            "--removed",
            "",
            "--tasks",
            ",".join(LIKELIHOODS),
            "--limit",
            3,
            "--include-path",
            TASKS,
            "--bootstrap-iters",
            0,
            "--log-samples",
            "--out",
            out_file,
            *more,
        )
        assert status == 0, err
        rows = map(json.loads, out_file.read_text().splitlines())
        found.append([(row["removed"], row["results"], row["samples"]) for row in rows])
    assert len(found[0]) == 2
    assert all(rows == found[0] for rows in found[1:])


def test_a_store_keeps_what_was_evaluated(folder, manager, tmp_path):
    ran = []
    settings = {"task_manager": manager, "store": tmp_path / "s.db", **SETTINGS}
    settings["progress"] = lambda event: ran.append(event.done)
    first = evaluate_masks(
        str(folder("llama")), fp.from_removed([(1, 2), ()], 5), LIKELIHOODS, **settings
    )
    assert ran
    ran.clear()
    again = evaluate_masks(
        str(folder("llama")), fp.from_removed([(), (1, 2)], 5), LIKELIHOODS, **settings
    )
    assert not ran
    assert [result["results"] for result in again] == [
        result["results"] for result in reversed(first)
    ]


def test_a_study_evaluates_what_it_chose(run, folder, text_file, manager, tmp_path, monkeypatch):
    out, again = tmp_path / "study", tmp_path / "again"
    tables = text_study(
        folder("llama"),
        text_file,
        search_algorithms=["one_shot", "greedy"],
        search_num_remove=[1, 2],
        control=[{"name": "first", "removed": "0-1"}, {"name": "back", "backwards": True}],
        evaluate={"tasks": ["demo_choices", "demo_text"], "include_path": TASKS, "limit": 6},
    )
    document = write_document(tmp_path / "study.toml", **tables)
    status, printed, err = run("study", document, "--out", out)
    assert status == 0, err
    cells = json.loads((out / "study.json").read_text())["cells"]
    ((name, rows),) = json.loads((out / "tasks.json").read_text()).items()
    chosen = {tuple(cell["removed"]) for cell in cells}
    assert rows[0]["removed"] == rows[0]["chosen"] == []
    assert {tuple(row["removed"]) for row in rows[1:-1]} == chosen | {(0, 1)}
    assert rows[-1]["sequence"] == [4, 3, 2, 1, 0]
    assert [row["controls"] for row in rows if row["controls"]] == [["first"], ["back"]]
    assert sum(len(row["chosen"]) for row in rows) == len(cells)
    sequences = [
        row.get("sequence") or [u for u in range(5) if u not in row["removed"]] for row in rows
    ]
    settings = {"task_manager": manager, "limit": 6}
    expected = evaluate_masks(name, None, ["demo_choices"], sequences=sequences, **settings)
    for row, result in zip(rows, expected, strict=True):
        assert row["results"]["demo_choices"] == result["results"]["demo_choices"]
    assert "word_perplexity" in printed
    assert "0-1 (control: first)" in printed
    monkeypatch.setattr("fastprune.cli.opening.Processes", InThisProcess)
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))
    tables["resources"] = {"weights_gb": float(least_gigabytes(folder("llama")))}
    write_document(document, **tables)
    status, _, err = run("study", document, "--workers", 2, "--out", again)
    assert status == 0, err
    assert (again / "tasks.json").read_text() == (out / "tasks.json").read_text()
    tables["evaluate"] = {"limit": 6}
    status, _, err = run("study", write_document(document, **tables), "--out", out)
    assert status == 2
    assert "study.toml: evaluate.tasks is missing" in err.splitlines()[-1]
    tables["evaluate"] = {"tasks": ["demo_choice"], "include_path": TASKS}
    status, _, err = run("study", write_document(document, **tables), "--out", out)
    assert status == 2
    assert "study.toml: evaluate.tasks: " in err.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--removed", "1"), "--tasks"),
        (("--tasks", "demo_choices"), "either as --masks FILE, or as --removed"),
        pytest.param(
            ("--tasks", "demo_choics", "--removed", "1"),
            "--tasks: unknown task 'demo_choics'",
            marks=pytest.mark.nightly,  # here, too, the harness indexes its own
            id="unknown",
        ),
        (("--tasks", ",", "--removed", "1"), "--tasks: tasks are given as"),
        (
            ("--tasks", "demo_choices", "--removed", "5"),
            "--removed: removed unit 5 is out of range",
        ),
        (("--tasks", "demo_choices", "--removed", "1", "--limit", "0"), "--limit"),
        (("--tasks", "demo_choices", "--masks", "/nowhere.npy"), "no such masks file"),
        (("--tasks", "demo_answer", "--removed", "0", "--granularity", "sublayer"), "half a block"),
        (
            ("--tasks", "demo_text,demo_answer", "--removed", "0", "--weights-gb", "1"),
            "--tasks: demo_answer: text is generated by the whole model, and its weights are "
            "streamed; leave out",
        ),
    ],
)
def test_eval_with_wrong_input(run, folder, arguments, message):
    status, _, err = run("eval", folder("llama"), "--include-path", TASKS, *arguments)
    assert status == 2
    assert message in err.splitlines()[-1]


def from_here(outer: Exception, inner: Exception) -> Exception:
    """An error that a library raised from another one."""
    outer.__cause__ = inner
    return outer


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("Couldn't reach 'some/data' on the Hub"),
        TimeoutError("some/data"),
        RequestError("some/data"),
        ReadTimeout("some/data"),
        httpx.ConnectError("some/data"),
        LocalEntryNotFoundError("some/data"),
        from_here(ValueError("some/data"), httpx.ConnectTimeout("")),
    ],
)
@pytest.mark.parametrize("more", [(), ("--weights-gb", 1)])
def test_a_data_set_that_cannot_be_reached(run, folder, monkeypatch, error, more):
    def load(*_):
        raise error

    monkeypatch.setattr(TaskManager, "load", load)
    eval_ = ("eval", folder("llama"), "--include-path", TASKS, "--removed", "1", *more)
    status, _, err = run(*eval_, "--tasks", "demo_choices,demo_text")
    line = err.splitlines()[-1]
    assert status == 2
    assert "one of demo_choices, demo_text cannot be loaded without a network" in line
    for word in ("some/data", "HF_HUB_OFFLINE=1", "HF_HOME", "--include-path"):
        assert word in line
    assert len(line) < 400


def test_a_study_misses_the_data_of_its_tasks_before_it_searches(
    run, folder, text_file, tmp_path, monkeypatch
):
    def load(*_):
        raise ConnectionError("some/data")

    monkeypatch.setattr(TaskManager, "load", load)
    tasks = {"tasks": ["demo_text"], "include_path": TASKS}
    tables = text_study(folder("llama"), text_file, evaluate=tasks)
    status, _, err = run(
        "study", write_document(tmp_path / "study.toml", **tables), "--out", tmp_path / "out"
    )
    assert status == 2
    assert "study.toml: evaluate.tasks: the data of demo_text cannot be loaded" in err
    assert not (tmp_path / "out").exists()


def test_the_own_command_line_of_the_harness_without_a_network(monkeypatch, capsys):
    def cli_evaluate():
        raise ConnectionError("Couldn't reach 'some/data' on the Hub")

    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", cli_evaluate)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fastprune: the data of a task cannot be loaded without a network")


@pytest.mark.parametrize("error", [FileNotFoundError("data.jsonl"), ValueError("data.jsonl")])
def test_other_errors_of_a_task_stay_what_they_are(folder, manager, monkeypatch, error):
    def load(*_):
        raise error

    monkeypatch.setattr(TaskManager, "load", load)
    masks = {"sequences": [(0,)], "task_manager": manager}
    with pytest.raises(type(error), match=r"data\.jsonl") as raised:
        evaluate_masks(str(folder("llama")), None, ["demo_choices"], **masks)
    assert raised.value is error


@pytest.mark.slow
def test_a_task_that_nobody_knows(run, folder, monkeypatch):
    """The harness's own are asked for as well, of which there are none here."""
    asked = []

    def managed(include_path=None, include_defaults=True):
        asked.append(include_defaults)
        return TaskManager(include_path=include_path, include_defaults=False)

    monkeypatch.setattr("fastprune.integrations.lm_eval.TaskManager", managed)
    arguments = ("--include-path", TASKS, "--tasks", "demo_choics", "--removed", "1")
    status, _, err = run("eval", folder("llama"), *arguments)
    assert status == 2
    assert (
        "--tasks: unknown task 'demo_choics'; did you mean 'demo_choices'?" in err.splitlines()[-1]
    )
    assert asked == [False, True]


@pytest.mark.slow
def test_without_the_harness(run, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "lm_eval" else found(name)
    )
    status, _, err = run("eval", "demo", "--tasks", "arc_easy", "--removed", "1")
    assert (status, err.count("\n")) == (2, 1)
    assert "lm_eval is needed for this and not installed: pip install 'fastprune[lm-eval]'" in err


@pytest.mark.nightly  # the harness indexes 14,000 tasks, for 20 s each time
def test_the_page_runs_as_it_stands(tmp_path):
    page = (TASKS.parents[2] / "docs" / "lm-eval.md").read_text()
    blocks = re.findall(r"^```(sh|python)\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert [kind for kind, _ in blocks] == ["sh", "sh", "python", "sh"]
    (tmp_path / "tests").symlink_to(TASKS.parents[1])
    names = (
        f'python() {{ "{sys.executable}" "$@"; }}\nfastprune() {{ python -m fastprune "$@"; }}\n'
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    for kind, block in blocks:
        command = ["bash", "-ec", names + block] if kind == "sh" else [sys.executable, "-c", block]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    assert "demo_choices" in done.stdout
    (row,) = map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines())
    assert row["removed"] == [9, 10, 11]
    assert 0 <= row["results"]["demo_answer"]["exact_match,none"] <= 1
