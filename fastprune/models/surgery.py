"""A transformers model with other blocks: on a shallow copy that shares all weights, or in place
inside of a `with` block.

`FIELDS` is the one table of config fields that describe layers by their index. A list with an entry
for each layer needs no row there. A `Cut` has the old block at each new place:

    6 blocks without 1 and 3:   sequence  0 2 4 5     old block at each new place
                                places    0 1 2 3
    moe_layers = [2, 3, 5]             -> [1, 3]      the places whose old block is in the list
    first_k_dense_replace = 2          -> 1           how many of the first 2 blocks are kept
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from ..errors import InputError
from ..masks import check_removed, check_sequences
from .compare import agree, probe_ids
from .generic import GenericRunner
from .model import Model, evaluating, lock_of
from .swap import INDEX_NAMES, Exchanged, Place, Sublayers, get_module, twin, with_replaced
from .text import depths, with_text_config
from .verify import verified


class Cut(NamedTuple):
    """The blocks that run, in their order, of a model with `num_blocks`; a block may repeat."""

    sequence: tuple[int, ...]
    num_blocks: int

    def places(self, chosen: Iterable[int]) -> list[int]:
        """The new places of old blocks."""
        blocks = set(chosen)
        return [place for place, block in enumerate(self.sequence) if block in blocks]


# -- configs ---------------------------------------------------------------------------------------


def _index_list(cut: Cut, listed: Any) -> tuple:
    return (cut.places(listed),)


def _leading_count(cut: Cut, count: Any) -> tuple:
    return (len(cut.places(range(count))),)


def _index_range(cut: Cut, start: Any, end: Any, step: Any) -> tuple:
    """From start to end, the layers with (i + 1) % step == 0; end -1 is the last layer."""
    end = cut.num_blocks - 1 if end < 0 else end
    places = cut.places(i for i in range(start, end + 1) if (i + 1) % step == 0)
    if not places:
        return len(cut.sequence), max(0, len(cut.sequence) - 1), step
    start, end = places[0], places[-1]
    steps = (n for n in range(1, len(cut.sequence) + 1) if _every(start, end, n) == places)
    return start, end, next(steps, step)


def _every(start: int, end: int, step: int) -> list[int]:
    return [i for i in range(start, end + 1) if (i + 1) % step == 0]


def _period(cut: Cut, period: Any, offset: Any) -> tuple:
    """The layers with i % period == offset. If no period describes the rest, numbers stay."""
    places, size = cut.places(range(offset, cut.num_blocks, period)), len(cut.sequence)
    if not places:
        return size + 1, size
    fits = (n for n in range(1, size + 1) if list(range(places[0] % n, size, n)) == places)
    fitting = next(fits, None)
    return (period, offset) if fitting is None else (fitting, places[0] % fitting)


def _sparse_step(cut: Cut, step: Any, dense: Any) -> tuple:
    """Every step-th layer has experts, except listed dense ones; the result lists all dense."""
    listed = set(dense or ())
    return 1, cut.places(i for i in range(cut.num_blocks) if i in listed or (i + 1) % step)


def _per_layer_dict(cut: Cut, overrides: Any) -> tuple:
    by_block = {int(block): values for block, values in overrides.items()}
    kept = enumerate(cut.sequence)
    return ({place: copy.deepcopy(by_block[b]) for place, b in kept if b in by_block},)


def _pattern(cut: Cut, pattern: Any) -> tuple:
    """A pattern that repeats over the layers; the result has an entry for each layer."""
    return ([pattern[block % len(pattern)] for block in cut.sequence] or pattern,)


def _letters(cut: Cut, letters: Any) -> tuple:
    return ("".join(letters[block] for block in cut.sequence),)


def _groups(cut: Cut, groups: Any) -> tuple:
    """GPT-Neo's [[types, repeats], ...]; the result is one group."""
    types = [kind for kinds, repeats in groups for _ in range(repeats) for kind in kinds]
    return ([[[types[block] for block in cut.sequence], 1]],)


