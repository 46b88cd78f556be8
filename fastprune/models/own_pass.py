"""Comparison of a model's blocks, run one by one, with its own forward pass.

Every opening compares two short rows. Before scoring, a row as long as the longest one is compared.
Equal code at equal shapes must give equal bits. A row beside others has other shapes, and the fused
path has other code, so these are compared with a tolerance.

Every function raises InputError, with the reason, if a comparison fails.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from ..errors import InputError
from .compare import agree, agreeing_share, continued_otherwise, probe_ids, same_bits
from .device import is_out_of_memory
from .fused import FusedRunner
from .generic import GenericRunner
from .model import Model
from .swap import Arguments, StandInLayer, first, get_module, with_replaced
from .text import failure_of


@contextmanager
def refusing(model: Model, why: Callable[[Exception], str]) -> Iterator[None]:
    """Turn an error of the family's own code into the refusal of the model, with its reason."""
    try:
        yield
    except Exception as error:  # of any kind
        if isinstance(error, InputError) or is_out_of_memory(error):
            raise
        raise model.refusal(why(error)) from error


def failed(error: Exception) -> str:
    """The end of a reason: an error's class and message."""
    return f"failed ({type(error).__name__}: {error})"


# -- the model's own forward pass ------------------------------------------------------------------


class _Call(NamedTuple):
    """A layer's call in the own forward pass; `run` repeats the call."""

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
    """Run the model's own forward pass, with a function before and after each block.

    The block's weights are loaded at that time.

    Returns:
        The logits, [B * T, V]; of a base model alone, the normed states.
    """
    blocks = model.weights.blocks()
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
    """Run the own forward pass, append its layers' calls to a list, and return [B * T, V]."""
    return _own_pass(model, ids, lambda _: None, lambda _, call: calls.append(call))


def run_block(
    runner: GenericRunner, block: int, state: torch.Tensor, arguments: Arguments
) -> torch.Tensor:
    """Run a block, and return its state. Raises InputError if the block changes its input."""
    version = state._version
    following = runner.run(block, state, arguments)
    if state._version != version:
        raise runner.model.refusal("its layers overwrite their input, which other masks still need")
    return following


def _checked(
    model: Model, block: int, before: torch.Tensor, after: torch.Tensor, own: _Call
) -> torch.Tensor:
    """Compare a block's states in the own forward pass with the runner's, before and after it.

    They must have the same bits; else InputError is raised. A module whose own two runs differ is
    compared with tolerance.
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
    """Raise InputError if later tokens change the states [B, T, D] of equal earlier tokens."""
    if not same_bits(other, states) and agreeing_share(other, states, model.dtype) < 1:
        raise model.refusal("it is not causal: states depend on later tokens")


def _require_alone(model: Model, beside: torch.Tensor, alone: torch.Tensor) -> None:
    """Raise InputError unless a row has the same states [B, T, D] alone and beside another row."""
    if agreeing_share(beside, alone, model.dtype) < MOST_POSITIONS:
        raise model.refusal("a row has other states beside another row")


# -- blocks ----------------------------------------------------------------------------------------

# the least share of positions at which a row beside another agrees with the row alone. Rounding
# differs with shapes, so a router near a tie may take another expert
MOST_POSITIONS = 0.75


def prove_blocks(runner: GenericRunner) -> tuple[torch.Tensor, torch.Tensor]:
    """Verify two short rows, run block by block.

    They must have the states of the model's own forward pass to the bit. No state may depend on
    later tokens or on another row.

    Returns:
        Their final states, [P, D], and the logits of the own forward pass, [P, V].
    """
    with refusing(runner.model, lambda error: failure_of(runner.model.hf, error)):
        finals, expected = _prove_short(runner)
        one_by_one = runner.head.logits(finals)
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
    opened = [runner.open(ids) for ids in (row, other)]
    states = [state for state, _ in opened]
    beside, arguments = runner.open(torch.cat([row, padded]))
    following = states

    def run_all(block: int) -> None:
        # in turn, which detects a block that keeps a value for a later one
        nonlocal following, beside
        following = [
            run_block(runner, block, state, arguments)
            for state, (_, arguments) in zip(states, opened, strict=True)
        ]
        beside = run_block(runner, block, beside, arguments)

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


def check_row(
    generic: GenericRunner, ids: torch.Tensor, together: bool, fused: FusedRunner | None = None
) -> None:
    """Verify a model on a plain row as long as the longest to be scored, once for each length.

    The generic path's states must equal those of the own forward pass to the bit. Later tokens may
    change no earlier state. The row must agree with itself beside another row. The row runs three
    times: in the own forward pass, on the generic path, and on the path to be used.

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
        with refusing(model, lambda error: f"a row of {ids.shape[1]} tokens {failed(error)}"):
            _prove_row(generic, ids, together, fused)

    model.once(("row", path, ids.shape[1], together), work)


