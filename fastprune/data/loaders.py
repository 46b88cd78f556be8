"""Load calibration data from files, data sets and Python values: text, chats and questions.

Each form of data has a reader (`readers`, `chats`, `questions`). Loaders turn rows into one
`TokenBatch` or `Tasks`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError, shown
from ..validate import check_integer, check_kind, check_one_of
from .chats import LOSS_ON, ChatEncoder, LossOn, is_chat
from .encode import Encoder, check_tokenizer
from .ids import IGNORED_LABEL, to_rows
from .ids import Row as IdRow
from .questions import question_form, read_question
from .readers import Row, Source, open_rows, read_ids
from .tokens import Tasks, TokenBatch

log = logging.getLogger(__name__)

MOST_COUNT = 2**63 - 1
MOST_SHOWN = 4  # ranges of drawn samples that a line of the log names
NUM_SAMPLES, SEQ_LEN = 64, 2048  # by default
TEXT_FILES = (".txt", ".jsonl", ".json", ".csv", ".parquet")
TASK_FILES = (".jsonl", ".json", ".parquet")
ID_FILES = (".npy", ".safetensors")
# arguments that decide how text and tasks are read
TEXT_READING = ("bos", "column", "chat_template", "loss_on")
TASKS_READING = ("delimiter",)


def load_text(
    data: Any,
    tokenizer: Any = None,
    num_samples: int | None = None,
    seq_len: int | None = None,
    seed: int = 0,
    bos: bool | None = None,
    column: str | None = None,
    chat_template: str | None = None,
    loss_on: LossOn = "completion",
) -> TokenBatch:
    """Load calibration text as `num_samples` sequences of `seq_len` tokens.

    Texts are encoded one by one, joined in order, and cut into windows. The tokens that the
    tokenizer puts before a text stay; those that it appends are dropped. A conversation is a row of
    its own, written by the chat template. The page on calibration data shows every form of data.

    Args:
        data: The data, in one of these forms.

            - A .txt, .jsonl, .json, .csv or .parquet file; .gz and .zst are decompressed.
            - The folder of a data set, or a data set of the hub as "NAME:CONFIG:SPLIT".
            - A `datasets.Dataset`, a DataFrame or one of its columns.
            - A list of strings or of rows.
            - Token ids: a .npy or .safetensors file of one array [S, T], or any value that
              `TokenBatch.from_ids` takes.
        tokenizer: A tokenizer of transformers, such as `model.tokenizer`. Token ids need none.
        num_samples: The number of windows, conversations or sequences. They are drawn without
            replacement and keep their order. By default 64 of a text, or all if it has fewer, and
            all sequences of token ids.
        seq_len: Tokens in a window, 2048 by default. Sequences of token ids and conversations are
            cut to this length.
        seed: Decides which samples are drawn.
        bos: Whether each window begins with the token that begins a text. None puts it there if the
            tokenizer puts one before a text. This token is never a target.
        column: The field of each row that holds the text; "text" by default.
        chat_template: The file of a chat template, or the name of one of the tokenizer's; by
            default the tokenizer's own.
        loss_on: The targets of a conversation: "completion" (the last answer) or "all".

    Returns:
        A row for each sample. `source` names the file or data set.

    Raises:
        InputError: The data is missing, empty or of another form, or has too few samples.

    Examples:
        >>> import fastprune as fp
        >>> from fastprune import demo
        >>> tokenizer = fp.load_model("demo").tokenizer
        >>> fp.load_text(demo.TEXT, tokenizer, num_samples=4, seq_len=64)
        TokenBatch(4 rows, 4 continuations, 256 tokens)
    """
    _check_count("num_samples", num_samples, 1)
    _check_count("seq_len", seq_len, 2)
    _check_count("seed", seed, 0)
    if bos is not None:
        check_kind("bos", bos, bool, "True, False or None")
    check_one_of("loss_on", loss_on, LOSS_ON)
    if isinstance(data, (str, os.PathLike)) and Path(data).suffix in ID_FILES:
        return _from_id_file(Path(data), num_samples, seq_len, seed)
    if _holds_ids(data):
        batch = _from_rows("token ids", to_rows(data), num_samples, seq_len, seed)
        return _named(batch, "token ids in memory")
    source = open_rows(data, "calibration", (*TEXT_FILES, *ID_FILES))
    if tokenizer is None:
        raise InputError(
            f"{source.name}: text needs a tokenizer, such as a model's own; without one, give "
            f"token ids (.npy)"
        )
    check_tokenizer(tokenizer)
    first = next(source.rows, None)
    if first is None:
        raise InputError(f"{source.name}: holds no text")
    rows = chain([first], source.rows)
    if column is None and is_chat(first.value) and "text" not in first.value:
        example = "".join(str(first.value.get(field, "")) for field in ("prompt", "completion"))
        encoder = ChatEncoder(Encoder(tokenizer, example), chat_template, loss_on)
        chats = [encoder.row(row.value, row.place) for row in rows]
        seq_len = seq_len or SEQ_LEN
        num_samples = num_samples or min(NUM_SAMPLES, len(chats))
        batch = _from_rows(source.name, chats, num_samples, seq_len, seed, tokenizer)
        return _named(batch, f"{source.name}, conversations, loss on {loss_on}")
    if chat_template is not None:
        raise InputError(
            f"chat_template is for rows of messages, or of prompt and completion, not for the text "
            f"of {source.name}",
            argument="chat_template",
        )
    texts = _read_texts(source.name, rows, column)
    batch = _from_texts(source.name, texts, tokenizer, num_samples, seq_len, seed, bos)
    return _named(batch, _described(source, first, column))


def load_tasks(data: Any, tokenizer: Any, limit: int | None = None, delimiter: str = " ") -> Tasks:
    """Load questions with choices.

    A row is {"prompt": str, "choices": [str, ...], "answer": index or letter}, or a row of ARC,
    MMLU or HellaSwag, worded as lm-evaluation-harness words it. Prompt, delimiter and choice are
    encoded together and split at the prompt's token count. Spaces at the prompt's end belong to the
    choice, as in the harness.

    Args:
        data: The data, in one of these forms.

            - A .jsonl, .json or .parquet file; .gz and .zst are decompressed.
            - The folder of a data set, or a data set of the hub as "NAME:CONFIG:SPLIT".
            - A `datasets.Dataset`, a DataFrame or a list of rows.
        tokenizer: A tokenizer of transformers, such as `model.tokenizer`.
        limit: The most questions to keep, from the first.
        delimiter: The text between prompt and choice, no part of the choice's length. A choice that
            begins with the delimiter loses it first. A row's own "delimiter" takes precedence.

    Returns:
        A row for each question, with a continuation for each choice.

    Raises:
        InputError: The data is missing or empty, or a row is wrong. The error names file, line and
            field.

    Examples:
        >>> import fastprune as fp
        >>> from fastprune import demo
        >>> tokenizer = fp.load_model("demo").tokenizer
        >>> fp.load_tasks(demo.QUESTIONS, tokenizer, limit=3).num_questions
        3
    """
    _check_count("limit", limit, 1)
    check_kind("delimiter", delimiter, str, 'text such as " "')
    source = open_rows(data, "task", TASK_FILES)
    if tokenizer is None:
        raise InputError(f"{source.name}: tasks need a tokenizer, such as a model's own")
    check_tokenizer(tokenizer)
    encoder: Encoder | None = None
    rows: list[list[tuple[np.ndarray, int]]] = []
    lengths: list[int] = []  # the number of choices of each question
    answer: list[int] = []
    texts: list[str] = []
    form = ""
    for place, value in islice(source.rows, limit):
        question, form = read_question(value, place)
        between = delimiter if question.delimiter is None else question.delimiter
        choices = [choice.removeprefix(between) for choice in question.choices]
        encoder = encoder or Encoder(tokenizer, f"{question.prompt}{choices[0]}")
        answer.append(len(texts) + question.answer)
        rows.append(
            [encoder.pair(question.prompt, f"{between}{choice}", place) for choice in choices]
        )
        lengths.append(len(choices))
        texts += choices
    if not rows:
        raise InputError(f"{source.name}: holds no questions")
    log.info("%s: the first %d questions", source.name, len(rows))
    tasks = Tasks(
        TokenBatch.from_continuations(rows),
        question=np.repeat(np.arange(len(rows)), lengths),
        answer=np.asarray(answer),
        choice_characters=np.array([len(text) for text in texts]),
        choice_bytes=np.array([len(text.encode()) for text in texts]),
    )
    own = form == "prompts"
    return _named(tasks, source.name if own else f"{source.name}, questions of the form {form}")


def _from_id_file(
    path: Path, num_samples: int | None, seq_len: int | None, seed: int
) -> TokenBatch:
    if not path.is_file():
        raise InputError(f"{path}: no such calibration file")
    ids = read_ids(path)
    if seq_len is not None and seq_len > ids.shape[1]:
        raise InputError(
            f"{path}: its sequences have {ids.shape[1]} tokens, fewer than the {seq_len} asked for",
            fits={"seq_len": ids.shape[1]},
        )
    drawn = _draw(str(path), "sequences", len(ids), num_samples or len(ids), seed)
    return _named(TokenBatch.from_ids(ids[drawn, :seq_len]), str(path))


def _from_rows(
    name: str,
    rows: Sequence[IdRow],
    num_samples: int | None,
    seq_len: int | None,
    seed: int,
    tokenizer: Any = None,
) -> TokenBatch:
    """Samples from separate rows: those with a target within seq_len tokens."""
    cut = [IdRow(ids[:seq_len], is_target[:seq_len]) for ids, is_target in rows]
    kept = [row for row in cut if row.is_target.any()]
    unit = "sequences" if seq_len is None else f"sequences with a target in {seq_len} tokens"
    if not kept:
        raise InputError(f"{name}: holds no {unit}")
    drawn = _draw(name, unit, len(kept), num_samples or len(kept), seed)
    return _to_batch([kept[i] for i in drawn], tokenizer)


def _from_texts(
    name: str,
    texts: Sequence[str],
    tokenizer: Any,
    num_samples: int | None,
    seq_len: int | None,
    seed: int,
    bos: bool | None,
) -> TokenBatch:
    """Samples from windows of a stream of texts."""
    seq_len = seq_len or SEQ_LEN
    encoder = Encoder(tokenizer, next(text for text in texts if text.strip()))
    begin = encoder.window_begin(bos)
    documents = encoder.documents(texts, name)
    stream = np.concatenate(documents)
    windows, ranges = _windows(stream, _places(documents, begin), begin, seq_len)
    num_samples = num_samples or max(1, min(NUM_SAMPLES, len(windows)))
    fits = {"num_samples": len(windows)} if windows else {}
    if len(stream) >= 2 * num_samples:
        fits["seq_len"] = len(stream) // num_samples
    longer = f"; what fits: a longer text (this one has {len(stream)} tokens)" if not fits else ""
    unit = f"windows of {seq_len} tokens"
    drawn = _draw(name, unit, len(windows), num_samples, seed, fits, longer)
    chosen = _in_short([ranges[i] for i in drawn])
    log.info("%s: the windows hold tokens %s of %d", name, chosen, len(stream))
    return _to_batch([windows[i] for i in drawn], tokenizer)


def _to_batch(rows: Sequence[IdRow], tokenizer: Any) -> TokenBatch:
    """A batch of rows.

    If the tokenizer decodes, the batch also counts the words and bytes of the targets' text.
    """
    batch = TokenBatch.from_ids(
        [
            {"input_ids": ids, "labels": np.where(is_target, ids, IGNORED_LABEL)}
            for ids, is_target in rows
        ]
    )
    if not hasattr(tokenizer, "batch_decode"):
        return batch
    texts = tokenizer.batch_decode(
        [row.ids[row.is_target] for row in rows],
        skip_special_tokens=True,
        clean_up_tokenization_spaces=False,
    )
    return replace(
        batch,
        row_words=np.array([len(text.split()) for text in texts]),
        row_bytes=np.array([len(text.encode()) for text in texts]),
    )


def _places(documents: Sequence[np.ndarray], begin: np.ndarray) -> np.ndarray:
    """Flags of the tokens that begin a document, over all joined documents, bool[T]."""
    size = len(begin)
    parts = []
    for ids in documents:
        part = np.zeros(len(ids), dtype=bool)
        part[:size] = np.array_equal(ids[:size], begin)
        parts.append(part)
    return np.concatenate(parts)


def _windows(
    stream: np.ndarray, begins: np.ndarray, begin: np.ndarray, seq_len: int
) -> tuple[list[IdRow], list[tuple[int, int]]]:
    """Windows of seq_len tokens that begin with `begin`, and the range of each in the stream.

    The first token of a window and the tokens of `begin` are never targets. `begin` may be empty.

    With begin = [0] and seq_len = 4, the stream 0 5 6 7 8 9 0 3 4 2 of two documents gives three
    windows: 0 5 6 7, 0 8 9 0 and 0 3 4 2. The third starts at a document, so it holds its 0
    already.
    """
    size = len(begin)
    if seq_len <= size:
        raise InputError(
            f"seq_len must be above the {size} tokens that begin a window, not {seq_len}",
            argument="seq_len",
            least=size + 1,
        )
    windows: list[IdRow] = []
    ranges: list[tuple[int, int]] = []
    place = 0
    while True:
        head = begins[place : place + size]  # a cut may leave a part of a document's beginning
        own = len(head) if head.all() else int(head.argmin())
        stop = place + seq_len - size + own
        if stop > len(stream):
            return windows, ranges
        ids = np.concatenate([begin, stream[place + own : stop]])
        inside = np.concatenate([np.ones(size, dtype=bool), begins[place + own : stop]])
        inside[0] = True
        if not inside.all():
            windows.append(IdRow(ids, ~inside))
            ranges.append((place, stop))
        place = stop


def _draw(
    name: str,
    unit: str,
    count: int,
    num_samples: int,
    seed: int,
    fits: Mapping[str, int] | None = None,
    longer: str = "",
) -> np.ndarray:
    """Draw num_samples of `count` samples: their indices, ascending."""
    if count < num_samples:
        raise InputError(
            f"{name}: holds {count} {unit}, but {num_samples} samples were asked for{longer}",
            fits={"num_samples": count} if fits is None else fits,
        )
    drawn = np.sort(np.random.default_rng(seed).choice(count, num_samples, replace=False))
    numbers = _in_short([(i, i + 1) for i in drawn.tolist()])
    if num_samples < count:
        which = f"drawn by seed {seed}: {numbers}"
        log.info("%s: %d of %d %s, %s", name, num_samples, count, unit, which)
    else:
        log.info("%s: all %d %s", name, count, unit)
    return drawn


def _in_short(ranges: Sequence[tuple[int, int]]) -> str:
    """Ascending ranges (start, stop) of integers, joined where they touch; of many, the first ones
    and the last.

    [(0, 2), (2, 4), (6, 7)] is "0-3, 6".
    """
    joined: list[tuple[int, int]] = []
    for start, stop in ranges:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    texts = [f"{a}-{b - 1}" if b - a > 1 else f"{a}" for a, b in joined]
    if len(texts) > MOST_SHOWN:
        texts = [*texts[: MOST_SHOWN - 1], "...", texts[-1]]
    return ", ".join(texts)


def _read_texts(name: str, rows: Iterator[Row], column: str | None) -> list[str]:
    """The texts of rows. A row is a dict, or the text itself."""
    texts = []
    for place, value in rows:
        text = value.get(column or "text") if isinstance(value, Mapping) else value
        if not isinstance(text, str) or (isinstance(value, str) and column is not None):
            raise _no_text(value, place, column)
        if text:
            texts.append(text)
    if not any(text.strip() for text in texts):
        raise InputError(f"{name}: holds no text")
    return texts


def _no_text(value: object, place: str, column: str | None) -> InputError:
    field = column or "text"
    start = f'{place}: expected a row like {{"{field}": "..."}}'
    if isinstance(value, (list, tuple)) and value and isinstance(value[0], Mapping):
        return InputError(f'{start}; a conversation is a row like {{"messages": [...]}}')
    if not isinstance(value, Mapping):
        return InputError(f"{start}, not {shown(value)}")
    if {"prompt", "choices"} <= set(value):
        return InputError(
            f"{start}; these are questions, for objectives such as margin and accuracy"
        )
    form = question_form(value)
    if form is not None and column is None:
        return InputError(
            f"{start}; these are questions of the form {form}, for objectives such as margin and "
            f"accuracy"
        )
    if field in value:
        return InputError(f"{start}; {field} must be text, not {shown(value[field])}")
    named = ", ".join(map(str, value)) or "none"
    lengths = {str(key): len(item) for key, item in value.items() if isinstance(item, str)}
    fits = {"column": max(lengths, key=lambda key: lengths[key])} if lengths else {}
    return InputError(f"{start}; its fields are {named}", fits=fits)


def _described(source: Source, first: Row, column: str | None) -> str:
    """The name of the data, with the column unless the form implies it."""
    plain = not isinstance(first.value, Mapping) or source.name.endswith((".txt", ".jsonl"))
    return source.name if plain and column is None else f"{source.name}, column {column or 'text'}"


def _holds_ids(data: Any) -> bool:
    """Whether a Python value holds token ids."""
    if isinstance(data, Mapping):
        return "input_ids" in data
    if hasattr(data, "column_names"):
        return "input_ids" in (data.column_names or ())
    if isinstance(data, (list, tuple)):
        first = data[0] if data else None
        is_chat_list = isinstance(first, (list, tuple)) and any(
            isinstance(item, Mapping) for item in first[:1]
        )
        return (isinstance(first, (list, tuple)) and not is_chat_list) or _holds_ids(first)
    return len(getattr(data, "shape", ())) == 2 and not hasattr(data, "columns")


def _named(data: Any, source: str) -> Any:
    object.__setattr__(data, "source", source)  # the class is frozen; nobody holds the value yet
    return data


def _check_count(name: str, value: Any, least: int) -> None:
    if value is not None:
        check_integer(name, value, least, MOST_COUNT)
