"""Write a mask or sequence as a checkpoint for stock transformers, with recipes for other tools."""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError, brief, shown
from ..masks import is_mask
from ..objectives import Objective, format_size, no_judge, objective_class
from ..validate import check_folder
from . import recipes
from .source import reader_notes, save_code, save_model, save_tokenizer, source_folder

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..evaluator import Evaluator
    from ..models import Model


LONGEST_REASON = 300  # characters of an error of the family's own code


def export(
    model: Model | Evaluator | nn.Module,
    out_dir: str | os.PathLike,
    *,
    removed: Iterable[int] | None = None,
    sequence: Sequence[int] | None = None,
    base_model: str | None = None,
    losses: Mapping[str, tuple[float, float]] | None = None,
    notes: Sequence[str] = (),
    measure_speed: bool = False,
) -> Path:
    """Write the model with some of its blocks as a safetensors checkpoint.

    `AutoModelForCausalLM.from_pretrained` loads the checkpoint; for a config with towers, its own
    auto class does. The config describes the blocks in their new order. Weights have the source's
    dtype if that loses nothing. All files of the source's tokenizer are copied.

    The written checkpoint is loaded again. Its logits must equal those of the same blocks run one
    by one. Only then does the folder appear, complete. It can go to a hub as it is: README.md is
    its model card, and `recipes/` describes the removal for mergekit, llama.cpp, EvoPress and
    LLM-Drop.

    Args:
        model: A Model, a transformers model, or an Evaluator of blocks. For an Evaluator, the card
            shows its metric with standard errors.
        out_dir: The new folder.
        removed: Indices of the blocks to leave out.
        sequence: Instead of removed, the blocks in the order in which they run, as in
            `Evaluator.score`. A block named n times is written n times, with separate
            weights.
        base_model: The hub id of the base model, for card and recipes. By default the name by which
            the model was opened, or the last part of its folder.
        losses: (before, after) by objective, for the card, which shows them as metrics. After a
            comma, a name may also name the calibration set.
        notes: Sentences for the card, below the metrics.
        measure_speed: Also measure the tokens that transformers' own code reads per second on this
            machine, for the card.

    Returns:
        The folder.

    Raises:
        InputError: Both or none of removed and sequence are given, an index is out of range or
            given twice, no block is kept, the folder is not empty, base_model is no hub id, or the
            family's blocks cannot be renumbered.

    Examples:
        >>> import tempfile
        >>> import fastprune as fp
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     pruned = fp.export(fp.load_model("demo"), f"{folder}/pruned", removed=(3, 7))
        ...     grown = fp.export(fp.load_model("demo"), f"{folder}/grown", sequence=(0, 1, 1, 2))
        ...     fp.load_model(pruned).num_blocks, fp.load_model(grown).num_blocks
        (10, 4)
    """
    from ..models import Library
    from ..models.surgery import kept_blocks, logits_by_blocks, ordered

    out = check_target(out_dir)
    model, evaluator = _opened(model)
    if isinstance(model, Library) and sequence is not None:
        model.check_exportable(sequence)
    model = _merged(model)
    blocks = kept_blocks(model.num_blocks, removed, sequence)
    if not blocks:
        emptied = "removing every block" if sequence is None else "a sequence without blocks"
        raise InputError(f"{emptied} leaves nothing to export")
    left_out = tuple(sorted(set(range(model.num_blocks)) - set(blocks)))
    how = f"without blocks {left_out}" if sequence is None else f"with the blocks {tuple(blocks)}"
    base = _base_name(check_base_model(base_model) or model.name)
    results = [_result(name, pair) for name, pair in _check_losses(losses).items()]
    notes = list(notes)
    with model.lock:
        if reason := _misfit(model, blocks):
            raise _refusal(model, how, reason)
    if evaluator is not None:
        measured, note = _measured(evaluator, blocks)
        results.append(measured)
        if note:
            notes.append(note)
    results += _sizes(model, blocks, measure_speed)
    partial = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}")
    partial.mkdir(parents=True)
    try:
        with model.evaluation(), _no_progress_bars():
            source = source_folder(model)
            save_model(ordered(model, blocks, copies=True), partial, source, model.towers)
            save_tokenizer(model, partial, source)
            save_code(model, partial, source)
            _check_written(model, logits_by_blocks(model, blocks), how, partial)
        _describe(model, blocks, base, results, notes, partial)
        # safetensors makes its files private; the folder has the mode of the umask
        for file in partial.rglob("*"):
            if file.is_file():
                file.chmod(partial.stat().st_mode & 0o666)
        if out.exists():
            out.rmdir()
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


