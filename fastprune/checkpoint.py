"""Mask -> Hugging Face checkpoint that stock transformers loads."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import InputError
from .masks import check_removed
from .models import Model
from .records import check_folder


def export(model, removed: Iterable[int], out_dir: str | os.PathLike) -> Path:
    """Write the model without these blocks as a safetensors checkpoint and return its folder.

    `AutoModelForCausalLM.from_pretrained` loads it: blocks are renumbered, num_hidden_layers and per-layer lists of
    the config are cut, the tokenizer goes along. The folder appears only when it is complete and what it holds,
    loaded again, gives the logits of the masked model.
    Raises InputError for an index out of range or given twice, a folder that is not empty, and for a family whose
    blocks cannot be renumbered.
    """
    model = model if isinstance(model, Model) else Model(model)
    removed = check_removed(removed, model.num_blocks)
    if len(removed) == model.num_blocks:
        raise InputError("removing every block leaves nothing to export")
    out = check_target(out_dir)
    partial = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}")
    partial.mkdir(parents=True)
    try:
        with model.evaluation(), _no_progress_bars():
            model.pruned(removed).save_pretrained(partial)
            if model.tokenizer is not None:
                model.tokenizer.save_pretrained(partial)
            _check_written(model, removed, partial)
        for file in partial.iterdir():  # safetensors makes its files private; the folder has what the umask leaves
            file.chmod(partial.stat().st_mode & 0o666)
        if out.exists():
            out.rmdir()
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


def check_target(out_dir: str | os.PathLike) -> Path:
    """The folder as a path, if a checkpoint can be written there. Raises InputError otherwise."""
    out = Path(out_dir)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: exists already and is not overwritten; name another folder or remove it")
    return check_folder(out)


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


def _check_written(model: Model, removed: tuple[int, ...], folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    ids = model.probe_ids()
    state, arguments = model.open(ids)
    for block in range(model.num_blocks):
        if block not in removed:
            state = model.run(block, state, arguments)
    expected = model.logits(state.flatten(0, 1))
    implementation = getattr(model.config, "_attn_implementation", None)
    # what such a model's own code has written along is that code
    own_code = type(model.hf).__module__.startswith("transformers_modules.")
    options = {"dtype": model.dtype, "attn_implementation": implementation, "trust_remote_code": own_code}
    try:
        written = AutoModelForCausalLM.from_pretrained(folder, **options)
        found = written.eval().to(model.device)(input_ids=ids, use_cache=False).logits.flatten(0, 1)
    except (RuntimeError, ValueError, KeyError, IndexError) as error:
        raise InputError(f"the family {model.family!r} cannot be exported without blocks {removed}: {error}") from error
    if not model.agree(found, expected):
        raise InputError(
            f"the family {model.family!r} cannot be exported without blocks {removed}: "
            "its blocks depend on their index, and the written checkpoint gives other logits"
        )
