"""The options that say how calibration data is read."""

import json

import datasets
import pytest

import fastprune as fp

SIZE = ("--num-samples", 4, "--seq-len", 16)


@pytest.fixture
def score(run, checkpoint, tmp_path):
    """score(*arguments) -> (loss without block 1, stderr)."""

    def score(*arguments):
        out = tmp_path / "scores.jsonl"
        out.unlink(missing_ok=True)
        status, _, err = run("score", checkpoint, "--removed", 1, "--out", out, *arguments)
        assert status == 0, err
        return json.loads(out.read_text())["loss"], err

    return score


@pytest.fixture
def refused(run):
    """refused(*arguments) -> the one line of the error."""

    def refused(*arguments):
        status, out, err = run("score", "nowhere/model", "--removed", "1", *arguments)
        assert (status, out) == (2, "")
        assert err.count("\n") == 1
        return err

    return refused


def test_the_column_that_is_read_is_said(score, text_file, tmp_path):
    expected, err = score("--calibration", text_file, *SIZE)
    assert "calibration:" not in err
    table = datasets.Dataset.from_list([{"body": text_file.read_text(), "id": "a"}])
    table.to_csv(tmp_path / "t.csv")
    table.rename_column("body", "text").save_to_disk(tmp_path / "folder")
    loss, err = score("--calibration", tmp_path / "t.csv", "--column", "body", *SIZE)
    assert loss == expected
    assert f"calibration: {tmp_path}/t.csv, column body" in err
    loss, err = score("--calibration", tmp_path / "folder", *SIZE)
    assert loss == expected
    assert f"calibration: {tmp_path}/folder, column text" in err


def test_windows_begin_with_bos_where_it_is_asked_for(run, tmp_path):
    """The demo's own text keeps its windows; a copy of it is text like any other."""
    from fastprune import demo

    copy = tmp_path / "text.jsonl"
    copy.write_bytes(demo.TEXT.read_bytes())
    losses = {}
    for name, arguments in {
        "own": (),
        "own, --no-bos": ("--no-bos",),
        "own, --bos": ("--bos",),
        "copy": ("--calibration", copy),
        "copy, --no-bos": ("--calibration", copy, "--no-bos"),
    }.items():
        out = tmp_path / f"{name}.jsonl"
        size = ("--num-samples", 2, "--seq-len", 64)
        status, *_ = run("score", "demo", "--removed", 3, *size, *arguments, "--out", out)
        assert status == 0
        losses[name] = json.loads(out.read_text())["loss"]
    assert losses["own"] == losses["own, --no-bos"] == losses["copy, --no-bos"]
    assert losses["own, --bos"] == losses["copy"] != losses["own"]


def test_chats(score, checkpoint, tmp_path):
    row = {"prompt": "w1 w2 w3", "completion": " w4 w5"}
    path, template = tmp_path / "chats.jsonl", tmp_path / "template.jinja"
    path.write_text(json.dumps(row) + "\n")
    template.write_text("{% for m in messages %}w9 {{ m.content }} {% endfor %}")
    tokenizer = fp.load_model(checkpoint).tokenizer
    for options, expected in {
        (): [([2, 3, 4, 5, 6], 3)],
        ("--loss-on", "all"): [([2, 3, 4, 5, 6], 1)],
        ("--chat-template", template): [([10, 2, 3, 4, 10, 5, 6], 4)],
    }.items():
        keywords = {k[2:].replace("-", "_"): str(v) for k, v in zip(options[::2], options[1::2])}
        batch = fp.load_text(path, tokenizer, **keywords)
        same = fp.TokenBatch.from_continuations([expected])
        assert batch.content_hash == same.content_hash
        loss, err = score("--calibration", path, *options)
        ev = fp.Evaluator(fp.load_model(checkpoint), fp.Perplexity(same))
        assert loss == ev.score(fp.from_removed([(1,)], 5))[0]
        assert "conversations, loss on" in err


