"""Every output of a run reads a loss as its metric: no error rate is called accuracy."""

import json
import math
import re

import pytest
from documents import write_document

import fastprune as fp
from fastprune.objectives import no_judge
from fastprune.study import run_study, write_report

MASKS = [(), (1,), (1, 2, 3)]


@pytest.fixture(scope="module")
def model(checkpoint):
    return fp.load_model(checkpoint)


@pytest.fixture(scope="module")
def evaluator(model, questions):
    return fp.Evaluator(model, fp.TaskAccuracy(fp.load_tasks(questions, model.tokenizer)))


def check_text(text: str, losses: list[float]) -> None:
    """The accuracies are there, and no loss as a number of its own."""
    assert "accuracy" in text
    assert "higher is better" in text
    for loss in losses:
        assert re.search(rf"(?<![\d.]){100 * (1 - loss):.1f} (± \d+\.\d )?%", text), loss
        if 0 < loss < 1:
            assert not re.search(rf"(?<![\d.]){re.escape(f'{loss:.4f}'[:5])}", text), loss


def check_json(value: object, inside_losses: bool = False) -> int:
    """The number of accuracies in a value: each beside its loss, as 100 (1 - loss). A number by
    an objective's label is a loss only under a key that says so."""
    count = 0
    if isinstance(value, list):
        return sum(check_json(entry, inside_losses) for entry in value)
    if not isinstance(value, dict):
        return 0
    for key, entry in value.items():
        if isinstance(entry, float) and "accuracy" in key and not inside_losses:
            loss = value[key.replace("accuracy", "loss")]
            assert entry == 100 * (1 - loss), key
            count += 1
        count += check_json(entry, inside_losses or "losses" in key)
    return count


def flags(checkpoint, questions) -> tuple:
    return (checkpoint, "--calibration", questions, "--objective", "accuracy")


def test_score(run, checkpoint, questions, evaluator, tmp_path):
    removed = ("--removed", "-", "--removed", "1", "--removed", "1-3")
    status, out, _ = run("score", *flags(checkpoint, questions), *removed)
    assert status == 0
    masks = fp.from_removed(MASKS, 5)
    losses = evaluator.score(masks).tolist()
    check_text(out, losses)
    samples, objective = evaluator.score_samples(masks), evaluator.objective
    for i in (1, 2):
        difference = objective.compare(samples[i], samples[0])
        assert objective.format_difference(difference) in out
        assert ("not told apart" in objective.format_difference(difference)) != (
            abs(difference.value) > 2 * difference.error
        )
    note = no_judge(objective.describe(), losses[0])
    assert (note or "no judge") in out or not note
    status, out, _ = run(
        "score", *flags(checkpoint, questions), *removed, "--out", tmp_path / "scores.jsonl"
    )
    rows = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in rows] == losses
    assert all(row.keys() == {"removed", "loss", "accuracy"} for row in rows)
    assert check_json(rows) == 3


def test_one_mask_under_accuracy_is_judged_beside_the_whole_model(
    run, checkpoint, questions, evaluator
):
    _, out, _ = run("score", *flags(checkpoint, questions), "--removed", "1")
    note = no_judge(evaluator.objective.describe(), evaluator.dense_loss)
    assert (note in out) if note else ("no judge" not in out)
    assert "1 mask that removes 1 of 5 units, and the whole model" in out


def test_search_and_the_card_of_its_export(run, checkpoint, questions, evaluator, tmp_path):
    found = ("--algorithm", "one_shot", "--num-remove", "2", "--out", tmp_path / "run")
    status, out, _ = run("search", *flags(checkpoint, questions), *found)
    assert status == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    pair = fp.from_removed([result["removed"], ()], 5)
    losses = evaluator.score(pair).tolist()
    assert [result["loss"], result["dense_loss"]] == losses
    check_text(out, losses)
    objective = evaluator.objective
    difference = objective.compare(*evaluator.score_samples(pair))
    assert f"difference to the whole model: {objective.format_difference(difference)}" in out
    assert check_json(result) == 2 + len(result["history"])
    note = no_judge(objective.describe(), losses[1])
    assert (note in out) if note else ("no judge" not in out)
    path = tmp_path / "run" / "result.json"
    status, out, _ = run("export", checkpoint, "--result", path, "--out", tmp_path / "a")
    assert status == 0
    fp.export(evaluator, tmp_path / "b", removed=result["removed"])
    for card in ((tmp_path / name / "README.md").read_text() for name in "ab"):
        check_text(card, losses)
        assert (note in card) if note else ("no judge" not in card)


