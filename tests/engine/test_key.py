"""The key of a store: whatever is changed that bits depend on, nothing of before is served.

The property, for every change there is: with a store that holds the scores of the unchanged model,
the changed one's are to the bit those that it has without a store.
"""

from __future__ import annotations

import contextlib
import copy
import os
import types

import numpy as np
import pytest
import torch
from families import build
from transformers import LlamaConfig, LlamaForCausalLM

import fastprune as fp
from fastprune.models.fingerprint import machine_fingerprint

MASKS = np.array([[1, 1], [1, 0], [0, 1]], dtype=bool)
BATCH = fp.TokenBatch.from_ids(np.random.default_rng(0).integers(0, 61, (3, 9)))


@pytest.fixture(scope="module")
def hf():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module", params=["generic", "fused"])
def scores(request, hf, tmp_path_factory):
    """scores(model, with_store) -> bytes; the store holds those of the model as it is made."""
    store = tmp_path_factory.mktemp("store") / "s.db"

    def scores(model, with_store: bool) -> bytes:
        model = model if isinstance(model, fp.Model) else fp.Model(model)
        ev = fp.Evaluator(
            model, fp.Perplexity(BATCH), request.param, store=store if with_store else None
        )
        return ev.score(MASKS).tobytes()

    scores(hf, True)
    return scores


def holds(scores, model) -> bool:
    """Whether the property does; a change, being arbitrary, may make a model that cannot be run:
    nothing is served."""
    try:
        expected = scores(model, False)
    except Exception:
        return True
    return scores(model, True) == expected


def parts(hf):
    """The modules, of all layers the first one's."""
    return [(name, module) for name, module in hf.named_modules() if "layers.1" not in name]


def test_every_tensor(hf, scores):
    """Parameters and buffers: changed in place within one Model, and for a new one."""
    model = fp.Model(hf)
    for name, tensor in [*hf.named_parameters(), *hf.named_buffers()]:
        if "layers.1" in name:
            continue
        before = tensor.detach().clone()
        with torch.no_grad():
            tensor.view(-1)[tensor.numel() // 2].mul_(1.5).add_(0.25)
            assert holds(scores, model), name
            assert holds(scores, hf), name
            tensor.copy_(before)


def hooks_of(module):
    yield lambda: module.register_forward_hook(lambda module, inputs, output: scaled(output))
    yield lambda: module.register_forward_pre_hook(
        lambda module, inputs: tuple(map(scaled, inputs))
    )


def scaled(value):
    if isinstance(value, tuple):
        return tuple(map(scaled, value))
    return value * 1.25 if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def test_every_hook(hf, scores):
    for name, module in parts(hf):
        for make in hooks_of(module):
            hook = make()
            try:
                assert holds(scores, hf), (name, hook)
            finally:
                hook.remove()


def test_a_hook_is_not_taken_for_one_that_is_gone(hf, scores):
    for factor in np.linspace(0.5, 1.5, 12):  # each, as a rule, where the one before has been
        hook = hf.model.layers[0].mlp.register_forward_hook(
            lambda module, inputs, output, by=factor: output * by
        )
        try:
            assert holds(scores, hf)
        finally:
            hook.remove()
            del hook


def test_a_forward_of_its_own(hf, scores):
    """Put on a module of a Model that was opened, and checked, before."""
    model = fp.Model(hf)
    scores(model, False)
    mlp = hf.model.layers[1].mlp
    forward = mlp.forward
    mlp.forward = lambda x: 1.5 * forward(x)
    try:
        assert holds(scores, model)
        with pytest.raises(fp.InputError, match=r"mlp' has a forward of its own"):
            fp.Evaluator(model, fp.Perplexity(BATCH), "fused")
    finally:
        del mlp.forward


def test_global_hooks(hf, scores):
    of_modules = torch.nn.modules.module
    for register in (
        of_modules.register_module_forward_hook,
        of_modules.register_module_forward_pre_hook,
    ):
        hook = register(
            lambda module, *values: (
                scaled(values[-1]) if isinstance(module, torch.nn.Linear) else None
            )
        )
        try:
            assert holds(scores, hf)
        finally:
            hook.remove()


def other_values(value):
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, (int, float)):
        yield value + 1
    elif isinstance(value, str):
        yield value + "x"


def test_every_plain_attribute(hf, scores):
    seen = set()
    for name, module in parts(hf):
        for attribute, value in list(vars(module).items()):
            if (type(module), attribute) in seen:
                continue
            seen.add((type(module), attribute))
            for other in other_values(value):
                setattr(module, attribute, other)
                try:
                    assert holds(scores, hf), (name, attribute, other)
                finally:
                    setattr(module, attribute, value)
    assert len(seen) > 50


def test_every_number_of_the_config(hf, scores):
    for attribute, value in list(vars(hf.config).items()):
        for other in other_values(value):
            changed = copy.deepcopy(hf)
            try:
                setattr(changed.config, attribute, other)
            except Exception:
                continue  # a config that knows what the value may be
            assert holds(scores, changed), (attribute, other)


@contextlib.contextmanager
def switched(read, write, value):
    before = read()
    write(value)
    try:
        yield
    finally:
        write(before)


