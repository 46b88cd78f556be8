"""Texts as token ids.

This file knows the tokens that a tokenizer puts around a text, and finds a choice's first token.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from ..errors import InputError, shown
from ..validate import check_callable, tokenizing

NO_IDS = np.zeros(0, dtype=np.int64)


class Encoder:
    """A tokenizer without the tokens that it appends to a text.

    A token that ends every text, such as </s>, would separate a prompt from its choice, and would
    be a target after every document. The encoder drops it.

    Args:
        tokenizer: One of transformers, or a function from texts to {"input_ids": ...}.
        example: A text, not blank, from which the encoder learns the tokens that the tokenizer
            adds.
    """

    def __init__(self, tokenizer: Any, example: str):
        self.tokenizer = check_tokenizer(tokenizer)
        self._example = example
        self._prefix = getattr(tokenizer, "bos_token", None) or getattr(
            tokenizer, "eos_token", None
        )

    @cached_property
    def _added(self) -> tuple[np.ndarray, np.ndarray]:
        """The tokens that the tokenizer puts before and after a text."""
        if not hasattr(self.tokenizer, "all_special_ids"):  # a plain function adds no such tokens
            return NO_IDS, NO_IDS
        example = self._example.strip()[:100]
        with tokenizing("tokenizer"):
            plain, framed = (
                np.asarray(
                    self.tokenizer(example, add_special_tokens=special, verbose=False)["input_ids"]
                )
                for special in (False, True)
            )
        if not len(plain):
            raise InputError(f"tokenizer must know the text; it has no token for {shown(example)}")
        for first in range(len(framed) - len(plain) + 1):
            stop = first + len(plain)
            if np.array_equal(framed[first:stop], plain):
                return framed[:first].astype(np.int64), framed[stop:].astype(np.int64)
        raise InputError(
            "tokenizer must add its special tokens before and after a text, not inside it"
        )

    def documents(self, texts: Sequence[str], name: str) -> list[np.ndarray]:
        """Encode texts, with the tokens that begin a text and without those that end one.

        Args:
            texts: The texts.
            name: The name of the data, for errors.

        Returns:
            The ids of each text, int64[T].
        """
        with tokenizing(name):
            encoded = self.tokenizer(list(texts), return_attention_mask=False, verbose=False)
        return [self._without_end(ids) for ids in encoded["input_ids"]]

    def pair(self, prompt: str, choice: str, place: str) -> tuple[np.ndarray, int]:
        """Encode a choice after its prompt, as lm-evaluation-harness does.

        Both are encoded together and split at the prompt's token count. Spaces at the prompt's end
        belong to the choice. Text that already begins with the tokenizer's first special token gets
        no second one.

        Args:
            prompt: The text before the choice.
            choice: The scored text, with its delimiter.
            place: File and line, for errors.

        Returns:
            The token ids, and the index of the choice's first token.

        Raises:
            InputError: No token precedes the choice, or the choice adds no token.
        """
        stripped = prompt.rstrip()
        choice = prompt[len(stripped) :] + choice
        with tokenizing(place):
            ids, start = self._text(stripped + choice), len(self._text(stripped))
        if start == 0:
            raise InputError(
                f"{place}: the prompt is empty and the tokenizer adds no token before the choice"
            )
        if start >= len(ids):
            raise InputError(
                f"{place}: the choice {shown(choice)} adds no token of its own after the prompt"
            )
        return ids, start

    def raw(self, text: str) -> np.ndarray:
        """Encode a text that already holds its special tokens, as chat templates write it."""
        encoded = self.tokenizer(text, add_special_tokens=False, verbose=False)
        return np.asarray(encoded["input_ids"], dtype=np.int64)

    def window_begin(self, bos: bool | None) -> np.ndarray:
        """The tokens in front of a window, by the argument bos of `load_text`."""
        begin, _ = self._added
        if bos is None or (bos and len(begin)):
            return begin
        if not bos:
            return NO_IDS
        token = getattr(self.tokenizer, "bos_token_id", None)
        if token is None:
            raise InputError(
                "bos must be False or None, because the tokenizer has no token that begins a text",
                argument="bos",
            )
        return np.array([token], dtype=np.int64)

    def _text(self, text: str) -> np.ndarray:
        if self._prefix and text.startswith(self._prefix):
            return self.raw(text)
        return self._without_end(self.tokenizer(text, verbose=False)["input_ids"])

    def _without_end(self, ids: Iterable[int]) -> np.ndarray:
        ids = np.asarray(ids, dtype=np.int64)
        _, end = self._added
        return ids[: len(ids) - len(end)]


def check_tokenizer(tokenizer: Any) -> Any:
    return check_callable("tokenizer", tokenizer, "one of transformers, such as model.tokenizer")
