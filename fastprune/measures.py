"""What is computed at every target, from a mask's final states: one or more values, which the engine sums over each
continuation. To add one, write a function and register it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .models import Runner


@dataclass(frozen=True)
class Measure:
    """compute(runner, states [P, D], tile, dense [P, D] or None) -> [V, M], the values at a tile's targets.

    values: what they are, V of them. needs_dense: whether it compares with the dense model's final states.
    """

    name: str
    compute: Callable[..., torch.Tensor]
    values: tuple[str, ...]
    needs_dense: bool = False


def _nll(runner: Runner, states: torch.Tensor, tile, dense) -> torch.Tensor:
    return runner.nll(states, tile)[None]


def _greedy(runner: Runner, states: torch.Tensor, tile, dense) -> torch.Tensor:
    return torch.stack([runner.nll(states, tile), runner.misses(states, tile)])


def _kl(runner: Runner, states: torch.Tensor, tile, dense) -> torch.Tensor:
    return runner.kl(dense, states, tile)[None]


MEASURES = {
    measure.name: measure
    for measure in (
        Measure("nll", _nll, ("-log p of the target",)),
        Measure("greedy", _greedy, ("-log p of the target", "1 where the target is not the most likely token")),
        Measure("kl", _kl, ("KL(dense || masked)",), needs_dense=True),
    )
}
