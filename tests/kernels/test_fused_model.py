"""The whole fused model on Triton's operators, on the device that the kernels' tests run on.

The interpreter takes milliseconds for each program, so rows are short and masks few; on the other
operators, tests/engine/test_fused.py tests the same properties (`fused_suite`) broadly.
"""

from __future__ import annotations

import collections

import numpy as np
import pytest
import torch
from engine.helpers import make_tasks
from families import build, physically_removed
from fused_suite import FusedProperties, Scene
from kernel_checks import DEVICE, INTERPRETED, random  # skips where triton is not installed

import fastprune as fp
from fastprune.models import fused
from fastprune.models.operators import kernels
from fastprune.models.operators.rows import Rows
from fastprune_kernels import attention, gated_mlp, linear_loss, norm, reference, rope
from fastprune_kernels.attention import TreePlan

LENGTHS = [9, 8]
MASKS = np.array([[1, 1, 0], [1, 0, 1]], dtype=bool)
KERNELS = [
    norm.add_rms_norm_kernel,
    rope.rotary_kernel,
    gated_mlp.gated_mlp_kernel,
    attention.tree_attention_kernel,
]
KERNELS += [linear_loss.linear_nll_kernel, linear_loss.finish_nll_kernel]
# small tiles, one of which is run as a measurement
OPTIONS = {"backend": "auto", "memory_bytes": 300_000 if INTERPRETED else None}


@pytest.fixture(autouse=True)
def operators(monkeypatch):
    monkeypatch.setattr(fused, "fast_operators", lambda device, dtype: "triton")
    return "triton"


def three_blocks(family: str):
    return physically_removed(build(family), (3, 4))


SCENE = Scene(
    three_blocks, LENGTHS, [(7, [1, 3]), (2, [1] * 18)], lambda units: MASKS, OPTIONS, DEVICE.type
)


@pytest.fixture
def scene():
    return SCENE


# A norm of each head. A window shorter than a row. Norms of branches, and GELU. LayerNorm, pairs of
# neighbours, and scaled logits. Sinks, and experts.
@pytest.fixture(params=["qwen3", "mistral", "gemma3", "cohere", "gpt_oss"])
def family(request):
    return request.param


@pytest.fixture
def granularity():
    return "block"


@pytest.mark.slow
class TestOperatorsOfTriton(FusedProperties):
    pass


class CountingMisses(fp.Perplexity):
    measure = "greedy"


@pytest.mark.slow
def test_misses_are_counted_in_the_pass_of_the_loss():
    """The whole model misses no token of a text that it wrote itself. Logits are scaled."""
    hf = three_blocks("cohere").to(DEVICE)
    ids = torch.tensor([[5], [9]], device=DEVICE)
    with torch.no_grad():
        for _ in range(8):
            likely = hf(input_ids=ids, use_cache=False).logits[:, -1:].argmax(dim=-1)
            ids = torch.cat([ids, likely], dim=1)
    batch = fp.TokenBatch.from_ids(ids.tolist())
    masks = np.array([[1, 1, 1], [1, 0, 1]], dtype=bool)
    sums = SCENE.evaluator(hf, CountingMisses(batch)).sums(masks)
    losses = SCENE.evaluator(hf, fp.Perplexity(batch)).sums(masks)
    assert np.array_equal(sums[:, :1], losses)  # to the bit
    misses = fp.Evaluator(hf, CountingMisses(batch), backend="generic").sums(masks)[:, 1]
    assert np.array_equal(sums[:, 1], misses)
    assert not misses[0].any()
    assert misses[1].any()


@pytest.mark.slow
def test_no_kernel_is_compiled_anew_for_another_number_of_rows(monkeypatch):
    """Triton compiles a kernel for every set of constants, and for integers that are 1 or multiples
    of 16, and pointers that are aligned. Sizes here are of every kind, and one variant serves them
    all."""
    seen = collections.defaultdict(set)
    for kernel in KERNELS:
        kept = {p.name for p in getattr(kernel, "params", ()) if p.do_not_specialize}
        kept |= set(getattr(kernel, "kwargs", {}).get("do_not_specialize") or ())

        def note(*arguments, kernel=kernel, kept=kept, **constants):
            key = [
                (x.dtype, x.data_ptr() % 16)
                if torch.is_tensor(x)
                else type(x)
                if name in kept
                else (x == 1, x)
                for name, x in zip(kernel.arg_names, arguments)
                if x is not None
            ]
            absent = [name for name, x in zip(kernel.arg_names, arguments) if x is None]
            seen[kernel.fn.__name__].add(repr((key, absent, sorted(constants.items(), key=str))))

        monkeypatch.setattr(kernel, "pre_run_hooks", [note])
    hf = three_blocks("qwen3").to(DEVICE)
    for questions in ([(7, [1, 3]), (2, [1] * 18)], [(1, [1, 1])], [(10, [3, 3]), (3, [1] * 3)]):
        tasks = make_tasks(hf.config.vocab_size, questions)
        SCENE.evaluator(hf, fp.TaskMargin(tasks)).score(MASKS[:1])
    # one more: of a norm that keeps the sum, and of the loss that counts misses, in the comparison
    # of heads when a model is opened
    more = ("add_rms_norm_kernel", "linear_nll_kernel", "finish_nll_kernel")
    assert {name: len(keys) for name, keys in seen.items()} == {
        kernel.fn.__name__: 2 if kernel.fn.__name__ in more else 1 for kernel in KERNELS
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "grouped", "tree"),
    [(torch.float32, True, True), (torch.float32, False, False), (torch.bfloat16, True, False)],
)
def test_plain_rows_that_no_memory_efficient_kernel_takes_go_to_tree_attention(
    dtype, grouped, tree
):
    """Torch's takes no grouped heads in float32, and would hold all scores of a row."""
    rows = Rows(3, 9, None, None, DEVICE, dtype)
    plan = kernels.plan_attention(rows, 16, grouped, None)
    assert isinstance(plan, TreePlan) == tree
    heads, kv_heads = (4, 2) if grouped else (3, 3)
    qkv = random(27, (heads + 2 * kv_heads) * 16, dtype=dtype)
    found = kernels.attention(qkv, plan, heads, kv_heads, 0.25)
    truth = reference.tree_attention(
        qkv.double(),
        reference.tree_mask(torch.tensor([0, 9, 18, 27]), *plain(27, 9)).to(DEVICE),
        heads,
        kv_heads,
        0.25,
    )
    assert (found.double() - truth).abs().max() <= 8 * torch.finfo(dtype).eps * truth.abs().max()


def plain(count: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Branch and position of the tokens of plain rows."""
    return torch.zeros(count, dtype=torch.int64), torch.arange(count) % length
