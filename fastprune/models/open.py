"""Folder, hub id, "demo" or a model in memory -> Model -> Runner. safetensors only; every file is
checked before it is read."""

from __future__ import annotations

import glob
import importlib.util
import os
import re
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import nn

from ..errors import InputError, brief, shown
from ..validate import check_bytes, is_number, tokenizing
from .alignment import align
from .files import check_shard, listed_shards
from .folder import MANY_TIMES, Folder, first_line
from .formats import ADAPTER_WEIGHTS, adapter_base, check_gguf, forget_form, merged
from .fused import FusedRunner, prefers_fused
from .generic import GenericRunner
from .imports import accelerate_shown
from .model import Model
from .offload.placement import resident_bytes, to_device
from .own_pass import check_row
from .precision import has_instructions
from .text import auto_class
from .unwrap import unwrap
from .verify import SHORT_ROWS, Needs, fused_failure, verified

LONGEST_MESSAGE = 400
# the files of a hub repository that hold a model and its tokenizer
HUB_FILES = [
    "*.json",
    "*.txt",
    "*.model",
    "*.tiktoken",
    "*.jinja",
    "model.safetensors",
]
TOKENIZER_MODELS = ("*.model", "*.tiktoken", "vocab.*", "tekken.json")  # beside tokenizer.json
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def load_model(
    source: str | os.PathLike | Model | nn.Module,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    *,
    tokenizer: Any = None,
    trust_remote_code: bool = False,
    weights_bytes: int | None = None,
) -> Model:
    """Open a language model for scoring.

    Args:
        source: The model, in one of these forms.

            - "demo", the small model of the package.
            - A folder of safetensors, a .gguf file or a hub id.
            - A folder of a peft adapter, which is merged into its base.
            - A transformers causal language model in memory. Its weights are shared, and it is left
              unchanged; device and dtype must stay None.
            - A Model, which is returned as it is.
        device: By default "cuda" if the machine has a GPU, else "cpu".
        dtype: By default the checkpoint's own, like "auto". A CPU without instructions for a 16-bit
            dtype runs in float32 by default: weights are widened as they are loaded, or, if they
            would not fit into memory, as they are used, with a UserWarning.
        tokenizer: A tokenizer of transformers; by default the folder's own, None for a model in
            memory.
        trust_remote_code: Run code of the checkpoint, for a family that transformers does not know.
        weights_bytes: For a checkpoint larger than memory, the most bytes of weights to load,
            embeddings and head included. Blocks stay in their files, and are read a band at a time.
            Scores have the same bits.

    Returns:
        The model.

    Raises:
        InputError: A shard is missing or truncated, the folder holds pickles, or the family cannot
            be run.

    Examples:
        >>> import fastprune as fp
        >>> fp.load_model("demo").num_blocks
        12
    """
    if not isinstance(source, (str, os.PathLike)):
        if device is not None or dtype is not None:
            raise InputError(
                "device and dtype belong to a model that is loaded; move a model in memory yourself"
            )
        if weights_bytes is not None:
            raise InputError(
                "weights_bytes belongs to a model that is read from a folder; this one is in memory"
            )
        if trust_remote_code:
            raise InputError(
                "trust_remote_code belongs to a model that is loaded; this one is in memory"
            )
        if isinstance(source, Model) and tokenizer is not None:
            raise InputError(
                "tokenizer belongs to a model that is opened; this one is open, with its own"
            )
        model = source if isinstance(source, Model) else Model(unwrap(source), tokenizer)
        verified(model)
        return model
    try:
        return _load(
            source,
            device,
            dtype,
            tokenizer,
            trust_remote_code,
            check_bytes("weights_bytes", weights_bytes, 1),
        )
    except InputError as error:
        raise error.restated(brief(error.message, LONGEST_MESSAGE)) from error.__cause__


