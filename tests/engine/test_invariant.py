"""A score is the same to the bit whatever else is scored, and the caller's model is left as it was
found."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from families import build, layers_of, random_rows, some_masks
from helpers import make_tasks, run_python, smallest_budget

import fastprune as fp

LENGTHS = [93, 9, 47, 93, 46, 2]
SHAPES = [(11, [1, 4, 7]), (5, [2, 2]), (13, [3, 1, 1, 6]), (12, [4, 7]), (9, [4, 5])]
KINDS = ["text", "tasks", "kl"]


def objective(kind: str, vocab_size: int):
    if kind == "tasks":
        return fp.TaskMargin(make_tasks(vocab_size, SHAPES))
    batch = fp.TokenBatch.from_ids(random_rows(vocab_size, LENGTHS))
    return fp.Perplexity(batch) if kind == "text" else fp.KLDivergence(batch)


def assert_same_bits(found, expected):
    assert np.asarray(found).tobytes() == np.asarray(expected).tobytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "granularity", "kind", "dtype"),
    [
        ("llama", "block", "text", "float32"),
        ("llama", "block", "tasks", "bfloat16"),
        ("gemma2-eager", "block", "tasks", "float32"),
        ("gemma2-eager", "block", "text", "bfloat16"),
        ("gpt-neox", "sublayer", "kl", "float32"),
        ("gpt-neox", "sublayer", "text", "bfloat16"),
        ("qwen3-moe", "block", "tasks", "float32"),
        ("qwen3-moe", "block", "kl", "bfloat16"),
    ],
)
def test_company_and_order_do_not_matter(family, granularity, kind, dtype):
    hf = build(family, getattr(torch, dtype))
    model, target = fp.Model(hf), objective(kind, hf.config.vocab_size)

    def make(memory_bytes, layout=None):
        return fp.Evaluator(
            model, target, granularity=granularity, memory_bytes=memory_bytes, layout=layout
        )

    num_chunks = 0
    for memory_bytes in (None, smallest_budget(make)):
        ev = make(memory_bytes)
        masks = some_masks(ev.num_units, 20, seed=7)
        together = ev.score(masks)
        assert np.isfinite(together).all()
        assert len(np.unique(together)) > 5
        for number in range(
            0, len(masks), 10
        ):  # alone, on an evaluator that has never scored anything else
            assert_same_bits(make(memory_bytes).score(masks[number]), together[number : number + 1])
        groups = np.array_split(np.arange(len(masks)), 4)
        assert_same_bits(np.concatenate([ev.score(masks[group]) for group in groups]), together)
        shuffled = np.random.default_rng(8).permutation(len(masks))
        assert_same_bits(ev.score(masks[shuffled]), together[shuffled])
        assert_same_bits(ev.score(masks[::-1]), together[::-1])
        assert_same_bits(ev.score(np.repeat(masks, 3, axis=0)), np.repeat(together, 3))
        assert_same_bits(ev.score(masks), together)  # warm
        samples = ev.score_samples(masks)
        assert_same_bits(ev.score_samples(masks[shuffled]), samples[shuffled])
        for some in ([1], [3, 0], list(range(ev.num_samples))[::-1]):
            assert_same_bits(ev.score_samples(masks, samples=some), samples[:, some])

        order = np.random.default_rng(9).permutation(len(ev.layout.chunks))
        assert len(order) > num_chunks  # the small budget cuts smaller chunks
        num_chunks = len(order)
        other = replace(ev.layout, chunks=tuple(ev.layout.chunks[i] for i in order))
        assert_same_bits(make(memory_bytes, other).score(masks), together)


def test_a_failed_call_leaves_no_trace():
    """An exception in the middle of a call (here from the progress callback) does not change what
    is scored next."""
    hf = build("gpt2")
    hf.train()
    target = objective("text", hf.config.vocab_size)
    ev = fp.Evaluator(hf, target)
    masks = some_masks(ev.num_units, 20, seed=10)
    expected = ev.score(masks)

    def stop(event):
        if event.done >= event.total // 3:
            raise KeyboardInterrupt

    ev.progress = stop
    with pytest.raises(KeyboardInterrupt):
        ev.score(masks)
    assert all(module.training for module in hf.modules())
    ev.progress = None
    assert_same_bits(ev.score(masks), expected)


def test_progress_ends_at_the_total():
    hf = build("llama")
    seen = []
    ev = fp.Evaluator(
        hf,
        objective("text", hf.config.vocab_size),
        progress=lambda event: seen.append((event.done, event.total)),
    )
    ev.score(some_masks(ev.num_units, 20, seed=11))
    done, totals = zip(*seen, strict=True)
    assert list(done) == sorted(done)
    assert len(set(totals)) == 1
    assert done[-1] == totals[0] > 0


def losses_of_thirty_masks(backwards_first: bool) -> str:
    hf = build("gemma2-eager")
    rows = random_rows(hf.config.vocab_size, [23, 9, 17, 23])
    ev = fp.Evaluator(hf, fp.Perplexity(fp.TokenBatch.from_ids(rows)), memory_bytes=3_000_000)
    masks = some_masks(ev.num_units, 30, seed=12)
    if backwards_first:
        np.testing.assert_array_equal(ev.score(masks[::-1])[::-1], ev.score(masks))
    return ev.score(masks).tobytes().hex()


def test_another_process_gives_the_same_bits():
    code = f"import torch; torch.backends.mkldnn.set_flags({torch.backends.mkldnn.enabled})\n"
    code += "import test_invariant; print(test_invariant.losses_of_thirty_masks(True))"
    there = run_python(code, OMP_NUM_THREADS=str(torch.get_num_threads())).split()[-1]
    assert len(there) == 30 * 16
    assert there == losses_of_thirty_masks(False)


# -- the caller's model ----------------------------------------------------------------------------


def snapshot(hf) -> dict:
    """The state of a process that a caller could find changed."""
    modules = dict(hf.named_modules())
    return {
        "modules": {name: id(module) for name, module in modules.items()},
        "attributes": {name: set(vars(module)) for name, module in modules.items()},
        "children": {
            name: {n: id(m) for n, m in module._modules.items()} for name, module in modules.items()
        },
        "hooks": {
            name: (list(module._forward_hooks), list(module._forward_pre_hooks))
            for name, module in modules.items()
        },
        "training": {name: module.training for name, module in modules.items()},
        "tensors": {
            name: (t.data_ptr(), t.requires_grad, t.grad is None, digest(t))
            for name, t in hf.state_dict(keep_vars=True).items()
        },
        "config": hf.config.to_dict(),
    }


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(
        tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()
    ).hexdigest()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "training"),
    [
        ("gpt2", True),
        ("gpt2", False),
        ("gemma2-sdpa", True),
        ("gpt-neox", False),
        ("qwen3-moe", True),
        ("phi3", True),
    ],
)
def test_the_model_is_left_as_it_was_found(family, training):
    hf = build(family)
    for module in hf.modules():  # dropout everywhere, which must not act while masks are scored
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    calls = []
    layers_of(hf)[1].register_forward_hook(
        lambda module, inputs, output: calls.append(1)
    )  # the caller's own hook
    ids = torch.tensor(random_rows(hf.config.vocab_size, [15, 15]))
    with torch.no_grad():
        logits = hf(input_ids=ids).logits
    targets = [objective(kind, hf.config.vocab_size) for kind in KINDS]
    quiet = [fp.Evaluator(hf, target).dense_loss for target in targets]
    hf.train(training)
    layers_of(hf)[0].eval()  # a frozen part of a model in training
    before = snapshot(hf)
    for target, expected in zip(targets, quiet, strict=True):
        for granularity in ("block", "sublayer"):
            ev = fp.Evaluator(hf, target, granularity=granularity)
            ev.score(some_masks(ev.num_units, 20, seed=13)[:5])
            assert ev.dense_loss == pytest.approx(expected, rel=1e-5, abs=1e-7)
            ev.similarity()
            if not isinstance(target, fp.KLDivergence):
                ev.unit_gradients()
    assert snapshot(hf) == before
    hf.eval()
    with torch.no_grad():
        assert torch.equal(hf(input_ids=ids).logits, logits)


def test_weights_are_shared():
    hf = build("llama")
    model = fp.Model(hf)
    for layer, own in zip(model.layers, layers_of(hf), strict=True):
        assert [p.data_ptr() for p in layer.parameters()] == [
            p.data_ptr() for p in own.parameters()
        ]
    batch = fp.TokenBatch.from_ids(random_rows(hf.config.vocab_size, [11]))
    ev = fp.Evaluator(model, fp.Perplexity(batch))
    before = ev.score(np.ones(5, dtype=bool))
    with torch.no_grad():
        for parameter in hf.parameters():
            parameter *= 0.9
    assert (
        ev.score(np.ones(5, dtype=bool)) != before
    )  # a change of the caller's weights is seen: nothing was copied


@pytest.mark.parametrize("kind", KINDS)
def test_a_layout_keeps_the_bits_under_another_budget(kind):
    hf = build("llama")
    model, target = fp.Model(hf), objective(kind, hf.config.vocab_size)
    masks = some_masks(len(layers_of(hf)), 12, seed=0)
    least = smallest_budget(
        lambda memory_bytes: fp.Evaluator(model, target, memory_bytes=memory_bytes)
    )
    small = fp.Evaluator(model, target, memory_bytes=2 * least)
    again = fp.Evaluator(
        model,
        target,
        memory_bytes=10**9,
        layout=type(small.layout).from_json(small.layout.to_json()),
    )
    assert len(again.layout.chunks) > len(
        fp.Evaluator(model, target, memory_bytes=10**9).layout.chunks
    )
    assert_same_bits(again.score(masks), small.score(masks))
    with pytest.raises(fp.InputError, match="the largest chunk of the layout takes"):
        fp.Evaluator(model, target, memory_bytes=least // 8, layout=small.layout)
    with pytest.raises(fp.InputError, match="layout must be a Layout"):
        fp.Evaluator(model, target, layout=small.layout.to_json())
    with pytest.raises(fp.InputError, match=r"layout must be a Layout.* or 'rows', not str"):
        fp.Evaluator(model, target, layout="row")
