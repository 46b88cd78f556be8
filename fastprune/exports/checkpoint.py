"""Mask or sequence -> Hugging Face checkpoint that stock transformers loads, and the same for other
tools."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import InputError, shown
from ..masks import check_removed, check_sequences
from ..objectives import Objective, format_size, no_judge, objective_class
from ..validate import check_folder
from . import recipes

if TYPE_CHECKING:
    from torch import nn

    from ..evaluator import Evaluator
    from ..models import Model


def export(
    model: Model | Evaluator | nn.Module,
    removed: Iterable[int],
    out_dir: str | os.PathLike,
    *,
    base_model: str | None = None,
    losses: Mapping[str, tuple[float, float]] | None = None,
    notes: Sequence[str] = (),
) -> Path:
    """Write the model without these blocks as a safetensors checkpoint and return its folder.

    `AutoModelForCausalLM.from_pretrained` loads it: blocks are renumbered, num_hidden_layers and
    per-layer lists of the config are cut, the tokenizer goes along. The folder appears only when it
    is complete and what it holds, loaded again, gives the logits of the masked model. It can go to
    a hub as it is: README.md is its model card, and `recipes/` says the same for mergekit,
    llama.cpp, EvoPress and LLM-Drop (see `fastprune.exports.recipes`).

    model: a Model, a transformers model, or an Evaluator of blocks, whose metric is then in the
    card, with standard errors.
    base_model: the hub id of the base model, for card and recipes; by default the name that it was
    opened by, of a folder its last part. losses: (before, after) by objective, for the card, which
    has them under the objective's metric; what they were measured on may follow the objective's
    name behind a comma. notes: sentences for the card, below them. Raises InputError for an
    index out of range or given twice, a folder that is not empty, a base_model that is no hub id,
    and for a family whose blocks cannot be renumbered.

    >>> import tempfile
    >>> import fastprune as fp
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     pruned = fp.export(fp.load_model("demo"), (3, 7), f"{folder}/pruned")
    ...     fp.load_model(pruned).num_blocks
    10
    """
    check_target(out_dir)
    model, evaluator = _opened(model)
    removed = check_removed(removed, model.num_blocks)
    sequence = [block for block in range(model.num_blocks) if block not in removed]
    if not sequence:
        raise InputError("removing every block leaves nothing to export")
    return _export(
        model, evaluator, sequence, out_dir, f"without blocks {removed}", base_model, losses, notes
    )


def export_sequence(
    model: Model | Evaluator | nn.Module,
    sequence: Sequence[int],
    out_dir: str | os.PathLike,
    *,
    base_model: str | None = None,
    losses: Mapping[str, tuple[float, float]] | None = None,
) -> Path:
    """Write the model with these blocks in this order, as `export` does; a block may stand
    repeatedly, or not at all.

    `Evaluator.score(sequences=[sequence])` scores the same. The weights of a block that stands n
    times are written n times, as separate weights. Raises InputError as `export` does, and for a
    sequence that is empty.

    >>> import tempfile
    >>> import fastprune as fp
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     grown = fp.export_sequence(fp.load_model("demo"), (0, 1, 2, 1, 2, 3), f"{folder}/grown")
    ...     fp.load_model(grown).num_blocks
    6
    """
    check_target(out_dir)
    model, evaluator = _opened(model)
    (checked,) = check_sequences([sequence], model.num_blocks)
    if not checked:
        raise InputError("a sequence without blocks leaves nothing to export")
    return _export(
        model, evaluator, checked, out_dir, f"with the blocks {checked}", base_model, losses
    )


def check_target(out_dir: str | os.PathLike) -> Path:
    """The folder as a path, if a checkpoint can be written there. Raises InputError otherwise."""
    out = Path(out_dir)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(
            f"{out}: exists already and is not overwritten; name another folder or remove it"
        )
    return check_folder(out)


def check_base_model(base_model: str | None) -> str | None:
    """The hub id, if it is one. Raises InputError otherwise."""
    if base_model is not None and not (
        isinstance(base_model, str) and recipes.HUB_ID.fullmatch(base_model)
    ):
        raise InputError(f"base_model must be a hub id such as 'org/name', not {shown(base_model)}")
    return base_model


def llama_cpp_warning(model: Model) -> str | None:
    """What must be known before blocks of this Model are left out with llama.cpp's own option; None
    where nothing."""
    from ..models.surgery import per_layer

    return recipes.llama_cpp_warning(per_layer(model))


def _opened(model: Model | Evaluator | nn.Module) -> tuple[Model, Evaluator | None]:
    """The Model, and the Evaluator where one was given."""
    from ..evaluator import Evaluator
    from ..models import Model, open_runner

    if not isinstance(model, Evaluator):
        opened = model if isinstance(model, Model) else Model(model)
        open_runner(opened, "generic")  # verified before anything is written
        return opened, None
    if model.granularity != "block":
        raise InputError(
            "half a block cannot be left out of a checkpoint; give an evaluator of blocks"
        )
    return model.model, model


def _export(
    model: Model,
    evaluator: Evaluator | None,
    sequence: Sequence[int],
    out_dir: str | os.PathLike,
    what: str,
    base_model: str | None,
    given: Mapping[str, tuple[float, float]] | None,
    notes: Sequence[str] = (),
) -> Path:
    from ..models.surgery import ordered

    out, base = check_target(out_dir), _base_name(check_base_model(base_model) or model.name)
    results = [_result(name, pair) for name, pair in _check_losses(given).items()]
    notes = list(notes)
    if evaluator is not None:
        objective, (before, after) = evaluator.objective, _measure(evaluator, sequence)
        data = format_size(objective.num_samples, objective.batch.num_tokens)
        dense_loss, error = before
        results.append(
            (
                f"{objective.header()}, {data}",
                objective.format(dense_loss, error, named=False),
                objective.format(*after, named=False),
            )
        )
        if note := no_judge(objective.describe(), dense_loss):
            notes.append(note)
    partial = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}")
    partial.mkdir(parents=True)
    try:
        with model.evaluation(), _no_progress_bars():
            ordered(model, sequence, copies=True).save_pretrained(partial)
            if model.tokenizer is not None:
                model.tokenizer.save_pretrained(partial)
            _check_written(model, sequence, what, partial)
        _describe(model, sequence, base, results, notes, partial)
        for file in partial.rglob(
            "*"
        ):  # safetensors makes its files private; the folder has what the umask leaves
            if file.is_file():
                file.chmod(partial.stat().st_mode & 0o666)
        if out.exists():
            out.rmdir()
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


def _describe(
    model: Model,
    sequence: Sequence[int],
    base: str,
    results: Sequence[tuple[str, str, str]],
    notes: Sequence[str],
    folder: Path,
) -> None:
    """Write the model card, and what other tools need to make the same of the base model."""
    warning = llama_cpp_warning(model) if recipes.is_mask(sequence) else None
    card = recipes.model_card(base, sequence, model.num_blocks, results, notes, warning)
    (folder / "README.md").write_text(card, encoding="utf-8")
    (folder / "recipes").mkdir()
    dtype = str(model.dtype).removeprefix("torch.")
    for name, text in recipes.all_recipes(base, sequence, model.num_blocks, dtype, warning).items():
        (folder / "recipes" / name).write_text(text, encoding="utf-8")


Measured = tuple[float, float | None]  # a loss, and its standard error where it is known


def _measure(evaluator: Evaluator, sequence: Sequence[int]) -> tuple[Measured, Measured]:
    """The losses of the whole model and of these blocks; of blocks that ascend with errors."""
    if not recipes.is_mask(sequence):
        return (evaluator.dense_loss, None), (float(evaluator.score(sequences=[sequence])[0]), None)
    masks = np.ones((2, evaluator.num_units), dtype=bool)
    masks[1] = np.isin(np.arange(evaluator.num_units), sequence)
    sample_losses = evaluator.score_samples(masks)
    losses = evaluator.objective.mean(sample_losses).tolist()
    before, after = zip(losses, evaluator.objective.standard_error(sample_losses).tolist())
    return before, after


def _result(name: str, losses: tuple[float, float]) -> tuple[str, str, str]:
    """A row of the card: metric, direction and data, before and after.

    name: of the objective; what it was measured on may follow behind a comma.
    """
    name, comma, data = name.partition(",")
    objective = objective_class(name)
    what = objective.header() if objective is not Objective else f"{name} loss (lower is better)"
    before, after = (objective.format(loss, named=False) for loss in losses)
    return what + comma + data, before, after


def _base_name(name: str) -> str:
    """A name that may be published: a hub id, or the last part of a folder's path."""
    is_hub_id = recipes.HUB_ID.fullmatch(name) and not Path(name).exists()
    return name if is_hub_id else Path(name).absolute().name


