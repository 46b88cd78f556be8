"""A model with variants of its blocks: further units, each of which can take a block's place.

Masks cover the model's own units, 0 to U - 1. Variants have the numbers from U on, and only
sequences name them. No other module knows of variants: runs, cache and store see more units.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from ..errors import InputError, shown
from ..validate import check_integer, check_number
from .compare import agree, probe_ids, probe_tree
from .generic import GenericRunner
from .model import Model, without_training
from .offload.weights import Weights
from .swap import Exchanged, Place, State, accepted_of, first, hidden_of, twin
from .unwrap import unwrap
from .verify import verified
from .version import Watch, digest_of

HALVES = {"no attention": 1, "no mlp": 0}  # the half that stays: 0 attention, 1 MLP

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Variant:
    """One more unit, which can take a block's place.

    Attributes:
        unit: Its number in sequences.
        block: The block whose place and arguments it takes.
        name: Its name, a column of `Evaluator.replace_one`.
        cost: Its cost, by default its number of parameters.
        module: The module that runs, or None for one half of the block.
        half: The half that runs, 0 for attention and 1 for the MLP; -1 with a module.
        fits_trees: Whether branches of a token tree are hidden from each other in it.
        accepted: The names of the arguments that the module takes; None for all that a layer gets.
    """

    unit: int
    block: int
    name: str
    cost: float
    module: nn.Module | None = None
    half: int = -1
    fits_trees: bool = True
    accepted: frozenset[str] | None = None

    def __repr__(self) -> str:
        return f"Variant({self.unit}: {self.name!r} for block {self.block}, cost {self.cost:g})"


class Library(Model):
    """A model, and variants of its blocks.

    `fp.Evaluator(library, objective)` scores the model's own masks, and sequences that may name
    variants. Objectives that compare with the whole model compare with the model alone.

    Args:
        model: A Model, or a transformers model in memory. It is shared and left unchanged.

    Raises:
        InputError: The weights are streamed.

    Examples:
        >>> import fastprune as fp
        >>> library = fp.Library(fp.load_model("demo"))
        >>> library.add(3, "no attention"), library.add(4, "no attention")
        (12, 13)
        >>> ids = [[5, 6, 7, 8, 9], [10, 11, 12]]
        >>> ev = fp.Evaluator(library, fp.Perplexity(fp.TokenBatch.from_ids(ids)))
        >>> ev.replace_one().shape
        (12, 1)
        >>> ev.score(sequences=[(0, 1, 2, 12, 13, 5, 6, 7, 8, 9, 10, 11)]).shape
        (1,)
    """

    def __init__(self, model: Model | nn.Module):
        parent = model if isinstance(model, Model) else Model(unwrap(model))
        parent.require_resident("a library needs all weights; open the model without weights_bytes")
        super().__init__(parent.given, parent.tokenizer, parent.name)
        self.variants: list[Variant] = []
        self._watch: Any = _Watches(self._watch, self.variants)
        self._version = self._watch.read()
        self.towers, self.tokenizer_problem = parent.towers, parent.tokenizer_problem
        if parent.opened is not None and parent.opened[1] == parent.version:
            self.opened = parent.opened[0], self._version

    @property
    def num_variants(self) -> int:
        """The number of variants.

        Examples:
            >>> import fastprune as fp
            >>> fp.Library(fp.load_model("demo")).num_variants
            0
        """
        return len(self.variants)

    @property
    def variant_names(self) -> list[str]:
        """The distinct names of variants, in the order in which they were added.

        They are the columns of `Evaluator.replace_one`.

        Examples:
            >>> import fastprune as fp
            >>> library = fp.Library(fp.load_model("demo"))
            >>> library.add(3, "no attention"), library.add(4, "no attention")
            (12, 13)
            >>> library.variant_names
            ['no attention']
        """
        return list(dict.fromkeys(variant.name for variant in self.variants))

    def add(
        self,
        block: int,
        variant: nn.Module | str,
        name: str | None = None,
        cost: float | None = None,
    ) -> int:
        """Add a variant of a block.

        Args:
            block: The block whose place it takes.
            variant: A module that is called as the block is, with the arguments that its `forward`
                names, and returns states of the same shape and dtype, or a tuple with them in
                front. Or "no attention" or "no mlp": the block without this half.
            name: A name, which variants of other blocks may share; by default the text, or the
                module's class.
            cost: Its cost, in any unit; by default the parameters that it has.

        Returns:
            Its number in sequences.

        Raises:
            InputError: The block does not exist or has a variant of this name. The cost is negative
                or not finite. The module fails, changes its input, returns states of another shape
                or dtype, or lets a token see later ones or other rows.

        Examples:
            >>> import fastprune as fp
            >>> from torch import nn
            >>> class Nothing(nn.Module):
            ...     def forward(self, hidden_states):
            ...         return hidden_states
            >>> fp.Library(fp.load_model("demo")).add(3, Nothing(), name="nothing")
            12
        """
        block = check_integer("block", block, 0, self.num_blocks - 1, "the model's blocks")
        if cost is not None:
            cost = check_number("cost", cost, least=0)
        if not isinstance(variant, nn.Module) and variant not in HALVES:
            raise InputError(
                f"variant must be a module, or one of {', '.join(HALVES)}, not {shown(variant)}",
                argument="variant",
            )
        name = name or (variant if isinstance(variant, str) else type(variant).__name__)
        if any(known.block == block and known.name == name for known in self.variants):
            raise InputError(
                f"block {block} has a variant {name!r} already; give another name=",
                argument="name",
            )
        with self.lock:
            fields = (
                self._half(block, variant)
                if isinstance(variant, str)
                else self._module(block, variant)
            )
            parameters = fields.pop("parameters")
            unit = self.num_blocks + len(self.variants)
            self.variants.append(
                Variant(unit, block, name, parameters if cost is None else cost, **fields)
            )
        return unit

    def cost(self, sequence: Iterable[int]) -> float:
        """Add up the costs of a sequence's units.

        Args:
            sequence: Units in the order in which they run. A repeated unit counts each time.

        Returns:
            The sum. A block costs its number of parameters, a variant the cost that `add` gave it.

        Examples:
            >>> import fastprune as fp
            >>> library = fp.Library(fp.load_model("demo"))
            >>> variant = library.add(3, "no mlp", cost=1000)
            >>> library.cost([variant, variant])
            2000.0
        """
        costs = [_parameters(layer) for layer in self.layers]
        costs += [variant.cost for variant in self.variants]
        return float(sum(costs[unit] for unit in sequence))

    def names_of(self, sequence: Iterable[int]) -> list[str]:
        """Describe the variants of a sequence.

        Args:
            sequence: Units in the order in which they run.

        Returns:
            A text for each variant in the sequence; blocks are left out.

        Examples:
            >>> import fastprune as fp
            >>> library = fp.Library(fp.load_model("demo"))
            >>> variant = library.add(3, "no mlp")
            >>> library.names_of((0, 1, 2, variant))
            ["'no mlp' for block 3"]
        """
        chosen = (self.variants[unit - self.num_blocks] for unit in sequence if self._is_new(unit))
        return [f"{variant.name!r} for block {variant.block}" for variant in chosen]

    def check_exportable(self, sequence: Iterable[int]) -> None:
        """Raise InputError for a sequence with variants, which no config can describe."""
        if names := self.names_of(sequence):
            raise InputError(
                f"a checkpoint's config cannot hold variants: {', '.join(names)}; export a "
                f"sequence of the blocks 0 to {self.num_blocks - 1}",
                argument="sequence",
            )

    def replacements(self) -> list[tuple[int, ...]]:
        """For each variant, the whole model's sequence with the variant in its block's place."""
        whole = tuple(range(self.num_blocks))
        return [(*whole[: v.block], v.unit, *whole[v.block + 1 :]) for v in self.variants]

    def table(self, values: Sequence[float] | np.ndarray) -> np.ndarray:
        """Arrange one value a variant as float64[blocks, names]; nan where there is no variant."""
        names = self.variant_names
        table = np.full((self.num_blocks, len(names)), np.nan)
        for variant, value in zip(self.variants, values, strict=True):
            table[variant.block, names.index(variant.name)] = value
        return table

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        modules = [v.module for v in self.variants if v.module is not None]
        with super().evaluation(), without_training(nn.ModuleList(modules).modules()):
            yield

    @property
    def digest(self) -> str:
        if not self.variants:
            return super().digest

        def work() -> str:
            parts = [
                [v.block, v.half, v.module is not None and self._digest_of(v.module)]
                for v in self.variants
            ]
            text = json.dumps([super(Library, self).digest, parts])
            return hashlib.sha256(text.encode()).hexdigest()

        return self.once("library digest", work)

    def extended(self, runner: T, granularity: str) -> T:
        """Add the variants to a runner, as further units. Raises InputError for sublayers."""
        if granularity != "block":
            raise InputError(
                'a library\'s units are blocks; take granularity="block"', argument="granularity"
            )
        if not self.variants:
            return runner
        if any(variant.module is None for variant in self.variants):
            verified(self, "sublayer")
        generic = runner if isinstance(runner, GenericRunner) else verified(self)
        extended: Any = LibraryRunner(runner, generic, self.num_blocks, tuple(self.variants))
        return extended

    def place_of(self, unit: int) -> Place:
        if not self._is_new(unit):
            return super().place_of(unit)
        variant = self.variants[unit - self.num_blocks]
        layer = self.layers[variant.block]
        if variant.module is None:
            return Place(variant.block, twin(layer), frozenset((variant.half,)))
        as_tuple = verified(self).takes_tuples
        module = Exchanged(layer, variant.module, variant.accepted, as_tuple)
        return Place(variant.block, module)

    def _is_new(self, unit: int) -> bool:
        return self.num_blocks <= unit < self.num_blocks + len(self.variants)

    def _digest_of(self, module: nn.Module) -> str:
        return digest_of(module, self.config, self.dtype, Weights(0))

    def _half(self, block: int, name: str) -> dict[str, Any]:
        layer, sublayers = self.layers[block], verified(self, "sublayer").sublayers[block]
        gone = nn.ModuleList(sublayers.modules(layer, 1 - HALVES[name]))
        parameters = _parameters(layer) - _parameters(gone)
        return {"half": HALVES[name], "parameters": parameters}

    def _module(self, block: int, module: nn.Module) -> dict[str, Any]:
        """Run a module on the states of short rows, and return the fields of its variant."""
        refusal = f"{type(module).__name__} cannot take the place of block {block}"
        signature = inspect.signature(module.forward).parameters.values()
        accepted = None
        if not any(p.kind is p.VAR_KEYWORD for p in signature):
            accepted = frozenset(p.name for p in signature)
        runner = verified(self)
        with self.evaluation(), without_training(module.modules()):
            probe = partial(_probe, self, runner, module, block, accepted, refusal)
            ids = torch.cat([probe_ids(self), probe_ids(self).flip(-1)])
            state, after = probe((ids, None, None), slice(-1, None))
            if not agree(after[:, :-1], state[:, :-1], self.dtype):
                raise InputError(f"{refusal}: a token sees later ones")
            for row in (0, 1):
                alone, _ = probe((ids[row : row + 1], None, None), slice(-1, None))
                if not agree(state[row], alone[0], self.dtype):
                    raise InputError(f"{refusal}: a row sees the others")
            tree, fits = probe_tree(self), True
            if tree[0].shape[1] == 8:  # a trunk and two branches, of which the first changes
                state, after = probe(tree, slice(3, 5))
                fits = agree(after[:, 5:], state[:, 5:], self.dtype)
        return {
            "module": module,
            "parameters": _parameters(module),
            "accepted": accepted,
            "fits_trees": fits,
        }


def _probe(
    model: Model,
    runner: GenericRunner,
    module: nn.Module,
    block: int,
    accepted: frozenset[str] | None,
    refusal: str,
    inputs: tuple,
    changed: slice,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run a module on the states before a block, and on copies changed at some tokens."""
    state, arguments = runner.open(*inputs)
    for before in range(block):
        state = runner.run(before, state, arguments)
    other = state.clone()
    other[:, changed] = other[:, changed].flip(-1) + 1
    outputs = []
    for entry in (state, other):
        version = entry._version
        try:
            output = first(module(entry, **accepted_of(arguments[block], accepted)))
        except Exception as error:  # any kind: the module's own code fails
            line = (str(error).splitlines() or [""])[0]
            raise InputError(f"{refusal}: {type(error).__name__}: {line}") from error
        if not isinstance(output, torch.Tensor):
            raise InputError(f"{refusal}: it returns {type(output).__name__}, not a tensor")
        if output.shape != state.shape or output.dtype != state.dtype:
            raise InputError(
                f"{refusal}: it returns {output.dtype} {list(output.shape)} for "
                f"{state.dtype} {list(state.shape)}"
            )
        if entry._version != version:
            raise InputError(f"{refusal}: it changes its input")
        outputs.append(output)
    return outputs[0], outputs[1]