def _depth_scale(cut: Cut, scale: Any) -> tuple:
    """Residual branches are multiplied by scale / sqrt(layers); the result keeps this factor."""
    return (scale * math.sqrt(len(cut.sequence) / cut.num_blocks),)


def _absent(cut: Cut, count: Any) -> tuple:
    return (0,)


# names that a config must all have -> their new values, by (cut, *old values)
FIELDS: dict[tuple[str, ...], Callable[..., tuple]] = {
    ("mlp_only_layers",): _index_list,  # Qwen's experts
    ("decoder_sparse_step", "mlp_only_layers"): _sparse_step,
    ("moe_layers",): _index_list,  # Llama 4
    ("attn_layer_indices",): _index_list,  # Bamba
    ("full_attn_idxs",): _index_list,  # LFM2
    ("hybrid_layer_ids",): _index_list,  # Zamba 2
    ("cross_attention_layers",): _index_list,
    ("local_layer_ids",): _index_list,
    ("ple_layer_ids",): _index_list,
    ("first_k_dense_replace",): _leading_count,  # DeepSeek, Kimi, GLM 4
    ("num_dense_layers",): _leading_count,  # AFMoE, LFM2
    ("max_window_layers",): _leading_count,  # Qwen 2
    ("moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval"): _index_range,  # Ernie
    ("attn_layer_period", "attn_layer_offset"): _period,  # Jamba
    ("expert_layer_period", "expert_layer_offset"): _period,
    ("per_layer_config",): _per_layer_dict,  # Gemma 4
    ("attention_types",): _groups,
    ("block_types",): _pattern,  # RecurrentGemma
    ("hybrid_override_pattern",): _letters,  # Nemotron-H
    ("scale_depth",): _depth_scale,  # MiniCPM
    # layers that predict further tokens come last in a checkpoint; transformers neither loads nor
    # writes them
    ("num_nextn_predict_layers",): _absent,
    ("num_mtp_layers",): _absent,
}
IN_FIELDS = frozenset(name for names in FIELDS for name in names)
# lists whose length may be the number of layers by chance
NOT_PER_LAYER = frozenset(
    ("architectures", "mlp_multipliers", "ssm_multipliers", "time_step_limit", "keys_to_ignore")
)


