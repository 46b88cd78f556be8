"""A transformers model as parts: its layers and sizes, with a lock, a version and a
digest. `runner` says how its units run, `surgery` how it loses blocks."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import nn

from ..errors import InputError
from .attention import pinned_attention
from .offload.placement import Towers
from .offload.weights import Weights
from .precision import first_loaded, working_dtype
from .rotary import with_unrounded_frequencies
from .swap import Place, get_module
from .text import config_above, depths, layer_paths, output_head, text_config
from .version import Watch, digest_of

Granularity = Literal["block", "sublayer"]
GRANULARITIES = get_args(Granularity)

T = TypeVar("T")

# one lock for each transformers model, shared by all wrappers: its training flags and recorders
# serve one call at a time
_LOCKS: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()


def lock_of(hf: Any) -> threading.RLock:
    """The lock of a transformers model, shared by everything that wraps it."""
    if not isinstance(hf, nn.Module):
        return threading.RLock()
    return _LOCKS.setdefault(hf, threading.RLock())


@contextmanager
def without_training(modules: Iterable[nn.Module]) -> Iterator[None]:
    """A context in which modules run without dropout; training flags are restored on exit."""
    training = [module for module in modules if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def evaluating(modules: Iterable[nn.Module], device: torch.device) -> Iterator[None]:
    """Like `Model.evaluation`, without the lock and the check; `modules` are all of a model's."""
    kind = device.type
    in_inference, in_autocast = torch.is_inference_mode_enabled(), torch.is_autocast_enabled(kind)
    with (
        without_training(modules),
        torch.inference_mode(False) if in_inference else nullcontext(),
        torch.autocast(kind, enabled=False) if in_autocast else nullcontext(),
        torch.no_grad(),
        pinned_attention(),
    ):
        yield


