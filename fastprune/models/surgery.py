"""A transformers model with other blocks: reordered or cut on a shallow copy that shares all
weights, or masked in place for as long as a `with` block lasts."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..errors import InputError
from ..masks import check_removed
from .model import Model, lock_of
from .swap import get_module, with_replaced
from .verify import ATTENTION_NAMES, MLP_NAMES, probe_ids, verified

INDEX_LISTS = ("mlp_only_layers",)  # entries of a config that list layers by their index


def without(model: Model, removed: Iterable[int]) -> Any:
    """The transformers model without these blocks, see `ordered`."""
    gone = set(removed)
    return ordered(model, [i for i in range(model.num_blocks) if i not in gone])


def unit_parameters(model: Model, granularity: str) -> list[int]:
    """The parameters of each unit."""
    parts: list[nn.Module] = list(model.layers)
    if granularity == "sublayer":
        parts = [
            next(getattr(layer, name) for name in names if hasattr(layer, name))
            for layer in model.layers
            for names in (ATTENTION_NAMES, MLP_NAMES)
        ]
    return [sum(weights.numel() for weights in part.parameters()) for part in parts]


def ordered(model: Model, sequence: Sequence[int], copies: bool = False) -> Any:
    """The transformers model with these blocks in this order: a shallow copy that shares all
    weights.

    Its config describes the blocks in their new order.

    Args:
        model: The model.
        sequence: Block indices; a block may be repeated.
        copies: Whether a repeated block has weights of its own, as a checkpoint needs it; otherwise
            it is the same module.

    Raises:
        InputError: The blocks' weights are streamed.
    """
    if sequence:
        model.require_resident(
            "its weights are streamed (weights_bytes); open it without, to take it whole"
        )
    config, blocks = _config_of(model, sequence), []
    for place, block in enumerate(sequence):
        repeated = copies and block in sequence[:place]
        blocks.append(copy.deepcopy(model.layers[block]) if repeated else model.layers[block])
    result = with_replaced(model.hf, model.path, nn.ModuleList(blocks))
    owner: Any = result
    for name in model.path:
        if getattr(owner, "config", None) is not None:
            owner.config = config
        owner = getattr(owner, name)
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


@contextmanager
def masked(model: Model | nn.Module, removed: Iterable[int]) -> Iterator[Any]:
    """Run any code on a transformers model without some of its blocks; nothing is copied, and all
    is put back.

    Inside, the model is the one that `export` would write: its list of layers is short,
    num_hidden_layers and the per-layer lists of its config are cut, and its attentions are numbered
    anew, so that `generate` works with a cache. Afterwards, also after an exception, it has its own
    list, its own config object and its own numbers again. May be nested: the indices then count the
    remaining blocks. The model's lock is held throughout, so that evaluators in other threads wait.
    A `Model` that was opened outside is refused inside, and a cache that was filled outside is of
    no use there.

    Args:
        model: The transformers model, or a `Model` of it, which saves the checks of opening one.
        removed: Block indices.

    Yields:
        The transformers model.

    Raises:
        InputError: An index is out of range or given twice, the model cannot be run block by block,
            or no block is kept and the family cannot run without blocks.

    Examples:
        >>> import fastprune as fp
        >>> with fp.masked(fp.load_model("demo"), (9, 10)) as hf:
        ...     hf.config.num_hidden_layers
        10
    """
    hf = model.given if isinstance(model, Model) else model
    with lock_of(hf):
        if not isinstance(model, Model) or not model.is_whole:
            model = Model(hf)
        model.require_resident(
            "its weights are streamed (weights_bytes); open it without, to mask it in place"
        )
        verified(model)
        gone = set(check_removed(removed, model.num_blocks))
        kept = [i for i in range(model.num_blocks) if i not in gone]
        if not kept and not runs_without_blocks(model):
            raise InputError(
                f"nothing is kept, and the family {model.family!r} cannot run without blocks"
            )
        with _cut_in_place(model, kept):
            yield hf


@contextmanager
def _cut_in_place(model: Model, kept: Sequence[int]) -> Iterator[None]:
    """Inside, the caller's own model has only these blocks."""
    before: list[tuple[Any, str, Any]] = []  # (object, attribute, value), put back in the end
    *above, last = model.path
    base = get_module(model.given, above)
    layers = base._modules[last]
    try:
        config, owner = _config_of(model, kept), model.given
        for name in (*above, None):
            _set(before, owner, "config", config)
            owner = name and getattr(owner, name)
        for place, block in enumerate(kept):  # a cache has its entries by these indices
            for module in model.layers[block].modules():
                if isinstance(vars(module).get("layer_idx"), int):
                    _set(before, module, "layer_idx", place)
        base._modules[last] = nn.ModuleList(model.layers[i] for i in kept)
        yield
    finally:
        base._modules[last] = layers
        for owner, name, value in reversed(before):
            setattr(owner, name, value)


def _set(before: list[tuple[Any, str, Any]], owner: Any, name: str, value: Any) -> None:
    """Set an attribute where the owner has one, and note its value before."""
    if getattr(owner, name, None) is not None:
        before.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)


# -- configs ---------------------------------------------------------------------------------------


def _config_of(model: Model, sequence: Sequence[int]) -> Any:
    """The config of the model with these blocks in this order."""
    values: dict[str, Any] = {
        name: [entries[i] for i in sequence] for name, entries in per_layer(model).items()
    }
    for name in INDEX_LISTS:
        if listed := getattr(model.config, name, None):
            values[name] = [place for place, block in enumerate(sequence) if block in listed]
    values["num_hidden_layers"] = len(sequence)
    config = copy.deepcopy(model.config)
    for name, value in values.items():
        setattr(config, name, value)
    return config


def per_layer(model: Model) -> dict[str, list]:
    """The lists of the config that have an entry for each layer, by name."""
    return {
        name: list(value)
        for name, value in vars(model.config).items()
        if isinstance(value, (list, tuple))
        and len(value) == model.num_blocks
        and "token" not in name
        and name not in INDEX_LISTS
    }
