"""The head: from final states to logits, in parts of the vocabulary, and to the losses of targets.

No mask shares the head with another, so it must run at the speed of its matrix product. A part is a
few thousand tokens of the vocabulary. All positions of a tile go through one part, then through the
next. So the weights are read once, and a part's logits are still in the processor's caches when
they are summed.

P positions, M targets, D columns of a state, V tokens of the vocabulary, N tokens of a part, S
parts, K targets of the position that has most.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.modeling_outputs import BaseModelOutput

from . import native
from .model import Model
from .precision import Widening, WideningLinear
from .swap import StandIn, get_module, with_replaced

LINEAR = (nn.Linear, WideningLinear)
PART = {"cpu": 4096, "cuda": 16384}  # tokens whose logits are held at once

Logits = tuple[int, torch.Tensor]  # the first token of a part, and the part's logits [P, N]
DensePart = tuple[torch.Tensor, torch.Tensor]  # logits [P, N], and their log-sum-exp, float64[P]


@dataclass(frozen=True)
class Targets:
    """The targets of a tile of P positions, as the head reads them.

    Attributes:
        num_positions: P.
        rows: The position of each target, ascending, int64[M].
        tokens: The targets, int64[M].
    """

    num_positions: int
    rows: torch.Tensor
    tokens: torch.Tensor

    @cached_property
    def table(self) -> torch.Tensor:
        """The tokens by position, int64[P, K], filled up with -1; K is at least 1."""
        table = self.tokens.new_full((self.num_positions, self._columns[1]), -1)
        table.view(-1)[self.places] = self.tokens
        return table

    @cached_property
    def places(self) -> torch.Tensor:
        """The place of each target in the flattened table, int64[M]."""
        column, count = self._columns
        return self.rows * count + column

    @cached_property
    def _columns(self) -> tuple[torch.Tensor, int]:
        """Each target's number among those of its position, int64[M], and K."""
        per_row = torch.bincount(self.rows, minlength=self.num_positions)
        column = (
            torch.arange(len(self.rows), device=self.rows.device)
            - (per_row.cumsum(0) - per_row)[self.rows]
        )
        return column, max(1, int(per_row.max()))


@dataclass(frozen=True)
class DenseLogits:
    """The dense model's logits, which many masks share.

    Attributes:
        logits: In the head's own precision, [P, V].
        sums: The log-sum-exp of each part, float64[S, P].
        part: Tokens of a part.
    """

    logits: torch.Tensor
    sums: torch.Tensor
    part: int

    @property
    def nbytes(self) -> int:
        return self.logits.nbytes + self.sums.nbytes

    def __iter__(self) -> Iterator[DensePart]:
        return zip(self.logits.split(self.part, dim=1), self.sums, strict=True)


