"""The costs of units, budgets on the pruned model, and the measured speed of a model.

A cost counts parameters, their bytes, bytes of the key-value cache per token, or milliseconds of a
forward pass. Weights that several units share count once. They are saved when the last of these
units is removed.
"""

from __future__ import annotations

import math
import re
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .errors import InputError, shown
from .validate import check_integer, check_number, check_one_of

if TYPE_CHECKING:
    import torch
    from torch import nn

    from .models import Model

KINDS = ("params", "bytes", "kv_bytes", "latency_ms")
UNITS = {
    "params": "parameters",
    "bytes": "bytes of parameters",
    "kv_bytes": "bytes of the key-value cache per token",
    "latency_ms": "ms of a forward pass",
}
SEQ_LEN = 512  # tokens of a timed row, unless the model takes fewer
REPEATS = 5  # timed passes; their median counts
MOST_TOKENS = 10**9 - 1  # the largest batch_size and seq_len
_PERCENT = re.compile(r"(\d{1,3}(?:\.\d{1,9})?)\s*%")
_AMOUNT = re.compile(r"(\d{1,18}(?:\.\d{1,24})?(?:e[+-]?\d{1,3})?)\s*([KMGT]i?)?B?", re.IGNORECASE)
_SETTING = re.compile(r"(batch_size|seq_len)\s*=\s*(\d{1,9})")
_PREFIXES = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
_PREFIXES |= {f"{name}i": 2.0 ** (10 * power) for power, name in enumerate("kmgt", 1)}


