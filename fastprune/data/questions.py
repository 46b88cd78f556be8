"""Read questions from rows, in our own form or that of ARC, MMLU or HellaSwag."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from string import ascii_uppercase
from typing import Any, NamedTuple

import numpy as np

from ..errors import InputError, shown
from ..validate import is_integer

EXPECTED = '{"prompt": "...", "choices": ["...", "..."], "answer": 0}'


class Question(NamedTuple):
    """A prompt, its choices, and the index of the right one."""

    prompt: str
    choices: list[str]
    answer: int
    delimiter: str | None = None  # the row's own, between prompt and choice


def read_question(value: Any, place: str) -> tuple[Question, str]:
    """Read a row of any known form.

    Args:
        value: The row.
        place: File and line, for errors.

    Returns:
        The question, worded as lm-evaluation-harness words that task, and the name of the form.

    Raises:
        InputError: The row has another form, or a field is wrong; the error names the field.
    """
    for name, (prompt, others, read) in FORMS.items():
        if isinstance(value, Mapping) and {prompt, *others} <= set(value):
            if not isinstance(value[prompt], str):
                raise InputError(
                    f"{place}: expected a row like {EXPECTED}; {prompt} must be text, not "
                    f"{shown(value[prompt])}"
                )
            return read(value, place), name
    raise InputError(
        f"{place}: expected a row like {EXPECTED}, or one of {', '.join([*FORMS][1:])}"
    )


def question_form(row: Mapping) -> str | None:
    """The name of the public data set whose form a row has, such as ARC; None for no such form."""
    for name, (prompt, others, _) in FORMS.items():
        if others and {prompt, *others} <= set(row):
            return name
    return None


def _read_own(row: Mapping, place: str) -> Question:
    if row.get("choices") is None:
        fields = ", ".join(map(str, row))
        raise InputError(
            f"{place}: choices must be a list of strings, as in {EXPECTED}; the row's fields are "
            f"{fields}"
        )
    choices = _check_choices(row.get("choices"), "choices", place)
    delimiter = row.get("delimiter")
    if delimiter is not None and not isinstance(delimiter, str):
        raise InputError(f'{place}: delimiter must be text such as " ", not {shown(delimiter)}')
    answer = _check_answer(row.get("answer"), choices, "answer", place)
    return Question(row["prompt"], choices, answer, delimiter)


def _read_arc(row: Mapping, place: str) -> Question:
    choices = row["choices"] if isinstance(row["choices"], Mapping) else {}
    texts = _check_choices(choices.get("text"), 'choices["text"]', place)
    labels = _plain_list(choices.get("label"))
    if not isinstance(labels, list) or len(labels) != len(texts):
        raise InputError(f'{place}: choices["label"] must be a list with one label a choice')
    if row["answerKey"] not in labels:
        raise InputError(
            f"{place}: answerKey must be one of the labels {', '.join(map(str, labels))}, not "
            f"{shown(row['answerKey'])}"
        )
    prompt = f"Question: {row['question']}\nAnswer:"
    return Question(prompt, texts, labels.index(row["answerKey"]))


def _read_mmlu(row: Mapping, place: str) -> Question:
    choices = _check_choices(row["choices"], "choices", place)
    letters = list(ascii_uppercase[: len(choices)])
    if len(letters) < len(choices):
        raise InputError(f"{place}: choices must be at most {len(letters)}, not {len(choices)}")
    listed = "".join(f"\n{letter}. {choice}" for letter, choice in zip(letters, choices))
    answer = _check_answer(row["answer"], choices, "answer", place)
    return Question(f"{row['question'].strip()}{listed}\nAnswer:", letters, answer)


def _read_hellaswag(row: Mapping, place: str) -> Question:
    endings = _check_choices(row["endings"], "endings", place)
    text = row["ctx"]
    if all(isinstance(row.get(part), str) for part in ("activity_label", "ctx_a", "ctx_b")):
        text = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    label = row["label"]
    if isinstance(label, str) and label.isdecimal() and len(label) < 4:
        label = int(label)
    answer = _check_answer(label, endings, "label", place)
    return Question(_without_marks(text), [_without_marks(ending) for ending in endings], answer)


def _without_marks(text: str) -> str:
    """The text without the marks in HellaSwag's questions from WikiHow."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _check_choices(choices: Any, field: str, place: str) -> list[str]:
    choices = _plain_list(choices)
    if (
        not isinstance(choices, list)
        or not choices
        or not all(isinstance(c, str) and c.strip() for c in choices)
    ):
        raise InputError(f"{place}: {field} must be a list of strings that are not empty")
    if len(choices) < 2:
        raise InputError(f"{place}: a question needs at least 2 choices, not {len(choices)}")
    return choices


def _check_answer(answer: Any, choices: list[str], field: str, place: str) -> int:
    """The index of the right choice, from an index or from a letter: A is the first."""
    letters = ascii_uppercase[: len(choices)]
    if isinstance(answer, str) and len(answer) == 1 and answer in letters:
        index = letters.index(answer)
        texts = [choice.strip() for choice in choices]
        if answer in texts and texts.index(answer) != index:
            raise InputError(
                f"{place}: {field} {answer!r} names a choice by its letter and another by its "
                f"text; give the index, 0 to {len(choices) - 1}"
            )
        return index
    if not is_integer(answer) or not 0 <= answer < len(choices):
        raise InputError(
            f"{place}: {field} must be the index of a choice, 0 to {len(choices) - 1}, not "
            f"{shown(answer)} (or its letter, A to {letters[-1]})"
        )
    return int(answer)


def _plain_list(value: Any) -> Any:
    """An array, as data frames hold it, as a list."""
    return value.tolist() if isinstance(value, np.ndarray) else value


# by name of the form: the field of the prompt, the other fields of a row, and the reader
FORMS: dict[str, tuple[str, tuple[str, ...], Callable[[Mapping, str], Question]]] = {
    "prompts": ("prompt", (), _read_own),
    "ARC": ("question", ("choices", "answerKey"), _read_arc),
    "MMLU": ("question", ("choices", "answer"), _read_mmlu),
    "HellaSwag": ("ctx", ("endings", "label"), _read_hellaswag),
}
