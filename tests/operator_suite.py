"""Properties of operators that hold whichever set computes them, against the float64 reference.

`kernels/test_cpu_ops.py` runs them on csrc's, on every instruction set, and
`kernels/test_triton_ops.py` on Triton's. Each has the fixtures `ops` (an `Operators`), `dtype` and
`activation`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from fastprune_kernels import reference

EPS = 1e-5


@dataclass(frozen=True)
class Operators:
    """A set of operators, and the tests' means for its device.

    add_rms_norm, rotary, gated_mlp: as in `reference`, with outputs. assert_as_exact: compares a
    result, torch's own in the same dtype, and the truth; its fourth argument says how far off
    approximate exponentials, roots and divisions may be, in units of float32's eps. tokens: rows
    that run together. threads: numbers of them to try.
    """

    add_rms_norm: Callable[..., torch.Tensor]
    rotary: Callable[..., torch.Tensor]
    gated_mlp: Callable[..., torch.Tensor]
    assert_as_exact: Callable[..., None]
    device: torch.device
    tokens: int
    threads: Sequence[int] = ()

    def random(
        self, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0
    ) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        values = torch.randn(*shape, generator=generator, dtype=torch.float64) * scale
        return values.to(self.device, dtype)

    def nans(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """An output as an operator finds it in a test: what it does not write shows."""
        return torch.full(shape, torch.nan, dtype=dtype, device=self.device)

    def tables(self, half: int) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin of 50 positions, float32[50, R]."""
        steps = torch.arange(half, device=self.device) / half
        angles = torch.arange(50, device=self.device)[:, None] * 100.0**-steps
        return angles.cos(), angles.sin()

    def positions(self, tokens: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(2)
        return torch.randint(50, (tokens,), generator=generator).to(self.device)


def wide(values: dict[str, Any]) -> dict[str, Any]:
    """Arguments with tensors in float64."""
    return {name: x.double() if torch.is_tensor(x) else x for name, x in values.items()}


def check_rows(ops: Operators, operator: Callable, *inputs: torch.Tensor) -> None:
    """Rows have the same bits alone, together and in another order, on any number of threads; no
    rows are no error."""
    before = torch.get_num_threads()
    try:
        together = operator(*inputs)
        assert torch.equal(operator(*inputs), together)
        for number in ops.threads:
            torch.set_num_threads(number)
            assert torch.equal(operator(*inputs), together)
    finally:
        torch.set_num_threads(before)
    count = len(together)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(6)).to(ops.device)
    assert torch.equal(operator(*(x[order] for x in inputs)), together[order])
    for row in (0, 7, count - 1):
        assert torch.equal(operator(*(x[row : row + 1] for x in inputs)), together[row : row + 1])
    assert len(operator(*(x[:0] for x in inputs))) == 0