def _check_losses(
    losses: Mapping[str, tuple[float, float]] | None,
) -> dict[str, tuple[float, float]]:
    if losses is None:
        return {}
    try:
        return {
            str(name): (float(before), float(after)) for name, (before, after) in losses.items()
        }
    except (AttributeError, TypeError, ValueError):
        raise InputError(
            f"losses are (before, after) by objective, such as {{'perplexity': (2.1, 2.4)}}, not "
            f"{shown(losses)}"
        ) from None


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Without transformers' own bars for reading and writing weights."""
    from transformers.utils import logging

    were_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if were_enabled:
            logging.enable_progress_bar()


def _check_written(model: Model, sequence: Sequence[int], what: str, folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    from ..models import open_runner
    from ..models.verify import agree, probe_ids

    runner, ids = open_runner(model, "generic"), probe_ids(model)
    state, arguments = runner.open(ids)
    for block in sequence:
        state = runner.run(block, state, arguments)
    expected = runner.logits(state.flatten(0, 1))
    implementation = getattr(model.config, "_attn_implementation", None)
    # what such a model's own code has written along is that code
    own_code = type(model.hf).__module__.startswith("transformers_modules.")
    options = {
        "dtype": model.dtype,
        "attn_implementation": implementation,
        "trust_remote_code": own_code,
    }
    try:
        written = AutoModelForCausalLM.from_pretrained(folder, **options)
        found = written.eval().to(model.device)(input_ids=ids, use_cache=False).logits.flatten(0, 1)
    except (RuntimeError, ValueError, KeyError, IndexError) as error:
        raise InputError(
            f"the family {model.family!r} cannot be exported {what}: {error}"
        ) from error
    if not agree(found, expected, model.dtype):
        raise InputError(
            f"the family {model.family!r} cannot be exported {what}: "
            "its blocks depend on their index, and the written checkpoint gives other logits"
        )
