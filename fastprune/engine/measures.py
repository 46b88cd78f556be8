"""What is computed at every target, from a mask's final states: one or more values, which the
engine sums over each continuation. To add one, write a function and register it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..models import Runner

if TYPE_CHECKING:
    from .chunks import Tile


@dataclass(frozen=True)
class Measure:
    """compute(runner, states [P, D], tile, reference [P, ...] or None) -> [V, M], the values at a
    tile's targets.

    values: what they are, V of them. reference(runner, dense [P, D]): what every mask is compared
    with, of the dense model's final states; None for a measure that compares with nothing.
    """

    name: str
    compute: Callable[..., torch.Tensor]
    values: tuple[str, ...]
    reference: Callable[..., torch.Tensor] | None = None

    @property
    def needs_dense(self) -> bool:
        return self.reference is not None


def _nll(runner: Runner, states: torch.Tensor, tile: Tile, reference: None) -> torch.Tensor:
    return runner.nll(states, tile)[None]


def _greedy(runner: Runner, states: torch.Tensor, tile: Tile, reference: None) -> torch.Tensor:
    return torch.stack([runner.nll(states, tile), runner.misses(states, tile)])


def _kl_reference(runner: Runner, dense: torch.Tensor) -> torch.Tensor:
    return runner.kl_reference(dense)


def _kl(runner: Runner, states: torch.Tensor, tile: Tile, reference: torch.Tensor) -> torch.Tensor:
    return runner.kl(reference, states, tile)[None]


def _normed(runner: Runner, states: torch.Tensor) -> torch.Tensor:
    """States as the head reads them, float64[P, D]."""
    return runner.normed(states).double()


def _direction(runner: Runner, states: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(_normed(runner, states), dim=-1, eps=0)


def _cosine(
    runner: Runner, states: torch.Tensor, tile: Tile, reference: torch.Tensor
) -> torch.Tensor:
    # half the squared distance of unit vectors is 1 - cosine: exact where they are equal, and never
    # below 0
    return ((_direction(runner, states) - reference).square().sum(dim=-1) / 2)[tile.rows][None]


def _nmse(
    runner: Runner, states: torch.Tensor, tile: Tile, reference: torch.Tensor
) -> torch.Tensor:
    distance = (_normed(runner, states) - reference).square().sum(dim=-1)
    return (distance / reference.square().sum(dim=-1))[tile.rows][None]


def _moments(
    runner: Runner, states: torch.Tensor, tile: Tile, reference: torch.Tensor
) -> torch.Tensor:
    normed = _normed(runner, states)
    moments = [(normed - reference).square(), normed.square(), reference.square()]
    of_positions = torch.stack([moment.sum(dim=-1) for moment in moments])  # [3, P]
    return of_positions[tile.tokens, tile.rows][None]


MEASURES = {
    measure.name: measure
    for measure in (
        Measure("nll", _nll, ("-log p of the target",)),
        Measure(
            "greedy",
            _greedy,
            ("-log p of the target", "1 where the target is not the most likely token"),
        ),
        Measure("kl", _kl, ("KL(dense || masked)",), _kl_reference),
        Measure("cosine", _cosine, ("1 - cosine of normed states, dense and masked",), _direction),
        Measure("nmse", _nmse, ("|dense - masked|^2 / |dense|^2 of normed states",), _normed),
        Measure(
            "moments",
            _moments,
            ("by the target's token, 0 to 2: |dense - masked|^2, |masked|^2, |dense|^2 (normed)",),
            _normed,
        ),
    )
}