def _parameters(module: nn.Module) -> float:
    return float(sum(weights.numel() for weights in module.parameters()))


@dataclass
class _Arguments:
    """A chunk's arguments for the inner runner, and for transformers' layers.

    The second kind is made when a module first asks for it.
    """

    inner: Any
    open_layers: Callable[[], list[dict]]

    @cached_property
    def of_layers(self) -> list[dict]:
        return self.open_layers()


class LibraryRunner:
    """Runs a model's blocks on its own path, and variants as further units (see `Runner`).

    A half of a block runs on the block's path. A module gets the arguments that transformers passes
    to the block.
    """

    def __init__(
        self, inner: Any, generic: GenericRunner, num_blocks: int, variants: tuple[Variant, ...]
    ):
        self._inner, self._generic = inner, generic
        self._num_blocks, self._variants = num_blocks, variants
        self.path_name, self.device, self.head = inner.path_name, inner.device, inner.head

    def open(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor | None = None,
        branch: torch.Tensor | None = None,
    ) -> tuple[Any, _Arguments]:
        if branch is not None:
            for variant in self._variants:
                if not variant.fits_trees:
                    raise InputError(
                        f"{variant!r} lets the branches of a token tree see each other, so that it "
                        "cannot score questions"
                    )
        state, arguments = self._inner.open(ids, positions, branch)
        return state, _Arguments(arguments, lambda: self._generic.open(ids, positions, branch)[1])

    def run(
        self, unit: int, state: Any, arguments: _Arguments, granularity: str = "block"
    ) -> State:
        if unit < self._num_blocks:
            return self._inner.run(unit, state, arguments.inner, granularity)
        variant = self._variants[unit - self._num_blocks]
        if variant.module is None:
            half = 2 * variant.block + variant.half
            return hidden_of(self._inner.run(half, state, arguments.inner, "sublayer"))
        own = accepted_of(arguments.of_layers[variant.block], variant.accepted)
        return first(variant.module(state, **own)).contiguous()

    def unpack(self, packed: torch.Tensor, unit: int) -> State:
        return packed

    def numerics(self) -> str:
        return f"{self._inner.numerics()}, variants on {self._generic.numerics()}"


class _Watches:
    """The version of a model together with its variants (see `Watch`)."""

    def __init__(self, parent: Watch, variants: list[Variant]):
        self._parent, self._variants = parent, variants
        self._of_modules: dict[int, Watch] = {}  # by unit
        self._numbers: dict[tuple, int] = {}

    def _all(self) -> list[Watch]:
        for variant in self._variants:
            if variant.module is not None and variant.unit not in self._of_modules:
                self._of_modules[variant.unit] = Watch(variant.module, Weights(0))
        return [self._parent, *self._of_modules.values()]

    def modules(self) -> list[nn.Module]:
        return self._parent.modules()

    def read(self, wait: bool = True) -> int:
        return self._number(tuple(watch.read(wait) for watch in self._all()))

    def settle(self) -> int:
        return self._number(tuple(watch.settle() for watch in self._all()))

    def _number(self, versions: tuple[int, ...]) -> int:
        return self._numbers.setdefault((len(self._variants), *versions), len(self._numbers))
