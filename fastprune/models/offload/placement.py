"""Opening a model without the weights of its blocks, or of its towers, which stay in their files.

transformers' own code opens the model. Its own rules map stored tensors to parameters.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..alignment import ALIGNMENT
from ..files import Files, Stored
from .weights import Block, Piece, Place, StreamedWeights, nothing

_PATCHING = threading.RLock()  # one thread at a time opens a model whose weights stay in files


@dataclass(frozen=True)
class Towers:
    """The weights of a model that text does not use, in their files.

    Attributes:
        files: The files.
        tensors: The place of each tensor, by its name in the files without a wrapper's prefix.
    """

    files: Files
    tensors: dict[str, Stored]

    def write(self, path: Path) -> None:
        """Copy all tensors to a safetensors file. Raises InputError if a file has changed."""
        from safetensors.torch import save_file

        self.files.check()
        tensors = {name: self.files.tensor(stored) for name, stored in self.tensors.items()}
        save_file(tensors, path, metadata={"format": "pt"})


@dataclass
class LeftOut:
    """The parts of a model that stayed in their files; None for loaded parts."""

    weights: StreamedWeights | None = None
    towers: Towers | None = None


@contextmanager
def left_in_files(
    folder: Path,
    stored: dict[str, Stored],
    find_layers: Callable[[nn.Module], Sequence[str]] | None,
    find_towers: Callable[[nn.Module], Sequence[str]] | None,
    wrapper: str,
) -> Iterator[LeftOut]:
    """Let transformers' from_pretrained leave parts of a model on the meta device.

    These are the parameters of the blocks, of the towers, or of both. The rest loads as usual.

    Args:
        stored: The checkpoint's tensors.
        find_layers: Finds the attribute path to a model's list of layers; None loads the blocks.
        find_towers: Finds the names of the modules that text does not use; None loads the towers.
        wrapper: A prefix of all names, which is left out.

    Yields:
        The parts that the model lacks, after from_pretrained.
    """
    from transformers import PreTrainedModel

    base: Any = PreTrainedModel
    left_out = LeftOut()
    thread = threading.get_ident()
    _PATCHING.acquire()
    original = base._load_pretrained_model

    def load(
        model: Any,
        state_dict: Any,
        checkpoint_files: Any,
        load_config: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if threading.get_ident() != thread:  # another thread opens a model of its own
            return original(model, state_dict, checkpoint_files, load_config, *args, **kwargs)
        files = Files(tensor.path for tensor in stored.values())
        prefix = "" if find_layers is None else ".".join(find_layers(model)) + "."
        parameters = {
            name
            for name, _ in model.named_parameters(remove_duplicate=False)
            if prefix and name.startswith(prefix)
        }
        below = tuple(f"{name}." for name in (find_towers(model) if find_towers else ()))
        in_towers = {name for name in model.state_dict() if name.startswith(below)}
        sources, others = _sort(model, load_config, stored, parameters | in_towers)
        residents = {key: _Later(files, tensor) for key, tensor in others.items()}
        loaded = original(model, residents, None, load_config, *args, **kwargs)
        if prefix:
            blocks, names = _lay_out(model, load_config, prefix, parameters, sources)
            loaded[0].missing_keys -= names.keys()
            left_out.weights = StreamedWeights(folder, files, blocks, names)
        if in_towers:
            absent, tensors = _leave(model, in_towers, sources)
            loaded[0].missing_keys -= absent
            named = {key.removeprefix(wrapper): tensor for key, tensor in tensors.items()}
            left_out.towers = Towers(Files(tensor.path for tensor in tensors.values()), named)
        return loaded

    base._load_pretrained_model = staticmethod(load)
    try:
        yield left_out
    finally:
        base._load_pretrained_model = staticmethod(original)
        _PATCHING.release()


def _leave(model: Any, names: Iterable[str], sources: dict) -> tuple[set[str], dict[str, Stored]]:
    """Empty the parameters and buffers that the checkpoint has tensors for.

    Returns:
        Their names, and the tensors.

    Raises:
        ValueError: A tensor has another shape.
    """
    of_names = {name: sources[name] for name in names if name in sources}
    # a tensor may become several parameters, of which the rules name one
    converted = any(pattern is not None for of in of_names.values() for pattern, _, _ in of)
    absent = set(names) if converted else set(of_names)
    for name in absent:
        owner, _, own_name = name.rpartition(".")
        module = model.get_submodule(owner)
        held = module._parameters if own_name in module._parameters else module._buffers
        tensor, of = held[own_name], of_names.get(name, [])
        if len(of) == 1 and of[0][0] is None and of[0][2].shape != tuple(tensor.shape):
            raise ValueError(
                f"{of[0][1]} has the shape {list(of[0][2].shape)}, but the config asks for "
                f"{list(tensor.shape)}"
            )
        held[own_name] = nothing(tensor.shape, tensor.dtype)
        if held is module._buffers:
            held[own_name] = held[own_name].data
        held[own_name]._is_hf_initialized = True
    return absent, {key: tensor for of in of_names.values() for _, key, tensor in of}


class _Later:
    """A stored tensor, read when transformers indexes it, like a safetensors slice."""

    def __init__(self, files: Files, stored: Stored):
        self._files, self._stored = files, stored

    def get_dtype(self) -> str:
        return self._stored.dtype

    def get_shape(self) -> list[int]:
        return list(self._stored.shape)

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self._files.tensor(self._stored)[index]


def _sort(
    model: Any, load_config: Any, stored: dict[str, Stored], parameters: set[str]
) -> tuple[dict, dict[str, Stored]]:
    """Sort the checkpoint's tensors by transformers' own rules of renaming.

    Returns:
        The sources of each of these parameters, as (pattern or None, key, tensor), and all other
        tensors.
    """
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    rules = load_config.weight_mapping or []
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    state, prefix = model.state_dict(), model.base_model_prefix
    sources: dict[str, list] = {}
    others = {}
    for key in sorted(stored, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, state)
        if name not in state and key in state:
            name, pattern = rename_source_key(
                key, [], [], base_model_prefix=prefix, meta_state_dict=state
            )
        if name in parameters:
            sources.setdefault(name, []).append((pattern, key, stored[key]))
        else:
            others[key] = stored[key]
    return sources, others


def _lay_out(
    model: Any, load_config: Any, prefix: str, parameters: set[str], sources: dict
) -> tuple[list[Block], dict[str, int]]:
    """Lay out a model's blocks; also return the block of each parameter with tensors."""
    by_block: dict[int, list[str]] = {}
    for name in model.state_dict():
        if name in parameters:
            by_block.setdefault(int(name.removeprefix(prefix).split(".")[0]), []).append(name)
    count = len(model.get_submodule(prefix[:-1]))
    blocks, block_of = [], {}
    for number in range(count):
        places, pieces, end = [], [], 0
        for name in by_block.get(number, []):
            if name not in sources:
                continue  # transformers reports it as missing
            parameter = model.get_parameter(name)
            dtype = _planned_dtype(load_config, name, parameter.dtype)
            owner, _, own_name = name.rpartition(".")
            place = Place(model.get_submodule(owner), own_name, end, dtype, parameter.shape)
            places.append(place)
            pieces += _pieces(model, load_config, name, place, sources[name])
            absent: Any = nothing(place.shape, dtype)
            place.module._parameters[own_name] = absent
            absent._is_hf_initialized = True
            block_of[name] = number
            end += -(-parameter.numel() * dtype.itemsize // ALIGNMENT) * ALIGNMENT
        pieces.sort(key=lambda piece: (piece.stored.path, piece.stored.offset))
        blocks.append(Block(tuple(places), tuple(pieces), end))
    return blocks, block_of


def _planned_dtype(load_config: Any, name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which transformers loads a parameter; some families keep some in float32."""
    from transformers.core_model_loading import build_glob_alternation

    plan = load_config.dtype_plan or {}
    if plan:
        pattern, by_group, _ = build_glob_alternation(list(plan))
        match = pattern.search(name)
        if match is not None and match.lastgroup is not None:
            return plan[by_group[match.lastgroup]]
    return dtype


def _pieces(model: Any, load_config: Any, name: str, place: Place, sources: list) -> list[Piece]:
    """The places of the tensors that make up a parameter.

    Raises ValueError unless the parameter is a concatenation of them.
    """
    if len(sources) == 1 and sources[0][0] is None:
        (_, key, stored), offsets = sources[0], [0]
        if stored.shape != tuple(place.shape):
            raise ValueError(
                f"{key} has the shape {list(stored.shape)}, but the config asks for "
                f"{list(place.shape)}"
            )
    else:
        offsets = _side_by_side(model, load_config, name, place, sources)
    return [
        Piece(stored, place.offset + offset * place.dtype.itemsize, place.dtype)
        for (_, _, stored), offset in zip(sources, offsets, strict=True)
    ]


def _side_by_side(
    model: Any, load_config: Any, name: str, place: Place, sources: list
) -> list[int]:
    """The offset of each source within a parameter that transformers merges from several.

    transformers' own rule runs on one number for each source, which shows the order.
    """
    from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

    rules = [rule for rule in load_config.weight_mapping or [] if isinstance(rule, WeightConverter)]
    rule: Any = next((rule for rule in rules if sources[0][0] in rule.source_patterns), None)
    shape = sources[0][2].shape
    plain = rule is not None and all(
        type(op) in (MergeModulelist, Concatenate) for op in rule.operations
    )
    if not plain or any(stored.shape != shape for _, _, stored in sources):
        raise ValueError(
            f"{name} is converted from the checkpoint in a way that cannot be streamed; open it "
            f"whole"
        )
    rule = deepcopy(rule)
    for number, (pattern, key, _) in enumerate(sources):
        one = torch.full((1,) * len(shape), number)
        rule.add_tensor(name, key, pattern, lambda one=one: one)
    (grid,) = rule.convert(name, model=model, config=model.config).values()
    cells = (1,) * (grid.dim() - len(shape)) + shape
    if tuple(a * b for a, b in zip(grid.shape, cells, strict=True)) != tuple(place.shape):
        raise ValueError(f"{name} has not the shape that the config asks for, {list(place.shape)}")
    whole = torch.empty(place.shape, device="meta")
    offsets = [0] * len(sources)
    for cell in np.ndindex(*grid.shape):
        part = whole[tuple(slice(i * n, (i + 1) * n) for i, n in zip(cell, cells, strict=True))]
        if not part.squeeze().is_contiguous():
            raise ValueError(
                f"{name} is put together from columns, which cannot be streamed; open it whole"
            )
        offsets[int(grid[cell])] = int(part.storage_offset())
    return offsets


def to_device(hf: nn.Module, device: torch.device) -> nn.Module:
    """Move all tensors with storage to a device. Tied parameters stay tied.

    torch's own `to` refuses a model with parameters on the meta device.
    """
    return hf._apply(lambda tensor: tensor if tensor.is_meta else tensor.to(device))


def resident_bytes(hf: nn.Module) -> int:
    """Bytes of a model's parameters and buffers that have storage, each once."""
    tensors = [
        tensor for tensor in (*hf.parameters(), *hf.buffers()) if tensor.device.type != "meta"
    ]
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())
