"""A family's own head: from normed hidden states to logits, and the bytes that this takes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

from .model import Model
from .swap import with_replaced


def head_bytes(model: Model, measure: str) -> int:
    """About the bytes that a measure holds for each position of a tile.

    Logits, their float32 copy and its log-softmax; for "kl" the dense model's too; for measures
    that compare states, both models' states and float64 copies of them.
    """
    if measure in ("cosine", "nmse", "moments"):
        return model.hidden_size * (2 * model.dtype.itemsize + 5 * 8)
    return model.vocab_size * (model.dtype.itemsize + 8) * (3 if measure == "kl" else 1)


class FamilyHead:
    """The causal-LM wrapper's own code from normed hidden states to logits: head, scaling, soft
    cap."""

    def __init__(self, path: tuple[str, ...], hf: nn.Module):
        self._stub = _BaseStub()
        self._lm = with_replaced(hf, path[:-1], self._stub)

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        self._stub.hidden = hidden[None]
        try:
            ids = torch.zeros(
                1, len(hidden), dtype=torch.int64, device=hidden.device
            )  # only its shape is read
            return self._lm(input_ids=ids, use_cache=False).logits[0]
        finally:
            self._stub.hidden = None


class _BaseStub(nn.Module):
    """Stands in for the base model below a causal-LM wrapper and returns given hidden states."""

    hidden: torch.Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> BaseModelOutput:
        # transformers calls any tensor a FloatTensor
        return _BaseOutput(last_hidden_state=self.hidden)  # type: ignore[arg-type]


class _BaseOutput(BaseModelOutput):
    """A base model's output; whatever else a family's wrapper reads from its own output type is
    None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)
        return None
