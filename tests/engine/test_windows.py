"""Windows are those of the model's own forward pass, whatever else its config says: rows and trees
longer than every window, on each path."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from families import (
    WINDOW,
    build,
    num_blocks,
    random_rows,
    reference_losses,
    reference_model,
    reference_token_nll,
)
from helpers import make_tasks

import fastprune as fp
from fastprune.models import GenericRunner, native, open_runner
from fastprune.models.windows import NO_WINDOW_FORM, window_of

RELATIVE = 1e-5
MASKS = np.array([[1, 1, 1, 1, 1], [1, 0, 1, 1, 0]], dtype=bool)
SLIDING, FULL = ["sliding_attention"] * 5, ["full_attention"] * 5
MIXED = [*SLIDING[:2], *FULL[:3]]

# keys that the family's code may read, or not
LEFT_OVER = [
    ("llama", {"sliding_window": WINDOW}),
    ("llama", {"sliding_window": WINDOW, "use_sliding_window": True}),
    ("llama", {"sliding_window": WINDOW, "layer_types": SLIDING}),
    ("llama", {"sliding_window": 3 * WINDOW, "max_window_layers": 0}),
    ("mistral", {"use_sliding_window": False}),
    ("mistral", {"layer_types": FULL}),
    ("mistral", {"layer_types": MIXED, "use_sliding_window": False}),
    ("mistral", {"sliding_window": None, "layer_types": SLIDING}),
    ("phi3", {"sliding_window": WINDOW, "use_sliding_window": False}),
    ("phi3", {"sliding_window": WINDOW, "layer_types": FULL}),
    ("qwen2", {"sliding_window": WINDOW}),
    ("qwen2", {"sliding_window": WINDOW, "layer_types": MIXED}),
    ("qwen2-window", {"use_sliding_window": False}),
    ("qwen3", {"sliding_window": WINDOW, "use_sliding_window": True}),
    ("qwen3", {"sliding_window": WINDOW, "layer_types": MIXED, "use_sliding_window": False}),
    ("gemma3", {"use_sliding_window": False}),
    ("olmo2", {"sliding_window": WINDOW, "layer_types": MIXED}),
]
CASES = pytest.mark.parametrize(
    ("family", "changes"), LEFT_OVER, ids=lambda x: x if isinstance(x, str) else ",".join(x)
)


@pytest.mark.parametrize("backend", ["auto", "generic"])
@CASES
def test_keys_of_a_config_count_where_the_family_reads_them(family, changes, backend):
    hf = build(family, **changes)
    rows = random_rows(hf.config.vocab_size, [30, 7, 41])
    ev = fp.Evaluator(hf, fp.Perplexity(fp.TokenBatch.from_ids(rows)), backend=backend)
    np.testing.assert_allclose(ev.score(MASKS), reference_losses(hf, MASKS, rows), rtol=RELATIVE)


@pytest.mark.parametrize("backend", ["auto", "generic"])
@CASES
def test_trees_are_their_sequences(family, changes, backend):
    """Questions longer than the window, and the same choices as rows of plain text."""
    hf = build(family, **changes)
    tasks = make_tasks(hf.config.vocab_size, [(23, [1, 4, 19]), (17, [3] * 6)])
    batch = tasks.batch
    ev = fp.Evaluator(hf, fp.TaskMargin(tasks), backend=backend)
    for mask in MASKS:
        nll = np.array([_nll(hf, mask, batch, c) for c in range(batch.num_continuations)])
        for question, margin in enumerate(ev.score_samples(mask)[0]):
            choices = np.flatnonzero(tasks.question == question)
            wrong = choices[choices != tasks.answer[question]]
            expected = nll[tasks.answer[question]] - nll[wrong].mean()
            assert margin == pytest.approx(expected, abs=RELATIVE * nll.max())


def _nll(hf, mask: np.ndarray, batch: fp.TokenBatch, continuation: int) -> float:
    """The mean loss of one continuation behind its prompt, by the model's own forward pass with the
    blocks removed."""
    of = np.flatnonzero(batch.target_continuation == continuation)
    row = batch.continuation_row[continuation]
    inside = np.arange(batch.row_starts[row], batch.row_starts[row + 1])
    own = batch.branch[batch.target_source[of[-1]]]
    path = inside[(batch.branch[inside] == 0) | (batch.branch[inside] == own)]
    path = path[path <= batch.target_source[of[-1]]]
    ids = [*batch.ids[path].tolist(), int(batch.target_token[of[-1]])]
    return float(reference_token_nll(reference_model(hf, mask), [ids])[0][-len(of) :].mean())


@pytest.mark.skipif(not native.available(), reason="the extension is not built")
def test_a_left_over_key_leaves_the_fused_path():
    hf = build("llama", sliding_window=WINDOW, layer_types=SLIDING)
    rows = fp.TokenBatch.from_ids(random_rows(hf.config.vocab_size, [30]))
    assert fp.Evaluator(hf, fp.Perplexity(rows)).backend == "fused (native)"


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("llama", [None] * 5),
        ("mistral", [WINDOW] * 5),
        ("qwen2-window", [None] * 2 + [WINDOW] * 3),
        ("gemma3", [WINDOW, None, WINDOW, WINDOW, None]),
        ("gemma2-eager", [WINDOW, None, WINDOW, None, WINDOW]),
        ("gpt2", [None] * 6),
    ],
)
def test_windows_are_read_from_masks(family, expected):
    model = fp.Model(build(family))
    runner = open_runner(model, "generic")
    with model.evaluation():
        assert [runner.windows(length) for length in (1, 50)] == [expected] * 2


def test_a_window_longer_than_the_probed_row_is_read_from_a_longer_one(monkeypatch):
    monkeypatch.setattr("fastprune.models.windows.LONGEST_PROBE", 4)
    model = fp.Model(build("mistral"))
    with model.evaluation():
        runner = GenericRunner(model)
        assert runner.windows(4) == [None] * num_blocks(model.hf)
        assert runner.windows(WINDOW + 1) == [WINDOW] * num_blocks(model.hf)


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize(
    ("seen", "window"),
    [
        (lambda q, k: q >= k, None),
        (lambda q, k: (q >= k) & (q - k < 4), 4),
        (lambda q, k: (q >= k) & (q // 4 == k // 4), NO_WINDOW_FORM),  # chunks
        (lambda q, k: q - k < 4, NO_WINDOW_FORM),  # not causal
        (lambda q, k: (q >= k) & ((k == 0) | (q - k < 3)), NO_WINDOW_FORM),  # a sink
    ],
)
def test_the_window_of_a_mask(seen, window, additive):
    steps = torch.arange(11)
    mask = seen(steps[:, None], steps)[None, None]
    if additive:
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    assert window_of(mask) == window
