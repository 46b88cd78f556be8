"""The definition of each operator, in plain torch. Slow is fine; every faster version is tested against this."""

from __future__ import annotations

import torch


def token_nll(logits: torch.Tensor, row: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of tokens, in nats: logsumexp(logits[row_m]) - logits[row_m, token_m].

    logits [P, V] (float, any precision; computed in float32, or float64 if given), row int64[M] into them,
    token int64[M]. Returns [M].
    """
    logits = _at_least_float32(logits)
    return torch.logsumexp(logits, dim=-1)[row] - logits[row, token]


def token_kl(dense: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
    """KL(p || q) = sum_v p(v) (log p(v) - log q(v)) in nats, p from the dense logits and q from the masked ones.

    dense, masked: logits [P, V]. Returns [P].
    """
    log_p = torch.log_softmax(_at_least_float32(dense), dim=-1)
    log_q = torch.log_softmax(_at_least_float32(masked), dim=-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _at_least_float32(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()
