"""Verification, on the model itself, that it can be run unit by unit before it is used: its layers
one by one against its own forward pass, its head's losses against its logits, token trees against
their sequences, the halves of a block against the block, and the fused path against the generic
one.

Each raises InputError, with the reason, if a comparison fails.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ..errors import InputError
from .generic import GenericRunner
from .head import Head, Targets
from .model import Model
from .runner import Runner
from .swap import Arguments, StandInLayer, Sublayers, hidden_of, split_layer, with_replaced
from .text import failure_of
from .tree import few_branches

LONGEST_CHECKED = 2048  # tokens of a tree compared with its sequences


def verified(model: Model, granularity: str = "block") -> GenericRunner:
    """The generic runner of a model, verified once for each version of the model.

    Raises InputError if units of this granularity cannot be run.
    """
    model.unit_names(granularity)  # a known one

    def make() -> GenericRunner:
        runner = GenericRunner(model)
        prove_head(model, runner.head, *prove_blocks(runner))
        return runner

    runner = model.once("generic", make)
    if granularity == "sublayer":
        runner.sublayers = model.once("sublayers", lambda: find_sublayers(runner))
    return runner


# -- probes ----------------------------------------------------------------------------------------


def probe_ids(model: Model) -> torch.Tensor:
    """A short row of token ids spread over the vocabulary, int64[1, T]."""
    length = min(8, model.max_positions or 8)
    return (torch.arange(1, length + 1, device=model.device) * 7919 % model.vocab_size)[None]


def probe_tree(model: Model) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The short row as a trunk with two branches: ids, positions, branch, each int64[1, T]."""
    ids = probe_ids(model)
    tree = torch.tensor([[0, 1, 2, 3, 4, 3, 4, 5], [0, 0, 0, 1, 1, 2, 2, 2]], device=model.device)
    tree = tree[:, : ids.shape[1]]
    return ids, tree[:1], tree[1:]