def test_losses_given_for_a_card_are_read(model, tmp_path):
    losses = {"accuracy, 40 questions": (0.05, 0.2), "perplexity": (1.0, 2.0), "own": (1.5, 2.5)}
    card = (fp.export(model, tmp_path / "c", removed=(1,), losses=losses) / "README.md").read_text()
    assert "| accuracy, % (higher is better), 40 questions | 95.0 % | 80.0 % |" in card
    assert f"| perplexity (lower is better) | {math.e:.3f} | {math.exp(2):.3f} |" in card
    assert "| own loss (lower is better) | 1.50000 | 2.50000 |" in card


def test_the_result_in_python(evaluator):
    result = fp.run_search(evaluator, "one_shot", 1)
    assert f"accuracy {100 * (1 - result.loss):.1f} %" in repr(result)
    assert str(result.loss) not in repr(result)
    assert result.to_dict()["accuracy"] == 100 * (1 - result.loss)


def makers(questions) -> dict:
    def make(limit: int):
        return lambda model: fp.TaskAccuracy(fp.load_tasks(questions, model.tokenizer, limit))

    return {"accuracy": make(7), "accuracy-few": make(4)}


def test_a_study_and_its_page(model, questions, tmp_path):
    pytest.importorskip("matplotlib")
    study = run_study(
        [model],
        makers(questions),
        ["one_shot", "contiguous"],
        [1, 2],
        tmp_path / "s",
        held_out={"judge": makers(questions)["accuracy"]},
    )
    written = json.loads((tmp_path / "s" / "study.json").read_text())
    labels = ("accuracy", "accuracy-few", "judge")
    # of every cell its own and that of each label, and of the whole model
    assert check_json(written) == len(study["cells"]) * (1 + len(labels)) + len(labels)
    for entry in written["calibration"]:
        for by, difference in entry["metrics"]["judge"].items():
            assert difference == pytest.approx(100 * entry["losses"]["judge"][by])
    write_report(study, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    axis = "accuracy, % (higher is better); bars: standard errors; grey mark: nothing removed"
    assert f"<!-- {axis} -->" in page
    assert "loss under" not in page
    text = re.sub(r"<svg.*?</svg>|<style>.*?</style>|<script>.*?</script>", "", page, flags=re.S)
    values = re.findall(r"[\d.]+(?: ± [\d.]+)? %(?! fewer)", re.sub(r"chance \(.*?\)", "", text))
    assert len(values) > 4 * len(study["cells"])
    assert [value for value in values if "±" not in value] == []  # each has its standard error
    (dense,) = written["dense"].values()
    cells = [cell["losses"][label] for cell in study["cells"] for label in labels]
    check_text(text, [*cells, *(entry["loss"] for entry in dense.values())])
    described = {**written["objectives"], **written["held_out"]}
    for label, result in dense.items():
        note = no_judge(described[label], result["loss"])
        assert not note or f"{label}: {note}" in text


def test_the_tables_of_a_study(run, checkpoint, questions, tmp_path):
    tables = {
        "model": {"path": checkpoint},
        "calibration": [{"name": "q", "kind": "tasks", "file": questions}],
        "objective": [{"name": "accuracy"}],
        "search": {"algorithms": ["one_shot"], "num_remove": [1, 2]},
    }
    document = write_document(tmp_path / "study.toml", **tables)
    status, out, err = run("study", document, "--out", tmp_path / "s")
    assert status == 0, err
    study = json.loads((tmp_path / "s" / "study.json").read_text())
    (dense,) = study["dense"].values()
    check_text(out, [*(cell["loss"] for cell in study["cells"]), dense["accuracy-q"]["loss"]])
    values = re.findall(r"[\d.]+(?: ± [\d.]+)? %(?! fewer)", re.sub(r"chance \(.*?\)", "", out))
    assert [value for value in values if "±" not in value] == []  # each has its standard error
