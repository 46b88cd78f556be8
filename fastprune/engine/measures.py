"""Measures: one or more values at every target, computed from a mask's final states.

The engine sums the values over each continuation. To add a measure, write a function, and add a
`Measure` of it to `MEASURES`. `Head.parts` computes logits, a part of the vocabulary at a time.

P positions of a tile, D columns of a state, V values of the measure, M targets.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..models import Head
from ..models.head import Targets


@dataclass(frozen=True)
class Reference:
    """The part of the dense model's output that every mask is compared with.

    Attributes:
        compute: (head, dense final states [P, D], keep) -> a value that `Measure.compute` takes.
            With keep, the value may hold `position_bytes` for each position. Without, it is small,
            and `Measure.compute` computes the rest each time. Both give the same bits.
        position_bytes: The bytes that a head keeps for each position.
    """

    compute: Callable[[Head, torch.Tensor, bool], Any]
    position_bytes: Callable[[Head], int]


@dataclass(frozen=True)
class Measure:
    """A function of final states, with its names and its memory.

    Attributes:
        name: Its name.
        compute: (head, states [P, D], targets, reference or None) -> [V, M], the values at the
            targets.
        values: The names of the V values.
        position_bytes: About the bytes that `compute` holds for each position of a head.
        reference: None for a measure that compares with nothing.
    """

    name: str
    compute: Callable[[Head, torch.Tensor, Targets, Any], torch.Tensor]
    values: tuple[str, ...]
    position_bytes: Callable[[Head], int]
    reference: Reference | None = None


def _nll(head: Head, states: torch.Tensor, targets: Targets, reference: None) -> torch.Tensor:
    return head.nll(states, targets)[None]


def _greedy(head: Head, states: torch.Tensor, targets: Targets, reference: None) -> torch.Tensor:
    return head.greedy(states, targets)


def _kl(head: Head, states: torch.Tensor, targets: Targets, reference: Any) -> torch.Tensor:
    return head.kl(reference, states)[targets.rows][None]


def _rejection(head: Head, states: torch.Tensor, targets: Targets, reference: Any) -> torch.Tensor:
    return head.rejection(reference, states)[targets.rows][None]


def _other_token(
    head: Head, states: torch.Tensor, targets: Targets, reference: torch.Tensor
) -> torch.Tensor:
    token = head.most_likely(states)
    differs = (token != reference).to(torch.float32)
    differs[(token < 0) | (reference < 0)] = torch.nan
    return differs[targets.rows][None]


def _most_likely(head: Head, states: torch.Tensor, keep: bool) -> torch.Tensor:
    return head.most_likely(states)


def _normed(head: Head, states: torch.Tensor, keep: bool = True) -> torch.Tensor:
    """Normed states, as the head reads them, float64[P, D]."""
    return head.normed(states).double()


def _direction(head: Head, states: torch.Tensor, keep: bool = True) -> torch.Tensor:
    return torch.nn.functional.normalize(_normed(head, states), dim=-1, eps=0)


def _cosine(
    head: Head, states: torch.Tensor, targets: Targets, reference: torch.Tensor
) -> torch.Tensor:
    # half the squared distance of unit vectors is 1 - cosine: exact if they are equal, and never
    # below 0
    distance = (_direction(head, states) - reference).square().sum(dim=-1) / 2
    return distance[targets.rows][None]


def _nmse(
    head: Head, states: torch.Tensor, targets: Targets, reference: torch.Tensor
) -> torch.Tensor:
    distance = (_normed(head, states) - reference).square().sum(dim=-1)
    return (distance / reference.square().sum(dim=-1))[targets.rows][None]


def _states_bytes(head: Head) -> int:
    """Both models' normed states, and five float64 copies."""
    return head.hidden_size * (2 * head.dtype.itemsize + 5 * 8)


def _normed_bytes(head: Head) -> int:
    return head.hidden_size * 8


def _moments(
    head: Head, states: torch.Tensor, targets: Targets, reference: torch.Tensor
) -> torch.Tensor:
    normed = _normed(head, states)
    moments = [(normed - reference).square(), normed.square(), reference.square()]
    of_positions = torch.stack([moment.sum(dim=-1) for moment in moments])  # [3, P]
    return of_positions[targets.tokens, targets.rows][None]


MEASURES = {
    measure.name: measure
    for measure in (
        Measure("nll", _nll, ("-log p of the target",), lambda head: head.nll_bytes),
        Measure(
            "greedy",
            _greedy,
            ("-log p of the target", "1 where the target is not the most likely token"),
            lambda head: head.nll_bytes,
        ),
        Measure(
            "kl",
            _kl,
            ("KL(dense || masked)",),
            lambda head: head.kl_bytes,
            Reference(lambda head, dense, keep: head.dense(dense, keep), lambda h: h.dense_bytes),
        ),
        Measure(
            "rejection",
            _rejection,
            ("1 - sum of min(dense, masked) probabilities",),
            lambda head: head.rejection_bytes,
            Reference(lambda head, dense, keep: head.dense(dense, keep), lambda h: h.dense_bytes),
        ),
        Measure(
            "other_token",
            _other_token,
            ("1 if the most likely tokens of dense and masked differ",),
            lambda head: head.nll_bytes,
            Reference(_most_likely, lambda head: 8),
        ),
        Measure(
            "cosine",
            _cosine,
            ("1 - cosine of normed states, dense and masked",),
            _states_bytes,
            Reference(_direction, _normed_bytes),
        ),
        Measure(
            "nmse",
            _nmse,
            ("|dense - masked|^2 / |dense|^2 of normed states",),
            _states_bytes,
            Reference(_normed, _normed_bytes),
        ),
        Measure(
            "moments",
            _moments,
            ("by the target's token, 0 to 2: |dense - masked|^2, |masked|^2, |dense|^2 (normed)",),
            _states_bytes,
            Reference(_normed, _normed_bytes),
        ),
    )
}