class Model:
    """The parts of a decoder-only transformers model.

    `load_model` opens one and verifies that it can be run block by block. This constructor finds
    the parts and leaves verification to the first evaluator. The transformers model is shared and
    left unchanged. Rotary frequencies that `.to(dtype)` has rounded are taken unrounded, as a
    folder's are.

    Args:
        hf: A causal language model of transformers, in memory.
        tokenizer: Its tokenizer, or None.
        name: A name for messages; by default the model's own.
        weights: The blocks' weights if these are streamed from files; run a block inside
            `weights.visit` or `weights.blocks` only.

    Raises:
        InputError: The parts were not found, or the family cannot be run block by block.

    Examples:
        >>> import fastprune as fp
        >>> fp.load_model("demo").unit_names("sublayer")[:3]
        ['attn 0', 'mlp 0', 'attn 1']
    """

    # load_model's arguments, and the version that the model had when it was opened
    opened: tuple[tuple, int] | None = None
    tokenizer_problem = ""  # why the folder's tokenizer could not be read
    towers: Towers | None = None  # weights beside the text that stayed in the folder's files

    def __init__(
        self,
        hf: nn.Module,
        tokenizer: Any = None,
        name: str | None = None,
        weights: Weights | None = None,
    ):
        self.lock = lock_of(hf)
        with self.lock:  # no other thread masks it meanwhile
            self._take_apart(hf, name)
            self.weights = weights or Weights(self.num_blocks)
            self._watch = Watch(hf, self.weights)
            self._version = self._watch.read()  # the version of the parts
        self.tokenizer = tokenizer
        self._held = False  # whether `held` holds the version
        self._results: dict[int, dict[Hashable, Any]] = {}  # by version, see `once`

    def _take_apart(self, given: nn.Module, name: str | None) -> None:
        if not isinstance(given, nn.Module) or getattr(given, "config", None) is None:
            kind = type(given).__name__
            hint = "; load_model opens folders, hub ids and 'demo'" * isinstance(given, str)
            raise InputError(f"expected a transformers causal language model, not {kind}{hint}")
        self.given: Any = given  # the caller's own model
        self._take_module()
        self.config: Any = self.hf.config  # until the layers are known
        self.family = getattr(self.config, "model_type", type(given).__name__)
        self.name = name or getattr(self.config, "_name_or_path", "") or self.family
        self.path = self._find_layers()
        self._list: nn.ModuleList = get_module(given, self.path)
        self.num_blocks = len(self._list)
        if not self.num_blocks:
            raise self.refusal("it has no blocks")
        self._take_parts()

    def _take_module(self) -> None:
        hf = with_unrounded_frequencies(self.given)
        if hf is not self.given:
            _LOCKS[hf] = self.lock
        self.hf: Any = hf  # Any: a transformers model has more attributes than a module

    def _take_parts(self) -> None:
        """Set the attributes that depend on the current config and layers."""
        composite = text_config(self.hf.config) is not self.hf.config
        self.config = config_above(self.hf, self.path) if composite else self.hf.config
        self.layers: list[nn.Module] = list(self._list)
        self.device, self.dtype = first_loaded(self.hf).device, working_dtype(self.hf)
        self.vocab_size = int(self.config.vocab_size)
        self.hidden_size = int(self.config.hidden_size)
        self.max_positions: int | None = getattr(self.config, "max_position_embeddings", None)

    def __repr__(self) -> str:
        size = f"{self.num_blocks} blocks of width {self.hidden_size}"
        return (
            f"Model({self.name!r}, {self.family}, {size}, "
            f"{str(self.dtype).removeprefix('torch.')} on {self.device})"
        )

    def unit_names(self, granularity: str) -> list[str]:
        """Name the prunable units, in the order in which they run.

        Args:
            granularity: "block", or "sublayer" for the attention and the MLP of each block.

        Returns:
            U names. The index of a name is the number of its unit in masks.

        Raises:
            InputError: The granularity is another.

        Examples:
            >>> import fastprune as fp
            >>> fp.load_model("demo").unit_names("block")[-1]
            'block 11'
        """
        if granularity not in GRANULARITIES:
            raise InputError(
                f"granularity must be one of {', '.join(GRANULARITIES)}, not {granularity!r}"
            )
        if granularity == "block":
            return [f"block {i}" for i in range(self.num_blocks)]
        return [f"{part} {i}" for i in range(self.num_blocks) for part in ("attn", "mlp")]

    @property
    def output_head(self) -> Any:
        """The module that gives logits."""
        return output_head(self.hf, self.path)

    @property
    def num_variants(self) -> int:
        """The number of variants: units besides those of `unit_names`. A `Library` has some."""
        return 0

    def extended(self, runner: T, granularity: str) -> T:
        """Add this model's variants to its runner, as further units. A plain model has none."""
        return runner

    def place_of(self, unit: int) -> Place:
        """The module that runs as this unit when a list of layers is put together."""
        return Place(unit, self.layers[unit])

    # -- weights -----------------------------------------------------------------------------------

    def require_resident(self, why: str) -> None:
        """Raise InputError, with the reason `why`, if weights are streamed."""
        if self.weights.streamed:
            raise InputError(f"{self.name}: {why}")

    # -- lock, version, digest ---------------------------------------------------------------------

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """A context for forward passes: without gradients, dropout or the caller's autocast.

        Attention runs on the pinned backends. On exit, training flags and switches get their old
        values back. One thread at a time is inside; wrappers of one transformers model share its
        lock.
        """
        with self.lock:
            self.check_whole()
            modules = self._watch.modules() if self.hf is self.given else self.hf.modules()
            with evaluating(modules, self.device):
                yield

    @property
    def version(self) -> int:
        """A number that changes whenever the model's outputs could change. Reads few weights.

        When a change is undone, its old number returns. The version covers module attributes and
        the objects in them, hooks, the functions that forward passes call, pointers, tensor
        versions and sampled values. It does not cover values that only a function's closure holds.
        For streamed weights it covers the size and time of their files.

        torch counts most writes; each counted write gives a new version, even of equal values. A
        write through `.data` is not counted: the version sees it if a sampled value changes.

        Raises:
            InputError: The model's list of blocks was replaced or resized, or a file of streamed
                weights has changed.

        Examples:
            >>> import fastprune as fp
            >>> model = fp.load_model("demo")
            >>> before = model.version
            >>> model.hf.lm_head.weight.data *= 2
            >>> model.version == before
            False
        """
        with self.lock:
            return self._version if self._held else self._at(self._watch.read())

    def begin_version(self) -> int:
        """Like `version`, without waiting for a GPU. `settle_version` compares the values there."""
        with self.lock:
            return self._version if self._held else self._at(self._watch.read(wait=False))

    def settle_version(self) -> int:
        """Finish `begin_version`: compare the values sampled on a GPU, and return the version."""
        with self.lock:
            return self._at(self._watch.settle())

    @contextmanager
    def held(self) -> Iterator[int]:
        """A context in which the version is read once and then reused."""
        with self.lock:
            version, outside = self.version, self._held
            self._held = True
            try:
                yield version
            finally:
                self._held = outside

    def _at(self, version: int) -> int:
        """Return the version. If it is a new one, find the model's parts again."""
        if version != self._version:
            self.check_whole()
            self._version = -1  # holds if the parts are not found: no version is negative
            self._take_module()
            self._take_parts()
            self._version = version
        return version

    @property
    def digest(self) -> str:
        """The SHA-256 of the model's content, as hexadecimal text. Reads all weights.

        It covers the config, every tensor with unsaved buffers, the attributes and hooks of every
        module, and code from outside transformers. It is computed once for each `version`.

        Examples:
            >>> import fastprune as fp
            >>> fp.load_model("demo").digest == fp.load_model("demo").digest
            True
        """
        return self.once(
            "digest", lambda: digest_of(self.hf, self.config, self.dtype, self.weights)
        )

    def once(self, name: Hashable, work: Callable[[], T]) -> T:
        """Compute `work` under `evaluation`, once for each `version`.

        Results of the last two versions are kept. An exception is raised and not remembered.
        """
        with self.lock:
            self.check_whole()
            with self.held() as version:
                results = self._results.pop(version, {})
                self._results = dict([*self._results.items(), (version, results)][-2:])
                if name not in results:
                    with self.evaluation():
                        results[name] = work()
                return results[name]

    @property
    def is_whole(self) -> bool:
        """Whether the transformers model still has its list of blocks, of the same length."""
        blocks = get_module(self.given, self.path)
        return blocks is self._list and len(blocks) == self.num_blocks

    def check_whole(self) -> None:
        """Raise InputError unless the model `is_whole`."""
        if not self.is_whole:
            raise InputError(
                f"{self.name}: its blocks are not those that it was opened with; a model that was "
                "opened outside of fp.masked serves outside, one opened inside serves inside"
            )

    # -- finding the parts -------------------------------------------------------------------------

    def refusal(self, why: str) -> InputError:
        """The error for a family that cannot be run block by block; `why` is its reason."""
        return InputError(
            f"{self.name}: the family {self.family!r} cannot be run block by block: {why}"
        )

    def _find_layers(self) -> tuple[str, ...]:
        """Attribute path from the model to its list of decoder layers."""
        text = text_config(self.config)
        if any(getattr(config, "is_encoder_decoder", False) for config in (self.config, text)):
            raise self.refusal("it is an encoder-decoder")
        if getattr(text, "num_kv_shared_layers", 0):
            raise self.refusal("its layers share keys and values across depth")
        if any(hasattr(module, "_hf_hook") for module in self.hf.modules()):
            raise InputError(
                f"{self.name}: load the model on one device, without device_map offloading"
            )
        paths = layer_paths(self.hf)
        if len(paths) != 1:
            stated = " or ".join(map(str, dict.fromkeys(depths(text).values())))
            if not stated:
                raise self.refusal("its config states no number of decoder layers")
            raise self.refusal(
                f"{'no' if not paths else 'more than one'} list of {stated} decoder layers was "
                f"found"
            )
        if output_head(self.hf, paths[0]) is None:
            raise self.refusal("it has no language-model head")
        return paths[0]
