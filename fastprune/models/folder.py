"""A folder of safetensors as a transformers model, checked against its config.

Streamed weights of blocks stay in their files, and so may the weights of towers.
"""

from __future__ import annotations

import math
import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import InputError, brief
from .device import available_bytes
from .files import (
    FLOATS,
    TOWER,
    check_checkpoint,
    locate,
    names_other_attention,
    read_config,
    stored_dtype,
    wrong_dtype,
)
from .formats import (
    ask_to_dequantize,
    common_prefix,
    dequantized,
    forget_form,
    quantization_method,
)
from .imports import accelerate_shown
from .offload.placement import LeftOut, left_in_files
from .precision import widen
from .text import auto_class, layer_paths, text_config, towers

# share of the available memory that weights in float32 may take; activations need the rest
MOST_OF_MEMORY = 0.8
# buffers of earlier releases that carry no weights: causal masks, position tables, rotary
# frequencies
BUFFERS = re.compile(r"(attn|attention)\.(masked_)?bias$|(^|\.)position_ids$|rotary_emb\.inv_freq$")
MANY_TIMES = "a run takes many times as long as in float32"


class Folder:
    """A checkpoint's folder, checked.

    Attributes:
        name: Its name for messages.
        trusted: Whether the checkpoint's own code may run.
        dtype: The dtype of its weights.
        quantized: Whether they are quantized, and dequantized as they are loaded.
        prefix: A prefix that was removed from all names; "" for none.
        left: The weights that stayed in the files at the last load.
        has_towers: Whether the last loaded model takes other inputs besides text.

    Raises:
        InputError: A file is missing or damaged.
    """

    def __init__(self, path: Path, name: str, trust_remote_code: bool):
        self._path, self.name, self.trusted = path, name, trust_remote_code
        self._tensors = check_checkpoint(path)
        config = read_config(path / "config.json")
        self.quantized = quantization_method(config, path / "config.json") is not None
        self.dtype = stored_dtype(config, self._tensors)
        self._asks_for_attention = names_other_attention(config)
        self.prefix, self.left, self.has_towers = "", LeftOut(), False
        self._encodes = False  # whether it has an encoder beside its decoder

    def load(self, dtype: str | torch.dtype, streamed: bool, text_only: bool) -> Any:
        """Load the transformers model.

        Args:
            dtype: The dtype; "auto" is the checkpoint's own.
            streamed: Whether the weights of blocks stay in the files.
            text_only: Whether the weights of towers stay in the files.

        Raises:
            InputError: The checkpoint does not fit its config, or cannot be loaded.
        """
        import transformers

        self.left, self.has_towers = LeftOut(), False
        try:
            config: Any = transformers.AutoConfig.from_pretrained(
                self._path, local_files_only=True, trust_remote_code=self.trusted
            )
            self.has_towers = text_config(config) is not config
            self._encodes = bool(getattr(config, "is_encoder_decoder", False))
            self.prefix = common_prefix(self._tensors, self.has_towers)
            if self.quantized:
                ask_to_dequantize(config)
            leaves_towers = text_only and self.has_towers and not self.quantized
            if streamed or leaves_towers:
                with left_in_files(
                    self._path,
                    locate(self._path),
                    _only_layers if streamed else None,
                    towers if leaves_towers else None,
                    self.prefix,
                ) as self.left:
                    hf, report = self._with_attention(config, dtype)
            else:
                with accelerate_shown() if self.quantized else nullcontext():
                    hf, report = self._with_attention(config, dtype)
                    hf = dequantized(hf) if self.quantized else hf
        except Exception as error:  # any kind: the folder's content caused it
            if not self.trusted and "trust_remote_code" in str(error):
                raise InputError(
                    f"{self.name}: brings code of its own, which runs only with "
                    f"--trust-remote-code (trust_remote_code=True)"
                ) from error
            if "does not recognize this architecture" in str(error):
                raise InputError(
                    f"{self.name}: its family is not in transformers {transformers.__version__}; "
                    f"a newer release may know it"
                ) from error
            raise InputError(f"{self.name}: cannot be loaded: {first_line(error)}") from error
        if self.quantized or self.prefix:
            forget_form(hf)
        self._check(hf, report)
        return hf

    def load_widened(self, text_only: bool) -> tuple[Any, str]:
        """Load a 16-bit checkpoint to run in float32; also return the way of widening."""
        needed = 4 * sum(
            math.prod(shape) * (2 if kind == "U8" else 1)  # two numbers of 4 bits in a byte
            for name, (kind, shape) in self._tensors.items()
            if not (text_only and TOWER.search(name))
        )
        if needed > MOST_OF_MEMORY * available_bytes(torch.device("cpu")):
            hf = self.load("auto", False, text_only)
            if widen(hf):
                return (
                    hf,
                    "its weights are widened to float32 as they are used, since all would not fit",
                )
            del hf
        hf = self.load(torch.float32, False, text_only)
        return hf, "its weights were widened to float32, which loses nothing"

    def _with_attention(self, config: Any, dtype: str | torch.dtype) -> Any:
        """Load the model, with attention that takes masks; also return transformers' report."""

        def load(**attention: Any) -> Any:
            return auto_class(config).from_pretrained(
                self._path,
                config=config,
                dtype=dtype,
                key_mapping={f"^{re.escape(self.prefix)}": ""} if self.prefix else None,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=self.trusted,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # the check after it says which
                **attention,
            )

        if not self._asks_for_attention:
            return load()
        try:
            return load(attn_implementation="sdpa")
        except ValueError as error:
            if "scaled_dot_product_attention" not in str(error):
                raise
            return load(attn_implementation="eager")  # the family has no sdpa

    def _check(self, hf: Any, report: dict) -> None:
        """Raise InputError unless every tensor had its place, and every place its tensor."""
        misfit = f"{self.name}: the checkpoint does not fit its config"
        strange = [
            tensor
            for tensor in sorted(report.get("unexpected_keys", ()), key=str)
            if not BUFFERS.search(tensor)
            and not (tensor == "lm_head.weight" and hf.config.tie_word_embeddings)
        ]
        if strange and self._encodes:
            raise InputError(
                f"{self.name}: it is an encoder-decoder's checkpoint ({brief(strange[0], 80)}), "
                f"and only models of decoder layers are scored"
            )
        if missing := sorted(report.get("missing_keys", ()), key=str):
            instead = f"; it holds {brief(strange[0], 80)} instead" if strange else ""
            raise InputError(f"{misfit} (missing keys: {brief(missing[0], 80)}{instead})")
        if mismatched := sorted(report.get("mismatched_keys", ()), key=str):
            tensor, stored, expected = mismatched[0]
            raise InputError(
                f"{misfit}: {brief(tensor, 80)} has the shape {list(stored)}, not {list(expected)}"
            )
        if strange:
            raise InputError(
                f"{self.name}: the config has no place for the tensor {brief(strange[0], 80)} of "
                f"the checkpoint"
            )
        own = [buffer for buffer, values in hf.named_buffers() if not values.is_floating_point()]
        for tensor, (kind, _) in self._tensors.items():
            is_buffer = BUFFERS.search(tensor) or any(
                f".{buffer}".endswith(f".{tensor}") for buffer in own
            )
            if kind not in FLOATS and not is_buffer and not self.quantized:
                raise wrong_dtype(self.name, tensor, kind)


def _only_layers(hf: nn.Module) -> tuple[str, ...]:
    paths = layer_paths(hf)
    if len(paths) != 1:
        raise ValueError(
            "its list of decoder layers was not found, so that its weights cannot be streamed"
        )
    return paths[0]


def first_line(error: Exception) -> str:
    """The first line of an exception, with the next one if it ends in a colon; or its type."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    count = 2 if lines and lines[0].endswith(":") else 1
    return " ".join(lines[:count]) or type(error).__name__
