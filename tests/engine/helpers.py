"""Tools that several engine tests need: evaluators in small budgets, questions, refusals,
environments of subprocesses."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers as tf
from families import (
    build,
    num_blocks,
    random_rows,
    reference_model,
    reference_token_nll,
    some_masks,
)
from safetensors.torch import load_file, save_file

import fastprune as fp


def smallest_budget(make) -> int:
    """The smallest byte budget with which make(memory_bytes) is accepted, as the first refusal
    names it."""
    with pytest.raises(fp.InputError, match="memory_bytes is too small: one row of") as error:
        make(1)
    assert error.value.argument == "memory_bytes"
    assert f"takes {error.value.least} bytes" in str(error.value)
    return error.value.least


def make_tasks(vocab_size: int, shapes, seed: int = 0) -> fp.Tasks:
    """Random questions: shapes are (prompt length, choice lengths) pairs."""
    rng = np.random.default_rng(seed)
    rows = []
    for prompt_length, choice_lengths in shapes:
        prompt = rng.integers(0, vocab_size, prompt_length)
        rows.append(
            [
                (np.concatenate([prompt, rng.integers(0, vocab_size, n)]), prompt_length)
                for n in choice_lengths
            ]
        )
    counts = [len(row) for row in rows]
    return fp.Tasks(
        batch=fp.TokenBatch.from_continuations(rows),
        question=np.repeat(np.arange(len(counts)), counts),
        answer=np.concatenate([[0], np.cumsum(counts)[:-1]]) + [rng.integers(n) for n in counts],
        choice_characters=np.array([2 * n for _, lengths in shapes for n in lengths]),
        choice_bytes=np.array([3 * n for _, lengths in shapes for n in lengths]),
    )


def bfloat16_errors(family: str, lengths, make_evaluator) -> tuple[float, float]:
    """Root mean square distance from the float32 loss, of fastprune's and of transformers' own
    bfloat16 losses.

    The same (bfloat16) weights on all sides; over 6 sets of rows times the distinct ones of 40
    masks, since the losses of one set are a few roundings each, whose ratio depends on the
    processor.
    """
    low, masks, rows = (
        build(family, torch.bfloat16),
        *_bfloat16_masks_and_rows(family, tuple(lengths)),
    )
    truth, own = _bfloat16_references(family, tuple(lengths))
    found = (
        _by_set(make_evaluator(low, fp.TokenBatch.from_ids(rows)).score_samples(masks), rows)
        - truth
    )
    return float(np.sqrt(np.mean(np.square(found)))), float(
        np.sqrt(np.mean(np.square(own - truth)))
    )


def _bfloat16_masks_and_rows(family: str, lengths: tuple[int, ...]):
    hf = build(family)
    rows = [row for seed in range(6) for row in random_rows(hf.config.vocab_size, lengths, seed)]
    return np.unique(some_masks(num_blocks(hf), 40, seed=2), axis=0), rows


@functools.cache
def _bfloat16_references(family: str, lengths: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The losses of each mask on each set, [N, 6]: in float32, and transformers' own."""
    masks, rows = _bfloat16_masks_and_rows(family, lengths)

    def reference(hf) -> np.ndarray:
        models = (reference_model(hf, mask) for mask in masks)
        return _by_set(
            [[nll.mean() for nll in reference_token_nll(model, rows)] for model in models], rows
        )

    low = build(family, torch.bfloat16)
    own = reference(low)
    return reference(low.float()), own


def _by_set(row_losses, rows) -> np.ndarray:
    """The loss of each mask on each of 6 sets of rows, [N, 6], from its mean on each row."""
    targets = np.array([len(row) - 1 for row in rows]).reshape(6, -1)  # [set, row]
    return (np.reshape(row_losses, (-1, *targets.shape)) * targets).sum(axis=2) / targets.sum(
        axis=1
    )


def run_python(code: str, **environment: str) -> str:
    """Standard output of a fresh interpreter that can import what this one can, for code that opens
    models."""
    begin = "from fastprune.models.imports import import_transformers; import_transformers()\n"
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    done = subprocess.run(
        [sys.executable, "-c", begin + code],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def edit_config(folder, **values) -> None:
    """Change entries of a model folder's config."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


def edit_tensors(folder, change) -> None:
    """Write a model folder's tensors as `change` gives them, a function of {name: tensor}."""
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def refuses(culprit: str, call, *args, **options) -> None:
    """The call raises InputError with one line in which `culprit` (a pattern) is found."""
    with pytest.raises(fp.InputError, match=culprit) as caught:
        call(*args, **options)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) > len(culprit) / 2


def t5() -> torch.nn.Module:
    """An encoder-decoder, which no family here is."""
    return tf.T5ForConditionalGeneration(
        tf.T5Config(vocab_size=60, d_model=16, d_kv=4, d_ff=16, num_layers=2, num_heads=2)
    )
