"""Numbers, names and paths that no run could use are refused at the door: status 2, one short line,
no model opened."""

from __future__ import annotations

import pytest
from documents import text_study, write_document

from fastprune.cli import cli


@pytest.fixture
def refused(run, monkeypatch):
    """refused(*arguments) -> the one line on stderr."""

    def opened(*_, **__):
        raise AssertionError("the model was opened")

    monkeypatch.setattr("fastprune.models.load_model", opened)

    def refused(*arguments) -> str:
        status, out, err = run(*arguments)
        assert status == 2, err
        assert not out
        assert err.startswith("fastprune: ")
        assert err.endswith("\n")
        assert err.count("\n") == 1
        assert len(err) <= 401
        assert "Traceback" not in err
        return err

    return refused


LONG, NUL, SURROGATE = "x" * 10_000, "a\0b", "a\ud800b"
DIGITS = "9" * 5000
HUGE = "1" + "0" * 20
BEYOND = str(2**63)

SHARED = [  # options of score and search, which are the same objects: held for score
    *(("--seq-len", value) for value in (HUGE, DIGITS, "-1", "1", "0x10", "", LONG, "nan", "1e3")),
    *(("--num-samples", value) for value in (HUGE, DIGITS, "0", "-5", "2.5", NUL)),
    *(("--sample-seed", value) for value in (BEYOND, DIGITS, "-1")),
    *(
        ("--memory-gb", value)
        for value in ("nan", "inf", "-inf", "1e300", "1e999", "0", "-1", "1e-300", "four", DIGITS)
    ),
    *(("--granularity", value) for value in ("", LONG, NUL, "head")),
    *(("--backend", value) for value in (LONG, SURROGATE)),
    *(("--dtype", value) for value in (LONG, "int8")),
    ("--quiet=yes",),
    (f"--{LONG}",),
]
PATHS = ["", NUL, SURROGATE, "a\udcffb", LONG, "é" * 125, "a/" * 2500 + "b"]
SCORE = [
    *(("--store", path) for path in PATHS),
    *(("--calibration", path) for path in [*PATHS, "nowhere.txt", "."]),
    *(("--out", path) for path in PATHS),
    *(
        ("--removed", units)
        for units in (DIGITS, "0-99999999999", "0-9999999", LONG, NUL, SURROGATE, "1-")
    ),
    *(("--objective", name) for name in ("", LONG, NUL, SURROGATE)),
]
SEARCH = [
    *(("--num-remove", value) for value in (DIGITS, HUGE, "-1", "", "1,2", LONG)),
    *(("--seed", value) for value in (BEYOND, DIGITS, "-1", "one")),
    *(("--algorithm", name) for name in ("", LONG, NUL, SURROGATE)),
    *(("--protect", units) for units in (DIGITS, "0-99999999999", LONG)),
    *(("--out", path) for path in PATHS),
    *(
        ("--algorithm", "beam", "--option", option)
        for option in (f"x={LONG}", f"beam_width={LONG}", LONG, f"{LONG}=1", f"x={NUL}", "=", "")
    ),
    *(
        ("--algorithm", "beam", "--option", f"beam_width={value}")
        for value in (DIGITS, "nan", "", SURROGATE)
    ),
    ("--algorithm", "beam", "--option", "beam_width=5", "--option", "beam_width=6"),
    ("--algorithm", "beam", "--option", "beam_width=5", "--option", "beam-width=5"),
]
STUDY = [  # changes of a document
    *(
        ("search_num_remove", value)
        for value in ([int("9" * 4000)], [10**20], [1, 1], [-1], [], "")
    ),
    *(("search_num_remove", value) for value in (LONG, NUL, [LONG], ["1"], [1.0], 1)),
    *(("search_seed", value) for value in (2**63, -1, "0", 0.5)),
    *(
        ("search_algorithms", names)
        for names in (["beam", "beam"], ["beam", ""], [], ["all", "beam"], LONG, [NUL], "beam")
    ),
    *(("search_options", {"beam": {"beam_width": value}}) for value in (LONG, "5", 10**20, 0)),
    *(("search_options", {name: {"x": 5}}) for name in ("", LONG, NUL, "beam")),
    *(("search_granularity", value) for value in ("", LONG, NUL, "head")),
    *(("model", {"path": path}) for path in ("", NUL, SURROGATE, LONG, "é" * 125)),
    *(("model", {"path": "m", "backend": value}) for value in (LONG, SURROGATE)),
    *(("model", {"path": "m", "dtype": value}) for value in (LONG, "int8", 16)),
    *(
        ("calibration", [{"name": "a", "kind": "text", "file": path}])
        for path in ("", NUL, SURROGATE, LONG, "é" * 125, "a/" * 2500 + "b", "nowhere.txt", ".")
    ),
    *(
        ("calibration", [{"name": "a", "kind": "text", "file": __file__, name: value}])
        for name in ("num_samples", "seq_len", "seed")
        for value in (10**20, int("9" * 4000), -1, LONG, float("nan"), 1e3, True)
    ),
    *(("calibration", [{"name": name, "kind": "text"}]) for name in ("", LONG, NUL, "a/b")),
    *(("objective", [{"name": name}]) for name in ("", LONG, NUL, SURROGATE)),
    *(
        ("resources", {"memory_gb": value})
        for value in (float("nan"), float("inf"), -float("inf"), 1e300, 0, -1, "four", 10**400)
    ),
    *(("resources", {"cache_dir": path}) for path in ("", NUL, LONG)),
    *((name, 1) for name in ("", LONG, NUL, "modle")),
]


