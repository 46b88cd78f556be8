"""Verification that a model can run unit by unit. It runs on the model itself, before its use.

It compares the layers, one by one, with the model's own forward pass (`own_pass`), the head's
losses with the model's logits, token trees with their sequences, the halves of a block with the
block, and the fused path with the generic one. Every opening verifies two short rows. `Needs` name
the rows and trees of a calibration set.

Every function raises InputError, with the reason, if a comparison fails.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch

from ..errors import InputError
from .compare import agree, ordinary, probe_ids, probe_tree, tolerance
from .device import is_out_of_memory
from .fused import FusedRunner
from .generic import GenericRunner
from .head import Head, Targets
from .model import Model
from .own_pass import (
    Step,
    check_row,
    failed,
    prove_blocks,
    refusing,
    require_fused_agrees,
    run_block,
)
from .swap import Arguments, Sublayers, hidden_of, split_layer
from .tree import few_branches

# ids, positions and branch, int64[B, T], as `Runner.open` takes them
Inputs = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]
LONGEST_CHECKED = 2048  # tokens of a tree compared with its sequences
MASKED_ATTENTION = ("eager", "sdpa")  # implementations that take a mask of [B, 1, T, T]


@dataclass(frozen=True)
class Needs:
    """A use of a model, for which `open_runner` verifies it beyond the short rows of every opening.

    Attributes:
        granularity: "block", or "sublayer", whose halves are verified too.
        row: The longest plain row to be run, int64[1, T]; None for none.
        together: Whether plain rows run in company.
        tree: The longest token tree to be run: ids, positions, branch, each int64[1, T]; None for
            none.
    """

    granularity: str = "block"
    row: torch.Tensor | None = None
    together: bool = False
    tree: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None


SHORT_ROWS = Needs()


def verified(model: Model, granularity: str = "block") -> GenericRunner:
    """Return a model's generic runner, which is verified once for each version of the model.

    Raises:
        InputError: Units of this granularity cannot run.
    """
    model.unit_names(granularity)  # raises InputError for an unknown granularity

    def make() -> GenericRunner:
        runner = GenericRunner(model)
        prove_head(model, runner.head, *prove_blocks(runner))
        return runner

    runner = model.once("generic", make)
    if granularity == "sublayer":
        runner.sublayers = model.once("sublayers", lambda: find_sublayers(runner))
    return runner


# -- the head --------------------------------------------------------------------------------------


def prove_head(model: Model, head: Head, states: torch.Tensor, expected: torch.Tensor) -> None:
    """Verify a head's losses against the model's own logits.

    If bias, scale or cap of the family do not act on each token alone, the vocabulary is no longer
    cut into parts. A family may hide tokens by logits of -inf, or the lowest number. Positions
    whose other logits are not finite are left out.

    Args:
        model: The model.
        head: The head.
        states: Final states, [P, D].
        expected: The model's own logits of these states, [P, V].
    """
    shown = ordinary(expected)
    clear = (shown | (expected < 0)).all(dim=-1) & shown.any(dim=-1)
    # in float64, every hidden token has a probability of 0 and a loss of infinity
    states = states[clear]
    expected = expected.double().masked_fill(~shown, -torch.inf)[clear]
    if not len(expected):
        return
    if head.part < head.vocab_size and not _parts_agree(head, states, expected):
        head.part = head.vocab_size
    with refusing(model, lambda error: f"its head {failed(error)}"):
        right = _losses_agree(head, states, expected)
    if not right:
        raise model.refusal("its head does not give the losses of its own forward pass")


def _parts_agree(head: Head, states: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether logits in parts equal the model's own, token by token."""
    try:
        parts = [part.clone() for _, part in head.parts(head.normed(states))]
    except Exception as error:  # of any kind: the family's code cannot run a part
        if is_out_of_memory(error):
            raise
        return False
    logits = torch.cat(parts, dim=-1)
    if logits.shape != expected.shape:
        return False
    hidden = ~ordinary(logits) & (logits < 0)
    logits = logits.double().masked_fill(hidden, -torch.inf)
    size = expected[expected.isfinite()].abs().median()
    relative = tolerance(head.dtype)
    return torch.allclose(logits, expected, rtol=relative, atol=relative * 16 * float(size))


