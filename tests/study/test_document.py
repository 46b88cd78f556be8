"""Study documents: what they say is what runs, and every mistake in one is named with its place."""

from __future__ import annotations

import json
import math

import pytest
from documents import document_text, text_study, write_document

import fastprune as fp
from fastprune import demo
from fastprune.study import read_document
from fastprune.study.config import EXAMPLE
from fastprune.study.folder import check_study_folder


def test_the_example_runs_on_the_demo_model(run, tmp_path):
    status, printed, _ = run("study", "--example")
    assert status == 0
    assert printed == EXAMPLE.read_text()
    document = tmp_path / "study.toml"
    document.write_text(printed.replace("[2, 3]", "[1]").replace('"greedy", "beam"', '"beam"'))
    status, out, err = run("study", document, "--out", tmp_path / "s", "--quiet")
    assert status == 0, err
    assert "unseen-questions: accuracy" in out
    study = json.loads((tmp_path / "s" / "study.json").read_text())
    assert study["objectives"].keys() == {"perplexity-text", "margin-questions"}
    assert study["inputs"]["algorithms"]["beam"] == {"beam_width": 3}
    model = fp.load_model("demo")
    batch = fp.load_text(demo.TEXT, model.tokenizer, 4, 64, bos=False)
    result = fp.run_search(fp.Evaluator(model, fp.Perplexity(batch)), "one_shot", 1)
    (cell,) = [
        cell
        for cell in study["cells"]
        if (cell["objective"], cell["algorithm"]) == ("perplexity-text", "one_shot")
    ]
    assert (tuple(cell["removed"]), cell["loss"]) == (result.removed, result.loss)


@pytest.mark.parametrize("document", [EXAMPLE, demo.STUDY, demo.QUICK_STUDY], ids=lambda p: p.name)
def test_documents_that_ship_are_right(document):
    config = read_document(document).config
    assert list(config.objectives) == ["perplexity-text", "margin-questions"]
    assert all(data.file for data in (*config.calibration, *config.held_out))
    assert {data.file for data in config.held_out} == {
        str(demo.TEXT_HELDOUT),
        str(demo.QUESTIONS_HELDOUT),
    }


def test_keys_shown_in_the_examples_comments_are_right(tmp_path):
    """Every commented key of the example, uncommented."""
    lines = EXAMPLE.read_text().splitlines()
    head = lines.index("[model]")
    keys = [
        line[2:] if line.startswith(("# [", "# ")) and (" = " in line or line[2] == "[") else line
        for line in lines[head:]
    ]
    for name in ("c4.jsonl", "questions.jsonl", "chat.jinja"):
        (tmp_path / name).write_text("{}")
    text = "\n".join(keys).replace("/fast/disk", str(tmp_path / "disk"))
    (tmp_path / "study.toml").write_text(text)
    config = read_document(tmp_path / "study.toml").config
    assert config.model.dtype == "bfloat16"
    text, tasks = config.calibration
    assert text.reading == {
        "bos": False,
        "column": "text",
        "chat_template": str(tmp_path / "chat.jinja"),
        "loss_on": "completion",
    }
    assert tasks.reading == {"delimiter": " "}
    margin = config.objective[1]
    assert margin.settings == {"normalization": "mean", "weighting": "question"}
    assert config.held_out[1].settings == {"normalization": "sum"}
    assert config.search.protect == (0, 1)
    assert config.search.racing == 0.99
    assert config.resources.in_bytes("weights") == 8 * 2**30
    assert config.evaluate.settings == {
        "limit": 100.0,
        "num_fewshot": 0,
        "apply_chat_template": False,
        "system_instruction": "Answer briefly.",
        "fewshot_as_multiturn": True,
    }
    assert config.evaluate.include_path == str(tmp_path / "my_tasks")


@pytest.fixture
def refused(text_file, questions, tmp_path):
    """refused(message, **changes): the document with these changes is refused, with its name."""

    def refused(message: str, text: str | None = None, **changes) -> None:
        path = write_document(tmp_path / "study.toml", **text_study("m", text_file, **changes))
        if text is not None:
            path.write_text(text)
        with pytest.raises(fp.InputError) as error:
            read_document(path)
        line = str(error.value)
        assert line.startswith(f"{path}: ")
        assert message in line
        assert "\n" not in line

    return refused


