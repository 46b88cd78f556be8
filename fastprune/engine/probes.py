"""Probes of the whole model, which score no mask: similarities of states, and gradients.

U units, S samples, B rows of T tokens, D columns of a state.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from ..data import TokenBatch
from ..errors import InputError
from ..models import GenericRunner, Model
from ..models.swap import Arguments, HalfBlock, State, hidden_of, pack
from ..objectives import Objective
from .chunks import Chunk, chunk_rows, places_of
from .loading import row_groups, there_and_back
from .local import verified_for

# positions whose states of all depths are compared, or whose logits are differentiated, together
TOKENS_AT_ONCE = 256


def similarity(model: Model, batch: TokenBatch, granularity: str) -> np.ndarray:
    """Compute the mean cosine between the states before each unit and after the last.

    Rows run one at a time, and the states of every depth are held for a row. If weights take turns,
    as many rows run together as fit into `loading.STATES_BYTES`.

    Args:
        model: The model.
        batch: The calibration set.
        granularity: "block" or "sublayer".

    Returns:
        float64[U + 1, U + 1]: for each pair of depths, the mean over all tokens.
    """
    batch, runner = _opened(model, batch, granularity)
    num_units = len(model.unit_names(granularity))
    total = torch.zeros(num_units + 1, num_units + 1, dtype=torch.float64, device=model.device)
    with model.evaluation():
        for _, flat in _states(runner, batch, granularity):
            for start in range(0, len(flat[0]), TOKENS_AT_ONCE):
                part = torch.stack(
                    [h[start : start + TOKENS_AT_ONCE].float() for h in flat], dim=1
                )  # [n, U + 1, D]
                part = torch.nn.functional.normalize(part, dim=-1)
                total += (part @ part.mT).double().sum(0)
    mean = total.cpu().numpy() / batch.num_tokens
    np.fill_diagonal(mean, 1.0)
    return (mean + mean.T) / 2


def angular_distance(model: Model, batch: TokenBatch, granularity: str) -> np.ndarray:
    """Compute the mean of arccos(cosine) / pi between states (Gromov et al., arXiv 2403.17887).

    Args:
        model: The model.
        batch: The calibration set.
        granularity: "block" or "sublayer".

    Returns:
        float64[U + 1, U + 1]: for each pair of depths, the mean over the last tokens of sequences.
        A sequence is a row of text, or a branch of a tree behind its trunk.
    """
    batch, runner = _opened(model, batch, granularity)
    num_units = len(model.unit_names(granularity))
    count = 0
    total = torch.zeros(num_units + 1, num_units + 1, dtype=torch.float64, device=model.device)
    with model.evaluation():
        for row, states in _states(runner, batch, granularity):
            branch = batch.branch[batch.row_starts[row] : batch.row_starts[row + 1]]
            ends = np.flatnonzero(np.diff(branch, append=-1))
            ends = ends[branch[ends] > 0] if batch.row_is_tree[row] else ends
            last = torch.as_tensor(ends, device=model.device)
            part = torch.stack([h[last].double() for h in states], dim=1)
            part = torch.nn.functional.normalize(part, dim=-1)  # in float64: arccos is steep near 1
            total += ((part @ part.mT).clamp(-1, 1).arccos() / torch.pi).sum(0)
            count += len(ends)
    mean = total.cpu().numpy() / count
    np.fill_diagonal(mean, 0.0)
    return (mean + mean.T) / 2


def _states(
    runner: GenericRunner, batch: TokenBatch, granularity: str
) -> Iterator[tuple[int, list[torch.Tensor]]]:
    """Yield each row with its U + 1 dense states [T, D], before each unit and after the last."""
    model = runner.model
    per_block = len(model.unit_names(granularity)) // max(1, model.num_blocks)
    for rows in row_groups(model, batch, per_block * model.num_blocks + 1):
        walks = [_open(runner, batch, row) for row in rows]
        states: list[list] = [[state] for _, state, _ in walks]
        for block in model.weights.blocks():
            for (_, _, arguments), of in zip(walks, states, strict=True):
                for unit in range(per_block * block, per_block * (block + 1)):
                    of.append(runner.run(unit, of[-1], arguments, granularity))
        for row, of in zip(rows, states, strict=True):
            places = torch.as_tensor(places_of(batch, row), device=model.device)
            yield row, [hidden_of(state).flatten(0, 1)[places] for state in of]


def _opened(model: Model, batch: TokenBatch, granularity: str) -> tuple[TokenBatch, GenericRunner]:
    """A calibration set as the model runs it, and the generic runner, verified on its rows."""
    with model.held():
        batch, runner = verified_for(model, "generic", batch, granularity)
    assert isinstance(runner, GenericRunner)
    return batch, runner


def _open(
    runner: GenericRunner, batch: TokenBatch, row: int
) -> tuple[Chunk, torch.Tensor, Arguments]:
    chunk = chunk_rows(batch, [row]).to(runner.device)
    return chunk, *runner.open(chunk.ids, chunk.positions, chunk.branch)


def unit_gradients(model: Model, objective: Objective, granularity: str) -> np.ndarray:
    """Compute the derivative of each sample's loss by a factor of each unit's term.

    Samples run one at a time. The states before each block are kept. On the way back, blocks run
    again one at a time, so that at most the graph of one block is held.

    If weights take turns, only the states before each band are kept, for as many samples as fit
    into `loading.STATES_BYTES`. A band's own states are computed again on the way back.

    Args:
        model: The model.
        objective: The objective; its loss must have a gradient.
        granularity: "block" or "sublayer".

    Returns:
        dL_s/da_i, float64[S, U].

    Raises:
        InputError: The objective has no useful gradient.
    """
    _check_differentiable("unit gradients need", objective)
    batch, runner = _opened(model, objective.batch, "sublayer")
    gradients = np.zeros((objective.num_samples, 2 * model.num_blocks))
    with model.evaluation():
        for rows in row_groups(model, batch):
            samples = [_Sample(runner, objective, batch, row) for row in rows]
            for blocks, is_back in there_and_back(model):
                for sample in samples:
                    if is_back:
                        sample.backward(blocks)
                    else:
                        sample.forward(blocks)
            for sample in samples:
                gradients[sample.number] = sample.gradient
    if granularity == "sublayer":
        return gradients
    return gradients[:, 0::2] + gradients[:, 1::2]


def unit_salience(model: Model, objective: Objective, granularity: str, power: int) -> np.ndarray:
    """Compute the salience of each unit's weights (Shortened LLaMA, arXiv 2402.02834).

    Samples run one at a time, and one unit's graph is held at a time. The gradient of every weight
    of the blocks is held throughout, in at least float32.

    Args:
        model: The model, with all its weights loaded.
        objective: The objective; its loss must have a gradient.
        granularity: "block" or "sublayer".
        power: The exponent.

    Returns:
        The sum over a unit's weights w of |w dL/dw|^power, without biases, float64[U]. L is the
        loss on the whole calibration set.

    Raises:
        InputError: The objective has no useful gradient, or weights are streamed.
    """
    _check_differentiable("unit salience needs", objective)
    model.require_resident(
        "unit salience holds a gradient of every weight, more than where weights are streamed "
        "(weights_bytes) may fit; open it without"
    )
    batch, runner = _opened(model, objective.batch, granularity)
    per_block = 2 if granularity == "sublayer" else 1
    weights = [
        _weights(model.layers[unit // per_block])
        for unit in range(len(model.unit_names(granularity)))
    ]
    totals = [
        [torch.zeros_like(w, dtype=torch.promote_types(w.dtype, torch.float32)) for w in of]
        for of in weights
    ]
    with model.evaluation(), _recording([weight for of in weights for weight in of]):
        for row in range(batch.num_rows):
            chunk = chunk_rows(batch, [row]).to(model.device)
            share = objective.weight * objective.sample_weight[objective.sample]
            _add_weight_gradients(
                runner, chunk, share[chunk.continuation], granularity, weights, totals
            )
        salience = [
            [
                (w.detach().to(t.dtype) * t).abs().pow(power).sum(dtype=torch.float64)
                for w, t in zip(*pair)
            ]
            for pair in zip(weights, totals, strict=True)
        ]
    return np.array([float(sum(of)) for of in salience])


def _add_weight_gradients(
    runner: GenericRunner,
    chunk: Chunk,
    weight: np.ndarray,
    granularity: str,
    weights: Sequence[Sequence[torch.Tensor]],
    totals: Sequence[Sequence[torch.Tensor]],
) -> None:
    """Add one row's gradients to `totals`, unit by unit.

    They are gradients of the sum of weight_m * nll_m over the row's targets m.
    """
    state: State
    state, arguments = runner.open(chunk.ids, chunk.positions, chunk.branch)
    entries = []
    for unit in range(len(weights)):
        entries.append(pack(state))
        state = runner.run(unit, state, arguments, granularity)
    grad = _head_gradient(
        runner, chunk, hidden_of(state), torch.as_tensor(weight, device=runner.device)
    )
    for unit in reversed(range(len(weights))):
        entry = entries.pop().requires_grad_()
        with torch.enable_grad():
            after = pack(runner.run(unit, runner.unpack(entry, unit - 1), arguments, granularity))
        grad, *own = torch.autograd.grad(after, (entry, *weights[unit]), grad, allow_unused=True)
        for total, gradient in zip(totals[unit], own, strict=True):
            if gradient is not None:  # a sublayer does not use the other half's weights
                total += gradient


def _weights(layer: torch.nn.Module) -> list[torch.Tensor]:
    named = layer.named_parameters()
    return [
        tensor for name, tensor in named if tensor.is_floating_point() and not name.endswith("bias")
    ]


@contextmanager
def _recording(parameters: Sequence[torch.Tensor]) -> Iterator[None]:
    """A context in which frozen parameters have gradients, too."""
    frozen = [parameter for parameter in parameters if not parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def _check_differentiable(subject: str, objective: Objective) -> None:
    if not objective.differentiable:
        raise InputError(
            f"{subject} a gradient at the whole model, which {type(objective).__name__} has not; "
            "use Perplexity, TaskMargin or TaskLikelihood"
        )


class _Sample:
    """dL/da of one row for every sublayer, [2 * blocks].

    L is the sum of weight_m * nll_m over the row's targets m.
    """

    def __init__(self, runner: GenericRunner, objective: Objective, batch: TokenBatch, row: int):
        self._runner = runner
        self._chunk, state, self._arguments = _open(runner, batch, row)
        (self.number,) = set(objective.sample[self._chunk.continuation].tolist())
        self._weight = torch.as_tensor(
            objective.weight[self._chunk.continuation], device=runner.device
        )
        self._starts = [state]  # before each call of `forward`
        self._grad: torch.Tensor | None = None
        self.gradient = np.zeros(2 * runner.model.num_blocks)

    def forward(self, blocks: Sequence[int]) -> None:
        self._starts.append(self._through(blocks)[-1])

    def backward(self, blocks: Sequence[int]) -> None:
        runner, entries = self._runner, self._through(blocks)
        self._starts.pop()
        final = entries.pop()
        grad = (
            _head_gradient(runner, self._chunk, final, self._weight)
            if self._grad is None
            else self._grad
        )
        for block in reversed(blocks):
            entry = entries.pop().requires_grad_()
            with torch.enable_grad():
                middle = runner.run(2 * block, entry, self._arguments, "sublayer")
                after = hidden_of(runner.run(2 * block + 1, middle, self._arguments, "sublayer"))
            between = hidden_of(middle)
            if isinstance(
                middle, HalfBlock
            ):  # both halves read the entry, and their terms are added
                grad_middle, (grad_entry,) = grad, torch.autograd.grad(after, entry, grad)
            else:
                grad_middle, grad_entry = torch.autograd.grad(after, (between, entry), grad)
            self.gradient[2 * block] = _dot(grad_middle, between - entry)
            self.gradient[2 * block + 1] = _dot(grad, after - between)
            grad = grad_entry
        self._grad = grad

    def _through(self, blocks: Sequence[int]) -> list[torch.Tensor]:
        """Run blocks, and return the states before each of them and after the last."""
        states = [self._starts[-1]]
        for block in blocks:
            states.append(self._runner.run(block, states[-1], self._arguments))
        return states


def _head_gradient(
    runner: GenericRunner, chunk: Chunk, hidden: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    """dL/d hidden, [B, T, D], computed tile by tile over the positions that predict targets."""
    gradient = torch.zeros_like(hidden, memory_format=torch.contiguous_format)
    flat, flat_gradient = hidden.flatten(0, 1), gradient.flatten(0, 1)
    first = 0
    for tile in chunk.tiles(TOKENS_AT_ONCE):
        states = flat[tile.sources].requires_grad_()
        last = first + len(tile.tokens)
        with torch.enable_grad():
            losses = runner.head.nll(states, tile).double()
            (flat_gradient[tile.sources],) = torch.autograd.grad(
                (losses * weight[first:last]).sum(), states
            )
        first = last
    return gradient


def _dot(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() * b.double()).sum())