def _load(
    source: str | os.PathLike,
    device: str | torch.device | None,
    dtype: str | torch.dtype | None,
    tokenizer: Any,
    trust_remote_code: bool,
    weights_bytes: int | None,
    text_only: bool = True,
) -> Model:
    name, folder = str(source), Path(source)
    if name == "demo":
        from ..demo import MODEL_DIR

        folder = MODEL_DIR
    try:
        is_folder, exists = folder.is_dir(), folder.exists()
    except OSError as error:
        raise InputError(f"{name}: cannot be looked at ({error.strerror})") from None
    if exists and not is_folder:
        if folder.suffix.lower() != ".gguf" or not folder.is_file():
            raise InputError(
                f"{name}: a model is a folder, a .gguf file, a hub id or 'demo', not another file"
            )
        if weights_bytes is not None:
            raise InputError(f"{name}: a GGUF file is dequantized whole; leave weights_bytes out")
        return _load_gguf(folder, _check_device(device), _check_dtype(dtype), tokenizer)
    if not exists and (not _HUB_ID.fullmatch(name) or name.startswith(".")):
        raise InputError(f"{name}: no such model folder")
    device, dtype = _check_device(device), _check_dtype(dtype)
    if not exists:
        folder = _fetch(name, trust_remote_code)
    if (base := adapter_base(folder)) is not None:
        if weights_bytes is not None:
            raise InputError(f"{name}: an adapter is merged into its base; leave weights_bytes out")
        # an adapter may change towers
        try:
            model = _load(base, device, dtype, tokenizer, trust_remote_code, None, text_only=False)
        except InputError as error:
            raise error.restated(f"{name}: the adapter's base: {error.message}") from error
        return _with_adapter(model, folder, name, tokenizer, trust_remote_code)
    checkpoint = Folder(folder, name, trust_remote_code)
    if weights_bytes is not None and checkpoint.quantized:
        raise InputError(
            f"{name}: quantized weights are dequantized whole; leave weights_bytes out"
        )
    wanted = checkpoint.dtype if dtype is None else dtype
    slow = device.type == "cpu" and isinstance(wanted, torch.dtype) and not has_instructions(wanted)
    place = str(Path(source).absolute()) if exists and name != "demo" else name
    widens, how = slow and dtype is None, MANY_TIMES
    try:
        model, how = _open_folder(
            checkpoint, device, dtype, widens, weights_bytes, place, text_only
        )
    except InputError:
        if not text_only or not checkpoint.has_towers:
            raise
        # some families run their towers for text, too
        model, how = _open_folder(checkpoint, device, dtype, widens, weights_bytes, place, False)
    if slow:
        lacks = (
            f"{name}: this processor has no instructions for {str(wanted).removeprefix('torch.')}"
        )
        warnings.warn(f"{lacks}: {how}", stacklevel=3)
    if checkpoint.prefix:
        warnings.warn(
            f"{name}: the names of its tensors begin with {checkpoint.prefix!r}, which is left out",
            stacklevel=3,
        )
    model.tokenizer = tokenizer
    if tokenizer is None:
        model.tokenizer, model.tokenizer_problem = _load_tokenizer(folder, trust_remote_code)
        if model.tokenizer_problem:
            warnings.warn(
                f"{name}: {model.tokenizer_problem}; token ids can be scored", stacklevel=3
            )
    return model


def _open_folder(
    checkpoint: Folder,
    device: torch.device,
    dtype: str | torch.dtype | None,
    widens: bool,
    weights_bytes: int | None,
    place: str,
    text_only: bool,
) -> tuple[Model, str]:
    """Open and verify the model of a folder. Also return how its weights are widened, if so."""
    how = MANY_TIMES
    if weights_bytes is not None:
        hf = checkpoint.load(torch.float32 if widens else dtype or "auto", True, text_only)
        how = "its weights are widened to float32 as they are read" if widens else how
    elif widens:
        hf, how = checkpoint.load_widened(text_only)
        if hf.dtype == torch.float32:
            dtype = torch.float32  # for workers, which must not decide by their own memory
    else:
        hf = checkpoint.load(dtype or "auto", False, text_only)
    align(hf)
    hf, left = to_device(hf, device).eval(), checkpoint.left
    if left.weights is not None and weights_bytes is not None:
        left.weights.start(weights_bytes, resident_bytes(hf), device, checkpoint.name)
    model = Model(hf, None, checkpoint.name, left.weights)
    model.towers = left.towers
    return _verified(model, (place, dtype, checkpoint.trusted, weights_bytes)), how


def _verified(model: Model, opened: tuple) -> Model:
    """Verify a model that was opened by these arguments of `load_model`."""
    with model.held() as version:
        verified(model)
        model.opened = opened, version
    return model


def _load_gguf(
    path: Path, device: torch.device, dtype: str | torch.dtype | None, tokenizer: Any
) -> Model:
    """Open a GGUF file, dequantized by transformers' own reader, and its tokenizer."""
    from transformers import AutoConfig, AutoTokenizer

    check_gguf(path)
    place = {"gguf_file": path.name, "local_files_only": True}
    wanted = torch.float32 if dtype in (None, "auto") else dtype  # the reader's own
    try:
        config = AutoConfig.from_pretrained(path.parent, **place)
        with accelerate_shown():
            hf = auto_class(config).from_pretrained(path.parent, dtype=wanted, **place)
        if tokenizer is None:
            tokenizer = AutoTokenizer.from_pretrained(path.parent, **place)
    except Exception as error:  # any kind: the file's content caused it
        raise InputError(f"{path}: cannot be read as GGUF: {first_line(error)}") from error
    forget_form(hf)
    model = Model(hf.to(device).eval(), tokenizer, str(path))
    return _verified(model, (str(path.absolute()), dtype, False, None))