def can_export(model: Model, sequence: Sequence[int] | None = None) -> str | None:
    """Check, without reading weights, that a checkpoint with some blocks can be written.

    From the config that an export would write, the family's own code must make tensors of the
    blocks' names and shapes. `export` also checks the values.

    Args:
        model: The model.
        sequence: Blocks in their order; by default all, all but the first, and all but the last.

    Returns:
        None if it can be written; else the reason.

    Examples:
        >>> import fastprune as fp
        >>> from fastprune.exports import can_export
        >>> print(can_export(fp.load_model("demo")))
        None
    """
    model = _merged(model)
    if sequence is not None:
        return _misfit(model, sequence)
    blocks = list(range(model.num_blocks))
    ways = {"": blocks}
    if model.num_blocks > 1:
        ways |= {"without block 0: ": blocks[1:], f"without block {blocks[-1]}: ": blocks[:-1]}
    for how, kept in ways.items():
        if reason := _misfit(model, kept):
            return how + reason
    return None


def _misfit(model: Model, sequence: Sequence[int]) -> str | None:
    import torch

    from ..models.surgery import ordered

    try:
        pruned = ordered(model, sequence)
        # write and read the config, so that its class checks and derives its values
        with tempfile.TemporaryDirectory() as folder:
            pruned.config.save_pretrained(folder)
            config = type(pruned.config).from_pretrained(folder)
        config._attn_implementation = getattr(model.hf.config, "_attn_implementation", None)
    except InputError as error:
        return str(error)
    except Exception as error:  # the family's own code refuses in ways of its own
        text = brief(str(error), LONGEST_REASON)
        return f"its config cannot describe these blocks ({type(error).__name__}: {text})"
    try:
        with torch.device("meta"):
            fresh = type(pruned)(config)
    except Exception:  # its code needs values to make a model; `export` checks the written one
        return None
    shapes = {name: tensor.shape for name, tensor in pruned.state_dict().items()}
    expected = {name: tensor.shape for name, tensor in fresh.state_dict().items()}
    differing = sorted(
        name for name in shapes.keys() | expected.keys() if shapes.get(name) != expected.get(name)
    )
    if differing:
        return f"its blocks depend on their index ({differing[0]} would differ)"
    return None


def check_target(out_dir: str | os.PathLike) -> Path:
    """Return the folder if a checkpoint can be written to it; else raise InputError."""
    out = Path(out_dir)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(
            f"{out}: exists already and is not overwritten; name another folder or remove it"
        )
    return check_folder(out)


def check_base_model(base_model: str | None) -> str | None:
    """Return the value if it is a hub id; else raise InputError."""
    if base_model is not None and not (
        isinstance(base_model, str) and recipes.HUB_ID.fullmatch(base_model)
    ):
        raise InputError(f"base_model must be a hub id such as 'org/name', not {shown(base_model)}")
    return base_model


def llama_cpp_warning(model: Model) -> str | None:
    """The warning about llama.cpp's own option to drop blocks of a model; None if none applies."""
    from ..models.surgery import per_layer

    return recipes.llama_cpp_warning(per_layer(model))


def _opened(model: Model | Evaluator | nn.Module) -> tuple[Model, Evaluator | None]:
    """The Model, and the Evaluator if one was passed."""
    from ..evaluator import Evaluator
    from ..models import Model, open_runner
    from ..models.unwrap import unwrap

    if not isinstance(model, Evaluator):
        opened = model if isinstance(model, Model) else Model(unwrap(model))
        open_runner(opened, "generic")  # verified before anything is written
        return opened, None
    if model.granularity != "block":
        raise InputError(
            "half a block cannot be left out of a checkpoint; give an evaluator of blocks"
        )
    return model.model, model


def _merged(model: Model) -> Model:
    """The model with its adapters merged, as a checkpoint holds it."""
    from ..models import Model
    from ..models.unwrap import without_adapters

    hf = without_adapters(model.hf)
    if hf is model.hf:
        return model
    merged = Model(hf, model.tokenizer, model.name)
    merged.towers = model.towers
    return merged


