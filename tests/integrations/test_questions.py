"""Questions are scored as lm-evaluation-harness scores them: split, delimiter and lengths."""

import json

import datasets
import numpy as np
import pytest
from lm_eval import simple_evaluate

import fastprune as fp
from fastprune import demo

COUNT = 60


@pytest.mark.slow
@pytest.mark.parametrize("spaced", [False, True])
def test_accuracies_are_those_of_the_harness(tmp_path, monkeypatch, spaced):
    """With and without the delimiter in the file; the harness always reads choices without it."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
    lines = demo.QUESTIONS_HELDOUT.read_text().splitlines()[:COUNT]
    rows = [json.loads(line) for line in lines]
    for row in rows:  # of unlike lengths, so that dividing by them matters
        row["choices"] = [
            " " * spaced + choice.strip() + " it is" * (i % 3)
            for i, choice in enumerate(row["choices"])
        ]
    plain = [row | {"choices": [choice.strip() for choice in row["choices"]]} for row in rows]
    config = {
        "task": "questions",
        "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(plain)},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{prompt}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metric_list": [{"metric": name} for name in ("acc", "acc_norm", "acc_bytes")],
    }
    folder = fp.export(fp.load_model("demo"), tmp_path / "pruned", removed=(2, 6, 8))
    found = simple_evaluate(
        "hf", {"pretrained": str(folder), "device": "cpu"}, [config], bootstrap_iters=0
    )
    tasks = fp.load_tasks(rows, fp.load_model(folder).tokenizer)
    shares = []
    for metric, normalization in {
        "acc": "sum",
        "acc_norm": "characters",
        "acc_bytes": "bytes",
    }.items():
        objective = fp.TaskAccuracy(tasks, normalization)
        wrong = fp.Evaluator(fp.load_model(folder), objective).score_samples(
            np.ones((1, 9), dtype=bool)
        )[0]
        theirs = [sample[metric] for sample in found["samples"]["questions"]]
        assert (1 - wrong).tolist() == theirs
        shares.append(np.mean(theirs))
    assert 0 < shares[0] != shares[1] < 1