class NormProperties:
    @pytest.mark.parametrize(("rows", "size"), [(63, 60), (1, 60), (5, 1), (7, 128), (3, 1025)])
    @pytest.mark.parametrize(
        ("unit_offset", "centered", "biased"),
        [
            (False, False, False),
            (True, False, False),
            (False, True, False),
            (True, True, False),
            (False, True, True),
        ],
    )
    @pytest.mark.parametrize("weighted", [True, False])
    def test_adds_and_norms(self, ops, rows, size, dtype, unit_offset, centered, biased, weighted):
        states, branch = (ops.random(rows, size, dtype=dtype, seed=seed) for seed in (1, 2))
        weight = ops.random(size, dtype=dtype, seed=3) if weighted else None
        bias = ops.random(size, dtype=dtype, seed=4) if biased else None
        out = {name: ops.nans(rows, size, dtype=dtype) for name in ("residual", "normed")}
        kind = {"unit_offset": unit_offset, "centered": centered, "bias": bias}
        normed = ops.add_rms_norm(states, weight, EPS, branch=branch, **out, **kind)
        assert normed is out["normed"]
        same_sum, same = reference.add_rms_norm(states, weight, EPS, branch, **kind)
        assert torch.equal(out["residual"], same_sum)  # one addition in float32, rounded once
        # the norm is taken of the rounded sum
        exact = None if weight is None else weight.double()
        truth = reference.rms_norm(same_sum.double(), exact, EPS, **wide(kind))
        # x / root(sum / D): the root halves the error of the division, and adds a unit
        approximations = 1.5 * truth.abs().max().item()
        if centered:  # the mean is off by a rounding, and so is each difference from it
            spread = same_sum.double().std(dim=-1, correction=0).min().clamp(min=EPS**0.5)
            scale = 1 if weight is None else 1 + weight.abs().max()
            approximations += 2 * float(scale * (1 + same_sum.abs().max()) / spread)
        ops.assert_as_exact(normed, same, truth, approximations)
        assert torch.equal(ops.add_rms_norm(same_sum, weight, EPS, **kind), normed)

    def test_residual_in_place_and_without_a_branch(self, ops, dtype):
        states, branch = (ops.random(9, 60, dtype=dtype, seed=seed) for seed in (1, 2))
        weight = ops.random(60, dtype=dtype, seed=3)
        expected = states + branch
        normed = ops.add_rms_norm(states, weight, EPS, branch=branch, residual=states)
        assert torch.equal(states, expected)
        residual = ops.nans(9, 60, dtype=dtype)
        assert torch.equal(ops.add_rms_norm(states, weight, EPS, residual=residual), normed)
        assert torch.equal(residual, expected)

    @pytest.mark.parametrize("centered", [False, True])
    def test_rows_have_the_same_bits_alone_and_together(self, ops, dtype, centered):
        weight = ops.random(60, dtype=dtype, seed=3)
        states, branch = (ops.random(ops.tokens, 60, dtype=dtype, seed=seed) for seed in (1, 2))

        def operator(states, branch):
            return ops.add_rms_norm(states, weight, EPS, branch=branch, centered=centered)

        check_rows(ops, operator, states, branch)

    @pytest.mark.parametrize(
        ("name", "shape", "message"),
        [
            ("weight", (61,), r"weight must have shape \[60\], not \[61\]"),
            ("bias", (61,), r"bias must have shape \[60\], not \[61\]"),
            ("residual", (4, 60), r"residual must have shape \[5, 60\], not \[4, 60\]"),
            ("branch", (6, 60), r"branch must have shape \[5, 60\], not \[6, 60\]"),
        ],
    )
    def test_wrong_shapes_are_named(self, ops, name, shape, message):
        arguments = {"weight": ops.random(60), "eps": EPS, name: ops.random(*shape)}
        with pytest.raises(ValueError, match=message):
            ops.add_rms_norm(ops.random(5, 60), **arguments)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda x: x.half(), "branch must be float32, not float16"),
            (lambda x: x.T.contiguous().T, "branch must be contiguous"),
        ],
    )
    def test_wrong_tensors_are_named(self, ops, change, message):
        branch = change(ops.random(5, 60))
        with pytest.raises(ValueError, match=message):
            ops.add_rms_norm(ops.random(5, 60), ops.random(60), EPS, branch=branch)


