"""Compiled code with one thing wrong must be found out: else what passes here says little."""

from __future__ import annotations

import re
from collections import Counter

import pytest
import torch
from executed.ptx import Fault

from fastprune_kernels.attention import plan_tree, tree_attention
from fastprune_kernels.linear_loss import linear_kl, linear_logits, linear_nll
from fastprune_kernels.norm import add_rms_norm

WAIT = re.compile(
    r"(?P<group>cp\.async\.wait_group|wgmma\.wait_group\.sync\.aligned)\s+(?P<left>\d+)"
    r"|mbarrier\.try_wait[^;]*?(?P<complete>\w+),[^;]*"
)


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def attention():
    """450 tokens: a tile with blocks that it sees whole, and with others."""
    starts, branch, position = torch.tensor([0, 450]), torch.zeros(450), torch.arange(450)
    plan = plan_tree(
        starts, branch, position, head_dim=64, dtype=torch.bfloat16, device=torch.device("cpu")
    )
    return tree_attention(random(450, 3 * 64), plan, 1, 1)


def likelihood(size: int, vocab: int = 300):
    return linear_nll(random(9, size), random(vocab, size), torch.arange(9))


def divergence():
    logits = random(9, 512, dtype=torch.float32)[:, :300]
    return linear_kl(logits, random(9, 448), random(300, 448))


CASES = {
    "attention": attention,
    "likelihood by TMA": lambda: likelihood(448),
    "likelihood by pointers": lambda: likelihood(450),  # rows are not aligned to 16 bytes
    "likelihood of whole tiles by TMA": lambda: likelihood(448, 512),
    "likelihood of whole tiles by pointers": lambda: likelihood(450, 512),
    "divergence by TMA": divergence,
}
WAITS = {  # in the code of the kernels that a case launches: there are none but these
    "attention": {"cp.async": 4, "wgmma": 4},
    "likelihood by TMA": {"mbarrier": 1, "cp.async": 2, "wgmma": 4},
    "likelihood by pointers": {"cp.async": 4, "wgmma": 4},
    "likelihood of whole tiles by TMA": {"mbarrier": 1, "cp.async": 2, "wgmma": 4},
    "likelihood of whole tiles by pointers": {"cp.async": 4, "wgmma": 4},
    "divergence by TMA": {"mbarrier": 1, "wgmma": 2},
}
# A flat loop waits for a tile's products before it sums their exponentials, in the last step too.
# The compiler waits once more behind the loop, for nothing.
IDLE = {name: {"wgmma": 1} for name in CASES if "whole tiles" in name}


@pytest.fixture
def change(card):
    """change(function) -> from now on PTX is executed as the function returns it."""

    def change(function):
        card.change = function

    yield change
    card.change = None


def sources_of(case, change) -> list[str]:
    """PTX of the kernels that a case launches, which runs without a fault."""
    sources: list[str] = []

    def note(source):
        if source not in sources:
            sources.append(source)
        return source

    change(note)
    assert torch.isfinite(case()).all()
    return sources


def weakened(wait: re.Match) -> str:
    """A wait that leaves one more group on its way; of a barrier, one that does not wait."""
    if wait["group"]:
        return f"{wait['group']} {int(wait['left']) + 1}"
    return f"mov.pred {wait['complete']}, -1"


@pytest.mark.parametrize("name", CASES)
def test_every_wait_is_needed(name, change):
    case, needed, idle = CASES[name], Counter(), Counter()
    for source in sources_of(case, change):
        for wait in WAIT.finditer(source):
            kind = next(x for x in ("mbarrier", "cp.async", "wgmma") if wait[0].startswith(x))
            wrong = source[: wait.start()] + weakened(wait) + source[wait.end() :]
            change(lambda x, source=source, wrong=wrong: wrong if x == source else x)
            try:
                case()
                idle[kind] += 1
            except Fault:
                needed[kind] += 1
    assert needed == WAITS[name]
    assert idle == IDLE.get(name, {})


@pytest.mark.parametrize("name", CASES)
def test_barriers_are_needed(name, change):
    """Without those of one kernel; one alone may be more than is needed."""
    case = CASES[name]
    for source in sources_of(case, change):
        wrong = re.sub(r"bar\.sync\s+0;", "", source)
        change(lambda x, source=source, wrong=wrong: wrong if x == source else x)
        with pytest.raises(Fault, match="with no barrier"):
            case()


def edited(change, old: str, new: str):
    """Every occurrence of a pattern, in the code that is executed from now on."""

    def edit(source):
        result, count = re.subn(old, new, source)
        assert count
        return result

    change(edit)


def norm():
    return add_rms_norm(random(3, 60), random(60), 1e-5)


def test_an_unknown_opcode_is_named(change):
    edited(change, r"rsqrt\.approx\.ftz\.f32", "rsqrt.approx.ftz.f99")
    with pytest.raises(Fault, match=r"unknown opcode rsqrt\.approx\.ftz\.f99, in rsqrt\.approx"):
        norm()


def test_an_address_outside_of_every_tensor_is_refused(change):
    edited(change, r"(ld\.global[^;]*)\+ 0 \]", r"\1+ 1073741824 ]")
    with pytest.raises(Fault, match=r"loads 4 bytes of global memory at 0x.*, outside"):
        norm()


def test_a_misaligned_address_is_refused(change):
    edited(change, r"(st\.global[^;]*)\+ 0 \]", r"\1+ 1 ]")
    with pytest.raises(Fault, match="stores 4 bytes of global memory at a misaligned address"):
        norm()


def test_a_register_that_holds_nothing_is_named(change):
    edited(change, r"mov\.u32 \t(%r\d+), %tid\.x;", "")
    with pytest.raises(Fault, match=r"'%r.* is read before it is written"):
        norm()


def test_sums_of_the_tensor_core_are_cut_off_where_asked(card):
    hidden, weight = random(9, 448), random(300, 448)
    truth = hidden.double() @ weight.double().T
    bound = 448 * 2**-24 * (hidden.double().abs() @ weight.double().abs().T).max()
    errors = []
    for coarse in (False, True):
        with card.rounding(coarse):
            errors.append((linear_logits(hidden, weight).double() - truth).abs().max().item())
    assert 0 < errors[0] < errors[1] <= bound


def test_results_are_the_same_each_time(card):
    with card.rounding(True):
        assert torch.equal(attention(), attention())