def config_of(model: Model, sequence: Sequence[int]) -> Any:
    """A copy of the model's config that describes these blocks in this order."""
    cut, old = Cut(tuple(sequence), model.num_blocks), model.config
    if cut.sequence == tuple(range(model.num_blocks)) and not _has_further_predictions(model):
        return copy.deepcopy(old)
    values: dict[str, Any] = {
        name: [entries[i] for i in sequence] for name, entries in per_layer(model).items()
    }
    for names, remap in FIELDS.items():
        before = [_value(old, name) for name in names]
        if all(value is not None for value in before):
            values.update(zip(names, remap(cut, *before), strict=True))
    config = copy.deepcopy(old)
    overrides = values.pop("per_layer_config", None)
    for name, depth in depths(old).items():  # some families also state a multiple of the depth
        if depth % model.num_blocks == 0:
            setattr(config, name, depth // model.num_blocks * len(sequence))
    for name, value in values.items():
        setattr(config, name, value)
    if overrides is not None:  # last: transformers checks it against the others
        config.per_layer_config = overrides
    return config


def per_layer(model: Model) -> dict[str, list]:
    """The lists of the config that have an entry for each layer, by name."""
    return {
        name: list(value)
        for name, value in vars(model.config).items()
        if _is_per_layer(name, value, model.num_blocks)
        and name not in NOT_PER_LAYER
        and name not in IN_FIELDS
    }


def _is_per_layer(name: str, value: Any, num_blocks: int) -> bool:
    is_list = isinstance(value, (list, tuple)) and len(value) == num_blocks
    return is_list and "token" not in name and not name.startswith("_")


def _value(config: Any, name: str) -> Any:
    """A config's own value; per-layer overrides as the dict in its file."""
    if name == "per_layer_config":
        is_heterogeneous = getattr(config, "is_heterogeneous", False)
        return config.to_dict().get(name) if is_heterogeneous else None
    return vars(config).get(name)


def _has_further_predictions(model: Model) -> bool:
    return any(
        _value(model.config, names[0]) for names, remap in FIELDS.items() if remap is _absent
    )


# -- on a shallow copy -----------------------------------------------------------------------------


def without(model: Model, removed: Iterable[int]) -> Any:
    """The transformers model without these blocks (see `ordered`)."""
    gone = set(removed)
    return ordered(model, [i for i in range(model.num_blocks) if i not in gone])


def ordered(model: Model, sequence: Sequence[int], copies: bool = False) -> Any:
    """Copy a transformers model with these blocks in this order.

    The copy is shallow and shares all weights. Its config describes the blocks in their new order.

    Args:
        model: The model.
        sequence: Block indices; a block may be repeated.
        copies: Whether weights that several places share are copied, as a checkpoint needs it,
            unless the family itself ties them.

    Raises:
        InputError: The blocks' weights are streamed.
    """
    if sequence:
        model.require_resident(
            "its weights are streamed (weights_bytes); open it without, to take it whole"
        )
    blocks = [model.layers[block] for block in sequence]
    if copies:
        blocks = _with_weights_of_their_own(model, blocks)
    result = with_replaced(model.hf, model.path, nn.ModuleList(blocks))
    for owner, name, value in _descriptions(model, result, sequence):
        setattr(owner, name, value)
    return result


def _descriptions(
    model: Model, hf: Any, sequence: Sequence[int]
) -> Iterator[tuple[nn.Module, str, Any]]:
    """Yield the attributes above a list of layers that describe it, with their values for these
    blocks: configs, and plain lists that have an entry for each layer.

    They are those of the transformers model, and of the modules below it on the path.
    """
    config = config_of(model, sequence)
    for depth in range(len(model.path)):
        owner = get_module(hf, model.path[:depth])
        if getattr(owner, "config", None) is not None:
            yield owner, "config", with_text_config(owner.config, config)
        for name, entries in list(vars(owner).items()):
            if _is_per_layer(name, entries, model.num_blocks):
                yield owner, name, type(entries)(entries[block] for block in sequence)


def _with_weights_of_their_own(model: Model, blocks: Sequence[nn.Module]) -> list[nn.Module]:
    prefix = ".".join(model.path)
    tied = getattr(model.hf, "all_tied_weights_keys", None) or {}
    if any(str(name).startswith(f"{prefix}.") for name in tied):
        return list(blocks)  # the family's own code ties blocks, and saves them right
    seen: set[int] = set()
    result = []
    for block in blocks:
        tensors = {id(parameter) for parameter in block.parameters()}
        result.append(copy.deepcopy(block) if tensors & seen else block)
        seen |= tensors
    return result


def runs_without_blocks(model: Model) -> bool:
    """Whether the family's own forward pass works when every block is removed."""

    def run() -> None:
        without(model, range(model.num_blocks))(input_ids=probe_ids(model), use_cache=False)

    try:
        model.once("no blocks", run)
    except Exception:  # whatever it is, the family's own code cannot do it
        return False
    return True


# -- in place --------------------------------------------------------------------------------------


@contextmanager
def masked(
    model: Model | nn.Module,
    removed: Iterable[int] | None = None,
    *,
    sequence: Sequence[int] | None = None,
    granularity: str = "block",
) -> Iterator[Any]:
    """Run any code on a transformers model without some of its units. No weight is copied.

    Inside the `with` block, the model equals the one that `export` writes. Its list of layers and
    its config describe the blocks that run. Its attentions have new indices, so that `generate`
    works with a cache. A skipped half of a block is replaced by a module that adds nothing. A
    variant of a `Library` runs in its block's place. On entry, the model's own forward pass must
    give the logits of the same blocks run one by one.

    On exit, also after an exception, the model gets its own list, config object and indices back.
    Contexts may be nested; inner indices count the remaining blocks. The model's lock is held
    inside, so that evaluators in other threads wait. A `Model` that was opened outside is refused
    inside. A cache that was filled outside does not fit inside.

    Args:
        model: The transformers model, or a `Model` of it, which saves the checks of opening one.
        removed: Indices of the units to leave out.
        sequence: Instead of `removed`: indices of blocks in the order in which they run. A block
            may repeat, and then shares its weights. Of a `Library`, a variant may be named, too.
        granularity: "block", or "sublayer": `removed` then counts attentions and MLPs, attention 0,
            MLP 0, attention 1, ...

    Yields:
        The transformers model.

    Raises:
        InputError: An index is out of range or given twice, the model cannot be run block by block,
            no block is kept and the family cannot run without blocks, or the family's own code
            gives other logits without these blocks.

    Examples:
        >>> import fastprune as fp
        >>> with fp.masked(fp.load_model("demo"), (9, 10)) as hf:
        ...     hf.config.num_hidden_layers
        10
        >>> with fp.masked(fp.load_model("demo"), sequence=(0, 1, 1, 2)) as hf:
        ...     hf.config.num_hidden_layers
        4
    """
    hf = model.given if isinstance(model, Model) else model
    with lock_of(hf):
        if not isinstance(model, Model) or not model.is_whole:
            model = Model(hf)
        model.require_resident(
            "its weights are streamed (weights_bytes); open it without, to mask it in place"
        )
        verified(model, granularity)
        units = _units(model, removed, sequence, granularity)
        places = _places(model, units, granularity)
        if not places and not runs_without_blocks(model):
            raise InputError(
                f"nothing is kept, and the family {model.family!r} cannot run without blocks"
            )
        ids = probe_ids(model)
        expected = _logits_by_units(model, ids, units, granularity) if places else None
        caches = bool(places) and model.once("caches", lambda: _caches(model.given, ids))
        is_halved = any(len(place.halves) < 2 for place in places)
        sublayers = verified(model, "sublayer").sublayers if is_halved else []
        with _cut_in_place(model, places, sublayers):
            if expected is not None:
                with evaluating(hf.modules(), model.device):
                    _check_masked(model, hf, ids, expected, caches)
            yield hf


def kept_blocks(
    num_blocks: int,
    removed: Iterable[int] | None,
    sequence: Sequence[int] | None,
    num_variants: int = 0,
) -> list[int]:
    """The blocks that run, from either argument; a sequence may also name variants.

    Raises InputError for both arguments, or none.
    """
    if (removed is None) == (sequence is None):
        raise InputError(
            "give either removed, such as (9, 10), or sequence, such as (0, 1, 1, 2), and not both"
        )
    if sequence is not None:
        return list(check_sequences([sequence], num_blocks + num_variants)[0])
    assert removed is not None
    gone = set(check_removed(removed, num_blocks))
    return [block for block in range(num_blocks) if block not in gone]


def _units(
    model: Model,
    removed: Iterable[int] | None,
    sequence: Sequence[int] | None,
    granularity: str,
) -> list[int]:
    if granularity == "block":
        return kept_blocks(model.num_blocks, removed, sequence, model.num_variants)
    if sequence is not None:
        raise InputError("sequence counts blocks; with granularity='sublayer' give removed")
    return kept_blocks(2 * model.num_blocks, removed, None)


def _places(model: Model, units: Sequence[int], granularity: str) -> list[Place]:
    """The places of these units in a list of layers."""
    if granularity == "block":
        return [model.place_of(unit) for unit in units]
    halves: dict[int, set[int]] = {}
    for unit in units:
        halves.setdefault(unit // 2, set()).add(unit % 2)
    return [Place(block, model.layers[block], frozenset(of)) for block, of in halves.items()]


def logits_by_blocks(model: Model, blocks: Sequence[int]) -> torch.Tensor:
    """Logits [T, V] of a short row, from these blocks run one by one."""
    return _logits_by_units(model, probe_ids(model), blocks, "block")


def _logits_by_units(
    model: Model, ids: torch.Tensor, units: Sequence[int], granularity: str
) -> torch.Tensor:
    own = of_model = verified(model, granularity)
    if model.given is not model.hf:  # the caller's own model, with its own frequencies
        unchanged = copy.copy(model)
        unchanged.hf = model.given
        own = GenericRunner(unchanged)
    runner = model.extended(own, granularity) if granularity == "block" else own
    own.sublayers = of_model.sublayers
    with model.evaluation():
        state: Any
        state, arguments = runner.open(ids)
        for unit in units:
            state = runner.run(unit, state, arguments, granularity)
        return runner.head.logits(getattr(state, "hidden", state).flatten(0, 1))


def _caches(hf: Any, ids: torch.Tensor) -> bool:
    """Whether the model gives the same logits with a cache of keys as without."""
    try:
        plain = hf(input_ids=ids, use_cache=False).logits.flatten(0, 1)
        return agree(_cached_logits(hf, ids), plain, plain.dtype)
    except Exception:  # whatever it is, the family's own code has no such cache
        return False


def _cached_logits(hf: Any, ids: torch.Tensor) -> torch.Tensor:
    before = hf(input_ids=ids[:, :-1], use_cache=True)
    after = hf(input_ids=ids[:, -1:], past_key_values=before.past_key_values, use_cache=True)
    return torch.cat([before.logits, after.logits], dim=1).flatten(0, 1)


def _check_masked(
    model: Model, hf: Any, ids: torch.Tensor, expected: torch.Tensor, caches: bool
) -> None:
    refusal = f"{model.name}: the family {model.family!r} cannot be masked like this"
    ways = [("", lambda: hf(input_ids=ids, use_cache=False).logits.flatten(0, 1))]
    if caches:
        ways.append((" with a cache", lambda: _cached_logits(hf, ids)))
    for how, run in ways:
        try:
            logits = run()
        except Exception as error:  # whatever it is, the family's own code cannot do it
            line = (str(error).splitlines() or [""])[0]
            raise InputError(
                f"{refusal}: its own code fails{how}: {type(error).__name__}: {line}"
            ) from error
        if not agree(logits, expected, model.dtype):
            raise InputError(f"{refusal}: its own code gives other logits{how}")


@contextmanager
def _cut_in_place(
    model: Model, places: Sequence[Place], sublayers: Sequence[Sublayers]
) -> Iterator[None]:
    """A context in which the caller's own model has this list of layers."""
    blocks = [place.block for place in places]
    *above, last = model.path
    base = get_module(model.given, above)
    layers = base._modules[last]
    with ExitStack() as undo:
        undo.callback(base._modules.__setitem__, last, layers)
        for owner, name, value in _descriptions(model, model.given, blocks):
            _set(undo, owner, name, value)
        placed: list[nn.Module] = []
        for index, (block, layer, halves) in enumerate(places):  # the keys of a cache's entries
            # one module at two places would share an entry of a cache
            shared = {id(m) for earlier in placed for m in earlier.modules()}
            if any(id(m) in shared for m in layer.modules()):
                layer = twin(layer)
            placed.append(layer)
            for module in layer.modules():
                for name in INDEX_NAMES:
                    if type(vars(module).get(name)) is int:
                        _set(undo, module, name, index)
                if module.training != model.given.training and isinstance(layer, Exchanged):
                    _set(undo, module, "training", model.given.training)
            if len(halves) < 2:
                for name, stand_in in sublayers[block].stand_ins(layer, {*halves}):
                    undo.callback(layer._modules.__setitem__, name, layer._modules[name])
                    layer._modules[name] = stand_in
        base._modules[last] = nn.ModuleList(placed)
        yield


def _set(undo: ExitStack, owner: Any, name: str, value: Any) -> None:
    """Set an attribute until the stack is closed."""
    undo.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)