def _with_adapter(
    base: Model, folder: Path, name: str, tokenizer: Any, trust_remote_code: bool
) -> Model:
    """The base model with an adapter merged into its weights."""
    opened = base.opened
    assert opened is not None
    check_shard(folder / ADAPTER_WEIGHTS)
    hf = merged(base.given, folder).eval()
    if tokenizer is None:
        tokenizer = _load_tokenizer(folder, trust_remote_code)[0] or base.tokenizer
    return _verified(Model(hf, tokenizer, name), (str(folder.absolute()), *opened[0][1:]))


@overload
def open_runner(
    model: Model, backend: Literal["generic"], needs: Needs = SHORT_ROWS
) -> GenericRunner: ...


@overload
def open_runner(
    model: Model, backend: str = "auto", needs: Needs = SHORT_ROWS
) -> GenericRunner | FusedRunner: ...


def open_runner(
    model: Model, backend: str = "auto", needs: Needs = SHORT_ROWS
) -> GenericRunner | FusedRunner:
    """Open a runner of a model's units; it is verified once for each version and need.

    Args:
        model: The model.
        backend: "generic", "fused" or "auto". "auto" takes the fused path if it supports the model,
            has operators for its device, and agrees with the generic path. If they disagree, a
            RuntimeWarning says so.
        needs: The units, and the longest row and tree that will run. The default is blocks, on rows
            of a few tokens.

    Returns:
        The generic runner, or the fused one.

    Raises:
        InputError: The model cannot run for these needs, or not on the fused path if `backend` is
            "fused".
    """
    with model.held():
        generic = verified(model, needs.granularity)
        failure = None
        if backend == "fused" or (backend == "auto" and prefers_fused(model)):
            fused = FusedRunner(model)
            failure = fused_failure(fused, generic, needs)
            if failure is None:
                return fused
            if backend == "fused":
                raise InputError(failure)
        if needs.row is not None:
            check_row(generic, needs.row, needs.together)
        if failure is not None:
            message = f"{failure}; going on with the generic one, which is slower"
            model.once(
                "without the fused path",
                lambda: warnings.warn(message, RuntimeWarning, stacklevel=5),
            )
        return generic


def _fetch(name: str, trust_remote_code: bool) -> Path:
    """The folder with a hub repository's files, which are downloaded if they are missing."""
    from huggingface_hub import snapshot_download

    patterns = [*HUB_FILES, *["*.py"] * trust_remote_code]
    try:
        folder = Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns=["*/*"]))
        if shards := listed_shards(folder):
            snapshot_download(name, allow_patterns=[glob.escape(shard) for shard in shards])
        return folder
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"{name}: no such model folder, and the hub did not give it: {first_line(error)}"
        ) from error


def _load_tokenizer(folder: Path, trust_remote_code: bool) -> tuple[Any, str]:
    """Load the checkpoint's tokenizer.

    Returns:
        The tokenizer, or None without one (token ids can still be scored); and the reason if its
        files could not be read.
    """
    from transformers import AutoTokenizer

    file = folder / "tokenizer.json"
    try:
        with tokenizing(file), _quiet_panics():
            tokenizer = AutoTokenizer.from_pretrained(
                folder, trust_remote_code=trust_remote_code, local_files_only=True
            )
    except InputError:
        raise
    except Exception as error:  # the tokenizers library raises no narrower class
        if file.is_file():
            why = first_line(error)
            raise InputError(f"{file}: cannot be read as a tokenizer: {why}") from error
        files = sorted(p.name for kind in TOKENIZER_MODELS for p in folder.glob(kind))
        if not files:
            return None, ""
        needed = importlib.util.find_spec("sentencepiece") is None
        hint = " (pip install sentencepiece protobuf)" * needed
        why = first_line(error)
        return None, f"its tokenizer ({', '.join(files)}) cannot be read{hint}: {why}"
    longest = getattr(tokenizer, "model_max_length", 0)
    if not is_number(longest):
        raise InputError(
            f"{folder / 'tokenizer_config.json'}: model_max_length must be a number, not "
            f"{shown(longest)}"
        )
    return tokenizer, ""


@contextmanager
def _quiet_panics() -> Iterator[None]:
    """Hold back this process's stderr, and drop it upon an exception.

    A panic of the tokenizers library prints lines there, which its exception repeats.
    """
    try:
        stderr = os.dup(2)
    except OSError:  # it is closed
        yield
        return
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
            held.seek(0)
            os.write(stderr, held.read())
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


def _check_device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise InputError(
            f"device {str(device)!r} cannot be used: {str(error).splitlines()[0]}"
        ) from None
    return device


def _check_dtype(dtype: str | torch.dtype | None) -> torch.dtype | str | None:
    if dtype is None or dtype == "auto":
        return dtype
    known = {
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
        "float16": torch.float16,
        "float64": torch.float64,
    }
    if isinstance(dtype, torch.dtype) and dtype in known.values():
        return dtype
    if dtype not in known:
        raise InputError(f"dtype must be auto or one of {', '.join(known)}, not {dtype!r}")
    return known[dtype]
