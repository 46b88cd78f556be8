"""Conversations as sequences of tokens, through a chat template."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from ..errors import InputError, brief, shown
from ..validate import tokenizing
from .encode import Encoder
from .ids import Row
from .tokens import common_prefix

LossOn = Literal["completion", "all"]
LOSS_ON: tuple[LossOn, ...] = get_args(LossOn)


def is_chat(value: object) -> bool:
    """Whether a row holds a conversation: "messages", or "prompt" and "completion"."""
    return isinstance(value, Mapping) and (
        "messages" in value or {"prompt", "completion"} <= set(value)
    )


class ChatEncoder:
    """Conversations as token ids.

    Args:
        encoder: The tokenizer.
        chat_template: A template's file, or the name of one that the tokenizer has; by default the
            tokenizer's own.
        loss_on: "completion" for the last answer's tokens, "all" for every token but the first.
    """

    def __init__(self, encoder: Encoder, chat_template: str | None, loss_on: str):
        self._encoder, self._loss_on = encoder, loss_on
        self._template = _find_template(encoder.tokenizer, chat_template)

    def row(self, value: Any, place: str) -> Row:
        """Encode one conversation.

        Returns:
            Its tokens, and the flags of its targets.

        Raises:
            InputError: The row holds no conversation that ends with an answer, or the template
                refuses it. The error names place and field.
        """
        if not is_chat(value):
            raise InputError(
                f'{place}: expected a row like {{"messages": [...]}} or {{"prompt": "...", '
                f'"completion": "..."}}, not {shown(value)}'
            )
        prompt, answer = value.get("prompt"), value.get("completion")
        if self._template is None and isinstance(prompt, str) and isinstance(answer, str):
            ids, start = self._encoder.pair(prompt, answer, place)
        else:
            messages, completion = _conversation(value, place)
            text = self._render([*messages, *completion], place)
            start = 1
            with tokenizing(place):
                ids = self._encoder.raw(text)
                if self._loss_on == "completion":
                    before = self._prompt(messages, text, place)
                    start = common_prefix([self._encoder.raw(before), ids]) if before else 0
        start = 1 if self._loss_on == "all" else max(start, 1)
        if start >= len(ids):
            raise InputError(f"{place}: the completion adds no token of its own")
        return Row(ids, np.arange(len(ids)) >= start)

    def _prompt(self, messages: list, text: str, place: str) -> str:
        """The part of a conversation's text before its answer.

        Raises:
            InputError: The template writes the earlier turns differently with an answer, so that
                the answer has no place.
        """
        for opened in (True, False):
            prompt = self._render(messages, place, opened)
            if text.startswith(prompt):
                return prompt
        raise InputError(
            f"{place}: the chat template writes the turns before the answer differently when an "
            f"answer follows, so that the answer has no place",
            fits={"loss_on": "all"},
        )

    def _render(self, messages: list, place: str, opened: bool = False) -> str:
        """The text of messages; with `opened`, the marks that begin an answer follow."""
        if self._template is None:
            raise InputError(
                f"{place}: messages need a chat template, and the tokenizer has none; name a file "
                f"that holds one",
                fits={"chat_template": "template.jinja"},
            )
        try:
            return self._encoder.tokenizer.apply_chat_template(
                messages,
                chat_template=self._template,
                tokenize=False,
                add_generation_prompt=opened,
            )
        except Exception as error:  # a template raises whatever its author wrote
            raise InputError(
                f"{place}: the chat template takes no such row ({brief(str(error), 120)})"
            ) from None


def _find_template(tokenizer: Any, name: str | None) -> str | None:
    """The text of a template: the tokenizer's default, one of its named ones, or a file's."""
    own = getattr(tokenizer, "chat_template", None)
    if name is None:
        return own.get("default") if isinstance(own, Mapping) else own
    if isinstance(own, Mapping) and name in own:
        return own[name]
    if not isinstance(name, str) or not Path(name).is_file():
        names = f", or one of the tokenizer's {', '.join(own)}" if isinstance(own, Mapping) else ""
        raise InputError(
            f"chat_template must be the file of a template{names}, not {shown(name)}",
            argument="chat_template",
        )
    try:
        return Path(name).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"{name}: not a text file in UTF-8", argument="chat_template") from None


def _conversation(value: Any, place: str) -> tuple[list[dict], list[dict]]:
    """The turns before the last answer, and the turns of the answer."""
    if "messages" in value:
        turns = _as_turns(value["messages"], "user", f"{place}: messages")
        if turns[-1]["role"] != "assistant":
            raise InputError(
                f"{place}: messages must end with a turn of the role assistant, not "
                f"{shown(turns[-1]['role'])}"
            )
        return turns[:-1], turns[-1:]
    return (
        _as_turns(value["prompt"], "user", f"{place}: prompt"),
        _as_turns(value["completion"], "assistant", f"{place}: completion"),
    )


def _as_turns(value: object, role: str, place: str) -> list[dict]:
    """Read turns {"role", "content"}; a string is one turn of this role."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    turns = list(value) if isinstance(value, (list, tuple, np.ndarray)) else []
    for turn in turns:
        if not isinstance(turn, Mapping) or not {"role", "content"} <= set(turn):
            turns = []
            break
    if not turns:
        raise InputError(
            f'{place} must be turns like [{{"role": "user", "content": "..."}}], not {shown(value)}'
        )
    return [dict(turn) for turn in turns]
