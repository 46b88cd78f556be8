"""Any decoder-only transformers model, run unit by unit through its own layers.

A decoder layer needs what its model's forward passes to it: position embeddings, a mask per layer
type, and so on. `Model.open` runs the model's own forward with recorders in place of the layers, so
that it learns these arguments for any family without naming it, at the cost of the embeddings
alone.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import threading
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property
from typing import Any, overload

import torch
from torch import nn

from fastprune_kernels.reference import kl_from, log_probabilities, token_nll

from ..errors import InputError
from ..masks import check_removed
from .attention import pinned_attention
from .identity import Identity
from .offload.weights import Weights
from .precision import working_dtype
from .proof import find_sublayers, prove_blocks, prove_tree
from .rotary import switch_length, with_unrounded_frequencies
from .runner import Targets
from .swap import (
    Arguments,
    HalfBlock,
    Head,
    Recorder,
    State,
    Sublayers,
    first,
    get_module,
    with_replaced,
)
from .tree import few_branches, layer_windows, tree_mask

LAYERS_NAMES = ("layers", "h", "blocks")
FINAL_NORM_NAMES = (
    "norm",
    "final_layer_norm",
    "ln_f",
    "final_layernorm",
    "final_norm",
    "norm_f",
    "embedding_norm",
)
GRANULARITIES = ("block", "sublayer")
LONGEST_CHECKED = 2048  # tokens of a tree that is compared with its sequences


# of each transformers model, whoever wraps it: its training flags and recorders serve one call at a
# time
_TURNS: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()


class Model:
    """A decoder-only transformers model as a sequence of units.

    hf: the transformers model, shared and left as it was found. tokenizer: or None. name: for
    messages. Rotary frequencies that `.to(dtype)` has rounded are taken unrounded, as they are in
    the same model loaded from a folder.
    weights: of a model that was opened without its blocks' weights; who runs a block does so inside
    of `visit`. Raises InputError, before any long work, when the family cannot be run block by
    block.

    >>> import fastprune as fp
    >>> fp.load_model("demo").unit_names("sublayer")[:3]
    ['attn 0', 'mlp 0', 'attn 1']
    """

    path_name = "generic"  # beside "fused (...)", see FusedModel
    opened: tuple[tuple, tuple] | None = (
        None  # of what load_model opened: its arguments, and the state it then had
    )

    def __init__(
        self,
        hf: nn.Module,
        tokenizer: Any = None,
        name: str | None = None,
        weights: Weights | None = None,
    ):
        self.weights = weights
        self.turn = (
            _TURNS.setdefault(hf, threading.RLock())
            if isinstance(hf, nn.Module)
            else threading.RLock()
        )
        with self.turn:  # nobody masks it meanwhile
            self._open(hf, tokenizer, name)

    def _open(self, given: nn.Module, tokenizer: Any, name: str | None) -> None:
        self.given: Any = given  # the caller's own model
        self.tokenizer = tokenizer
        hf = with_unrounded_frequencies(given)
        self.hf: Any = hf  # with what a transformers model has and a module has not
        if hf is not given:
            _TURNS[hf] = self.turn
        self.config: Any = getattr(hf, "config", None)
        self.family = getattr(self.config, "model_type", type(hf).__name__)
        self.name = name or getattr(self.config, "_name_or_path", "") or self.family
        self.path = self._find_layers()
        assert self.config is not None  # or it was refused
        self._list: nn.ModuleList = get_module(given, self.path)
        self.layers: list[nn.Module] = list(self._list)
        self.num_blocks = len(self.layers)
        if not self.num_blocks:
            raise self.refusal("it has no blocks")
        self.device, self.dtype = next(hf.parameters()).device, working_dtype(hf)
        self.vocab_size = int(self.config.vocab_size)
        self.hidden_size = int(self.config.hidden_size)
        self.max_positions: int | None = getattr(self.config, "max_position_embeddings", None)
        self.final_norm = self._find_final_norm()
        self._signature = inspect.signature(type(self.layers[0]).forward)
        self.recorder = Recorder(self.path, hf)
        self.head = Head(self.path, hf)
        self._sublayers: list[Sublayers] = []  # none until they are required
        self._identity = Identity(self)
        self._passed: tuple[tuple | None, set[Hashable]] = (
            None,
            set(),
        )  # the state, and what was checked in it
        with self.evaluation():
            prove_blocks(self)

    def __repr__(self) -> str:
        size = f"{self.num_blocks} blocks of width {self.hidden_size}"
        return (
            f"Model({self.name!r}, {self.family}, {size}, "
            f"{str(self.dtype).removeprefix('torch.')} on {self.device})"
        )

    # -- units -------------------------------------------------------------------------------------

    @cached_property
    def rotary_switch(self) -> int | None:
        """The row length beyond which rotary frequencies change for all that runs together; None
        where they do not."""
        return switch_length(self.config)

    def unit_names(self, granularity: str) -> list[str]:
        """Names of the prunable units, in the order in which they run."""
        if granularity == "block":
            return [f"block {i}" for i in range(self.num_blocks)]
        return [f"{part} {i}" for i in range(self.num_blocks) for part in ("attn", "mlp")]

    def require(self, granularity: str) -> None:
        """Raise InputError unless the model's units of this granularity can be run."""
        if granularity not in GRANULARITIES:
            raise InputError(
                f"granularity must be one of {', '.join(GRANULARITIES)}, not {granularity!r}"
            )
        if granularity == "sublayer" and not self._sublayers:
            with self.evaluation():
                self._sublayers = find_sublayers(self)

    @property
    def bands(self) -> tuple[range, ...]:
        """The blocks whose weights are loaded together: all of them, where all stay loaded."""
        return (range(self.num_blocks),) if self.weights is None else self.weights.bands

    def visit(self, bands: Iterable[Sequence[int]] | None = None) -> Iterator[Sequence[int]]:
        """Groups of blocks, by default all `bands`, each with its weights at hand while it is the
        current one."""
        bands = self.bands if bands is None else bands
        return iter(bands) if self.weights is None else self.weights.visit(bands)

    def visited_blocks(self) -> Iterator[int]:
        """All blocks, each with its weights at hand while it is the current one."""
        return (block for band in self.visit() for block in band)

    @overload
    def run(self, unit: int, state: State, arguments: Arguments) -> torch.Tensor: ...

    @overload
    def run(self, unit: int, state: State, arguments: Arguments, granularity: str) -> State: ...

    def run(
        self, unit: int, state: State, arguments: Arguments, granularity: str = "block"
    ) -> State:
        """Run one unit on a state and return the next state. Skipping a unit is not calling
        this."""
        if granularity == "block":
            return first(self.layers[unit](state, **arguments[unit]))
        block, is_mlp = divmod(unit, 2)
        sublayers = self._sublayers[block]
        step = sublayers.mlp if is_mlp else sublayers.attention
        return step(state, arguments[block])

    def pack(self, state: State) -> torch.Tensor:
        """A state as one tensor: [B, T, D], or [3, B, T, D] inside of a parallel block."""
        return torch.stack(state[:3]) if isinstance(state, HalfBlock) else state

    def unpack(self, packed: torch.Tensor, unit: int) -> State:
        """The state that was packed, after a unit."""
        if packed.dim() == 3:
            return packed
        hidden, entry, attention = packed
        return HalfBlock(hidden, entry, attention, self._sublayers[unit // 2])

    def open(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor | None = None,
        branch: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, Arguments]:
        """Embed rows of tokens, [B, T, D], and work out the arguments of every layer.

        ids int64[B, T]. Plain causal rows need no more. Token trees give positions int64[B, T] and
        branch int64[B, T]: a token sees the earlier tokens of the trunk (branch 0) and of its own
        branch.
        """
        if branch is None:
            state, calls = self.recorder(input_ids=ids)
            return state, [self._by_name(args, kwargs) for args, kwargs in calls]
        assert positions is not None
        windows = layer_windows(self.config, self.num_blocks)
        masks = {
            window: self._layer_mask(tree_mask(positions, branch, window))
            for window in {None, *windows}
        }
        state, calls = self.recorder(
            input_ids=ids, position_ids=positions, attention_mask=masks[None]
        )
        arguments = [self._by_name(args, kwargs) for args, kwargs in calls]
        for layer, window in zip(arguments, windows, strict=True):
            layer["attention_mask"] = masks[window]
        return state, arguments

    def embed(
        self, ids: torch.Tensor, positions: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, Arguments]:
        """As `open`, for who does without the layers' masks: what stands in their place weighs
        nothing."""
        nothing = torch.ones((1, 1, 1, 1), dtype=torch.bool, device=ids.device)
        nothing = nothing.expand(len(ids), 1, ids.shape[1], ids.shape[1])
        state, calls = self.recorder(input_ids=ids, position_ids=positions, attention_mask=nothing)
        return state, [self._by_name(args, kwargs) for args, kwargs in calls]

    def normed(self, states: torch.Tensor) -> torch.Tensor:
        """Final states [P, D] as the head reads them."""
        return self.final_norm(states)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [P, V] of hidden states [P, D] taken before the final norm, in the model's
        dtype."""
        return self.head(self.normed(hidden))

    def nll(self, states: torch.Tensor, tile: Targets) -> torch.Tensor:
        """-log p of a tile's targets, [M], from the final states at its sources, [P, D]."""
        return token_nll(self.logits(states), tile.rows, tile.tokens)

    def misses(self, states: torch.Tensor, tile: Targets) -> torch.Tensor:
        """1 where a tile's target is not the most likely token, else 0, [M], from the final states
        [P, D]."""
        return (self.logits(states).argmax(dim=-1)[tile.rows] != tile.tokens).float()

    def kl_reference(self, dense: torch.Tensor) -> torch.Tensor:
        """What `kl` compares with, of the dense model's final states [P, D]: log-probabilities,
        float32[P, V]."""
        return log_probabilities(self.logits(dense))

    def kl(self, reference: torch.Tensor, states: torch.Tensor, tile: Targets) -> torch.Tensor:
        """KL(dense || masked) where a tile's targets are predicted, [M], from the masked one's
        final states [P, D]."""
        return kl_from(reference, self.logits(states))[tile.rows]

    def head_bytes(self, measure: str) -> int:
        """About what a measure holds for each position: logits, their float32 copy and its
        log-softmax; for "kl" the dense model's too; for those that compare states, both models',
        and float64 copies of them."""
        if measure in ("cosine", "nmse"):
            return self.hidden_size * (2 * self.dtype.itemsize + 5 * 8)
        return self.vocab_size * (self.dtype.itemsize + 8) * (3 if measure == "kl" else 1)

    def numerics(self) -> str:
        """What the bits of a score depend on in this path, besides torch and transformers."""
        return self.path_name

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """No gradients, no dropout, no autocast of the caller, and attention by the pinned
        backends; every training flag and switch is put back afterwards.

        Threads take turns: one at a time is inside, whatever wraps the same transformers model.
        """
        with self.turn:
            self._check_whole()
            training = [module for module in self.hf.modules() if module.training]
            for module in training:
                module.training = False
            try:
                without_autocast = torch.autocast(self.device.type, enabled=False)
                with (
                    torch.inference_mode(False),
                    torch.no_grad(),
                    without_autocast,
                    pinned_attention(),
                ):
                    yield
            finally:
                for module in training:
                    module.training = True

    @property
    def weights_hash(self) -> str:
        """SHA-256 over the config, every tensor (buffers that are not saved, too), the plain
        attributes of every module, and its hooks. All is read once, and again when something of it
        was replaced or changed in place since (through `.data`: where it shows in a few values of
        each tensor)."""
        self._check_whole()
        return self._identity.hash()

    @property
    def state(self) -> tuple:
        """What of the model decides its results, equal as long as nothing was changed; only a few
        weights are read.

        Of weights that stay in files, their size and time. Raises InputError where a file has
        changed.
        """
        return self._identity.state()

    def once(self, name: Hashable, check: Callable[[], None]) -> None:
        """Run a check that raises where it fails; not again where it has passed and the model is as
        it was then."""
        with self.turn:
            state = self.state
            if self._passed[0] != state:
                self._passed = (state, set())
            if name not in self._passed[1]:
                with self.evaluation():
                    check()
                self._passed[1].add(name)

    @cached_property
    def runs_without_blocks(self) -> bool:
        """Whether the family's own forward pass works when every block is removed."""
        try:
            with self.evaluation():
                self.pruned(range(self.num_blocks))(input_ids=self.probe_ids(), use_cache=False)
        except Exception:  # whatever it is, the family's own code cannot do it
            return False
        return True

    def pruned(self, removed: Iterable[int]) -> Any:
        """The transformers model without these blocks: a shallow copy that shares all weights, see
        `ordered`."""
        gone = set(removed)
        return self.ordered([i for i in range(self.num_blocks) if i not in gone])

    def ordered(self, sequence: Sequence[int], copies: bool = False) -> Any:
        """The transformers model with these blocks in this order: a shallow copy that shares all
        weights.

        Its config has num_hidden_layers and every per-layer list as the blocks stand. copies: a
        block that stands again has weights of its own, as a checkpoint needs it; otherwise it is
        the same module. Raises InputError where the blocks' weights stay in files.
        """
        if sequence and self.weights is not None:
            raise InputError(
                f"{self.name}: its weights are streamed (weights_bytes); open it without, to take "
                f"it whole"
            )
        config, blocks = self._config_of(sequence), []
        for place, block in enumerate(sequence):
            again = copies and block in sequence[:place]
            blocks.append(copy.deepcopy(self.layers[block]) if again else self.layers[block])
        ordered = with_replaced(self.hf, self.path, nn.ModuleList(blocks))
        owner: Any = ordered
        for name in self.path:
            if getattr(owner, "config", None) is not None:
                owner.config = config
            owner = getattr(owner, name)
        return ordered

    @contextmanager
    def masked(self, removed: Iterable[int]) -> Iterator[Any]:
        """See `masked`, the function."""
        if self.weights is not None:
            raise InputError(
                f"{self.name}: its weights are streamed (weights_bytes); open it without, to mask "
                f"it in place"
            )
        with self.turn:
            self._check_whole()
            gone = set(check_removed(removed, self.num_blocks))
            kept = [i for i in range(self.num_blocks) if i not in gone]
            if not kept and not self.runs_without_blocks:
                raise InputError(
                    f"nothing is kept, and the family {self.family!r} cannot run without blocks"
                )
            before: list[
                tuple[Any, str, Any]
            ] = []  # (object, attribute, value), put back in the end
            *above, last = self.path
            base = get_module(self.given, above)
            try:
                config, owner = self._config_of(kept), self.given
                for name in (*above, None):
                    _set(before, owner, "config", config)
                    owner = name and getattr(owner, name)
                for place, block in enumerate(kept):  # a cache has its entries by these indices
                    for module in self.layers[block].modules():
                        if isinstance(vars(module).get("layer_idx"), int):
                            _set(before, module, "layer_idx", place)
                base._modules[last] = nn.ModuleList(self.layers[i] for i in kept)
                yield self.given
            finally:
                base._modules[last] = self._list
                for owner, name, value in reversed(before):
                    setattr(owner, name, value)

    @property
    def is_whole(self) -> bool:
        """Whether the transformers model has the blocks that it had when it was opened."""
        return get_module(self.given, self.path) is self._list

    def _check_whole(self) -> None:
        if not self.is_whole:
            raise InputError(
                f"{self.name}: its blocks are not those that it was opened with; what was opened "
                f"outside of fp.masked "
                "serves outside, what was opened inside serves there"
            )

    def _config_of(self, sequence: Sequence[int]) -> Any:
        """The config of the model with these blocks: num_hidden_layers and every per-layer list as
        they stand."""
        config = copy.deepcopy(self.config)
        if getattr(config, "mlp_only_layers", None):  # a list of layer indices
            config.mlp_only_layers = [
                place for place, i in enumerate(sequence) if i in self.config.mlp_only_layers
            ]
        for name, value in self.per_layer().items():
            setattr(config, name, [value[i] for i in sequence])
        config.num_hidden_layers = len(sequence)
        return config

    def per_layer(self) -> dict[str, list]:
        """What the config lists layer by layer, by name."""
        lists = {
            name: list(v) for name, v in vars(self.config).items() if isinstance(v, (list, tuple))
        }
        other = {name for name in lists if "token" in name or name == "mlp_only_layers"}
        return {
            name: v for name, v in lists.items() if len(v) == self.num_blocks and name not in other
        }

    # -- finding the parts -------------------------------------------------------------------------

    def refusal(self, why: str) -> InputError:
        return InputError(
            f"{self.name}: the family {self.family!r} cannot be run block by block: {why}"
        )

    def _find_layers(self) -> tuple[str, ...]:
        """Attribute path from the model to its list of decoder layers."""
        if not isinstance(self.given, nn.Module) or self.config is None:
            what = type(self.hf).__name__
            hint = "; load_model opens folders, hub ids and 'demo'" * isinstance(self.hf, str)
            raise InputError(f"expected a transformers causal language model, not {what}{hint}")
        if getattr(self.config, "is_encoder_decoder", False):
            raise self.refusal("it is an encoder-decoder")
        if getattr(self.config, "num_kv_shared_layers", 0):
            raise self.refusal("its layers share keys and values across depth")
        if any(hasattr(module, "_hf_hook") for module in self.hf.modules()):
            raise InputError(
                f"{self.name}: load the model on one device, without device_map offloading"
            )
        if (
            not callable(getattr(self.hf, "get_output_embeddings", None))
            or self.hf.get_output_embeddings() is None
        ):
            raise self.refusal("it has no language-model head")
        found = layer_paths(self.hf)
        if len(found) != 1:
            depth = getattr(self.config, "num_hidden_layers", None)
            raise self.refusal(
                f"{'no' if not found else 'more than one'} list of {depth} decoder layers was found"
            )
        return found[0]

    def _find_final_norm(self) -> nn.Module:
        parent = get_module(self.hf, self.path[:-1])
        for name in FINAL_NORM_NAMES:
            if isinstance(getattr(parent, name, None), nn.Module):
                return getattr(parent, name)
        raise self.refusal("its final norm was not found")

    # -- proven on itself --------------------------------------------------------------------------

    def probe_ids(self) -> torch.Tensor:
        """A short row of token ids spread over the vocabulary, [1, T]."""
        length = min(8, self.max_positions or 8)
        return (torch.arange(1, length + 1, device=self.device) * 7919 % self.vocab_size)[None]

    def probe_tree(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The short row as a trunk with two branches: ids, positions, branch, each [1, T]."""
        ids = self.probe_ids()
        tree = torch.tensor(
            [[0, 1, 2, 3, 4, 3, 4, 5], [0, 0, 0, 1, 1, 2, 2, 2]], device=self.device
        )[:, : ids.shape[1]]
        return ids, tree[:1], tree[1:]

    def check_trees(
        self,
        ids: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        branch: torch.Tensor | None = None,
    ) -> None:
        """Raise InputError unless a token tree (as `open` takes it, [1, T]) gives what its
        sequences give one by one.

        The default is a short one; what depends on length (local attention of some kind) shows in
        the longest tree that is to be run. Of very many branches as many are looked at as a mask of
        [T, T] can be held for.
        """
        implementation = getattr(self.config, "_attn_implementation", None)
        if implementation not in ("eager", "sdpa"):
            raise InputError(
                f"{self.name}: token trees need attn_implementation 'sdpa' or 'eager', not "
                f"{implementation!r}"
            )
        if ids is None:
            ids, positions, branch = self.probe_tree()
        assert positions is not None
        assert branch is not None
        inside = (branch[0] == 0) | torch.isin(branch[0], few_branches(branch[0], LONGEST_CHECKED))
        ids, positions, branch = ids[:, inside], positions[:, inside], branch[:, inside]
        tree = ids, positions, branch
        name = (
            "trees",
            hashlib.sha256(b"".join(part.cpu().numpy().tobytes() for part in tree)).digest(),
        )
        self.once(name, lambda: prove_tree(self, *tree))

    def agree(self, found: torch.Tensor, expected: torch.Tensor) -> bool:
        """Equal up to a few roundings of the model's dtype, by relative norm; what is not finite
        stands alike."""
        finite = expected.isfinite()
        if not torch.equal(found.isfinite(), finite):
            return False
        found, expected = found[finite].double(), expected[finite].double()
        return bool(
            (found - expected).norm()
            <= max(8 * torch.finfo(self.dtype).eps, 1e-5) * expected.norm()
        )

    # -- layer arguments ---------------------------------------------------------------------------

    def _by_name(self, args: tuple, kwargs: dict) -> dict:
        """What the model passed to a layer after the hidden states, all by name."""
        names = [name for name in self._signature.parameters if name != "self"][1:]
        return {**dict(zip(names, args, strict=False)), **kwargs}

    def _layer_mask(self, seen: torch.Tensor) -> torch.Tensor:
        """[B, 1, T, T] as layers take it: bool (True = seen) for sdpa, additive in the model's
        dtype for eager."""
        if self.config._attn_implementation == "sdpa":
            return seen
        return torch.zeros_like(seen, dtype=self.dtype).masked_fill_(
            ~seen, torch.finfo(self.dtype).min
        )


def layer_paths(hf: nn.Module) -> list[tuple[str, ...]]:
    """Attribute paths from a transformers model to what may be its list of decoder layers."""
    depth = getattr(hf.config, "num_hidden_layers", None)
    return [
        tuple(name.split("."))
        for name, module in hf.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == depth
        and name.split(".")[-1] in LAYERS_NAMES
    ]


@contextmanager
def masked(model: Model | nn.Module, removed: Iterable[int]) -> Iterator[Any]:
    """Run any code on a transformers model without some of its blocks; nothing is copied, and all
    is put back.

    model: the transformers model, or a `Model` of it, which saves the checks of opening one.
    removed: block indices. Inside, the model is what `export` would write: its list of layers is
    short, num_hidden_layers and the per-layer lists of its config are cut, and its attentions are
    numbered anew, so that `generate` works with a cache. Afterwards, also after an exception, it
    has its own list, its own config object and its own numbers again. May be nested: the indices
    then count the blocks that are left. The model's turn is held throughout, so that evaluators in
    other threads wait; one that was opened outside is refused inside, and a cache that was filled
    outside is of no use there.

    Raises InputError for an index out of range or given twice, for a model that cannot be run block
    by block, and when none is kept where the family cannot run without blocks.

    >>> import fastprune as fp
    >>> with fp.masked(fp.load_model("demo"), (9, 10)) as hf:
    ...     hf.config.num_hidden_layers
    10
    """
    hf = model.given if isinstance(model, Model) else model
    turn = _TURNS.setdefault(hf, threading.RLock()) if isinstance(hf, nn.Module) else nullcontext()
    with turn:
        if not isinstance(model, Model) or not model.is_whole:
            model = Model(hf)
        with model.masked(removed):
            yield hf


def _set(before: list[tuple[Any, str, Any]], owner: Any, name: str, value: Any) -> None:
    """Set an attribute where there is one, and note what it was."""
    if getattr(owner, name, None) is not None:
        before.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)
