"""Verification, on the model itself, that it can be run unit by unit before it is used: its layers
one by one against its own forward pass, its head's losses against its logits, token trees against
their sequences, the halves of a block against the block, and the fused path against the generic
one. Every opening verifies two short rows; `Needs` name the rows and trees of a calibration set.

Equal code at equal shapes must give equal bits. A tolerance serves a row beside others, the fused
path and the head, whose shapes or code are others.

Each raises InputError, with the reason, if a comparison fails.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from ..errors import InputError
from .device import is_out_of_memory
from .generic import GenericRunner
from .head import Head, Targets
from .model import Model
from .runner import Runner
from .swap import (
    Arguments,
    StandInLayer,
    Sublayers,
    first,
    get_module,
    hidden_of,
    split_layer,
    with_replaced,
)
from .text import failure_of
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


def continued_otherwise(model: Model, ids: torch.Tensor, kept: int) -> torch.Tensor:
    """Rows int64[B, T] with other tokens after the first `kept`."""
    other = ids.clone()
    other[:, kept:] = (other[:, kept:] + 1 + model.vocab_size // 3) % model.vocab_size
    return other


def same_bits(result: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether two tensors are equal to the bit, NaN included."""
    if result.shape != expected.shape or result.dtype != expected.dtype:
        return False
    if torch.equal(result, expected):
        return True
    bits, expected_bits = (t.contiguous().view(torch.uint8) for t in (result, expected))
    return torch.equal(bits, expected_bits)