def test_mistakes_in_a_table(refused):
    refused("modle is no known key; did you mean 'model'? known: base, cal", modle={"path": "m"})
    refused("search.seeds is no known key; did you mean 'seed'?", search_seeds=3)
    refused("model.path is missing", model={})
    refused("model must be a table, not 'm'", model="m")
    refused("model.path must be a text or a list, not 3", model={"path": 3})
    refused("model.path must be a text, not 3", model={"path": ["m", 3]})
    refused("model.path: 'm' is given twice", model={"path": ["m", "n", "m"]})
    refused("model.path must name at least one", model={"path": []})
    refused("model.dtype: unknown value 'int8'", model={"path": "m", "dtype": "int8"})
    refused("model.backend: unknown value 'fussed'; did you mean 'fused'?",
            model={"path": "m", "backend": "fussed"})  # fmt: skip
    refused("model.trust_remote_code must be true or false, not 1",
            model={"path": "m", "trust_remote_code": 1})  # fmt: skip
    refused("search is missing", text='[model]\npath = "m"\n[[calibration]]\nname="a"\nkind="text"')
    refused("not valid TOML", text="[model\n")
    refused("not valid TOML", text='[model]\npath = "m"\npath = "n"')
    refused("not valid TOML", text="a = " + "[" * 100_000)
    refused("not valid TOML", text="a = " + "9" * 5000)
    refused("must be an absolute path, not 'here'", base="here")


def test_mistakes_in_a_search(refused):
    refused("search.racing must be a number between 0 and 1, not 2", search_racing=2)
    refused("search.racing must be a number between 0 and 1, not nan", search_racing=math.nan)
    refused("search.racing must be a number between 0 and 1, not True", search_racing=True)
    refused("search.racing: shortgpt needs every loss it asks for and does not race; these do: "
            "one_shot", search_racing=0.9, search_algorithms=["shortgpt"])  # fmt: skip
    refused("search.num_remove must be a list, not 3", search_num_remove=3)
    refused("search.num_remove: one_shot removes units, and no size is named", search_num_remove=[])
    refused("search.num_remove: 2 is given twice", search_num_remove=[2, 2])
    refused("search.num_remove must be an integer from 0 to 2147483647, not -1",
            search_num_remove=[-1])  # fmt: skip
    refused("search.num_remove must be an integer from 0", search_num_remove=[True])
    refused("search.seed must be an integer from 0 to 9223372036854775807, not 922337203685477",
            search_seed=2**63)  # fmt: skip
    refused("search.seed must be an integer", search_seed=1.5)
    refused("not 'beem'; did you mean 'beam'?", search_algorithms=["beem"])
    refused("search.algorithms: 'beam' is given twice", search_algorithms=["beam", "beam"])
    refused("search.algorithms must name at least one", search_algorithms=[])
    refused("must be a list of names or \"all\", not 'beam'", search_algorithms="beam")
    refused("search.granularity: unknown value 'head'", search_granularity="head")
    refused("search.protect: unknown preset 'slab'; did you mean 'sleb'?", search_protect="slab")
    refused("search.protect must be an integer", search_protect=[0, "1"])

    def options(message: str, algorithm: str, given: object) -> None:
        refused(message, search_algorithms=["beam"], search_options={algorithm: given})

    options("search.options.beam: beam has no option 'width'", "beam", {"width": 5})
    options("search.options.beam: beam_width must be an integer, not '5'", "beam",
            {"beam_width": "5"})  # fmt: skip
    options("beam_width of beam must be at least 1, not 0", "beam", {"beam_width": 0})
    options("search.options.greedy: greedy is not among search.algorithms", "greedy", {})
    options("not 'beem'; did you mean 'beam'?", "beem", {})


