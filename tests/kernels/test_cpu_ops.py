"""The compiled operators on a CPU, on every instruction set that this processor has, against the
float64 reference."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from operator_suite import MlpProperties, NormProperties, Operators, RotaryProperties, check_rows

from fastprune.models import native
from fastprune_kernels import reference

pytestmark = pytest.mark.skipif(not native.available(), reason="the extension is not built")

DTYPES = (torch.float32, torch.bfloat16)
SETS = native.extension.instruction_sets() if native.available() else ["none"]
EPS = 1e-5
INF, NAN = math.inf, math.nan


@pytest.fixture(params=SETS, autouse=True)
def instruction_set(request):
    native.extension.use_instruction_set(request.param)
    yield request.param
    native.extension.use_instruction_set(SETS[-1])


@pytest.fixture
def threads():
    """threads(n): torch's number of threads, until the end of the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def random(
    *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


def nans(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """An output as an operator finds it in a test: what it does not write shows."""
    return torch.full(shape, torch.nan, dtype=dtype)


def assert_as_exact(result: torch.Tensor, same: torch.Tensor, truth: torch.Tensor) -> None:
    """The greatest error of `result` is at most that of `same`, torch's own in the same dtype, plus
    one rounding."""
    assert result.shape == truth.shape
    assert torch.isfinite(result).all()
    rounding = torch.finfo(result.dtype).eps / 2 * truth.abs().max().item()
    error, allowed = ((x.double() - truth).abs().max().item() for x in (result, same))
    assert error <= allowed + rounding, (
        f"error {error:.3g}, torch's {allowed:.3g}, one rounding {rounding:.3g}"
    )


CSRC = Operators(
    native.add_rms_norm,
    native.rotary,
    native.gated_mlp,
    lambda result, same, truth, _: assert_as_exact(result, same, truth),
    torch.device("cpu"),
    tokens=2000,
    threads=(1, 2, 3),
)


@pytest.fixture
def ops():
    return CSRC


@pytest.fixture(params=DTYPES)
def dtype(request):
    return request.param


@pytest.fixture(params=native.ACTIVATIONS)
def activation(request):
    return request.param


class TestNorm(NormProperties):
    pass


class TestRotary(RotaryProperties):
    pass


class TestGatedMlp(MlpProperties):
    pass


def random_runs(rows: int, length: int, seed: int = 5) -> torch.Tensor:
    """Two runs of places for each query, int32[B, L, 4], of any length but both empty."""
    ends = (
        torch.randint(length + 1, (rows, length, 4), generator=torch.Generator().manual_seed(seed))
        .sort()
        .values
    )
    ends[..., 3] = ends[..., 3].maximum(ends[..., 2] + 1).clamp(max=length)
    ends[..., 2] = ends[..., 2].clamp(max=length - 1)
    ends[..., 1] = ends[..., 1].minimum(ends[..., 2])
    ends[..., 0] = ends[..., 0].minimum(ends[..., 1])
    return ends.int()


def causal_runs(length: int) -> torch.Tensor:
    ends = torch.arange(1, length + 1)
    return torch.stack([ends * 0, ends, ends, ends], dim=-1)[None].int()


def attention_by_rows(
    qkv: torch.Tensor,
    seen: torch.Tensor,
    heads: int,
    kv_heads: int,
    scale: float,
    soft_cap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """The reference, row by row, under the mask that `seen` stands for."""
    key = torch.arange(seen.shape[1])
    begin, end, next_begin, next_end = seen[..., None].unbind(dim=2)
    mask = (begin <= key) & (key < end) | (next_begin <= key) & (key < next_end)
    rows = qkv.split(seen.shape[1])
    masks = mask.expand(len(rows), -1, -1)
    parts = [
        reference.tree_attention(row, mask, heads, kv_heads, scale, soft_cap, sinks)
        for row, mask in zip(rows, masks, strict=True)
    ]
    return torch.cat(parts)


@pytest.mark.parametrize("runs", ["causal", "random"])
@pytest.mark.parametrize("soft_cap", [None, 2.0])
@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize(
    ("rows", "length", "heads", "kv_heads", "head_dim"),
    [
        (3, 21, 4, 2, 16),
        (1, 1, 1, 1, 1),
        (2, 7, 3, 1, 5),
        (1, 200, 2, 2, 20),
        (2, 65, 6, 2, 80),
        (1, 129, 1, 1, 256),
        (1, 600, 2, 1, 24),
    ],
)
def test_attends_to_the_keys_that_are_seen(
    rows, length, heads, kv_heads, head_dim, runs, soft_cap, has_sinks, dtype
):
    qkv = random(rows * length, (heads + 2 * kv_heads) * head_dim, dtype=dtype, seed=1, scale=2.0)
    seen = causal_runs(length) if runs == "causal" else random_runs(rows, length)
    arguments = (seen, heads, kv_heads, head_dim**-0.5)
    sinks = random(heads, dtype=dtype, seed=3, scale=4.0) if has_sinks else None
    options = {"soft_cap": soft_cap, "sinks": sinks}
    out = nans(rows * length, heads * head_dim, dtype=dtype)
    assert native.attention(qkv, *arguments, **options, out=out) is out
    truth = attention_by_rows(
        qkv.double(), *arguments, soft_cap, sinks if sinks is None else sinks.double()
    )
    # float32 roundings of the greatest score that there may be count twice in a weight; then the
    # result is rounded once
    q, k, v = qkv.double().unflatten(1, (-1, head_dim)).split([heads, kv_heads, kv_heads], dim=1)
    score = head_dim**-0.5 * q.norm(dim=-1).max() * k.norm(dim=-1).max()
    score = score if sinks is None else score.maximum(sinks.double().abs().max())
    allowed = (
        2 * (score + 2) * 2.0**-24 * v.abs().max() + torch.finfo(dtype).eps / 2 * truth.abs().max()
    )
    assert (out.double() - truth).abs().max() <= allowed
    assert torch.equal(native.attention(qkv, *arguments, **options), out)
    each = seen.expand(rows, -1, -1).contiguous()
    assert torch.equal(native.attention(qkv, each, *arguments[1:], **options), out)


def test_attention_depends_on_what_is_seen_alone(dtype, threads):
    """A row alone and among others, on any number of threads; a query without what it does not see,
    and beside queries that see something else."""
    rows, length, heads, kv_heads, head_dim = 5, 150, 4, 2, 24
    qkv = random(rows * length, (heads + 2 * kv_heads) * head_dim, dtype=dtype, seed=1)
    for seen in (causal_runs(length).expand(rows, -1, -1).contiguous(), random_runs(rows, length)):
        threads(1)
        together = native.attention(qkv, seen, heads, kv_heads, 0.2)
        for number in (2, 3):
            threads(number)
            assert torch.equal(native.attention(qkv, seen, heads, kv_heads, 0.2), together)
        for row in (0, 3):
            part = slice(row * length, (row + 1) * length)
            alone = native.attention(qkv[part], seen[row : row + 1], heads, kv_heads, 0.2)
            assert torch.equal(alone, together[part])
    short = native.attention(qkv[:101], causal_runs(101), heads, kv_heads, 0.2)
    assert torch.equal(
        short, native.attention(qkv[:length], causal_runs(length), heads, kv_heads, 0.2)[:101]
    )
    long = random(600, (heads + 2 * kv_heads) * head_dim, dtype=dtype, seed=2)
    seen, others = random_runs(1, 600), random_runs(1, 600, seed=6)
    found = native.attention(long, seen, heads, kv_heads, 0.2)
    for query in (0, 255, 256, 301, 599):
        beside = others.clone()
        beside[:, query] = seen[:, query]
        assert torch.equal(
            native.attention(long, beside, heads, kv_heads, 0.2)[query], found[query]
        )
    for seen in (causal_runs(length), causal_runs(length)[:0]):
        assert native.attention(qkv[:0], seen, heads, kv_heads, 0.2).shape == (0, heads * head_dim)


def test_attention_to_what_is_not_finite():
    """A key that is not finite shows where it is seen, a query in its own result; one that sees
    nothing gets NaN.

    A value that is not finite may show in queries beside those that see it.
    """
    length, seen = 70, causal_runs(70)
    qkv = random(length, 3 * 16, seed=1)
    before = native.attention(qkv, seen, 1, 1, 0.25)
    for value in (NAN, INF, -INF):
        broken = qkv.clone()
        broken[40, 16:32] = value
        found = native.attention(broken, seen, 1, 1, 0.25)
        assert torch.equal(found[:40], before[:40])
        torch.testing.assert_close(
            found, attention_by_rows(broken, seen, 1, 1, 0.25), equal_nan=True
        )
        broken = qkv.clone()
        broken[40, :16] = value
        found = native.attention(broken, seen, 1, 1, 0.25)
        assert found[40].isnan().all()
        found[40] = before[40]
        assert torch.equal(found, before)
        broken = qkv.clone()
        broken[40, 32:] = value
        found = native.attention(broken, seen, 1, 1, 0.25)
        assert torch.equal(found[:24], before[:24])
        torch.testing.assert_close(
            found[40:], attention_by_rows(broken, seen, 1, 1, 0.25)[40:], equal_nan=True
        )
    seen[0, 3] = 0
    found = native.attention(qkv, seen, 1, 1, 0.25)
    assert found[3].isnan().all()
    found[3] = before[3]
    assert torch.equal(found, before)


def test_attention_with_scores_far_apart():
    """Weights of exactly 1 and 0, and scores that would overflow without their maximum taken
    off."""
    qkv = torch.zeros(80, 3 * 8)
    qkv[:, :8], qkv[:, 8:16], qkv[:, 16:] = (
        1e3,
        torch.arange(80)[:, None] * 10.0,
        torch.arange(80)[:, None],
    )
    out = native.attention(qkv, causal_runs(80), 1, 1, 1.0)
    assert torch.equal(out, qkv[:, 16:])
    below, above = torch.tensor([-1e30]), torch.tensor([1e30])
    assert torch.equal(native.attention(qkv, causal_runs(80), 1, 1, 1.0, sinks=below), out)
    assert not native.attention(qkv, causal_runs(80), 1, 1, 1.0, sinks=above).any()


def test_a_query_that_sees_only_its_sink_gets_zero():
    seen = causal_runs(5)
    seen[0, 3] = 0
    qkv, sinks = random(5, 3 * 16, seed=1), random(1, seed=2)
    found = native.attention(qkv, seen, 1, 1, 0.25, sinks=sinks)
    assert not found[3].any()
    assert found[[0, 1, 2, 4]].all()


def test_activation_far_from_zero(activation, dtype):
    gate = torch.tensor(
        [[-INF, -1e30, -200.0, -89.0, -88.0, -20.0, -0.0, 20.0, 88.0, 1e30, INF, NAN]]
    ).to(dtype)
    out = native.gated_mlp(torch.cat([gate, torch.ones_like(gate)], dim=1), activation)
    wide = gate.double()
    twice = wide if activation == "silu" else 1.5957691216057308 * (wide + 0.044715 * wide**3)
    truth = wide * torch.sigmoid(twice)
    torch.testing.assert_close(
        out.double(), truth, rtol=torch.finfo(dtype).eps * 2, atol=1e-36, equal_nan=True
    )


@pytest.mark.parametrize(("rows", "size"), [(63, 1021), (1, 60), (3, 1), (2, 8192)])
def test_sums_exponentials(rows, size, dtype):
    logits = random(rows, size, dtype=dtype, seed=1, scale=4.0)
    out = nans(rows)
    assert native.log_sum_exp(logits, out) is out
    truth = torch.logsumexp(logits.double(), dim=-1)
    assert_as_exact(out, torch.logsumexp(logits.float(), dim=-1), truth)
    wider = torch.cat([logits, nans(rows, 7, dtype=dtype)], dim=1)
    assert torch.equal(native.log_sum_exp(wider[:, :size]), out)


@pytest.mark.parametrize("size", [1, 3, 100, 1025])
@pytest.mark.parametrize(
    ("everywhere", "there"),
    [
        (0.0, NAN),
        (-INF, NAN),
        (INF, NAN),
        (NAN, 0.0),
        (0.0, INF),
        (-INF, INF),
        (INF, -INF),
        (-INF, -INF),
        (-INF, 1e38),
        (-1e38, 1e38),
        (-1e38, -1e30),
        (1e38, 1e38),
    ],
)
def test_logits_that_are_not_finite_or_huge(everywhere, there, size, dtype):
    logits = torch.full((3, size), everywhere, dtype=dtype)
    for row, column in enumerate((0, size // 2, size - 1)):
        logits[row, column] = there
    torch.testing.assert_close(
        native.log_sum_exp(logits), torch.logsumexp(logits.float(), dim=-1), equal_nan=True
    )


@pytest.mark.parametrize(("rows", "size"), [(63, 1021), (1, 60), (3, 1), (2, 8192)])
def test_sums_of_a_divergence(rows, size, dtype):
    dense, logits = (random(rows, size, dtype=dtype, seed=i, scale=4.0) for i in (1, 2))
    dense_sums = native.exact_log_sum_exp(dense)
    assert dense_sums.dtype == torch.float64
    torch.testing.assert_close(
        dense_sums, torch.logsumexp(dense.double(), dim=-1), rtol=0, atol=3e-7
    )
    means, sums = native.divergence(dense, dense_sums, logits)
    assert torch.equal(sums, native.exact_log_sum_exp(logits))
    p = (dense.double() - dense_sums.float().double()[:, None]).exp()
    truth = (p * (dense.double() - logits.double())).sum(dim=-1)
    torch.testing.assert_close(means, truth, rtol=1e-5, atol=1e-5)
    wider = torch.cat([logits, nans(rows, 7, dtype=dtype)], dim=1)
    apart = native.divergence(torch.cat([dense] * 2, dim=1)[:, :size], dense_sums, wider[:, :size])
    assert all(map(torch.equal, apart, (means, sums)))
    means, sums = native.divergence(dense, dense_sums, dense.clone())
    assert torch.equal(sums, dense_sums)
    assert not means.any()


@pytest.mark.parametrize("size", [1, 3, 1025])
@pytest.mark.parametrize("there", [NAN, INF, -INF, 1e38, -1e38])
def test_exact_sums_of_logits_that_are_not_finite_or_huge(there, size, dtype):
    logits = torch.zeros(3, size, dtype=dtype)
    for row, column in enumerate((0, size // 2, size - 1)):
        logits[row, column] = there
    truth = torch.logsumexp(logits.double(), dim=-1)
    torch.testing.assert_close(native.exact_log_sum_exp(logits), truth, equal_nan=True)


def test_rows_of_logits_have_the_same_bits_alone_and_together(dtype):
    dense, logits = (random(2000, 61, dtype=dtype, seed=seed) for seed in (1, 2))
    check_rows(CSRC, native.log_sum_exp, logits)
    check_rows(
        CSRC,
        lambda dense, logits: torch.stack(
            native.divergence(dense, native.exact_log_sum_exp(dense), logits), dim=1
        ),
        dense,
        logits,
    )


def norm_with(**change):
    native.add_rms_norm(**{"states": random(5, 60), "weight": random(60), "eps": EPS, **change})


def rotary_with(**change):
    cos, sin = CSRC.tables(8)
    arguments = {"qkv": random(5, 128), "cos": cos, "sin": sin, "position": CSRC.positions(5)}
    native.rotary(**{**arguments, "num_heads": 4, "num_kv_heads": 2, **change})


def attention_with(**change):
    arguments = {
        "qkv": random(10, 64),
        "seen": causal_runs(5),
        "num_heads": 4,
        "num_kv_heads": 2,
        "scale": 1.0,
    }
    native.attention(**{**arguments, **change})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: norm_with(states=random(5, 60, 1)),
            r"states must be a matrix, not of shape \[5, 60, 1\]",
        ),
        (
            lambda: norm_with(states=random(5, 60, dtype=torch.float16)),
            "states must be float32 or bfloat16, not float16",
        ),
        (lambda: norm_with(states=random(60, 5).T), "states must be contiguous"),
        (
            lambda: norm_with(states=random(5, 60).to("meta")),
            "states must be on the CPU, not on meta",
        ),
        (lambda: norm_with(bias=random(61)), r"bias must have shape \[60\], not \[61\]"),
        (
            lambda: norm_with(branch=random(5, 60, dtype=torch.bfloat16)),
            "branch must be float32, not bfloat16",
        ),
        (
            lambda: norm_with(branch=random(5, 60).to("meta")),
            "branch must be on the CPU, not on meta",
        ),
        (
            lambda: norm_with(**dict.fromkeys(("residual", "normed"), random(5, 60))),
            "must be two tensors, not one",
        ),
        (
            lambda: rotary_with(num_kv_heads=0),
            "num_heads and num_kv_heads must be at least 1, not 4 and 0",
        ),
        (
            lambda: rotary_with(cos=random(50, 8, dtype=torch.bfloat16)),
            "cos must be float32, not bfloat16",
        ),
        (
            lambda: rotary_with(position=CSRC.positions(5).int()),
            "position must be int64, not int32",
        ),
        (
            lambda: rotary_with(position=CSRC.positions(5) + 50),
            r"position must lie in 0\.\.49, the rows of cos, not",
        ),
        (
            lambda: rotary_with(position=CSRC.positions(5) - 51),
            r"position must lie in 0\.\.49, the rows of cos, not -",
        ),
        (
            lambda: attention_with(qkv=random(10, 63)),
            r"qkv must have shape \[T, 8 \* Dh\], not \[10, 63\]",
        ),
        (
            lambda: attention_with(sinks=random(3)),
            r"sinks must have shape \[4\], not \[3\]",
        ),
        (
            lambda: attention_with(num_heads=2, num_kv_heads=3),
            "num_heads must be a multiple of num_kv_heads, not 2 of",
        ),
        (
            lambda: attention_with(num_kv_heads=0),
            "num_heads and num_kv_heads must be at least 1, not 4 and 0",
        ),
        (
            lambda: attention_with(seen=causal_runs(5)[0]),
            r"seen must have shape \[B or 1, L, 4\], not \[5, 4\]",
        ),
        (
            lambda: attention_with(seen=causal_runs(4)),
            r"seen \[1, 4, 4\] does not fit qkv of 10 tokens",
        ),
        (
            lambda: attention_with(seen=random_runs(3, 5)),
            r"seen \[3, 5, 4\] does not fit qkv of 10 tokens",
        ),
        (lambda: attention_with(seen=causal_runs(5).long()), "seen must be int32, not int64"),
        (
            lambda: attention_with(seen=causal_runs(5) + 1),
            r"seen must hold two runs of places in 0\.\.5, the",
        ),
        (lambda: attention_with(seen=causal_runs(5) - 1), "seen must hold two runs"),
        (lambda: attention_with(seen=causal_runs(5).flip(2)), "seen must hold two runs"),
        (
            lambda: attention_with(out=random(10, 64)),
            r"out must have shape \[10, 32\], not \[10, 64\]",
        ),
        (
            lambda: native.gated_mlp(random(3, 4), "relu"),
            "activation must be silu or gelu_tanh, not 'relu'",
        ),
        (lambda: native.log_sum_exp(random(4, 6).T), "logits must be contiguous within a row"),
        (
            lambda: native.log_sum_exp(random(4, 6), random(4).double()),
            "out must be float32, not float64",
        ),
        (lambda: native.exact_log_sum_exp(random(4, 6).T), "logits must be contiguous within"),
        (
            lambda: native.divergence(random(4, 5), random(4).double(), random(4, 6)),
            r"dense must have shape \[4, 6\], not \[4, 5\]",
        ),
        (
            lambda: native.divergence(random(4, 6).bfloat16(), random(4).double(), random(4, 6)),
            "dense must be float32, not bfloat16",
        ),
        (
            lambda: native.divergence(random(4, 6), random(4), random(4, 6)),
            "dense_sums must be float64, not float32",
        ),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_instruction_set_is_named(instruction_set, monkeypatch):
    assert native.instruction_set() == instruction_set
    with pytest.raises(ValueError, match="does not run the kernels 'mmx'"):
        native.extension.use_instruction_set("mmx")
    monkeypatch.setattr(native, "extension", None)
    assert (native.available(), native.instruction_set()) == (False, "none")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
@pytest.mark.parametrize("instruction_set", SETS[-1:], indirect=True)
@pytest.mark.parametrize("order", [("torch", "fastprune._native"), ("fastprune._native", "torch")])
def test_one_openmp_runtime(order):
    """Two would keep two pools of threads, whichever of torch and the extension is imported
    first."""
    code = f"import {', '.join(order)}; print(open('/proc/self/maps').read())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert len({line.split()[-1] for line in done.stdout.splitlines() if "libgomp" in line}) <= 1