@dataclass(frozen=True)
class Budget:
    """The most that a pruned model may cost, in one kind of cost.

    A search removes units until the remaining model is within the budget. The result never exceeds
    it, and putting any removed unit back would exceed it. Give exactly one amount: a number, or a
    share of the whole model's cost such as "75%". `Budget.parse` reads what `str` prints.

    Args:
        params: Parameters, with embeddings and head. Shared parameters count once.
        bytes: Bytes of the parameters, in the dtype in which the model was opened.
        kv_bytes: Bytes of the key-value cache per token of context.
        latency_ms: Milliseconds of a forward pass of transformers' own code, measured on this
            machine.
        batch_size: Rows of the timed pass, for latency_ms.
        seq_len: Tokens of each timed row. By default 512, or fewer if the model takes fewer.

    Raises:
        InputError: There is not exactly one amount, or it is negative, not finite, or a share
            above 100 %.

    Examples:
        >>> import fastprune as fp
        >>> fp.Budget(params="75%").limit(whole=2_000_000)
        1500000.0
        >>> str(fp.Budget(bytes=1e9))
        'bytes=1000000000'
    """

    params: float | str | None = None
    bytes: float | str | None = None
    kv_bytes: float | str | None = None
    latency_ms: float | str | None = None
    batch_size: int = 1
    seq_len: int | None = None

    def __post_init__(self) -> None:
        amounts = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(amounts) != 1:
            number = "none" if not amounts else " and ".join(amounts)
            raise InputError(f"a budget has one of {', '.join(KINDS)}, not {number}")
        check_integer("batch_size", self.batch_size, 1, MOST_TOKENS)
        if self.seq_len is not None:
            check_integer("seq_len", self.seq_len, 1, MOST_TOKENS)
        self.limit(1.0)
        (kind,), amount = amounts, self.amount
        # one form for each value, so that a budget equals the one read from its text
        plain = "".join(amount.split()) if isinstance(amount, str) else float(amount) + 0.0
        object.__setattr__(self, kind, plain)

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read a budget from text.

        Args:
            text: KIND=AMOUNT, such as "params=75%", "bytes=1.5G", "kv_bytes=64Ki" or
                "latency_ms=75%,batch_size=4,seq_len=128".

        Returns:
            The budget.

        Raises:
            InputError: The text has another form, or names another kind.

        Examples:
            >>> import fastprune as fp
            >>> fp.Budget.parse("bytes=1.5G").amount
            1500000000.0
        """
        first, *settings = str(text).split(",")
        kind, equals, amount = (part.strip() for part in first.partition("="))
        if not equals:
            raise InputError(
                f"budget takes KIND=AMOUNT, such as params=75% or bytes=1.5G, not {shown(text)}",
                argument="budget",
            )
        kind = check_one_of("budget", kind.replace("-", "_"), KINDS)
        number = _AMOUNT.fullmatch(amount)
        values: dict[str, Any] = {kind: amount}
        if number:
            values[kind] = float(number[1]) * _PREFIXES[(number[2] or "").lower()]
        for setting in settings:
            of = _SETTING.fullmatch(setting.strip())
            if of is None:
                raise InputError(
                    f"budget takes batch_size=ROWS and seq_len=TOKENS behind its amount, not "
                    f"{shown(setting.strip())}",
                    argument="budget",
                )
            values[of[1]] = int(of[2])
        return cls(**values)

    @property
    def kind(self) -> str:
        """The kind of cost: "params", "bytes", "kv_bytes" or "latency_ms"."""
        return next(kind for kind in KINDS if getattr(self, kind) is not None)

    @property
    def is_measured(self) -> bool:
        """Whether the costs are measured times, which another run measures otherwise."""
        return self.kind == "latency_ms"

    @property
    def amount(self) -> float | str:
        """The amount: a float, or a share such as "75%"."""
        return getattr(self, self.kind)

    def limit(self, whole: float) -> float:
        """Compute the amount as a number.

        Args:
            whole: The cost of the whole model, of which a share is taken.

        Returns:
            The most that the pruned model may cost.

        Examples:
            >>> import fastprune as fp
            >>> fp.Budget(kv_bytes="50%").limit(whole=4096)
            2048.0
        """
        amount, share = self.amount, None
        if isinstance(amount, str):
            share = _PERCENT.fullmatch(amount.strip())
            if share is None or float(share[1]) > 100:
                raise InputError(
                    f'{self.kind} must be a number of at least 0 or a share such as "75%", not '
                    f"{shown(amount)}",
                    argument=self.kind,
                )
            return whole * float(share[1]) / 100
        return check_number(self.kind, amount, least=0)

    def __str__(self) -> str:
        amount = self.amount if isinstance(self.amount, str) else repr(self.amount)
        amount = amount.removesuffix(".0")
        rows = f",batch_size={self.batch_size}" * (self.batch_size != 1)
        tokens = "" if self.seq_len is None else f",seq_len={self.seq_len}"
        return f"{self.kind}={amount}{rows}{tokens}"


@dataclass(frozen=True)
class UnitCosts:
    """The cost of a model, and the part of it that each unit's removal saves.

    Attributes:
        kind: One of `KINDS`.
        total: The cost of the whole model.
        own: For each unit, the cost of the weights that no other unit has.
        shared: Sets of units that share weights, each with the cost saved when all units
            of the set are removed.

    Examples:
        >>> from fastprune.costs import UnitCosts
        >>> costs = UnitCosts("params", 10.0, (2.0, 3.0, 3.0), ((frozenset({1, 2}), 1.0),))
        >>> costs.after([1]), costs.after([1, 2])
        (7.0, 3.0)
    """

    kind: str
    total: float
    own: tuple[float, ...]
    shared: tuple[tuple[frozenset[int], float], ...] = ()

    def after(self, removed: Iterable[int]) -> float:
        """The cost of the model without these units."""
        units = frozenset(removed)
        saved = math.fsum(self.own[unit] for unit in units)
        saved += math.fsum(cost for sharing, cost in self.shared if sharing <= units)
        return self.total - saved

    def saves(self, unit: int) -> bool:
        """Whether removing a unit can save anything."""
        return self.own[unit] > 0 or any(unit in units for units, _ in self.shared)

    def alike(self, units: Sequence[int]) -> bool:
        """Whether removing any one of these units saves the same amount."""
        own = {self.own[unit] for unit in units}
        return len(own) < 2 and not any(set(units) & shared for shared, _ in self.shared)


def unit_costs(
    model: Model, granularity: str, kind: str, batch_size: int = 1, seq_len: int | None = None
) -> UnitCosts:
    """Compute or measure the costs of a model's units, once for each version of the model.

    Args:
        model: The model.
        granularity: "block" or "sublayer".
        kind: One of `KINDS`.
        batch_size: Rows of the timed pass.
        seq_len: Tokens of each timed row; None for `SEQ_LEN`.

    Returns:
        The cost of the model and of each unit.

    Raises:
        InputError: The kind is unknown, the family's key-value cache has no entry for each layer,
            or the kind runs the model while its weights are streamed.
    """
    check_one_of("kind", kind, KINDS)

    def work() -> UnitCosts:
        if kind == "params":
            return _of_parameters(model, granularity, kind, lambda weights: weights.numel())
        if kind == "bytes":
            return _of_parameters(model, granularity, kind, lambda weights: weights.nbytes)
        model.require_resident(f"{kind} runs the model; open it without weights_bytes")
        if kind == "kv_bytes":
            return _of_cache(model, granularity)
        return _of_time(model, granularity, batch_size, seq_len)

    return model.once(("unit costs", granularity, kind, batch_size, seq_len), work)


def unit_modules(model: Model, granularity: str) -> list[nn.Module]:
    """The module of each unit: a block, or the modules of one of its halves."""
    from torch import nn

    from .models.verify import verified

    if granularity == "block":
        return list(model.layers)
    halves = zip(model.layers, verified(model, granularity).sublayers, strict=True)
    return [
        nn.ModuleList(sublayers.modules(layer, half))
        for layer, sublayers in halves
        for half in (0, 1)
    ]


def _of_parameters(
    model: Model, granularity: str, kind: str, weigh: Callable[[torch.Tensor], int]
) -> UnitCosts:
    parts = unit_modules(model, granularity)
    owners: dict[int, set[int]] = {}
    for unit, part in enumerate(parts):
        for weights in part.parameters():
            owners.setdefault(id(weights), set()).add(unit)
    inside = {id(module) for part in parts for module in part.modules()}
    for module in model.hf.modules():
        if id(module) not in inside:  # its weights stay, also those that it shares with a unit
            for weights in module.parameters(recurse=False):
                owners.pop(id(weights), None)
    sizes = {id(weights): weigh(weights) for weights in model.hf.parameters()}
    own, shared = [0.0] * len(parts), dict[frozenset[int], float]()
    for weights_id, units in owners.items():
        size = float(sizes[weights_id])
        if len(units) == 1:
            own[next(iter(units))] += size
        else:
            shared[frozenset(units)] = shared.get(frozenset(units), 0.0) + size
    return UnitCosts(kind, float(sum(sizes.values())), tuple(own), tuple(shared.items()))


def _of_cache(model: Model, granularity: str) -> UnitCosts:
    """The bytes of keys and values that a second token adds to each layer.

    A state of fixed size adds none.
    """
    from .models.compare import probe_ids

    ids = probe_ids(model)
    one, two = (_cache_bytes(model, ids[:, :length]) for length in (1, 2))
    own = [float(after - before) for before, after in zip(one, two, strict=True)]
    if granularity == "sublayer":
        own = [size for block_bytes in own for size in (block_bytes, 0.0)]
    return UnitCosts("kv_bytes", math.fsum(own), tuple(own))


def _cache_bytes(model: Model, ids: torch.Tensor) -> list[int]:
    import torch

    refusal = f"kv_bytes: the cache of the family {model.family!r} has no entry for each block"
    try:
        cache: Any = model.hf(input_ids=ids, use_cache=True).past_key_values
        entries = [
            [value for value in vars(layer).values() if isinstance(value, torch.Tensor)]
            for layer in cache.layers
        ]
    except (AttributeError, TypeError, RuntimeError, ValueError) as error:
        raise InputError(refusal) from error
    if len(entries) != model.num_blocks:
        raise InputError(refusal)
    return [
        sum(tensor.nbytes for tensor in tensors if tensor.dim() >= 3) // len(ids)
        for tensors in entries
    ]


def _of_time(model: Model, granularity: str, batch_size: int, seq_len: int | None) -> UnitCosts:
    """The median milliseconds of each unit and of the whole pass.

    Units of equal shape get one value, the median over all of their runs.
    """
    from .models.open import open_runner
    from .models.surgery import per_layer
    from .models.verify import Needs

    ids = _timed_ids(model, batch_size, seq_len)
    runner: Any = open_runner(model, "generic", Needs(granularity))
    num_units = len(model.unit_names(granularity))
    times: list[list[float]] = [[] for _ in range(num_units)]
    for _ in range(REPEATS + 1):
        state, arguments = runner.open(ids)
        for unit in range(num_units):
            started = _now(model)
            state = runner.run(unit, state, arguments, granularity)
            times[unit].append(_now(model) - started)
    lists = per_layer(model)
    per_block = num_units // model.num_blocks
    shapes = [
        (
            unit % per_block,
            tuple(str(entries[unit // per_block]) for entries in lists.values()),
            tuple(type(module).__name__ for module in part.modules()),
            tuple(tuple(weights.shape) for weights in part.parameters()),
        )
        for unit, part in enumerate(unit_modules(model, granularity))
    ]
    medians = {
        shape: statistics.median(
            seconds
            for unit, unit_times in enumerate(times)
            if shapes[unit] == shape
            for seconds in unit_times[1:]  # the first one warms up
        )
        for shape in set(shapes)
    }
    own = tuple(1000 * medians[shape] for shape in shapes)
    total = 1000 * _seconds_of(model, model.hf, ids)
    return UnitCosts("latency_ms", max(total, math.fsum(own)), own)


def tokens_per_second(
    model: Model, hf: Any, batch_size: int = 1, seq_len: int | None = None
) -> float:
    """Measure the tokens that a transformers model reads per second.

    Args:
        model: The `Model` from which hf was derived.
        hf: The transformers model, such as the one that `fp.masked` yields.
        batch_size: Rows of a pass.
        seq_len: Tokens of each row; None for 512, or fewer if the model takes fewer.

    Returns:
        Tokens per second, from the median time of 5 forward passes.
    """
    from .models.model import evaluating

    with evaluating(hf.modules(), model.device):
        ids = _timed_ids(model, batch_size, seq_len)
        return ids.numel() / _seconds_of(model, hf, ids)


def _timed_ids(model: Model, batch_size: int, seq_len: int | None) -> torch.Tensor:
    import torch

    length = seq_len or min(SEQ_LEN, model.max_positions or SEQ_LEN)
    if model.max_positions and length > model.max_positions:
        raise InputError(
            f"seq_len {length} is longer than the model's {model.max_positions} positions",
            argument="seq_len",
            most=model.max_positions,
        )
    return (torch.arange(batch_size * length, device=model.device) % model.vocab_size).view(
        batch_size, length
    )


def _seconds_of(model: Model, hf: Any, ids: torch.Tensor) -> float:
    times = []
    for _ in range(REPEATS + 1):
        started = _now(model)
        hf(input_ids=ids, use_cache=False)
        times.append(_now(model) - started)
    return statistics.median(times[1:])  # the first one warms up


def _now(model: Model) -> float:
    if model.device.type == "cuda":
        import torch

        torch.cuda.synchronize(model.device)
    return time.perf_counter()


def before_and_after(
    model: Model,
    removed: Sequence[int],
    granularity: str = "block",
    measure_speed: bool = False,
) -> dict[str, tuple[float, float]]:
    """Compute the costs of the whole model and of the model without some units.

    Args:
        model: The model.
        removed: Indices of the removed units.
        granularity: "block" or "sublayer".
        measure_speed: Also measure the tokens per second of both models.

    Returns:
        (before, after) under "params", "bytes" and, if measured, "tokens_per_second".
    """
    sizes: dict[str, tuple[float, float]] = {}
    for kind in ("params", "bytes"):
        costs = unit_costs(model, granularity, kind)
        sizes[kind] = costs.total, costs.after(removed)
    if measure_speed:
        from .models.surgery import masked

        before = tokens_per_second(model, model.given)
        with masked(model, removed, granularity=granularity) as pruned:
            sizes["tokens_per_second"] = before, tokens_per_second(model, pruned)
    return sizes