def test_mistakes_in_data(refused, text_file, questions):
    text = {"name": "a", "kind": "text", "file": text_file}
    tasks = {"name": "q", "kind": "tasks", "file": questions}

    def data(message: str, *sets: dict, **more) -> None:
        refused(message, calibration=list(sets), **more)

    data(
        "calibration.a.samples is no known key; did you mean 'num_samples'?", {**text, "samples": 8}
    )
    data("calibration.1.name is missing", {"kind": "text"})
    data("calibration.b.kind is missing", text, {"name": "b"})
    data("calibration.a.kind: unknown value 'txt'; did you mean 'text'?", {**text, "kind": "txt"})
    data("calibration.a.num_samples must be an integer from 1", {**text, "num_samples": 0})
    data("calibration.a.seq_len must be an integer from 2", {**text, "seq_len": "16"})
    data("calibration.a.file: nowhere.txt: no such file", {**text, "file": "nowhere.txt"})
    data("calibration.a.file: 'a\\x00b' holds a NUL character", {**text, "file": "a\0b"})
    data("calibration.a.file is missing; only the demo model", {"name": "a", "kind": "text"})
    data("calibration: 'a' is given twice", text, text)
    data("a label is made of", {**text, "name": "a/b"})
    data("a label is made of", {**text, "name": "x" * 55})  # with the objective's name
    data("calibration.q.seq_len is for text; num_samples says how many", {**tasks, "seq_len": 8})
    data("calibration.q.seed is for text", {**tasks, "seed": 0})
    data("calibration.q.column is for text", {**tasks, "column": "text"})
    data("calibration.a.delimiter is for tasks", {**text, "delimiter": ""})
    data("calibration.a.bos must be true or false", {**text, "bos": "no"})
    data("calibration.a.loss_on: unknown value 'every'", {**text, "loss_on": "every"})
    data("calibration must name at least one")
    data("objective.perplexity.flatten: perplexity has no such setting", text,
         objective=[{"name": "perplexity", "flatten": True}])  # fmt: skip
    data("objective.margin.normalization: unknown value 'bytes'; known: mean, sum", tasks,
         objective=[{"name": "margin", "normalization": "bytes"}])  # fmt: skip
    data("objective.kl.positions: unknown value 'last'; known: all, targets", text,
         objective=[{"name": "kl", "positions": "last"}])  # fmt: skip
    perplexity, margin = {"name": "perplexity"}, {"name": "margin"}
    data("calibration.q: no [[objective]] uses it", text, tasks, objective=[perplexity])
    data("objective.margin: takes tasks, of which no", text, objective=[perplexity, margin])
    data("objective: 'perplexity on a' is given twice", text, objective=[perplexity, perplexity])
    data("objective: unknown objective 'perplexety'; did you mean 'perplexity'?", text,
         objective=[{"name": "perplexety"}])  # fmt: skip
    data("objective.kl.on: unknown calibration set 'b'; known: a", text,
         objective=[{"name": "kl", "on": ["b"]}])  # fmt: skip
    data("objective.kl.on: takes text, and 'q' is tasks", text, tasks,
         objective=[{"name": "kl", "on": ["q"]}])  # fmt: skip
    held = {"name": "h", "objective": "accuracy", "file": questions}
    data("held_out.h.file is missing", text, held_out=[{"name": "h", "objective": "kl"}])
    data("held_out.h.objective: unknown objective 'acuracy'", text,
         held_out=[{**held, "objective": "acuracy"}])  # fmt: skip
    data("held_out.h.seed is for text", text, held_out=[{**held, "seed": 1}])
    data("held_out.h.weighting: accuracy has no such setting; it has normalization", text,
         held_out=[{**held, "weighting": "choices"}])  # fmt: skip
    data("held_out: 'h' is given twice", text, held_out=[held, held])
    data("'perplexity-a' is searched with", text, held_out=[{**held, "name": "perplexity-a"}])


def test_mistakes_in_resources(refused, text_file):
    for value in (0, -1, math.nan, math.inf, 1e300, "four", True):
        refused(
            "resources.memory_gb must be a number between 0 and", resources={"memory_gb": value}
        )
    refused("resources.cache_gb must be a number from 0", resources={"cache_gb": -1})
    refused("is a file, not a folder", resources={"cache_dir": str(text_file)})
    refused("evaluate.tasks must be a list", evaluate={"tasks": "arc_easy"})
    refused("evaluate.tasks is missing", evaluate={"limit": 6})
    refused("evaluate.limit must be a number between 0", evaluate={"tasks": ["a"], "limit": 0})