def attribute(owner, name):
    return lambda: getattr(owner, name), lambda value: setattr(owner, name, value)


CUDA, MKLDNN = torch.backends.cuda, torch.backends.mkldnn
SWITCHES = {
    "float32 precision, medium": (
        torch.get_float32_matmul_precision,
        torch.set_float32_matmul_precision,
        "medium",
    ),
    "float32 precision, high": (
        torch.get_float32_matmul_precision,
        torch.set_float32_matmul_precision,
        "high",
    ),
    "deterministic": (
        torch.are_deterministic_algorithms_enabled,
        torch.use_deterministic_algorithms,
        True,
    ),
    "threads": (torch.get_num_threads, torch.set_num_threads, 3),
    "default dtype": (torch.get_default_dtype, torch.set_default_dtype, torch.float64),
    "denormals": (lambda: False, torch.set_flush_denormal, True),
    "flash": (CUDA.flash_sdp_enabled, CUDA.enable_flash_sdp, False),
    "efficient": (CUDA.mem_efficient_sdp_enabled, CUDA.enable_mem_efficient_sdp, False),
    "math": (CUDA.math_sdp_enabled, CUDA.enable_math_sdp, False),
    "cudnn": (CUDA.cudnn_sdp_enabled, CUDA.enable_cudnn_sdp, False),
    "mkldnn": (*attribute(MKLDNN, "enabled"), False),
    "mkldnn, matmul": (*attribute(MKLDNN.matmul, "fp32_precision"), "bf16"),
}


@pytest.mark.parametrize("switch", SWITCHES.values(), ids=SWITCHES.keys())
def test_every_global_switch(hf, scores, switch):
    with switched(*switch):
        assert holds(scores, hf)


CUDNN = torch.backends.cudnn
GPU_SWITCHES = {
    "tf32 of all": (*attribute(torch.backends, "fp32_precision"), "tf32"),
    "tf32 of products": (*attribute(CUDA.matmul, "fp32_precision"), "tf32"),
    "ieee of convolutions": (*attribute(CUDNN.conv, "fp32_precision"), "ieee"),
    "float16 sums": (*attribute(CUDA.matmul, "allow_fp16_accumulation"), True),
    "bfloat16 sums": (*attribute(CUDA.matmul, "allow_bf16_reduced_precision_reduction"), False),
    # a build for CPUs refuses to prefer another one
    "library": (*attribute(CUDA, "preferred_blas_library"), lambda: "cublaslt"),
    "driver": (
        lambda: os.environ.get("NVIDIA_TF32_OVERRIDE", ""),
        lambda value: os.environ.update(NVIDIA_TF32_OVERRIDE=value),
        "0",
    ),
}


@pytest.mark.parametrize("switch", GPU_SWITCHES.values(), ids=GPU_SWITCHES.keys())
def test_every_global_switch_of_a_gpu(monkeypatch, switch):
    """A precision that is set by operator too, where torch can no longer say allow_tf32."""
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    card = types.SimpleNamespace(name="card", major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    before = machine_fingerprint(torch.device("cuda"))
    with switched(*switch):
        assert machine_fingerprint(torch.device("cuda")) != before
    assert machine_fingerprint(torch.device("cuda")) == before


def test_a_default_that_is_said_aloud_changes_nothing(hf, tmp_path):
    precision = attribute(MKLDNN.matmul, "fp32_precision")
    for value, runs in (("none", True), ("ieee", False)):
        with switched(*precision, value):
            ev = fp.Evaluator(fp.Model(hf), fp.Perplexity(BATCH), store=tmp_path / "s.db")
            ev.score(MASKS)
            assert (ev.stats.unit_runs > 0) == runs


@pytest.mark.parametrize(
    "family", ["llama", "gemma3", "gpt-neox", "phi3", "qwen3-moe"]
)  # each rotates otherwise
def test_a_model_in_memory_and_the_same_one_from_its_folder_have_the_same_scores(family, tmp_path):
    """`.to(dtype)` rounds the rotary frequencies of a model in memory, which no checkpoint
    holds."""
    hf = build(family).to(torch.bfloat16)
    held = {name: buffer.clone() for name, buffer in hf.named_buffers()}
    hf.save_pretrained(tmp_path / "m")
    loaded = fp.load_model(tmp_path / "m", dtype="auto")
    vocab, depth = loaded.vocab_size, loaded.num_blocks
    batch = fp.TokenBatch.from_ids(np.random.default_rng(1).integers(0, vocab, (3, 24)))
    masks = np.ones((2, depth), dtype=bool)
    masks[1, depth // 2] = False
    found = [
        fp.Evaluator(model, fp.Perplexity(batch)).score(masks).tobytes() for model in (hf, loaded)
    ]
    assert found[0] == found[1]
    assert all(
        torch.equal(buffer, held[name]) for name, buffer in hf.named_buffers()
    )  # left as it was found


def test_frequencies_that_were_changed_on_purpose_stay(hf):
    changed = copy.deepcopy(hf).to(torch.bfloat16)
    changed.model.rotary_emb.inv_freq.mul_(1.5)
    assert fp.Model(changed).hf is changed
    assert fp.Model(hf).hf is hf