class Head:
    """A model's own head: all that it does after its last layer, by its own code.

    Args:
        model: The model.
        norm: Takes final states [P, D] to the states that the head reads, [P, D].

    Attributes:
        vocab_size: Tokens of the vocabulary, V.
        part: Tokens whose logits are computed together, N. If bias, scale or soft cap do not act on
            each token by itself, `verify` sets it to V.
    """

    def __init__(self, model: Model, norm: Callable[[torch.Tensor], torch.Tensor]):
        self.normed = norm
        self.dtype, self.hidden_size = model.dtype, model.hidden_size
        head = model.output_head
        linear = type(head) in LINEAR and not head._forward_hooks and not head._forward_pre_hooks
        self.vocab_size = len(head._parameters["weight"]) if linear else model.vocab_size
        self.part = self.vocab_size
        self._native = (
            model.device.type == "cpu" and model.dtype in native.FLOATS and native.available()
        )
        self._base = _GivenStates(get_module(model.hf, model.path[:-1]))
        self._whole = with_replaced(model.hf, model.path[:-1], self._base)
        path = next((name for name, module in self._whole.named_modules() if module is head), None)
        if path is not None and linear:
            self.part = min(self.vocab_size, PART["cuda" if model.device.type == "cuda" else "cpu"])
            self._rows = _RowsOfHead(head)
            self._some = with_replaced(self._whole, path.split("."), self._rows)

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Logits [P, V] of final states [P, D], in the model's dtype."""
        return self._run(self._whole, self.normed(states))

    def parts(self, normed: torch.Tensor) -> Iterator[Logits]:
        """The logits of normed states [P, D], a part of the vocabulary at a time.

        A part is overwritten by the next one, unless gradients are recorded.
        """
        if self.part >= self.vocab_size:
            yield 0, self._run(self._whole, normed)
            return
        buffer = None
        if not torch.is_grad_enabled():
            buffer = normed.new_empty(len(normed), self.part)
        for start in range(0, self.vocab_size, self.part):
            self._rows.range = start, min(start + self.part, self.vocab_size)
            self._rows.buffer = buffer
            try:
                logits = self._run(self._some, normed)
            finally:
                self._rows.buffer = None
            yield start, logits

    def _run(self, lm: nn.Module, normed: torch.Tensor) -> torch.Tensor:
        self._base.states = normed[None]
        try:
            # only the shape of the ids is read
            ids = torch.zeros(1, len(normed), dtype=torch.int64, device=normed.device)
            return lm(input_ids=ids, use_cache=False).logits[0]
        finally:
            self._base.states = None

    # -- losses ------------------------------------------------------------------------------------

    def nll(self, states: torch.Tensor, targets: Targets) -> torch.Tensor:
        """-log p of the targets, [M], from the final states [P, D] that predict them."""
        return nll(self.parts(self.normed(states)), targets)

    def greedy(self, states: torch.Tensor, targets: Targets) -> torch.Tensor:
        """-log p of the targets, and 1 if a target is not the most likely token, [2, M]."""
        return greedy(self.parts(self.normed(states)), targets)

    def dense(self, states: torch.Tensor, keep: bool) -> Iterable[DensePart]:
        """The dense parts with which `kl` compares.

        Args:
            states: The dense model's final states, [P, D].
            keep: Whether to hold the logits, [P, V]; else each use computes them again.
        """
        if not keep:
            return _Recomputed(self, states)
        logits, sums = None, []
        for start, part in self.parts(self.normed(states)):
            if logits is None:
                logits = part.new_empty(len(part), self.vocab_size)
            logits[:, start : start + part.shape[1]] = part
            sums.append(exact_log_sum_exp(part))
        assert logits is not None
        return DenseLogits(logits, torch.stack(sums), self.part)

    def kl(self, dense: Iterable[DensePart], states: torch.Tensor) -> torch.Tensor:
        """KL(dense || masked) at each position, [P], from the masked model's states [P, D]."""
        return kl(dense, self.parts(self.normed(states)))

    def rejection(self, dense: Iterable[DensePart], states: torch.Tensor) -> torch.Tensor:
        """1 - sum_v min(p, q) at each position, [P].

        p is the dense model's distribution, and q that of the masked model's states [P, D].
        """
        return rejection(dense, self.parts(self.normed(states)))

    def most_likely(self, states: torch.Tensor) -> torch.Tensor:
        """The most likely token at each position, int64[P]; -1 if a logit is NaN."""
        return most_likely(self.parts(self.normed(states)))

    # -- memory, bits ------------------------------------------------------------------------------

    @property
    def nll_bytes(self) -> int:
        """About the bytes that `nll` holds for each position.

        These are a part's logits, and without csrc's operators their float32 copies.
        """
        return self.part * (self.dtype.itemsize + (0 if self._native else 8))

    @property
    def kl_bytes(self) -> int:
        """About the bytes that `kl` holds for each position besides `dense`.

        These are two parts' logits, and without csrc's operators their difference and the dense
        probabilities.
        """
        return self.nll_bytes + self.part * (self.dtype.itemsize + (0 if self._native else 16))

    @property
    def rejection_bytes(self) -> int:
        """About the bytes that `rejection` holds for each position besides `dense`.

        These are the logits of all tokens, and two parts' probabilities.
        """
        return self.kl_bytes + self.vocab_size * self.dtype.itemsize

    @property
    def dense_bytes(self) -> int:
        """The bytes that `dense` keeps for each position."""
        return self.vocab_size * self.dtype.itemsize + 8 * -(-self.vocab_size // self.part)

    def numerics(self) -> str:
        """The settings that decide the bits of a result besides torch's own."""
        return f"parts of {self.part}, {native.instruction_set() if self._native else 'torch'}"


class TritonHead(Head):
    """A linear head without bias whose losses Triton computes.

    Args:
        model: The model.
        norm: As for `Head`.
        scale: The factor of logits.
        soft_cap: Logits become soft_cap * tanh(logits / soft_cap).
    """

    def __init__(
        self,
        model: Model,
        norm: Callable[[torch.Tensor], torch.Tensor],
        scale: float = 1.0,
        soft_cap: float | None = None,
    ):
        from fastprune_kernels import linear_loss

        super().__init__(model, norm)
        self._loss, self._head = linear_loss, model.output_head
        self._scale, self._cap = scale, soft_cap

    def greedy(self, states: torch.Tensor, targets: Targets) -> torch.Tensor:
        misses = torch.empty(targets.table.shape, dtype=torch.float32, device=states.device)
        nll = self.nll(states, targets, misses)
        return torch.stack([nll, misses.flatten()[targets.places]])

    def nll(
        self, states: torch.Tensor, targets: Targets, misses: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Like `Head.nll`. `misses`, like the table, receives 1 for a target that another token
        beats."""
        nll = self._loss.linear_nll(
            self._scaled(states),
            self._head.weight,
            targets.table,
            soft_cap=self._cap,
            misses=misses,
        )
        return nll.flatten()[targets.places]

    def dense(self, states: torch.Tensor, keep: bool) -> Any:
        """The dense logits, float32[P, V]; they are always held."""
        return self._loss.linear_logits(self._scaled(states), self._head.weight, soft_cap=self._cap)

    def kl(self, dense: Any, states: torch.Tensor) -> torch.Tensor:
        return self._loss.linear_kl(
            dense, self._scaled(states), self._head.weight, soft_cap=self._cap
        )

    def _scaled(self, states: torch.Tensor) -> torch.Tensor:
        """Normed states [P, D] times the factor of the logits."""
        normed = self.normed(states)
        return normed if self._scale == 1 else normed * self._scale

    def rejection(self, dense: Any, states: torch.Tensor) -> torch.Tensor:
        masked = self.dense(states, keep=False)
        return (dense.softmax(dim=-1) - masked.softmax(dim=-1)).relu().sum(dim=-1)

    @property
    def nll_bytes(self) -> int:
        """Normed states, and up to four float32 results for each split of 1,024 tokens."""
        return self.hidden_size * self.dtype.itemsize + 16 * (self.vocab_size // 1024 + 1)

    @property
    def kl_bytes(self) -> int:
        """Like `nll_bytes`, with five results, and the dense logits if they are not kept."""
        splits = 20 * (self.vocab_size // 1024 + 1)
        return 2 * self.hidden_size * self.dtype.itemsize + splits + self.dense_bytes

    @property
    def rejection_bytes(self) -> int:
        """Both models' logits and probabilities, and their difference."""
        return self.kl_bytes + 4 * self.dense_bytes

    @property
    def dense_bytes(self) -> int:
        return 4 * (self.vocab_size + 16)


# -- losses of logits in parts ---------------------------------------------------------------------


def log_sum_exp(logits: torch.Tensor) -> torch.Tensor:
    """log(sum(exp(row))) of logits [P, N], in at least float32, [P]."""
    if _in_native(logits):
        return native.log_sum_exp(logits)
    return torch.logsumexp(_wide(logits), dim=-1)


def exact_log_sum_exp(logits: torch.Tensor, work: torch.Tensor | None = None) -> torch.Tensor:
    """`log_sum_exp` as float64[P]: a small divergence would show the roundings of float32.

    Args:
        logits: [P, N].
        work: A buffer to overwrite, [P, N]; None makes a new tensor.
    """
    if _in_native(logits):
        return native.exact_log_sum_exp(logits)
    wide = _wide(logits)
    most = wide.amax(dim=-1, keepdim=True).clamp(min=torch.finfo(wide.dtype).min)
    exponentials = torch.sub(wide, most, out=work).exp_()
    # eight float32 sums, added in float64, are many times as fast as one float64 sum
    pieces = exponentials.split(max(1, exponentials.shape[-1] // 8), dim=-1)
    total = torch.stack([piece.sum(dim=-1) for piece in pieces]).double().sum(dim=0)
    return most[:, 0].double() + total.log()


def nll(parts: Iterable[Logits], targets: Targets) -> torch.Tensor:
    """-log p of the targets, in nats, [M], from logits in parts."""
    sums, logits = [], None
    for start, part in parts:
        sums.append(log_sum_exp(part))
        logits = _targets_logits(logits, start, part, targets)
    assert logits is not None
    return (_total(sums)[targets.rows] - logits).to(sums[0].dtype)


def greedy(parts: Iterable[Logits], targets: Targets) -> torch.Tensor:
    """`nll`, and 1 if a target is not the most likely token, [2, M]; the first of equals is."""
    noted = _NotingBest(parts)
    losses = nll(noted, targets)
    return torch.stack([losses, (noted.token[targets.rows] != targets.tokens).to(losses.dtype)])


def most_likely(parts: Iterable[Logits]) -> torch.Tensor:
    """The most likely token, int64[P], the first of equals; -1 if a logit is NaN."""
    noted = _NotingBest(parts)
    for _ in noted:
        pass
    return torch.where(noted.best.isnan(), -1, noted.token)


class _NotingBest:
    """Yields logits in parts, and notes the highest logit and its token on the way.

    The first of equal logits counts, and NaN counts as the highest.

    Attributes:
        best: The highest logit, [P], once all parts were yielded.
        token: Its token, int64[P], likewise.
    """

    best: torch.Tensor
    token: torch.Tensor

    def __init__(self, parts: Iterable[Logits]):
        self._parts = parts

    def __iter__(self) -> Iterator[Logits]:
        for start, part in self._parts:
            values, index = part.max(dim=-1)
            if start == 0:
                self.best, self.token = values, index
            else:
                better = (values > self.best) | (values.isnan() & ~self.best.isnan())
                self.best = torch.where(better, values, self.best)
                self.token = torch.where(better, index + start, self.token)
            yield start, part


def kl(dense: Iterable[DensePart], parts: Iterable[Logits]) -> torch.Tensor:
    """KL(p || q) = sum_v p(v) (log p(v) - log q(v)) in nats, [P], q from logits in parts.

    It is computed as sum_v p (l_p - l_q) - lse_p + lse_q, with logits l and their log-sum-exps lse.
    Equal logits give 0. A token of p = 0 adds 0, also if its logits are -inf.
    """
    dense_sums, scales, sums, means = [], [], [], []
    dtype = torch.float32
    work: list[torch.Tensor] = []  # p, and l_p - l_q, of a part
    for (dense_part, dense_sum), (_, part) in zip(dense, parts, strict=True):
        dtype = _wide(part).dtype
        rounded = dense_sum.to(dtype)
        if _in_native(part):
            mean, part_sum = native.divergence(dense_part, dense_sum, part)
        else:
            if not work:
                work = [torch.empty_like(part, dtype=dtype) for _ in range(2)]
            p, difference = (tensor[:, : part.shape[1]] for tensor in work)
            torch.sub(_wide(dense_part), rounded[:, None], out=p).exp_()
            torch.sub(_wide(dense_part), _wide(part), out=difference).masked_fill_(p == 0, 0)
            mean, part_sum = torch.linalg.vecdot(p, difference), exact_log_sum_exp(part, work=p)
        means.append(mean)
        dense_sums.append(dense_sum)
        scales.append(rounded.double())
        sums.append(part_sum)
    total = _total(dense_sums)
    weights = (torch.stack(scales) - total).exp()  # of each part, [S, P]
    mean = (weights * torch.stack(means)).masked_fill(weights == 0, 0).sum(dim=0)
    return (mean - total + _total(sums)).to(dtype)


def rejection(dense: Iterable[DensePart], parts: Iterable[Logits]) -> torch.Tensor:
    """1 - sum_v min(p(v), q(v)), [P], q from logits in parts.

    It is computed as the sum of p - q over the tokens with p > q, so equal logits give 0. A
    probability needs the log-sum-exps of all parts. So the logits of q are held, and `dense` is
    iterated twice.
    """
    logits, sums, dense_sums = [], [], []
    for (_, dense_sum), (_, part) in zip(dense, parts, strict=True):
        logits.append(part.clone())  # the next part overwrites it
        sums.append(exact_log_sum_exp(part))
        dense_sums.append(dense_sum)
    dtype = _wide(logits[0]).dtype
    dense_total, total = (_total(of)[:, None].to(dtype) for of in (dense_sums, sums))
    higher = []
    for (dense_part, _), part in zip(dense, logits, strict=True):
        p, q = (_wide(dense_part) - dense_total).exp_(), (_wide(part) - total).exp_()
        higher.append(p.sub_(q).relu_().sum(dim=-1))
    return torch.stack(higher).sum(dim=0)


def _total(sums: list[torch.Tensor]) -> torch.Tensor:
    """The log-sum-exp of all parts, float64[P]."""
    return torch.stack(sums).double().logsumexp(dim=0)


def _targets_logits(
    logits: torch.Tensor | None, start: int, part: torch.Tensor, targets: Targets
) -> torch.Tensor:
    """Enter a part's targets into their logits, float64[M]; others stay NaN until their part."""
    if logits is None:
        logits = part.new_full((len(targets.tokens),), torch.nan, dtype=torch.float64)
    place = targets.tokens - start
    inside = (place >= 0) & (place < part.shape[1])
    here = part[targets.rows, place.clamp(0, part.shape[1] - 1)]
    return torch.where(inside, here.double(), logits)


def _in_native(logits: torch.Tensor) -> bool:
    """Whether csrc's operators sum these logits."""
    return (
        logits.is_cpu
        and logits.dtype in native.FLOATS
        and native.available()
        and not logits.requires_grad
    )


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


# -- modules in the place of others ----------------------------------------------------------------


class _Recomputed:
    """The dense model's logits in parts, computed each time from its final states [P, D]."""

    def __init__(self, head: Head, states: torch.Tensor):
        self._head, self._states = head, states

    def __iter__(self) -> Iterator[DensePart]:
        for _, part in self._head.parts(self._head.normed(self._states)):
            yield part, exact_log_sum_exp(part)


class _GivenStates(StandIn):
    """Replaces the base model below a causal-LM wrapper, and returns the normed states set here.

    The wrapper may read any attribute of the base, such as a multiplier or its embeddings.
    """

    states: torch.Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> BaseModelOutput:
        # transformers calls any tensor a FloatTensor
        return _BaseOutput(last_hidden_state=self.states)  # type: ignore[arg-type]


class _BaseOutput(BaseModelOutput):
    """A base model's output. All other fields that a family's wrapper may read are None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)
        return None


class _RowsOfHead(nn.Module):
    """Replaces a linear head, and computes the logits of a range of tokens.

    Attributes:
        range: The first token, and the one behind the last.
        buffer: Receives the logits, [P, N or more]; None makes a new tensor.
    """

    def __init__(self, head: nn.Module):
        super().__init__()
        self.__dict__["_head"] = head  # not a submodule
        self.range = (0, 0)
        self.buffer: torch.Tensor | None = None

    @property
    def weight(self) -> torch.Tensor:
        """The rows of these tokens, [N, D]; widened to float32 if the model widens its head."""
        head: Any = self._head
        weight = head._parameters["weight"][slice(*self.range)]
        return weight.float() if isinstance(head, Widening) else weight

    @property
    def bias(self) -> torch.Tensor | None:
        head: Any = self._head
        bias = head._parameters["bias"]
        return None if bias is None else bias[slice(*self.range)]

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        weight, bias, flat = self.weight, self.bias, states.flatten(0, -2)
        if self.buffer is None or self.buffer.dtype != weight.dtype:
            return F.linear(states, weight, bias)
        logits = self.buffer[:, : len(weight)]
        if bias is None:
            torch.mm(flat, weight.T, out=logits)
        else:
            torch.addmm(bias, flat, weight.T, out=logits)
        return logits.unflatten(0, states.shape[:-1])
