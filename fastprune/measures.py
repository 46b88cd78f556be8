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


def _cosine(runner: Runner, states: torch.Tensor, tile, dense) -> torch.Tensor:
    found, expected = (
        torch.nn.functional.normalize(normed, dim=-1, eps=0) for normed in _normed(runner, states, dense)
    )
    # half the squared distance of unit vectors is 1 - cosine: exact where they are equal, and never below 0
    return ((found - expected).square().sum(dim=-1) / 2)[tile.rows][None]


def _nmse(runner: Runner, states: torch.Tensor, tile, dense) -> torch.Tensor:
    found, expected = _normed(runner, states, dense)
    return ((found - expected).square().sum(dim=-1) / expected.square().sum(dim=-1))[tile.rows][None]


def _normed(runner: Runner, states: torch.Tensor, dense: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both models' states as the head reads them, [P, D], in float64."""
    return runner.normed(states).double(), runner.normed(dense).double()


MEASURES = {
    measure.name: measure
    for measure in (
        Measure("nll", _nll, ("-log p of the target",)),
        Measure("greedy", _greedy, ("-log p of the target", "1 where the target is not the most likely token")),
        Measure("kl", _kl, ("KL(dense || masked)",), needs_dense=True),
        Measure("cosine", _cosine, ("1 - cosine of normed states, dense and masked",), needs_dense=True),
        Measure("nmse", _nmse, ("|dense - masked|^2 / |dense|^2 of normed states",), needs_dense=True),
    )
}