def _prove_row(
    generic: GenericRunner, ids: torch.Tensor, together: bool, fused: FusedRunner | None
) -> None:
    model, length = generic.model, ids.shape[1]
    state, arguments = generic.open(ids)
    following = entry = state
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
    entries = batches = [states for states, _ in opened]

    def before(block: int) -> None:
        nonlocal following, entry, batches, entries
        entry, entries = state, batches
        following = run_block(generic, block, state, arguments)
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
            elif batch[0] == length and fused is not None:
                on_fused = Step(entries[number], opened[number][1], states)
                require_fused_agrees(generic, fused, block, Step(entry, arguments, state), on_fused)
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


class Step(NamedTuple):
    """A block's run on a path: entry and output [B, T, D], with the path's arguments of a chunk."""

    entry: torch.Tensor
    arguments: Any
    output: torch.Tensor


def require_fused_agrees(
    generic: GenericRunner, fused: FusedRunner, block: int, own: Step, other: Step
) -> None:
    """Raise InputError unless a block's states on the fused path agree with the generic path's.

    They may differ by a few roundings. Because of these, a router near a tie may take another
    expert. So a family's own mlp may give another output at a quarter of the positions, if
    everything around it agrees at every position.

    Args:
        generic: The generic runner.
        fused: The fused runner.
        block: The block.
        own: The block's run on the generic path.
        other: The block's run on the fused path: the same rows, and perhaps further ones.
    """
    dtype, result = generic.model.dtype, other.output[: len(own.output)]
    if agree(result, own.output, dtype):
        return
    name = fused.own_mlp_name(block)
    if (
        name is None
        or agreeing_share(result, own.output, dtype) < MOST_POSITIONS
        or not _agrees_around(generic, fused, name, block, own, other)
    ):
        raise InputError(
            f"{generic.model.name}: block {block} gives something else on the fused path"
        )


def _agrees_around(
    generic: GenericRunner, fused: FusedRunner, name: str, block: int, own: Step, other: Step
) -> bool:
    """Whether the mlp of this name gets the same input on both paths, and the block gives the same
    states for the same output of it."""
    layer, dtype = generic.model.layers[block], generic.model.dtype
    inputs: list[torch.Tensor] = []
    terms: list[torch.Tensor] = []

    def noted(states: torch.Tensor, args: tuple, kwargs: dict) -> Any:
        output = getattr(layer, name)(states, *args, **kwargs)
        inputs.append(states.flatten(0, 1).clone())
        terms.append(first(output).flatten(0, 1).clone())
        return output

    def repeated(states: torch.Tensor) -> torch.Tensor:
        inputs.append(states[0, : len(terms[0])].clone())  # the sum goes into these states later
        term = torch.zeros_like(states)
        term[0, : len(terms[0])] = terms[0]
        return term

    watched = with_replaced(layer, (name,), StandInLayer(getattr(layer, name), noted))
    expected = first(watched(own.entry, **own.arguments[block]))
    result = fused.run_with_mlp(block, other.entry, other.arguments, repeated)
    return agree(inputs[1], inputs[0], dtype) and agree(result[: len(expected)], expected, dtype)