class RotaryProperties:
    @pytest.mark.parametrize("norm", [None, "weight", "unit_offset", "after"])
    @pytest.mark.parametrize("interleaved", [False, True])
    @pytest.mark.parametrize(
        ("tokens", "heads", "kv_heads", "head_dim", "half"),
        [
            (63, 4, 2, 16, 8),
            (1, 3, 1, 64, 32),
            (5, 2, 1, 80, 40),
            (3, 3, 3, 128, 64),
            (7, 2, 1, 20, 5),
            (3, 1, 1, 80, 12),
        ],
    )
    def test_rotates_q_and_k(
        self, ops, tokens, heads, kv_heads, head_dim, half, norm, interleaved, dtype
    ):
        qkv = ops.random(tokens, (heads + 2 * kv_heads) * head_dim, dtype=dtype, seed=1)
        tables = ops.tables(half)
        others = (ops.positions(tokens), heads, kv_heads)
        kind: dict[str, Any] = {"interleaved": interleaved}
        if norm is not None:
            kind |= {"unit_offset": norm == "unit_offset", "norm_after": norm == "after"}
            kind |= {
                name: ops.random(head_dim, dtype=dtype, seed=seed)
                for name, seed in (("q_weight", 3), ("k_weight", 4))
            }
        same = reference.rotary(qkv, *tables, *others, **kind)
        exact = (x.double() for x in (qkv, *tables))
        truth = reference.rotary(*exact, *others, **wide(kind))
        result = qkv.clone()
        assert ops.rotary(result, *tables, *others, **kind) is result
        # one factor for all of a head, x / root(sum / Dh): the division is halved by the root,
        # which has a unit of its own
        approximations = 0 if norm is None else 1.5 * truth.abs().max().item()
        ops.assert_as_exact(result, same, truth, approximations)
        values = (heads + kv_heads) * head_dim
        assert torch.equal(result[:, values:], qkv[:, values:])
        if norm is None:
            rest, before = (x.unflatten(1, (-1, head_dim))[..., 2 * half :] for x in (result, qkv))
            assert torch.equal(rest, before)

    @pytest.mark.parametrize("kind", ["normed", "interleaved"])
    def test_rows_have_the_same_bits_alone_and_together(self, ops, dtype, kind):
        cos, sin = ops.tables(5)
        weights = {name: ops.random(20, dtype=dtype, seed=3) for name in ("q_weight", "k_weight")}
        options: dict[str, Any] = weights if kind == "normed" else {"interleaved": True}

        def operator(qkv, position):
            return ops.rotary(qkv.clone(), cos, sin, position, 2, 1, **options)

        qkv = ops.random(ops.tokens, 80, dtype=dtype, seed=1)
        check_rows(ops, operator, qkv, ops.positions(ops.tokens))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"num_heads": 5}, r"qkv must have shape \[T, 9 \* Dh\]"),
            ({"cos": (50, 9)}, r"cos must have shape \[N, 1 to 8\]"),
            ({"sin": (49, 8)}, r"sin must have shape \[50, 8\], not \[49, 8\]"),
            ({"q_weight": (16,)}, "q_weight and k_weight must be given together"),
        ],
    )
    def test_wrong_arguments_are_named(self, ops, change, message):
        cos, sin = ops.tables(8)
        arguments = {"cos": cos, "sin": sin, "position": ops.positions(5), "num_heads": 4}
        for name, value in change.items():
            arguments[name] = ops.random(*value) if isinstance(value, tuple) else value
        with pytest.raises(ValueError, match=message):
            ops.rotary(ops.random(5, 128), num_kv_heads=2, **arguments)


class MlpProperties:
    @pytest.mark.parametrize(("rows", "size"), [(63, 60), (1, 60), (3, 1), (2, 129)])
    def test_activates_and_multiplies(self, ops, rows, size, activation, dtype):
        gate_up = ops.random(rows, 2 * size, dtype=dtype, seed=1, scale=3.0)
        out = ops.nans(rows, size, dtype=dtype)
        assert ops.gated_mlp(gate_up, activation, out=out) is out
        truth = reference.gated_mlp(gate_up.double(), activation)
        # x / (1 + exp(-x)): the exponential, which is at most all of the sum, and the division;
        # erf is exact
        approximations = (0 if activation == "gelu" else 2) * truth.abs().max().item()
        same = reference.gated_mlp(gate_up, activation)
        ops.assert_as_exact(out, same, truth, approximations)
        assert torch.equal(ops.gated_mlp(gate_up, activation), out)

    def test_rows_have_the_same_bits_alone_and_together(self, ops, dtype, activation):
        check_rows(
            ops,
            lambda gate_up: ops.gated_mlp(gate_up, activation),
            ops.random(ops.tokens, 120, dtype=dtype, seed=1),
        )

    def test_wrong_shapes_are_named(self, ops):
        with pytest.raises(ValueError, match=r"gate_up must have shape \[T, 2F\], not \[3, 5\]"):
            ops.gated_mlp(ops.random(3, 5))
        with pytest.raises(ValueError, match=r"out must have shape \[3, 2\], not \[3, 4\]"):
            ops.gated_mlp(ops.random(3, 4), out=ops.random(3, 4))
