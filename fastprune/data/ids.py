"""Read token ids in the forms of other tools: arrays, tensors, lists, dict batches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from ..errors import InputError, shown

IGNORED_LABEL = -100  # marks a token that is no target, as in transformers


class Row(NamedTuple):
    """The tokens of one sequence, and the flags of its targets.

    The first token is never a target, because no state predicts it.
    """

    ids: np.ndarray  # int64[T]
    is_target: np.ndarray  # bool[T]


def to_rows(ids: object) -> list[Row]:
    """Read sequences of token ids, and leave out their padding.

    Args:
        ids: An int array or tensor [S, T]; a list of sequences [T] or of arrays [B, T]; a dict with
            input_ids and possibly attention_mask and labels, such as a BatchEncoding; or a list,
            a data set or a loader of such dicts.

    Returns:
        A row for each sequence, in order.

    Raises:
        InputError: The value holds no token ids, or a mask or labels of another shape.
    """
    if isinstance(ids, Mapping):
        return _rows_of_batch(ids, "the batch")
    rows: list[Row] = []
    for i, item in enumerate(_to_list(ids)):
        if isinstance(item, Mapping):
            rows += _rows_of_batch(item, f"batch {i}")
            continue
        array = _detached(item)
        several = isinstance(array, np.ndarray) and array.ndim == 2
        rows += [_all_targets(part, f"sequence {i}") for part in (array if several else [array])]
    return rows


def _rows_of_batch(batch: Mapping, name: str) -> list[Row]:
    """The rows of a dict batch: input_ids [B, T] or [T], with a mask and labels of that shape."""
    if "input_ids" not in batch:
        keys = ", ".join(map(str, batch)) or "none"
        raise InputError(f"{name} must hold input_ids; its keys are {keys}")
    ids = _parts(batch["input_ids"], name)
    masks, labels = (
        [None] * len(ids) if batch.get(key) is None else _parts(batch[key], f"{name}: {key}")
        for key in ("attention_mask", "labels")
    )
    for key, parts in (("attention_mask", masks), ("labels", labels)):
        lengths = [len(own) if part is None else len(part) for own, part in zip(ids, parts)]
        if len(parts) != len(ids) or lengths != list(map(len, ids)):
            raise InputError(f"{name}: {key} must have the shape of input_ids")
    return [
        _row_of_batch(*parts, f"{name}, sequence {r}")
        for r, parts in enumerate(zip(ids, masks, labels))
    ]


def _row_of_batch(
    ids: np.ndarray, mask: np.ndarray | None, labels: np.ndarray | None, name: str
) -> Row:
    kept = slice(None)
    if mask is not None:
        places = np.flatnonzero(mask)
        if len(places) and places[-1] - places[0] >= len(places):
            raise InputError(f"{name}: attention_mask must be 0 at the ends only, for padding")
        kept = slice(places[0], places[-1] + 1) if len(places) else slice(0)
    row = _all_targets(ids[kept], name)
    if labels is None:
        return row
    labels = labels[kept]
    is_target = labels != IGNORED_LABEL
    wrong = np.flatnonzero(is_target & (labels != row.ids))
    if len(wrong):
        raise InputError(
            f"{name}: labels must be -100 or the token itself (they are not shifted), not "
            f"{labels[wrong[0]]} at token {row.ids[wrong[0]]}"
        )
    return Row(row.ids, row.is_target & is_target)


def _parts(value: object, name: str) -> list[np.ndarray]:
    """An array for each sequence, from [B, T], [T] or ragged lists."""
    value = _detached(value)
    if isinstance(value, np.ndarray):
        parts = list(value) if value.ndim == 2 else [value]
    else:
        items = list(value) if isinstance(value, Iterable) else [value]
        flat = all(isinstance(item, (int, np.integer)) for item in items)
        parts = [items] if flat else items
    return [_as_ids(_detached(part), name) for part in parts]


def _all_targets(ids: Any, name: str) -> Row:
    ids = _as_ids(ids, name)
    return Row(ids, np.arange(len(ids)) > 0)


def _as_ids(row: Any, name: str) -> np.ndarray:
    try:
        array = np.asarray(row)
    except ValueError:  # numpy refuses ragged lists
        raise InputError(f"{name} must be integer token ids, not {shown(row)}") from None
    if array.dtype.kind in "US":
        raise InputError(f"{name} must be integer token ids, not text; load_text reads text")
    if array.ndim != 1 or (array.dtype.kind not in "iu" and array.size):
        raise InputError(f"{name} must be integer token ids, not {array.dtype} {list(array.shape)}")
    return array.astype(np.int64)


def _detached(value: Any) -> Any:
    """A tensor as an array, and any other value unchanged."""
    return value.detach().cpu().numpy() if hasattr(value, "detach") else value


def _to_list(ids: object) -> list:
    ids = _detached(ids)
    if isinstance(ids, np.ndarray) and ids.ndim != 2:
        raise InputError(f"token ids must have shape [S, T], not {list(ids.shape)}")
    if not isinstance(ids, Iterable):
        raise InputError(
            f"token ids must be an array [S, T] or a list of sequences, not {shown(ids)}"
        )
    ids = list(ids)
    if ids and all(isinstance(row, (int, np.integer)) for row in ids):
        raise InputError(
            "token ids must be an array [S, T] or a list of sequences; for one sequence, pass [ids]"
        )
    return ids