def test_files_that_are_no_documents(tmp_path):
    with pytest.raises(fp.InputError, match="no such file; fastprune study --example"):
        read_document(tmp_path)
    (tmp_path / "s.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(fp.InputError, match=r"s\.toml: not a text file in UTF-8"):
        read_document(tmp_path / "s.toml")


def test_defaults(tmp_path, text_file, questions):
    """One objective for each kind of data, every set of it; paths start from the document."""
    (tmp_path / "near.txt").write_text("w1 w2")
    path = write_document(
        tmp_path / "s.toml",
        model={"path": ["demo", "org/model", "here"]},
        calibration=[
            {"name": "a", "kind": "text", "file": "near.txt"},
            {"name": "q", "kind": "tasks", "file": questions},
            {"name": "b", "kind": "text", "file": text_file},
        ],
        search={"num_remove": [1]},
    )
    (tmp_path / "here").mkdir()
    document = read_document(path)
    assert list(document.config.objectives) == ["perplexity-a", "perplexity-b", "margin-q"]
    assert document.config.calibration[0].file == str(tmp_path / "near.txt")
    assert document.models == {
        "demo": "demo",
        "org/model": "org/model",
        "here": str(tmp_path / "here"),
    }


def test_a_study_from_the_command_line(run, checkpoint, text_file, questions, tmp_path):
    tables = text_study(
        checkpoint,
        text_file,
        calibration=[
            {"name": "a", "kind": "text", "file": text_file, "num_samples": 4, "seq_len": 16},
            {"name": "b", "kind": "text", "file": text_file, "num_samples": 2, "seq_len": 8}
            | {"seed": 3},
            {"name": "q", "kind": "tasks", "file": questions, "num_samples": 3},
        ],
        held_out=[
            {"name": "new", "objective": "perplexity", "file": text_file, "num_samples": 6}
            | {"seq_len": 16}
        ],
        search_algorithms=["one_shot", "greedy"],
    )
    path, out_dir = write_document(tmp_path / "study.toml", **tables), tmp_path / "s"
    status, out, err = run("study", path, "--out", out_dir)
    assert status == 0, err
    assert "greedy" in out
    assert "Another calibration set" in out
    study = json.loads((out_dir / "study.json").read_text())
    assert study["objectives"].keys() == {"perplexity-a", "perplexity-b", "margin-q"}
    assert study["held_out"].keys() == {"new"}
    (dense,) = study["dense"].values()
    whole = dense["perplexity-a"]
    assert whole["perplexity"] == math.exp(whole["loss"])
    assert f"perplexity {whole['perplexity']:.3f}" in out
    model = fp.load_model(checkpoint)
    batch = fp.load_text(text_file, model.tokenizer, 2, 8, 3)
    of_b = next(cell for cell in study["cells"] if cell["objective"] == "perplexity-b")
    scores = fp.Evaluator(model, fp.Perplexity(batch)).score(fp.from_removed([of_b["removed"]], 5))
    assert of_b["loss"] == scores[0]
    assert {"study.json", "report.html", "inputs.json", "scores.db", "study.toml"} <= {
        path.name for path in out_dir.iterdir()
    }

    def again(document, **changes) -> tuple[int, str]:
        changed = {**tables, **changes}
        changed["search"] = {**tables["search"], **changes.get("search", {})}
        status, _, err = run("study", write_document(document, **changed), "--out", out_dir)
        return status, err

    status, err = again(path, search={"seed": 1})
    assert status == 2
    assert "search.seed was 0 and is 1; name another folder" in err
    status, err = again(path, search={"num_remove": [1, 9]})
    assert status == 2
    assert "num_remove must be an integer from 0 to 4" in err
    status, err = again(path, search={"num_remove": [1, 2]})
    assert status == 0, err
    assert sum("removed" in line for line in err.splitlines()) == 6  # six cells were finished


def test_the_folders_document_continues_the_study(run, checkpoint, text_file, tmp_path):
    """Its paths lead to the same files, and no cell is searched again."""
    home = tmp_path / "home of studies"
    home.mkdir()
    (home / "model").symlink_to(checkpoint)
    (home / "text.txt").write_bytes(text_file.read_bytes())
    path = write_document(home / "study.toml", **text_study("model", "text.txt"))
    out = tmp_path / "s"
    status, _, err = run("study", path, "--out", out)
    assert status == 0, err
    kept = (out / "study.toml").read_text()
    assert kept == f'base = "{home}"  # relative paths start here\n\n{path.read_text()}'
    cells = {path.name: path.read_bytes() for path in (out / "cells").iterdir()}
    status, _, err = run("study", out / "study.toml", "--out", out)
    assert status == 0, err
    assert "removed" not in err
    assert (out / "study.toml").read_text() == kept
    assert {path.name: path.read_bytes() for path in (out / "cells").iterdir()} == cells
    study = json.loads((out / "study.json").read_text())
    assert [cell["model"] for cell in study["cells"]] == ["model"]  # wherever its folder is


def test_a_document_may_begin_in_its_own_folder(run, checkpoint, text_file, tmp_path):
    out = tmp_path / "s"
    out.mkdir()
    path = write_document(out / "study.toml", **text_study(checkpoint, text_file))
    before = path.read_bytes()
    status, _, err = run("study", path, "--out", out)
    assert status == 0, err
    assert path.read_bytes() == before
    (tmp_path / "t").mkdir()
    write_document(tmp_path / "t" / "study.toml", **text_study("other", text_file))
    text = document_text(text_study("m", text_file))
    with pytest.raises(fp.InputError, match="is not empty and holds no study"):
        check_study_folder(tmp_path / "t", {}, text)


def test_units_and_budgets_as_people_type_them(text_file, tmp_path):
    tables = text_study("m", text_file, search_protect="0-2,5", search_num_remove=["25%", 4])
    search = read_document(write_document(tmp_path / "s.toml", **tables)).config.search
    assert search.protect == (0, 1, 2, 5)
    assert search.num_remove == ("25%", 4)
    for wrong in ("25", "0%", "100%", "a quarter"):
        tables = text_study("m", text_file, search_num_remove=[wrong])
        with pytest.raises(fp.InputError, match='must be a share such as "25%", or an integer'):
            read_document(write_document(tmp_path / "s.toml", **tables))
    tables = text_study("m", text_file, search_protect="3-1")
    with pytest.raises(fp.InputError, match=r"search\.protect: 3-1 runs backwards"):
        read_document(write_document(tmp_path / "s.toml", **tables))