def shown(arguments) -> str:
    return ascii(" ".join(arguments))[:40]


@pytest.mark.parametrize("wrong", [*SHARED, *SCORE], ids=shown)
def test_score(refused, text_file, wrong):
    refused("score", "nowhere/model", "--calibration", text_file, "--removed", "1", *wrong)


def test_commands_share_their_options():
    """So that search refuses every value that score refuses."""
    score, other = (
        {own.opts[0]: (own, own.to_info_dict()) for own in cli.commands[name].params}
        for name in ("score", "search")
    )
    for flag in {arguments[0].partition("=")[0] for arguments in SHARED} - {f"--{LONG}"}:
        assert other[flag][1] == score[flag][1]
        assert other[flag][0].callback == score[flag][0].callback
    assert type(cli.commands["search"]) is type(cli.commands["score"])


@pytest.mark.parametrize("wrong", SEARCH, ids=shown)
def test_search(refused, text_file, wrong):
    refused("search", "nowhere/model", "--calibration", text_file, "--num-remove", "1", *wrong)


@pytest.mark.parametrize("change", STUDY, ids=lambda change: ascii(repr(change))[:40])
def test_study(refused, text_file, tmp_path, change):
    name, value = change
    tables = text_study("nowhere/model", text_file, **{name: value})
    document = write_document(tmp_path / "study.toml", **tables)
    refused("study", document, "--out", tmp_path / "s")
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("path", PATHS, ids=ascii)
def test_paths_of_a_study(refused, text_file, tmp_path, path):
    document = write_document(tmp_path / "study.toml", **text_study("nowhere/model", text_file))
    refused("study", document, "--out", path)
    assert "STUDY.TOML" in refused("study", path, "--out", tmp_path / "s")


def test_a_study_needs_a_document_and_a_folder(refused, text_file, tmp_path):
    assert "name a study document; fastprune study --example" in refused("study")
    document = write_document(tmp_path / "study.toml", **text_study("nowhere/model", text_file))
    assert "--out is missing" in refused("study", document)
    assert "no such file" in refused("study", tmp_path / "no.toml", "--out", tmp_path / "s")
    for flag in ("--num-remove", "--algorithms", "--objective", "--dtype"):
        assert "No such option" in refused("study", document, "--out", tmp_path / "s", flag, "1")


@pytest.mark.parametrize("path", PATHS, ids=ascii)
@pytest.mark.parametrize("command", ["info", "score", "search", "eval", "export"])
def test_models_are_named_by_paths(refused, text_file, tmp_path, command, path):
    more = {
        "info": (),
        "score": ("--removed", "1", "--calibration", text_file),
        "search": ("--num-remove", "1", "--calibration", text_file),
        "eval": ("--removed", "1", "--tasks", "arc_easy"),
        "export": ("--removed", "1", "--out", tmp_path / "e"),
    }[command]
    assert "MODEL" in refused(command, path, *more)


@pytest.mark.parametrize("path", PATHS, ids=ascii)
def test_other_paths(refused, text_file, path):
    refused("demo", "--out", path)
    refused("export", "nowhere/model", "--removed", "1", "--out", path)
    refused("score", "nowhere/model", "--calibration", text_file, "--masks", path)
    refused("eval", "nowhere/model", "--tasks", "arc_easy", "--removed", "1", "--out", path)


@pytest.mark.parametrize("name", [LONG, NUL, SURROGATE])
def test_other_names(refused, name):
    refused("algorithms", name)
    refused(name)


def test_no_command(refused):
    names = "demo, info, env, algorithms, score, search, study, eval, export, store"
    assert f"name a command: {names}; --help" in refused()