def test_delimiters_and_other_forms_of_questions(score, questions, tmp_path):
    on = ("--objective", "margin", "--calibration")
    expected, err = score(*on, questions)
    assert "calibration:" not in err
    assert score(*on, questions, "--delimiter", "")[0] == expected  # the choices begin with it
    assert score(*on, questions, "--delimiter", " w7 ")[0] != expected
    row = {"question": "w1", "choices": {"text": ["w2", "w3"], "label": ["1", "2"]}}
    (tmp_path / "arc.jsonl").write_text(json.dumps(row | {"answerKey": "2"}) + "\n")
    _, err = score(*on, tmp_path / "arc.jsonl")
    assert "questions of the form ARC" in err


def test_options_of_other_data_are_refused(refused, text_file, questions):
    text = ("--calibration", text_file)
    tasks = ("--calibration", questions, "--objective", "margin")
    assert "--delimiter is of questions; perplexity reads text" in refused(*text, "--delimiter", "")
    assert "--bos is of text; margin reads questions" in refused(*tasks, "--no-bos")
    assert "--column is of text" in refused(*tasks, "--column", "text")
    assert "did you mean 'completion'" in refused(*text, "--loss-on", "completions")


def test_choices_are_normalised_as_asked(score, checkpoint, questions):
    data = ("--calibration", questions, "--objective", "accuracy")
    model = fp.load_model(checkpoint)
    tasks = fp.load_tasks(questions, model.tokenizer)
    for normalization in ("sum", "characters", "bytes", "mean"):
        evaluator = fp.Evaluator(model, fp.TaskAccuracy(tasks, normalization))
        loss, _ = score(*data, "--normalization", normalization)
        assert loss == evaluator.score(fp.from_removed([(1,)], evaluator.num_units))[0]


def test_normalizations_that_an_objective_has_not_are_refused(refused, text_file, questions):
    message = refused("--calibration", text_file, "--normalization", "sum")
    assert "--normalization is for margin, likelihood, accuracy, not for perplexity" in message
    tasks = ("--calibration", questions, "--objective", "margin")
    message = refused(*tasks, "--normalization", "bytes")
    assert "--normalization must be one of mean, sum, not 'bytes'" in message


def test_a_search_is_printed_again_only_for_the_same_reading(run, checkpoint, text_file, tmp_path):
    search = ("search", checkpoint, "--algorithm", "one_shot", "--num-remove", 1)
    search = (*search, "--calibration", text_file, *SIZE, "--out", tmp_path / "out")
    assert run(*search)[0] == 0
    assert "nothing was computed" in run(*search)[2]
    status, _, err = run(*search, "--column", "text")
    assert status == 2
    assert "exists" in err


def test_wrong_columns_and_templates(run, checkpoint, text_file, tmp_path):
    def fails(*arguments):
        status, _, err = run("score", checkpoint, "--removed", 1, *arguments, *SIZE)
        assert status == 2
        assert err.count("\n") == 1
        return err

    (tmp_path / "t.csv").write_text("body\nw1 w2\n")
    message = fails("--calibration", tmp_path / "t.csv")
    assert "t.csv:2: expected a row" in message
    assert "what fits: --column body" in message
    (tmp_path / "c.jsonl").write_text('{"prompt": "w1", "completion": "w2"}\n')
    chats = ("--calibration", tmp_path / "c.jsonl")
    assert "--chat-template must be the file" in fails(*chats, "--chat-template", "nowhere.jinja")
    message = fails("--calibration", text_file, "--chat-template", "nowhere.jinja")
    assert "--chat-template is for rows of messages" in message
    assert "--bos must be False or None" in fails("--calibration", text_file, "--bos")


def test_data_sets_of_the_hub(score, text_file, monkeypatch):
    def load_dataset(path, name, *, split, streaming):
        assert (path, name, split, streaming) == ("some/texts", "en", "test", True)
        return datasets.Dataset.from_list([{"text": text_file.read_text()}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    loss, err = score("--calibration", "some/texts:en:test", *SIZE)
    assert loss == score("--calibration", text_file, *SIZE)[0]
    assert "calibration: some/texts:en:test, column text" in err