def _losses_agree(head: Head, states: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether nll, greedy, kl and rejection agree with the logits, at the edges of each part."""
    count = len(expected)
    tokens = sorted(
        {
            token
            for start in range(0, expected.shape[1], head.part)
            for token in (start, min(start + head.part, expected.shape[1]) - 1)
        }
    )
    likely = expected.argmax(dim=-1)
    table = torch.cat([likely[:, None], likely.new_tensor(tokens).expand(count, -1)], dim=1)
    rows = torch.arange(count, device=table.device).repeat_interleave(table.shape[1])
    targets = Targets(count, rows, table.flatten())
    log_p = torch.log_softmax(expected, dim=-1)
    losses = -log_p.gather(1, table).flatten()
    # another position's states serve as those of a masked model
    other, log_q = states.roll(1, dims=0), log_p.roll(1, dims=0)
    differences = (log_p - log_q).masked_fill(log_p.isneginf(), 0)
    divergence = (log_p.exp() * differences).sum(dim=-1)
    rejection = (log_p.exp() - log_q.exp()).relu().sum(dim=-1)
    # logits differ by their rounding
    allowed = tolerance(head.dtype) * (1 + float(expected[expected.isfinite()].abs().max()))

    def close(result: torch.Tensor, truth: torch.Tensor) -> bool:
        result = result.double()
        result = result.masked_fill(result > 0.9 * torch.finfo(head.dtype).max, torch.inf)
        return torch.allclose(result, truth, rtol=0, atol=allowed)

    nll, misses = head.greedy(states, targets)
    best = losses <= losses.view(count, -1)[:, :1].expand_as(table).flatten() + allowed
    # if two tokens are equally likely up to rounding, either may be the likeliest
    likeliest = expected.topk(min(2, expected.shape[1]), dim=-1).values
    clear = likeliest[:, 0] - likeliest[:, -1] > allowed
    return (
        close(head.nll(states, targets), losses)
        and close(nll, losses)
        and bool(((misses == 0) <= best).all())
        and not misses.view(count, -1).all(dim=1)[clear].any()
        and all(
            close(head.kl(head.dense(states, keep), other), divergence)
            and close(head.rejection(head.dense(states, keep), other), rejection)
            for keep in (True, False)
        )
    )


# -- token trees -----------------------------------------------------------------------------------


def check_trees(
    runner: GenericRunner,
    ids: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    branch: torch.Tensor | None = None,
) -> None:
    """Verify that a token tree has the states of its sequences, run one by one.

    The arguments are those of `GenericRunner.open`, with one row; the default is a short tree. The
    longest tree of a calibration set shows behaviour that depends on length, such as local
    attention. If a tree has very many branches, a part of them is compared, so that a [T, T] mask
    fits.

    Raises:
        InputError: The states differ.
    """
    model = runner.model
    if not takes_masks(model):
        raise InputError(
            f"{model.name}: token trees need attn_implementation 'sdpa' or 'eager', not "
            f"{_implementation(model)!r}"
        )
    if ids is None:
        ids, positions, branch = probe_tree(model)
    assert positions is not None
    assert branch is not None
    tree = _with_few_branches(ids, positions, branch)
    model.once(("trees", _content(*tree)), lambda: prove_tree(runner, *tree))


def takes_masks(model: Model) -> bool:
    """Whether the model's attention takes a mask of [B, 1, T, T].

    Other kernels may crash the process when they get one.
    """
    return _implementation(model) in MASKED_ATTENTION


def _implementation(model: Model) -> object:
    return getattr(model.config, "_attn_implementation", None)


def _with_few_branches(
    ids: torch.Tensor, positions: torch.Tensor, branch: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    inside = (branch[0] == 0) | torch.isin(branch[0], few_branches(branch[0], LONGEST_CHECKED))
    return ids[:, inside], positions[:, inside], branch[:, inside]


def _content(*tensors: torch.Tensor) -> bytes:
    return hashlib.sha256(b"".join(t.cpu().numpy().tobytes() for t in tensors)).digest()


def prove_tree(
    runner: GenericRunner, ids: torch.Tensor, positions: torch.Tensor, branch: torch.Tensor
) -> None:
    """Verify a token tree, given as for `GenericRunner.open`, against its sequences."""
    model = runner.model
    sequences = [
        (branch[0] == 0) | (branch[0] == number) for number in few_branches(branch[0]).tolist()
    ]
    alone = [runner.open(ids[:, inside]) for inside in sequences]
    try:
        tree, *expected = _final_states(runner, [runner.open(ids, positions, branch), *alone])
    except Exception as error:  # of any kind, from the family's code
        if is_out_of_memory(error):
            raise
        raise model.refusal(f"token trees failed ({error}); use plain text") from error
    if not all(
        agree(tree[inside], by_itself, model.dtype)
        for inside, by_itself in zip(sequences, expected)
    ):
        raise model.refusal("token trees do not give what their sequences give; use plain text")


def _final_states(
    runner: GenericRunner, opened: Sequence[tuple[torch.Tensor, Arguments]]
) -> list[torch.Tensor]:
    """Run opened chunks through the dense model; their normed final states, [B * T, D] each."""
    states = [state for state, _ in opened]
    for block in runner.model.weights.blocks():  # all chunks together: weights may be streamed
        states = [
            run_block(runner, block, state, arguments)
            for state, (_, arguments) in zip(states, opened, strict=True)
        ]
    return [runner.head.normed(state.flatten(0, 1)) for state in states]


# -- sublayers -------------------------------------------------------------------------------------


def find_sublayers(runner: GenericRunner) -> list[Sublayers]:
    """Find the two halves of every block, which add up to the block."""
    model, halves = runner.model, []
    state, arguments = runner.open(probe_ids(model))
    for block in model.weights.blocks():
        whole = runner.run(block, state, arguments)
        sublayers = split_layer(model.layers[block], state, arguments[block], whole)
        if sublayers is None:
            raise model.refusal(
                f"block {block} is not the sum of two sublayers; use granularity='block'"
            )
        halves.append(sublayers)
        state = whole
    return halves


# -- the fused path --------------------------------------------------------------------------------


def fused_failure(fused: FusedRunner, generic: GenericRunner, needs: Needs) -> str | None:
    """The reason why the fused path fails for these needs, or None. Each need is verified once."""
    model = generic.model
    checks: list[tuple[Hashable, Callable[[], object]]] = [
        ("", lambda: prove_fused(fused, generic))
    ]
    if needs.row is not None:
        row = needs.row
        checks += [(row.shape[1], lambda: check_row(generic, row, needs.together, fused))]
    if needs.tree is not None and takes_masks(model):
        tree = _with_few_branches(*needs.tree)
        checks += [(_content(*tree), lambda: _prove_fused_on(fused, generic, [tree]))]
    for key, check in checks:
        failure = model.once((fused.path_name, key), functools.partial(_failure, model, check))
        if failure is not None:
            return failure
    return None


def _failure(model: Model, check: Callable[[], object]) -> str | None:
    try:
        check()
    except Exception as error:  # of any kind, as other releases pass other arguments
        if is_out_of_memory(error):
            raise
        if isinstance(error, InputError):
            return error.message
        return f"{model.name}: the fused path {failed(error)}"
    return None


def prove_fused(fused: FusedRunner, generic: GenericRunner) -> None:
    """Verify the fused path on a short row and a short tree.

    Every block's output must agree with the generic path's, and the head's losses with the generic
    path's logits.
    """
    model = generic.model
    probes: list[Inputs] = [(probe_ids(model), None, None)]
    if takes_masks(model):
        probes.append(probe_tree(model))
    states = _prove_fused_on(fused, generic, probes)[0].flatten(0, 1)
    prove_head(model, fused.head, states, generic.head.logits(states))


def _prove_fused_on(
    fused: FusedRunner, generic: GenericRunner, probes: Sequence[Inputs]
) -> list[torch.Tensor]:
    """Verify every block of the fused path on inputs of `open`; return final states [B, T, D]."""
    model = generic.model
    opened = [(*generic.open(*inputs), fused.open(*inputs)[1]) for inputs in probes]
    for block in model.weights.blocks():
        for probe, (state, generic_arguments, arguments) in enumerate(opened):
            expected = generic.run(block, state, generic_arguments)
            result = hidden_of(fused.run(block, state, arguments, "block"))
            require_fused_agrees(
                generic,
                fused,
                block,
                Step(state, generic_arguments, expected),
                Step(state, arguments, result),
            )
            opened[probe] = expected, generic_arguments, arguments
    return [state for state, _, _ in opened]
