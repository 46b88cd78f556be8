"""A study's folder: what was left there is checked, a kill leaves nothing that blocks, and one
process writes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fastprune as fp
from fastprune.study import Control, check_study_folder, run_study, write_report
from fastprune.study.folder import hold
from fastprune.study.machines import machines_note

COSTS = ("unit_runs", "seconds")


def make_model() -> fp.Model:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    return fp.Model(LlamaForCausalLM(config).eval(), name="tiny")


IDS = fp.TokenBatch.from_ids(np.random.default_rng(1).integers(0, 97, (4, 13)))


def study(out, model: fp.Model | None = None, **more) -> dict:
    objectives = {"one": lambda model: fp.Perplexity(IDS)}
    return run_study(
        [model or make_model()], objectives, ["one_shot", "greedy"], [1, 2], out, **more
    )


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("studies") / "study"
    return out, study(out, model)


def found(cells: list[dict]) -> list[dict]:
    return [{key: value for key, value in cell.items() if key not in COSTS} for cell in cells]


def altered(**changes):
    return lambda path, other: path.write_text(
        json.dumps({**json.loads(path.read_text()), **changes})
    )


DAMAGE = {
    "empty": lambda path, other: path.write_bytes(b""),
    "cut short": lambda path, other: path.write_bytes(path.read_bytes()[:-9]),
    "no text": lambda path, other: path.write_bytes(b"\xff\x00" * 50),
    "another value": lambda path, other: path.write_text("[1, 2]"),
    "another loss": altered(loss=0.5),
    "other units": altered(removed=[0]),
    "another key": altered(more=1),
    "no checksum": altered(checksum=None),
    "another cell": lambda path, other: shutil.copyfile(other, path),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_cell_that_cannot_be_believed_is_named_and_made_again(finished, model, tmp_path, damage):
    out = shutil.copytree(finished[0], tmp_path / "s")
    path, other = sorted((out / "cells").iterdir())[:2]
    damage(path, other)
    with pytest.warns(RuntimeWarning, match=path.name):
        again = study(out, model)
    assert found(again["cells"]) == found(finished[1]["cells"])
    assert found(study(out, model)["cells"]) == found(
        finished[1]["cells"]
    )  # and nothing is said any more


def test_a_cell_of_a_study_with_other_settings_is_made_again(finished, model, tmp_path):
    out, other = shutil.copytree(finished[0], tmp_path / "s"), tmp_path / "other"
    expected = study(other, model, seed=1)
    for cell in (other / "cells").iterdir():
        shutil.copyfile(out / "cells" / cell.name, cell)
    with pytest.warns(RuntimeWarning) as said:
        again = study(other, model, seed=1)
    assert len(said) == len(expected["cells"])
    assert found(again["cells"]) == found(expected["cells"])


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"\xff\xfe", b'{"seed": 0, "seed": 0}', b"[" * 99999]
)
def test_inputs_that_no_study_has_written(model, tmp_path, content):
    (tmp_path / "inputs.json").write_bytes(content)
    with pytest.raises(fp.InputError, match=r"inputs\.json: is not what a study has written"):
        study(tmp_path, model)
    assert (tmp_path / "inputs.json").read_bytes() == content


@pytest.mark.parametrize("name", ["inputs.json", "scores.db", ".lock"])
def test_folders_in_the_place_of_files(finished, model, tmp_path, name):
    out = shutil.copytree(finished[0], tmp_path / "s")
    (out / name).unlink()
    (out / name).mkdir()
    with pytest.raises(fp.InputError, match=name):
        study(out, model)


def test_the_second_process_in_a_folder_is_refused(finished, model, tmp_path):
    out = shutil.copytree(finished[0], tmp_path / "s")
    program = (
        "import sys, pathlib\n"
        "from fastprune.study.folder import hold\n"
        "with hold(pathlib.Path(sys.argv[1])):\n"
        "    print('held', flush=True); sys.stdin.read()\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", program, str(out)]
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout.readline() == b"held\n"
        for call in (lambda: study(out, model), lambda: check_study_folder(out, {})):
            with pytest.raises(fp.InputError, match="another process is running a study there"):
                call()
        holder.send_signal(signal.SIGKILL)
    assert found(study(out, model)["cells"]) == found(finished[1]["cells"])


def test_what_a_kill_leaves_behind_does_not_block(finished, model, tmp_path):
    (tmp_path / ".lock").touch()
    (tmp_path / ".inputs.json.4242").write_text('{"mod')
    again = study(tmp_path, model)
    assert found(again["cells"]) == found(finished[1]["cells"])


def test_cells_of_another_machine_are_used_and_named(finished, model, tmp_path, monkeypatch):
    """A changed environment is another machine: its fingerprint differs."""
    out, said = shutil.copytree(finished[0], tmp_path / "s"), []
    (here,) = finished[1]["inputs"]["machines"]
    lost = sorted((out / "cells").iterdir())[0]
    lost.unlink()
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        mixed = study(out, model, notify=said.append)
    assert len([line for line in said if "removed" in line]) == 1  # the lost cell alone
    (there,) = mixed["inputs"]["machines"].keys() - {here}
    assert mixed["machine"] == {"tiny": there}
    assert sorted(cell["machine"] for cell in mixed["cells"]).count(there) == 1
    environments = [of["environment"] for of in mixed["inputs"]["machines"].values()]
    assert [of.get("CUBLAS_WORKSPACE_CONFIG") for of in environments] == [None, ":4096:8"]
    note = machines_note(mixed)
    assert "ran on 2 machines" in note
    assert f"3 on {here}" in note
    assert f"1 on {there}" in note
    assert "differ in CUBLAS_WORKSPACE_CONFIG." in note
    assert f"come from one machine, {there}" in note
    write_report(mixed, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "ran on 2 machines" in page
    assert page.count(f'<td class="text">{there}</td>') == 1
    again = study(out, model)  # back here: the cells stay as they are
    assert [cell["machine"] for cell in again["cells"]] == [
        cell["machine"] for cell in mixed["cells"]
    ]
    assert machines_note(again).endswith(f"come from one machine, {here}.")


def test_one_machine_needs_no_note(finished, tmp_path):
    assert machines_note(finished[1]) == ""
    write_report(finished[1], tmp_path / "report.html")
    assert "machine" not in (tmp_path / "report.html").read_text()


def test_another_backend_is_refused(finished, model):
    with pytest.raises(fp.InputError, match=r"model\.backend was 'auto' and is 'generic'"):
        study(finished[0], model, backend="generic")


def test_checking_a_folder_makes_none(tmp_path):
    assert check_study_folder(tmp_path / "new", {"seed": 0}) is None
    assert not (tmp_path / "new").exists()
    with hold(tmp_path / "new"):
        assert (tmp_path / "new").is_dir()
    assert not check_study_folder(tmp_path / "new", {"seed": 0})


@pytest.mark.parametrize("label", ["", "a/b", "..", "a\0", "x" * 61])
def test_labels_are_parts_of_file_names(model, tmp_path, label):
    make = {label: lambda model: fp.Perplexity(fp.TokenBatch.from_ids([[1, 2]]))}
    with pytest.raises(fp.InputError, match="a label is made of"):
        run_study([model], make, ["greedy"], [1], tmp_path / "s")


def test_nothing_is_given_twice(model, tmp_path):
    make = {"one": lambda model: fp.Perplexity(fp.TokenBatch.from_ids([[1, 2]]))}
    for algorithms, budgets in ((["greedy", "greedy"], [1]), (["greedy"], [1, 1])):
        with pytest.raises(fp.InputError, match="is given twice"):
            run_study([model], make, algorithms, budgets, tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_arguments_of_other_kinds_are_named(model, tmp_path):
    make = {"one": lambda model: fp.Perplexity(fp.TokenBatch.from_ids([[1, 2]]))}

    def refused(message, algorithms=("greedy",), budgets=(1,), **more):
        with pytest.raises(fp.InputError, match=message):
            run_study([model], make, algorithms, budgets, tmp_path / "s", **more)
        assert not (tmp_path / "s").exists()

    refused("algorithms: must be a list", algorithms="greedy")
    refused("budgets: must be a list", budgets="25%")
    for size in (-1, 2.5, True, None):
        refused("budgets: num_remove must be an integer of at least 0", budgets=[1, size])
    refused("budgets: num_remove must be an integer or a share", budgets=["1"])
    refused("control: a control must be a Control, not dict", controls=[{"name": "c"}])
    refused("control: a label is made of", controls=[Control(name=5, random=2)])
    refused("control.c: removed units are given as", controls=[Control(name="c", removed=5)])


def test_models_of_any_name(tmp_path):
    for name in ("x" * 1000, "é" * 300, "a/../b", "two\nlines"):
        other = make_model()
        other.name = name
        assert study(tmp_path / str(len(name)), other)["cells"]


def test_the_page_and_the_figure_replace_what_was_there_at_once(finished, tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    write_report(finished[1], path)
    before = path.read_bytes()

    def fails(*_):
        raise OSError("the disk is full")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="the disk is full"):
        write_report(finished[1], path)
    assert path.read_bytes() == before
    assert [place.name for place in tmp_path.iterdir()] == [path.name]


def test_a_cell_of_a_mask_may_lack_the_fields_of_sequences_and_budgets(model, tmp_path):
    """A cell is checked against what its file holds, so that later fields do not void it."""
    objectives = {"one": lambda model: fp.Perplexity(IDS)}
    arguments = [model], objectives, ["greedy"], [2], tmp_path / "s"
    first = run_study(*arguments)
    (path,) = (tmp_path / "s" / "cells").iterdir()
    assert path.name.endswith("-one-2-greedy.json")
    record, inputs = json.loads(path.read_text()), first["inputs"]
    for name in ("checksum", "sequence", "costs"):
        del record[name]
    made_with = {
        "model": ["tiny", inputs["models"]["tiny"], inputs["dtype"]["tiny"]],
        "objective": ["one", *inputs["objectives"]["tiny one"]],
        "num_remove": 2,
        "algorithm": ["greedy", {}],
        **{name: inputs[name] for name in ("seed", "racing", "protect", "granularity", "backend")},
    }
    text_of = json.dumps([record, made_with], sort_keys=True).encode()
    path.write_text(json.dumps({**record, "checksum": hashlib.sha256(text_of).hexdigest()}))
    said: list[str] = []
    assert run_study(*arguments, notify=said.append)["cells"] == first["cells"]
    assert said[-2:] == [
        "1 of 1 cells were finished before",
        "scoring every chosen mask under every objective",
    ]


def test_finished_cells_are_read_in_the_form_in_which_long_studies_wrote_them(model, tmp_path):
    """All keys are spelled here: a study of weeks must continue, whatever the code calls them."""
    objective = fp.Perplexity(IDS)
    cell = {"model": "tiny", "objective": "one", "num_remove": 2, "algorithm": "greedy"}
    cell |= {"removed": [1, 3], "sequence": None, "loss": 0.125, "error": None, "costs": None}
    cell |= {"decided_early": 0, "machine": "elsewhere", "losses": None, "masks": 7}
    cell |= {"unit_runs": 9.0, "asked_unit_runs": 11.0, "naive_unit_runs": 20.0, "seconds": 0.5}
    shared = {"seed": 0, "racing": None, "protect": [], "granularity": "block", "backend": "auto"}
    made_with = {
        "model": ["tiny", model.digest, "torch.float32"],
        "objective": ["one", "perplexity", objective.content_hash],
        "num_remove": 2,
        "algorithm": ["greedy", {}],
        **shared,
    }
    inputs = {
        "algorithms": {"greedy": {}},
        "budgets": [2],
        "models": {"tiny": model.digest},
        "dtype": {"tiny": "torch.float32"},
        "objectives": {"tiny one": ["perplexity", objective.content_hash]},
        "machines": {"elsewhere": {}},
        **shared,
    }
    text_of = json.dumps([cell, made_with], sort_keys=True).encode()
    checksum = hashlib.sha256(text_of).hexdigest()
    out = tmp_path / "s"
    name = f"tiny-{hashlib.sha256(b'tiny').hexdigest()[:8]}-one-2-greedy.json"
    (out / "cells").mkdir(parents=True)
    (out / "inputs.json").write_text(json.dumps(inputs))
    (out / "cells" / name).write_text(json.dumps({**cell, "checksum": checksum}))
    said: list[str] = []
    objectives = {"one": lambda model: objective}
    study = run_study([model], objectives, ["greedy"], [2], out, notify=said.append)
    assert "1 of 1 cells were finished before" in said
    (read,) = study["cells"]
    assert read.pop("losses").keys() == {"one"}
    del cell["losses"]
    assert {key: read[key] for key in cell} == {**cell, "removed": (1, 3)}
