"""The kernels of scaled_dot_product_attention are pinned while units run: the caller's switches
change no bit."""

from __future__ import annotations

import threading
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from families import build, num_blocks, random_rows, some_masks
from helpers import make_tasks

import fastprune as fp
from fastprune.engine.store import SumStore
from fastprune.models.attention import pinned_attention

cuda = torch.backends.cuda


def switches() -> dict[str, object]:
    return {
        "flash": cuda.flash_sdp_enabled(),
        "efficient": cuda.mem_efficient_sdp_enabled(),
        "math": cuda.math_sdp_enabled(),
        "cudnn": cuda.cudnn_sdp_enabled(),
        "order": torch._C._get_sdp_priority_order(),
    }


PINNED = {"flash": True, "efficient": True, "math": True, "cudnn": False}


@contextmanager
def only_math():
    before = cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled()
    cuda.enable_flash_sdp(False)
    cuda.enable_mem_efficient_sdp(False)
    try:
        yield
    finally:
        cuda.enable_flash_sdp(before[0])
        cuda.enable_mem_efficient_sdp(before[1])


@pytest.mark.parametrize("backend", ["generic", "fused"])
@pytest.mark.parametrize("kind", ["text", "questions"])
def test_the_callers_switches_change_no_bit_and_are_put_back(backend, kind):
    hf = build("llama")
    vocab = hf.config.vocab_size
    text = fp.Perplexity(fp.TokenBatch.from_ids(random_rows(vocab, [21, 17])))
    objective = (
        text if kind == "text" else fp.TaskMargin(make_tasks(vocab, [(7, [3, 2]), (5, [2, 4])]))
    )
    masks = some_masks(num_blocks(hf), 12, seed=1)
    expected = fp.Evaluator(hf, objective, backend=backend).score(masks)
    with only_math():
        before = switches()
        ev = fp.Evaluator(hf, objective, backend=backend)
        np.testing.assert_array_equal(ev.score(masks), expected)
        assert switches() == before


def test_the_pinned_order_holds_while_any_thread_is_inside():
    before = switches()
    entered, leave = threading.Event(), threading.Event()
    seen = []

    def stay():
        with pinned_attention():
            entered.set()
            leave.wait(10)
            seen.append(switches())

    other = threading.Thread(target=stay)
    with pinned_attention():
        assert PINNED.items() <= switches().items()
        other.start()
        assert entered.wait(10)
    assert PINNED.items() <= switches().items()  # the other one is still inside
    leave.set()
    other.join()
    assert PINNED.items() <= seen[0].items()
    assert switches() == before


def test_the_switches_are_put_back_after_an_error():
    before = switches()
    with pytest.raises(ZeroDivisionError), pinned_attention():
        1 / 0  # noqa: B018 (raises)
    assert switches() == before
    with pinned_attention(), pinned_attention():
        assert PINNED.items() <= switches().items()
    assert switches() == before


def test_the_key_of_the_store_names_the_backends_in_their_order(tmp_path):
    hf = build("llama")
    batch = fp.TokenBatch.from_ids(random_rows(hf.config.vocab_size, [5]))
    fp.Evaluator(hf, fp.Perplexity(batch), store=tmp_path / "s.db").score(
        np.ones((1, 5), dtype=bool)
    )
    ((by, _),) = SumStore(tmp_path / "s.db").contexts().values()
    found = by["sdpa"]
    assert found == ["FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH", "OVERRIDEABLE"]