def agree(result: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether two tensors are equal up to a few roundings of a dtype, by relative norm, and not
    finite at the same places."""
    finite = expected.isfinite()
    if not torch.equal(result.isfinite(), finite):
        return False
    result, expected = result[finite].double(), expected[finite].double()
    return bool((result - expected).norm() <= _tolerance(dtype) * expected.norm())


def _tolerance(dtype: torch.dtype) -> float:
    """A few roundings."""
    return max(8 * torch.finfo(dtype).eps, 1e-5)


# -- blocks ----------------------------------------------------------------------------------------


def prove_blocks(runner: GenericRunner) -> tuple[torch.Tensor, torch.Tensor]:
    """The layers, run one by one, give the logits of the model's own forward pass. Returns their
    final states [P, D], and these logits, [P, V]."""
    model = runner.model
    try:
        states, expected = _both_ways(runner, probe_ids(model))
        one_by_one = runner.head.logits(states)
    except InputError:
        raise
    except Exception as error:
        why = failure_of(model.hf, error)
        raise model.refusal(why) from error
    if not agree(one_by_one, expected, model.dtype):
        raise model.refusal(
            "its layers, run one by one, do not give the logits of its own forward pass"
        )
    return states, expected


def _both_ways(runner: GenericRunner, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Final states [B * T, D] of the model's layers, run one by one, and logits [B * T, V] of its
    own forward pass.

    Streamed weights are read as the forward pass calls their layer, once for both.
    """
    model = runner.model
    state, arguments = runner.open(ids)
    if not model.weights.streamed:
        for block in range(model.num_blocks):
            state = _after(runner, block, state, arguments)
        return state.flatten(0, 1), _logits(model.hf, ids)
    blocks = model.visited_blocks()

    def calling(layer: nn.Module) -> Callable:
        def call(hidden: torch.Tensor, args: tuple, kwargs: dict) -> Any:
            nonlocal state
            state = _after(runner, next(blocks), state, arguments)
            return layer(hidden, *args, **kwargs)

        return call

    own = with_replaced(
        model.hf, model.path, nn.ModuleList(StandInLayer(la, calling(la)) for la in model.layers)
    )
    expected = _logits(own, ids)
    return state.flatten(0, 1), expected


def _logits(hf: Any, ids: torch.Tensor) -> torch.Tensor:
    return hf(input_ids=ids, use_cache=False).logits.flatten(0, 1)


def _after(
    runner: GenericRunner, block: int, state: torch.Tensor, arguments: Arguments
) -> torch.Tensor:
    """The state after a block. Raises InputError if the block has changed the one before it."""
    version = state._version
    following = runner.run(block, state, arguments)
    if state._version != version:
        raise runner.model.refusal("its layers overwrite their input, which other masks still need")
    return following


# -- the head --------------------------------------------------------------------------------------


def prove_head(model: Model, head: Head, states: torch.Tensor, expected: torch.Tensor) -> None:
    """A head gives the losses that follow from the model's own logits, [P, V], of final states [P,
    D].

    If bias, scale or cap of the family do not act on each token by itself, the vocabulary is no
    longer cut into parts. Positions whose logits are not finite say nothing about the head.
    """
    finite = expected.isfinite().all(dim=-1)
    states, expected = states[finite], expected[finite]
    if not len(expected):
        return
    if head.part < head.vocab_size and not _parts_agree(head, states, expected):
        head.part = head.vocab_size
    try:
        right = _losses_agree(head, states, expected)
    except Exception as error:
        why = f"its head failed ({type(error).__name__}: {error})"
        raise model.refusal(why) from error
    if not right:
        raise model.refusal("its head does not give the losses of its own forward pass")


def _parts_agree(head: Head, states: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether logits in parts are the model's own, token by token."""
    try:
        parts = [part.clone() for _, part in head.parts(head.normed(states))]
    except Exception:  # the family's code takes no part of a vocabulary
        return False
    logits, expected = torch.cat(parts, dim=-1).double(), expected.double()
    if logits.shape != expected.shape:
        return False
    size = expected[expected.isfinite()].abs().median()
    tolerance = _tolerance(head.dtype)
    return torch.allclose(logits, expected, rtol=tolerance, atol=tolerance * 16 * float(size))


def _losses_agree(head: Head, states: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether nll, greedy and kl are those of the logits, at the probes' edges and of each part."""
    expected, count = expected.double(), len(expected)
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
    # each position's masked model is another position's
    other, log_q = states.roll(1, dims=0), log_p.roll(1, dims=0)
    divergence = (log_p.exp() * (log_p - log_q)).sum(dim=-1)
    # logits are off by their own rounding
    allowed = _tolerance(head.dtype) * (1 + float(expected[expected.isfinite()].abs().max()))

    def close(result: torch.Tensor, truth: torch.Tensor) -> bool:
        return torch.allclose(result.double(), truth, rtol=0, atol=allowed, equal_nan=True)

    nll, misses = head.greedy(states, targets)
    best = losses <= losses.view(count, -1)[:, :1].expand_as(table).flatten() + allowed
    return (
        close(head.nll(states, targets), losses)
        and close(nll, losses)
        and bool(((misses == 0) <= best).all())
        and not misses.view(count, -1).all(dim=1).any()
        and all(
            close(head.kl(head.dense(states, keep), other), divergence) for keep in (True, False)
        )
    )


# -- token trees -----------------------------------------------------------------------------------


def check_trees(
    runner: GenericRunner,
    ids: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    branch: torch.Tensor | None = None,
) -> None:
    """Raise InputError unless a token tree (as `GenericRunner.open` takes it, [1, T]) gives the
    states that its sequences give one by one.

    The default is a short tree. Behaviour that depends on length (local attention of some kind)
    shows in the longest tree of a calibration set. From very many branches, as many are compared as
    a mask of [T, T] can be held for.
    """
    model = runner.model
    implementation = getattr(model.config, "_attn_implementation", None)
    if implementation not in ("eager", "sdpa"):
        raise InputError(
            f"{model.name}: token trees need attn_implementation 'sdpa' or 'eager', not "
            f"{implementation!r}"
        )
    if ids is None:
        ids, positions, branch = probe_tree(model)
    assert positions is not None
    assert branch is not None
    inside = (branch[0] == 0) | torch.isin(branch[0], few_branches(branch[0], LONGEST_CHECKED))
    tree = ids[:, inside], positions[:, inside], branch[:, inside]
    content = hashlib.sha256(b"".join(part.cpu().numpy().tobytes() for part in tree))
    model.once(("trees", content.digest()), lambda: prove_tree(runner, *tree))


def prove_tree(
    runner: GenericRunner, ids: torch.Tensor, positions: torch.Tensor, branch: torch.Tensor
) -> None:
    """A token tree, as `GenericRunner.open` takes it, gives the states that its sequences give one
    by one."""
    model = runner.model
    sequences = [
        (branch[0] == 0) | (branch[0] == number) for number in few_branches(branch[0]).tolist()
    ]
    alone = [runner.open(ids[:, inside]) for inside in sequences]
    try:
        tree, *expected = _final_states(runner, [runner.open(ids, positions, branch), *alone])
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise model.refusal(f"token trees failed ({error}); use plain text") from error
    if not all(
        agree(tree[inside], by_itself, model.dtype)
        for inside, by_itself in zip(sequences, expected)
    ):
        raise model.refusal("token trees do not give what their sequences give; use plain text")


def _final_states(
    runner: GenericRunner, opened: Sequence[tuple[torch.Tensor, Arguments]]
) -> list[torch.Tensor]:
    """Normed final states [B * T, D] of the dense model for each chunk that `open` gave, layer by
    layer."""
    states = [state for state, _ in opened]
    for block in runner.model.visited_blocks():  # once for all chunks: a file may be read for it
        states = [
            _after(runner, block, state, arguments)
            for state, (_, arguments) in zip(states, opened, strict=True)
        ]
    return [runner.head.normed(state.flatten(0, 1)) for state in states]


# -- sublayers -------------------------------------------------------------------------------------


def find_sublayers(runner: GenericRunner) -> list[Sublayers]:
    """The two halves of every block, which add up to it."""
    model, found = runner.model, []
    state, arguments = runner.open(probe_ids(model))
    for block in model.visited_blocks():
        whole = runner.run(block, state, arguments)
        sublayers = split_layer(model.layers[block], state, arguments[block], whole)
        if sublayers is None:
            raise model.refusal(
                f"block {block} is not the sum of two sublayers; use granularity='block'"
            )
        found.append(sublayers)
        state = whole
    return found


# -- the fused path --------------------------------------------------------------------------------


def prove_fused(fused: Runner, generic: GenericRunner) -> None:
    """Every block's output on the fused path is the generic path's, on a short row and a short
    tree, and the head's losses are those of the generic path's logits."""
    model = generic.model
    probes = [(probe_ids(model), None, None), probe_tree(model)]
    opened = [(*generic.open(*inputs), fused.open(*inputs)[1]) for inputs in probes]
    for block in model.visited_blocks():
        for probe, (state, generic_arguments, arguments) in enumerate(opened):
            expected = generic.run(block, state, generic_arguments)
            result = hidden_of(fused.run(block, state, arguments, "block"))
            if not agree(result, expected, model.dtype):
                raise InputError(
                    f"{model.name}: block {block} gives something else on the fused path"
                )
            opened[probe] = expected, generic_arguments, arguments
    states = opened[0][0].flatten(0, 1)
    prove_head(model, fused.head, states, generic.head.logits(states))