def agree(result: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether two tensors are equal up to a few roundings of a dtype, by relative norm, and not
    finite at the same places."""
    finite = expected.isfinite()
    if result.shape != expected.shape or not torch.equal(result.isfinite(), finite):
        return False
    result, expected = result[finite].double(), expected[finite].double()
    return bool((result - expected).norm() <= _tolerance(dtype) * expected.norm())


def agreeing_share(result: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> float:
    """The share of positions at which states, [..., D], are equal up to a few roundings."""
    if result.shape != expected.shape:
        return 0.0
    alike = (result.isfinite() == expected.isfinite()).all(dim=-1)
    result, expected = (states.double().nan_to_num(0, 0, 0) for states in (result, expected))
    norms = expected.norm(dim=-1)
    close = (result - expected).norm(dim=-1) <= _tolerance(dtype) * norms.maximum(norms.mean() / 8)
    return float((alike & close).double().mean())


def _tolerance(dtype: torch.dtype) -> float:
    """A few roundings."""
    return max(8 * torch.finfo(dtype).eps, 1e-5)


# -- the model's own forward pass ------------------------------------------------------------------


class _Call(NamedTuple):
    """A layer's call in the own forward pass. run: the layer on its input once more."""

    entry: torch.Tensor
    output: torch.Tensor
    run: Callable[[], Any]


def _own_pass(
    model: Model,
    ids: torch.Tensor,
    before: Callable[[int], object],
    after: Callable[[int, _Call], object],
    base_only: bool = False,
) -> torch.Tensor:
    """The model's own forward pass, with a function before and after each block, whose weights are
    loaded then. Returns the logits [B * T, V], or of the base model alone the normed states."""
    blocks = model.visited_blocks()
    num_called = 0

    def calling(number: int, layer: nn.Module) -> Callable:
        def call(entry: torch.Tensor, args: tuple, kwargs: dict) -> Any:
            nonlocal num_called
            if number != num_called or next(blocks) != number:
                raise model.refusal("it does not run its blocks in order, each once")
            num_called += 1
            before(number)
            output = layer(entry, *args, **kwargs)
            after(number, _Call(entry, first(output), lambda: layer(entry, *args, **kwargs)))
            return output

        return call

    stand_ins = [StandInLayer(layer, calling(i, layer)) for i, layer in enumerate(model.layers)]
    own = with_replaced(model.hf, model.path, nn.ModuleList(stand_ins))
    base = get_module(own, model.path[:1]) if base_only else own
    output = base(input_ids=ids, use_cache=False)
    if num_called != model.num_blocks:
        raise model.refusal("it does not run its blocks in order, each once")
    return (output[0] if base_only else output.logits).flatten(0, 1)


def _recorded(model: Model, ids: torch.Tensor, calls: list[_Call]) -> torch.Tensor:
    """The logits [B * T, V] of the own forward pass, whose layers' calls join a list."""
    return _own_pass(model, ids, lambda _: None, lambda _, call: calls.append(call))


def _opened(runner: Any, ids: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """Like `Runner.open`, for plain rows. Raises InputError for states of another form."""
    state, arguments = runner.open(ids)
    if state.dim() != 3 or state.shape[:2] != ids.shape:
        raise runner.model.refusal(
            f"its states have the shape {list(state.shape)}, not [rows, tokens, width]"
        )
    return state, arguments


def _after(
    runner: GenericRunner, block: int, state: torch.Tensor, arguments: Arguments
) -> torch.Tensor:
    """The state after a block. Raises InputError if the block has changed the one before it."""
    version = state._version
    following = runner.run(block, state, arguments)
    if state._version != version:
        raise runner.model.refusal("its layers overwrite their input, which other masks still need")
    return following


def _checked(
    model: Model, block: int, before: torch.Tensor, after: torch.Tensor, own: _Call
) -> torch.Tensor:
    """A block's states in the own forward pass. Raises InputError unless those of the runner,
    before and after it, have the same bits.

    A module whose own two runs differ is compared with tolerance.
    """
    if not same_bits(before, own.entry):
        raise model.refusal(f"its own forward pass changes the states in front of block {block}")
    if same_bits(after, own.output):
        return after
    if not same_bits(first(own.run()), own.output) and agree(after, own.output, model.dtype):
        return own.output
    raise model.refusal(
        f"block {block} gives other states in the model's own forward pass: it reads more than the "
        f"states of the block before it, such as results of other blocks (tied across depth)"
    )


def _require_causal(model: Model, other: torch.Tensor, states: torch.Tensor) -> None:
    """Raise InputError unless the states of equal tokens, [B, T, D], are equal, at equal shapes,
    though other tokens follow."""
    if not same_bits(other, states) and agreeing_share(other, states, model.dtype) < 1:
        raise model.refusal("it is not causal: states depend on later tokens")


def _require_alone(model: Model, beside: torch.Tensor, alone: torch.Tensor) -> None:
    """Raise InputError unless a row's states beside another row, [B, T, D], are those alone."""
    if agreeing_share(beside, alone, model.dtype) < MOST_POSITIONS:
        raise model.refusal("a row has other states beside another row")


# -- blocks ----------------------------------------------------------------------------------------

# share of positions at which a row beside another must agree with the row alone: other shapes round
# otherwise, which lets a router near a tie take another expert
MOST_POSITIONS = 0.75


def prove_blocks(runner: GenericRunner) -> tuple[torch.Tensor, torch.Tensor]:
    """Two short rows, run block by block, have the states of the model's own forward pass to the
    bit; no state depends on later tokens or on another row.

    Returns their final states, [P, D], and the logits of the own forward pass, [P, V].
    """
    try:
        finals, expected = _prove_short(runner)
        one_by_one = runner.head.logits(finals)
    except InputError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise runner.model.refusal(failure_of(runner.model.hf, error)) from error
    if not agree(one_by_one, expected, runner.model.dtype):
        raise runner.model.refusal(
            "its layers, run one by one, do not give the logits of its own forward pass"
        )
    return finals, expected


def _prove_short(runner: GenericRunner) -> tuple[torch.Tensor, torch.Tensor]:
    model = runner.model
    row = probe_ids(model)
    kept = row.shape[1] - max(1, row.shape[1] // 3)
    other = continued_otherwise(model, row, kept)
    padded = other.clone()
    padded[:, -1] = 0  # as a shorter row is padded in a chunk
    opened = [_opened(runner, ids) for ids in (row, other)]
    states = [state for state, _ in opened]
    beside, arguments = _opened(runner, torch.cat([row, padded]))
    following = states

    def run_all(block: int) -> None:
        # in turn: a block that keeps something for a later one is caught
        nonlocal following, beside
        following = [
            _after(runner, block, state, arguments)
            for state, (_, arguments) in zip(states, opened, strict=True)
        ]
        beside = _after(runner, block, beside, arguments)

    def compare(block: int, *own: _Call) -> None:
        nonlocal states, beside
        pairs = list(zip(states, following))
        states = [_checked(model, block, *pair, call) for pair, call in zip(pairs, own)]
        states += following[len(own) :]
        _require_causal(model, states[1][:, :kept], states[0][:, :kept])
        alone = torch.cat(states)
        _require_alone(model, beside[:, :-1], alone[:, :-1])
        beside = alone  # each block by itself: no rounding grows over the depth

    if model.weights.streamed:  # a block is read once for all
        logits = _own_pass(model, row, run_all, compare)
        return states[0].flatten(0, 1), logits
    calls: tuple[list[_Call], list[_Call]] = [], []
    both = [_recorded(model, ids, of_row) for ids, of_row in zip((row, other), calls)]
    for block, own in enumerate(zip(*calls, strict=True)):
        run_all(block)
        compare(block, *own)
    return torch.cat(states).flatten(0, 1), torch.cat(both)


def check_needs(generic: GenericRunner, needs: Needs) -> None:
    """Verify the generic path for these needs. (Trees have `check_trees`.)"""
    if needs.row is not None:
        check_row(generic, needs.row, needs.together)


def check_row(
    generic: GenericRunner, ids: torch.Tensor, together: bool, fused: Runner | None = None
) -> None:
    """Verify a model on a plain row as long as the longest to be scored, once for each length.

    The generic path's states equal those of the own forward pass to the bit, later tokens change no
    earlier state, and the row agrees with itself beside another. Three passes over the row: the own
    forward pass, the generic path, and the path to be used.

    Args:
        generic: The generic runner.
        ids: The row, int64[1, T].
        together: Whether rows of this length run in company.
        fused: The fused runner, if it is to be used.

    Raises:
        InputError: The model cannot be run on such rows block by block, or on the fused path.
    """
    model, path = generic.model, "generic" if fused is None else fused.path_name
    if ids.shape[1] <= probe_ids(model).shape[1]:
        return

    def work() -> None:
        try:
            _prove_row(generic, ids, together, fused)
        except Exception as error:
            if isinstance(error, InputError) or is_out_of_memory(error):
                raise
            why = f"a row of {ids.shape[1]} tokens failed ({type(error).__name__}: {error})"
            raise model.refusal(why) from error

    model.once(("row", path, ids.shape[1], together), work)


def _prove_row(
    generic: GenericRunner, ids: torch.Tensor, together: bool, fused: Runner | None
) -> None:
    model, length = generic.model, ids.shape[1]
    state, arguments = _opened(generic, ids)
    following = state
    # The third pass runs batches of rows, each with the number of tokens that it shares with the
    # row. One shares two thirds, one all but the last: so neither a look at the next token nor one
    # at the rest of a segment is missed. Rows that never run in company run one by one. A fused
    # path is causal; if it agrees with the generic one, so is the generic one.
    shared = [length - max(1, length // 3), length - 1]
    if together:
        shares = [[length, *shared]]
    else:
        shares = [[kept] for kept in shared] if fused is None else [[length]]
    path: Any = generic if fused is None else fused
    opened = [
        path.open(torch.cat([continued_otherwise(model, ids, kept) for kept in batch]))
        for batch in shares
    ]
    batches = [states for states, _ in opened]

    def before(block: int) -> None:
        nonlocal following, batches
        following = _after(generic, block, state, arguments)
        batches = [
            path.run(block, states, rest, "block")
            for states, (_, rest) in zip(batches, opened, strict=True)
        ]

    def after(block: int, own: _Call) -> None:
        nonlocal state, batches
        state = _checked(model, block, state, following, own)
        for number, (states, batch) in enumerate(zip(batches, shares, strict=True)):
            if batch[0] == length and fused is None:
                _require_alone(model, states[:1], state)
            elif batch[0] == length and not _fused_agrees(model, block, states[:1], state):
                raise _fused_differs(model, block)
            same = states[:1] if together else state  # run at the same shapes
            for place, kept in enumerate(batch):
                if kept < length:
                    _require_causal(model, states[place : place + 1, :kept], same[:, :kept])
            # each block by itself: no rounding grows over the depth
            batches[number] = torch.stack(
                [
                    torch.cat([state[0, :kept], states[place, kept:]])
                    for place, kept in enumerate(batch)
                ]
            )

    _own_pass(model, ids, before, after, base_only=True)


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
    """Whether nll, greedy, kl and rejection are those of the logits, at the edges of each part."""
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
    rejection = (log_p.exp() - log_q.exp()).relu().sum(dim=-1)
    # logits are off by their own rounding
    allowed = _tolerance(head.dtype) * (1 + float(expected[expected.isfinite()].abs().max()))

    def close(result: torch.Tensor, truth: torch.Tensor) -> bool:
        return torch.allclose(result.double(), truth, rtol=0, atol=allowed, equal_nan=True)

    nll, misses = head.greedy(states, targets)
    best = losses <= losses.view(count, -1)[:, :1].expand_as(table).flatten() + allowed
    # of two tokens that are equally likely up to rounding, either may be the likeliest
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
    """Raise InputError unless a token tree (as `GenericRunner.open` takes it, [1, T]) gives the
    states that its sequences give one by one.

    The default is a short tree. Behaviour that depends on length (local attention of some kind)
    shows in the longest tree of a calibration set. From very many branches, as many are compared as
    a mask of [T, T] can be held for.
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
    """Whether the model's attention takes a mask of [B, 1, T, T]; a kernel that takes none may end
    the process when one is passed."""
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


def fused_failure(fused: Runner, generic: GenericRunner, needs: Needs) -> str | None:
    """Why the fused path does not hold for these needs; None if it does. Each is verified once."""
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
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        if is_out_of_memory(error):
            raise
        if isinstance(error, InputError):
            return error.message
        return f"{model.name}: the fused path failed ({type(error).__name__}: {error})"
    return None


def prove_fused(fused: Runner, generic: GenericRunner) -> None:
    """Every block's output on the fused path is the generic path's, on a short row and a short
    tree, and the head's losses are those of the generic path's logits."""
    model = generic.model
    probes: list[Inputs] = [(probe_ids(model), None, None)]
    if takes_masks(model):
        probes.append(probe_tree(model))
    states = _prove_fused_on(fused, generic, probes)[0].flatten(0, 1)
    prove_head(model, fused.head, states, generic.head.logits(states))


def _prove_fused_on(
    fused: Runner, generic: GenericRunner, probes: Sequence[Inputs]
) -> list[torch.Tensor]:
    """Every block's output on the fused path is the generic path's, on inputs of `open`. Returns
    their final states, [B, T, D]."""
    model = generic.model
    opened = [(*generic.open(*inputs), fused.open(*inputs)[1]) for inputs in probes]
    for block in model.visited_blocks():
        for probe, (state, generic_arguments, arguments) in enumerate(opened):
            expected = generic.run(block, state, generic_arguments)
            result = hidden_of(fused.run(block, state, arguments, "block"))
            if not _fused_agrees(model, block, result, expected):
                raise _fused_differs(model, block)
            opened[probe] = expected, generic_arguments, arguments
    return [state for state, _, _ in opened]


def _fused_agrees(model: Model, block: int, result: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether a block's states on the fused path are the generic path's, up to a few roundings.

    These let a router near a tie take another expert, so that of a block with experts (stacks of
    matrices) most positions are to agree.
    """
    if agree(result, expected, model.dtype):
        return True
    has_experts = any(weights.dim() == 3 for weights in model.layers[block].parameters())
    return has_experts and agreeing_share(result, expected, model.dtype) >= MOST_POSITIONS


def _fused_differs(model: Model, block: int) -> InputError:
    return InputError(f"{model.name}: block {block} gives something else on the fused path")