def _describe(
    model: Model,
    sequence: Sequence[int],
    base: str,
    results: Sequence[tuple[str, str, str]],
    notes: Sequence[str],
    folder: Path,
) -> None:
    """Write the model card, and the recipes by which other tools prune the base model alike."""
    from ..models.text import has_towers

    warning = llama_cpp_warning(model) if is_mask(sequence) else None
    if has_towers(model.hf):
        notes = [*notes, "Blocks were chosen by text alone; its other inputs were not run"]
    notes = [*notes, *reader_notes(folder)]
    card = recipes.model_card(base, sequence, model.num_blocks, results, notes, warning)
    (folder / "README.md").write_text(card, encoding="utf-8")
    (folder / "recipes").mkdir()
    dtype = str(model.dtype).removeprefix("torch.")
    # an absolute path, since tools run in other folders
    source = source_folder(model)
    place = base if recipes.HUB_ID.fullmatch(base) or source is None else str(source.absolute())
    texts = recipes.all_recipes(place, sequence, model.num_blocks, dtype, warning)
    for name, text in texts.items():
        (folder / "recipes" / name).write_text(text, encoding="utf-8")


def _sizes(
    model: Model, sequence: Sequence[int], measure_speed: bool
) -> list[tuple[str, str, str]]:
    """Make rows of the card: parameters, bytes and measured speed, before and after."""
    import torch

    from ..costs import tokens_per_second
    from ..models.surgery import ordered

    rows: list[tuple[str, str, str]] = []
    with model.evaluation():
        models = model.hf, ordered(model, sequence, copies=True)
        before, after = (list(hf.parameters()) for hf in models)
        for name, size in (("parameters", torch.numel), ("bytes", lambda weights: weights.nbytes)):
            rows.append((name, f"{sum(map(size, before)):,}", f"{sum(map(size, after)):,}"))
        if measure_speed:
            slow, fast = (f"{tokens_per_second(model, hf):,.0f}" for hf in models)
            rows.append(("tokens per second, measured", slow, fast))
    return rows


def _measured(evaluator: Evaluator, sequence: Sequence[int]) -> tuple[tuple[str, str, str], str]:
    """Score the whole model and these blocks.

    Returns:
        A row of the card, and a note if the objective cannot judge; else ''.
    """
    objective = evaluator.objective
    sample_losses = evaluator.score_samples(sequences=[range(evaluator.num_units), sequence])
    losses = objective.mean(sample_losses).tolist()
    errors = objective.standard_error(sample_losses).tolist()
    before, after = (
        objective.format(loss, error, named=False) for loss, error in zip(losses, errors)
    )
    data = format_size(objective.num_samples, objective.batch.num_tokens)
    note = no_judge(objective.describe(), losses[0])
    return (f"{objective.header()}, {data}", before, after), note


def _result(name: str, losses: tuple[float, float]) -> tuple[str, str, str]:
    """Make a row of the card: metric, direction and data, before and after.

    The name is that of the objective. The name of its data may follow after a comma.
    """
    name, comma, data = name.partition(",")
    objective = objective_class(name)
    header = objective.header() if objective is not Objective else f"{name} loss (lower is better)"
    before, after = (objective.format(loss, named=False) for loss in losses)
    return header + comma + data, before, after


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
    """Hide transformers' own bars for reading and writing weights."""
    from transformers.utils import logging

    were_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if were_enabled:
            logging.enable_progress_bar()


def _refusal(model: Model, how: str, reason: object) -> InputError:
    return InputError(f"the family {model.family!r} cannot be exported {how}: {reason}")


def _check_written(model: Model, expected: torch.Tensor, how: str, folder: Path) -> None:
    """Check that the written checkpoint, as transformers loads it, gives these logits [T, V]."""
    from transformers import AutoConfig

    from ..models.compare import agree, probe_ids
    from ..models.text import auto_class

    # the written code is the model's own, which has run already
    own_code = type(model.hf).__module__.startswith("transformers_modules.")
    options = {
        "dtype": model.dtype,
        "attn_implementation": getattr(model.hf.config, "_attn_implementation", None),
        "trust_remote_code": own_code,
    }
    ids = probe_ids(model)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=own_code)
        written, report = auto_class(config).from_pretrained(
            folder, output_loading_info=True, **options
        )
        if report["missing_keys"]:
            raise ValueError(f"{sorted(report['missing_keys'])[0]} would be missing")
        logits = written.eval().to(model.device)(input_ids=ids, use_cache=False).logits
    except (RuntimeError, ValueError, KeyError, IndexError, OSError) as error:
        line = next(iter(str(error).splitlines()), "")
        raise _refusal(model, how, f"{type(error).__name__}: {line}") from error
    if not agree(logits.flatten(0, 1), expected, model.dtype):
        reason = "its blocks depend on their index, and the written checkpoint gives other logits"
        raise _refusal(model, how, reason)
