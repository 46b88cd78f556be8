"""That a model can be run unit by unit is proven on itself before it is used: its layers, one by
one, against its own forward pass; token trees against their sequences; the halves of a block
against the block.

Each raises InputError, with the reason, where it is not so.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import InputError
from .swap import Arguments, HalfBlock, StandInLayer, Sublayers, with_replaced
from .tree import few_branches

if TYPE_CHECKING:  # a model proves itself
    from .generic import Model

ATTENTION_NAMES = ("self_attn", "attention", "attn", "self_attention")
MLP_NAMES = ("mlp", "feed_forward", "block_sparse_moe", "ffn")


def prove_blocks(model: Model) -> None:
    """The layers, run one by one, give the logits of the model's own forward pass; finds out what
    it takes of them."""
    ids = model.probe_ids()
    both, failure = None, None
    for as_tuple in (
        False,
        True,
    ):  # what the model takes from a layer: the states, or a tuple of them
        model.recorder.as_tuple = as_tuple
        try:
            both = _both_ways(model, ids)
            break
        except InputError:
            raise
        except Exception as error:
            failure = failure or error
    if both is None:
        why = f"running its layers one by one failed ({type(failure).__name__}: {failure})"
        raise model.refusal(why) from failure
    if not model.agree(*both):
        raise model.refusal(
            "its layers, run one by one, do not give the logits of its own forward pass"
        )


def _both_ways(model: Model, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [B * T, V] of the model's layers, run one by one, and of its own forward pass.

    Weights that stay in files come as the forward pass calls their layer, and serve both.
    """
    state, arguments = model.open(ids)
    if model.weights is None:
        (found,) = _final_states(model, [(state, arguments)])
        return model.head(found), model.hf(input_ids=ids, use_cache=False).logits.flatten(0, 1)
    blocks = model.visited_blocks()

    def calling(layer: nn.Module) -> Callable:
        def call(hidden: torch.Tensor, args: tuple, kwargs: dict) -> Any:
            nonlocal state
            state = _after(model, next(blocks), state, arguments)
            return layer(hidden, *args, **kwargs)

        return call

    own = with_replaced(
        model.hf, model.path, nn.ModuleList(StandInLayer(la, calling(la)) for la in model.layers)
    )
    expected = own(input_ids=ids, use_cache=False).logits.flatten(0, 1)
    return model.head(model.final_norm(state.flatten(0, 1))), expected


def prove_tree(
    model: Model, ids: torch.Tensor, positions: torch.Tensor, branch: torch.Tensor
) -> None:
    """A token tree, as `Model.open` takes it, gives what its sequences give one by one."""
    sequences = [
        (branch[0] == 0) | (branch[0] == number) for number in few_branches(branch[0]).tolist()
    ]
    alone = [model.open(ids[:, inside]) for inside in sequences]
    try:
        found, *expected = _final_states(model, [model.open(ids, positions, branch), *alone])
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise model.refusal(f"token trees failed ({error}); use plain text") from error
    if not all(
        model.agree(found[inside], by_itself) for inside, by_itself in zip(sequences, expected)
    ):
        raise model.refusal("token trees do not give what their sequences give; use plain text")


def _final_states(
    model: Model, opened: Sequence[tuple[torch.Tensor, Arguments]]
) -> list[torch.Tensor]:
    """Normed final states [B * T, D] of the dense model, layer by layer, of each that `open`
    gave."""
    states = [state for state, _ in opened]
    for block in model.visited_blocks():  # once for all: it may be read for this
        states = [
            _after(model, block, state, of) for state, (_, of) in zip(states, opened, strict=True)
        ]
    return [model.final_norm(state.flatten(0, 1)) for state in states]


def _after(model: Model, block: int, state: torch.Tensor, arguments: Arguments) -> torch.Tensor:
    """The state after a block. Raises InputError where that has changed the one before it."""
    version = state._version
    following = model.run(block, state, arguments)
    if state._version != version:
        raise model.refusal("its layers overwrite their input, which other masks still need")
    return following


def find_sublayers(model: Model) -> list[Sublayers]:
    """The two halves of every block, of a kind that adds up to it."""
    pairs = []
    for layer in model.layers:
        names = [
            [n for n, _ in layer.named_children() if n in known]
            for known in (ATTENTION_NAMES, MLP_NAMES)
        ]
        if any(len(found) != 1 for found in names):
            raise model.refusal(
                "its attention and mlp sublayers were not found; use granularity='block'"
            )
        pairs.append((layer, names[0][0], names[1][0]))
    state, arguments = model.open(model.probe_ids())
    for parallel, mlp_as_tuple in itertools.product((False, True), repeat=2):
        sublayers = [Sublayers(*pair, parallel, mlp_as_tuple) for pair in pairs]
        if _add_up(model, sublayers, state, arguments):
            return sublayers
    raise model.refusal(
        "its attention and mlp sublayers do not add up to its blocks; use granularity='block'"
    )


def _add_up(
    model: Model, sublayers: list[Sublayers], state: torch.Tensor, arguments: Arguments
) -> bool:
    """Whether the halves of every block, run one after the other, give the block's own output to
    the bit, leave their inputs alone, and a block without either half adds nothing."""
    for block in model.visited_blocks():
        halves = sublayers[block]
        whole = model.run(block, state, arguments)
        try:
            middle = halves.attention(state, arguments[block])
            inputs = (
                [t for t in middle if isinstance(t, torch.Tensor)]
                if isinstance(middle, HalfBlock)
                else [middle]
            )
            versions = [tensor._version for tensor in inputs]
            after = halves.mlp(middle, arguments[block])
            nothing = halves.neither(state, arguments[block])
            pairs = ((after, whole), (nothing, state))
            same = all(torch.allclose(a, b, rtol=0, atol=0, equal_nan=True) for a, b in pairs)
        except (
            TypeError,
            ValueError,
            AttributeError,
        ):  # this family's modules return something else
            return False
        if not same or versions != [tensor._version for tensor in inputs]:
            return False
        state = after
    return True
