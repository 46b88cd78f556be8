"""Checkpoints in 16 bits on a CPU without instructions for them; which CPU it is, the tests say
themselves."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from families import build, random_rows, some_masks
from transformers import AutoModelForCausalLM

import fastprune as fp
from fastprune.models import folder, precision

OLD, NEW = {"avx2": True}, {"avx2": True, "avx512_bf16": True, "avx512_fp16": True}


@pytest.fixture
def old_processor(monkeypatch):
    monkeypatch.setattr(precision, "capabilities", lambda: OLD)


@pytest.fixture
def little_memory(monkeypatch):
    monkeypatch.setattr(folder, "available_bytes", lambda device: 1000)


def saved(tmp_path, family="llama", dtype=torch.bfloat16):
    build(family, dtype).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def scores(model, granularity="block", **options):
    objective = fp.Perplexity(fp.TokenBatch.from_ids(random_rows(model.vocab_size, [19, 12])))
    ev = fp.Evaluator(model, objective, granularity=granularity, **options)
    losses = ev.score(some_masks(ev.num_units, 2 * ev.num_units + 2, seed=3))
    return losses, ev


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_processor_without_the_instructions_runs_float32_and_says_so_once(
    tmp_path, dtype, old_processor
):
    folder = saved(tmp_path, dtype=getattr(torch, dtype))
    with pytest.warns(
        UserWarning, match=f"no instructions for {dtype}: its weights were widened to float32"
    ) as said:
        model = fp.load_model(folder)
    assert len(said) == 1
    assert "\n" not in str(said[0].message)
    assert model.dtype == torch.float32
    assert {p.dtype for p in model.hf.parameters()} == {torch.float32}
    expected, _ = scores(fp.load_model(folder, dtype="float32"))
    np.testing.assert_array_equal(scores(model)[0], expected)


@pytest.mark.parametrize(
    ("processor", "dtype"), [(NEW, None), (NEW, "bfloat16"), (OLD, "float32"), (OLD, "auto")]
)
def test_nothing_is_said_where_nothing_is_amiss(tmp_path, monkeypatch, processor, dtype):
    monkeypatch.setattr(precision, "capabilities", lambda: processor)
    folder = saved(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = fp.load_model(folder, dtype=dtype)
    assert model.dtype == (torch.float32 if dtype == "float32" else torch.bfloat16)


def test_a_dtype_that_is_asked_for_by_name_is_had_with_a_warning(tmp_path, old_processor):
    with pytest.warns(
        UserWarning, match="no instructions for bfloat16: a run takes many times as long"
    ):
        model = fp.load_model(saved(tmp_path), dtype="bfloat16")
    assert model.dtype == torch.bfloat16
    assert np.isfinite(scores(model)[0]).all()


def test_what_the_config_says_is_the_checkpoints_own(tmp_path, old_processor):
    """float32 weights that are to be run in bfloat16, and the other way round, as transformers
    takes them."""
    for config, weights in [("float32", torch.bfloat16), ("bfloat16", torch.float32)]:
        folder = tmp_path / config
        hf = build("llama", weights)
        hf.save_pretrained(folder)
        path = folder / "config.json"
        stored = str(weights).removeprefix("torch.")
        path.write_text(path.read_text().replace(f'"dtype": "{stored}"', f'"dtype": "{config}"'))
        assert AutoModelForCausalLM.from_pretrained(folder, dtype="auto").dtype == getattr(
            torch, config
        )
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always", UserWarning)
            assert fp.load_model(folder).dtype == torch.float32
        assert len(said) == (config == "bfloat16")


@pytest.mark.parametrize(
    ("family", "backend", "granularity"),
    [
        ("llama", "generic", "block"),
        ("llama", "fused", "block"),
        ("llama-tied", "fused", "sublayer"),
        ("qwen3", "fused", "block"),
        ("phi3", "fused", "block"),
        ("gpt2", "generic", "sublayer"),
        ("mistral", "fused", "block"),
        ("gpt-neox", "generic", "sublayer"),
        ("qwen3-moe", "generic", "block"),
    ],
)
def test_weights_that_would_not_fit_are_widened_as_they_are_used_to_the_same_bits(
    tmp_path, family, backend, granularity, old_processor, little_memory
):
    folder = saved(tmp_path, family)
    wide = fp.load_model(folder, dtype="float32")
    with pytest.warns(
        UserWarning, match="widened to float32 as they are used, since all would not fit"
    ):
        narrow = fp.load_model(folder)
    assert narrow.dtype == torch.float32
    if family != "qwen3-moe":  # whose experts are no linear maps of their own
        assert weight_bytes(narrow) < 0.6 * weight_bytes(wide)
    for budget in (None, 300_000):
        expected, by = scores(wide, granularity, backend=backend, memory_bytes=budget)
        found, ev = scores(narrow, granularity, backend=backend, memory_bytes=budget)
        np.testing.assert_array_equal(found, expected)
        assert ev.backend == by.backend
        assert (
            ev.stats.peak_activation_bytes == by.stats.peak_activation_bytes
        )  # chunks are the same


def weight_bytes(model) -> int:
    return sum(parameter.nbytes for parameter in model.hf.parameters())


@pytest.mark.parametrize("family", ["gemma2-eager", "gemma3"])
def test_a_family_that_rounds_its_own_numbers_is_widened_whole(
    tmp_path, family, old_processor, little_memory
):
    """Gemma scales its embeddings by a number that is rounded to the weights' dtype as it is
    made."""
    folder = saved(tmp_path, family)
    with pytest.warns(UserWarning, match="were widened"):
        model = fp.load_model(folder)
    assert {parameter.dtype for parameter in model.hf.parameters()} == {torch.float32}
    np.testing.assert_array_equal(
        scores(model)[0], scores(fp.load_model(folder, dtype="float32"))[0]
    )


@pytest.mark.parametrize("granularity", ["block", "sublayer"])
def test_probes_take_widened_weights(tmp_path, granularity, old_processor, little_memory):
    folder = saved(tmp_path)
    with pytest.warns(UserWarning, match="as they are used"):
        narrow = fp.load_model(folder)
    _, by = scores(fp.load_model(folder, dtype="float32"), granularity)
    _, ev = scores(narrow, granularity)
    np.testing.assert_array_equal(ev.similarity(), by.similarity())
    np.testing.assert_array_equal(ev.unit_gradients(), by.unit_gradients())


def test_an_export_keeps_the_checkpoints_dtype(tmp_path, old_processor):
    from click.testing import CliRunner

    from fastprune.cli import cli

    folder, out = saved(tmp_path), tmp_path / "out"
    done = CliRunner().invoke(cli, ["export", str(folder), "--removed", "1", "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert AutoModelForCausalLM.from_pretrained(out, dtype="auto").dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("names", "bfloat16", "float16"),
    [
        ((), False, False),
        (("avx2", "avx512_f", "avx512_vnni"), False, False),
        (("avx512_bf16",), True, False),
        (("amx_tile", "amx_bf16"), True, False),
        (("avx512_bf16", "avx512_fp16"), True, True),
        (("neon", "fp16_arith"), False, True),
        (("neon", "bf16", "fp16_arith"), True, True),
    ],
)
def test_instructions_by_processor(monkeypatch, names, bfloat16, float16):
    monkeypatch.setattr(precision, "capabilities", lambda: dict.fromkeys(names, True))
    assert precision.has_instructions(torch.bfloat16) == bfloat16
    assert precision.has_instructions(torch.float16) == float16
    assert precision.has_instructions(torch.float32)
    assert precision.has_instructions(torch.float64)


def test_this_machine_says_what_it_has():
    assert isinstance(dict(precision.capabilities()), dict)
