"""Text and questions from files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError, shown
from ..io import read_jsonl, read_npy
from ..validate import check_callable, check_integer, check_kind, is_integer, tokenizing
from .tokens import Tasks, TokenBatch

MOST_COUNT = 2**63 - 1


def load_text(
    path: str | os.PathLike,
    tokenizer: Any = None,
    num_samples: int | None = None,
    seq_len: int | None = None,
    seed: int = 0,
) -> TokenBatch:
    """Calibration text as `num_samples` sequences of `seq_len` tokens (64 of 2048, or all that a
    text has).

    path: .txt, or .jsonl of rows {"text": ...}: documents are encoded (special tokens as the
        tokenizer adds them), joined in order, cut into windows of seq_len, and num_samples windows
        are drawn without replacement by `seed`, kept in file order.
    path: .npy or .safetensors (one tensor) of token ids [S, T]: used as they are; num_samples then
        draws rows and seq_len keeps the first tokens of each, by default all.
    tokenizer: a tokenizer of transformers, such as a model's own; not needed for token ids. Raises
    InputError for a missing or empty file, and when there are fewer windows or tokens than asked
    for.

    >>> import fastprune as fp
    >>> from fastprune import demo
    >>> fp.load_text(demo.TEXT, fp.load_model("demo").tokenizer, num_samples=4, seq_len=64)
    TokenBatch(4 rows, 4 continuations, 256 tokens)
    """
    path = _check_path(path)
    _check_count("num_samples", num_samples, 1)
    _check_count("seq_len", seq_len, 2)
    _check_count("seed", seed, 0)
    if not path.is_file():
        raise InputError(f"{path}: no such calibration file")
    longer = ""
    if path.suffix in (".npy", ".safetensors"):
        ids = _read_ids(path)
        if seq_len is not None and seq_len > ids.shape[1]:
            raise InputError(
                f"{path}: its sequences have {ids.shape[1]} tokens, fewer than the {seq_len} asked "
                f"for",
                fits={"seq_len": ids.shape[1]},
            )
        windows, unit = ids[:, :seq_len], "sequences"
        num_samples = len(windows) if num_samples is None else num_samples
        fits = {"num_samples": len(windows)}
    elif path.suffix in (".txt", ".jsonl"):
        if tokenizer is None:
            raise InputError(
                f"{path}: text needs a tokenizer, such as a model's own; without one, give token "
                f"ids (.npy)"
            )
        _check_tokenizer(tokenizer)
        seq_len = seq_len or 2048
        documents = _read_documents(path)
        with tokenizing(path):
            encoded = tokenizer(documents, return_attention_mask=False, verbose=False)["input_ids"]
        stream = np.concatenate([np.asarray(ids, dtype=np.int64) for ids in encoded])
        windows = stream[: len(stream) // seq_len * seq_len].reshape(-1, seq_len)
        unit = f"windows of {seq_len} tokens"
        num_samples = num_samples or max(1, min(64, len(windows)))
        fits = {"num_samples": len(windows)} if len(windows) else {}
        if len(stream) >= 2 * num_samples:
            fits["seq_len"] = len(stream) // num_samples
        if not fits:
            longer = f"; what fits: a longer text (this one has {len(stream)} tokens)"
    else:
        raise InputError(
            f"{path}: calibration text is read from .txt, .jsonl, .npy or .safetensors files"
        )
    if len(windows) < num_samples:
        raise InputError(
            f"{path}: holds {len(windows)} {unit}, but {num_samples} samples were asked "
            f"for{longer}",
            fits=fits,
        )
    drawn = np.sort(np.random.default_rng(seed).choice(len(windows), num_samples, replace=False))
    return TokenBatch.from_ids(windows[drawn])


def load_tasks(path: str | os.PathLike, tokenizer: Any, limit: int | None = None) -> Tasks:
    """Questions from a .jsonl file of rows {"prompt": str, "choices": [str, ...], "answer": index}.

    Prompt and choice are encoded together and split at the prompt's token count; trailing spaces of
    the prompt count to the choice (as lm-evaluation-harness does). `limit` keeps the first
    questions at most.
    tokenizer: a tokenizer of transformers, such as a model's own. Raises InputError naming file and
    line for a row without choices, an answer out of range, and the like.

    >>> import fastprune as fp
    >>> from fastprune import demo
    >>> fp.load_tasks(demo.QUESTIONS, fp.load_model("demo").tokenizer, limit=3).num_questions
    3
    """
    path = _check_path(path)
    _check_count("limit", limit, 1)
    if not path.is_file():
        raise InputError(f"{path}: no such task file")
    if path.suffix != ".jsonl":
        raise InputError(f"{path}: tasks are read from .jsonl files")
    if tokenizer is None:
        raise InputError(f"{path}: tasks need a tokenizer, such as a model's own")
    _check_tokenizer(tokenizer)
    rows: list[list[tuple[np.ndarray, int]]] = []
    question: list[int] = []
    answer: list[int] = []
    characters: list[int] = []
    in_bytes: list[int] = []
    for number, row in read_jsonl(path):
        if limit is not None and len(rows) == limit:
            break
        prompt, choices, correct = _check_task(row, f"{path}:{number}")
        answer.append(len(question) + correct)
        place = f"{path}:{number}"
        with tokenizing(place):
            rows.append([_encode_choice(tokenizer, prompt, choice, place) for choice in choices])
        question += [len(rows) - 1] * len(choices)
        characters += [len(choice) for choice in choices]
        in_bytes += [len(choice.encode()) for choice in choices]
    if not rows:
        raise InputError(f"{path}: holds no questions")
    arrays = map(np.asarray, (question, answer, characters, in_bytes))
    return Tasks(TokenBatch.from_continuations(rows), *arrays)


def _check_task(row: Any, place: str) -> tuple[str, list[str], int]:
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise InputError(
            f'{place}: expected a row like {{"prompt": "...", "choices": ["...", "..."], '
            f'"answer": 0}}'
        )
    choices, correct = row.get("choices"), row.get("answer")
    if (
        not isinstance(choices, list)
        or not choices
        or not all(isinstance(c, str) and c.strip() for c in choices)
    ):
        raise InputError(f"{place}: choices must be a list of strings that are not empty")
    if len(choices) < 2:
        raise InputError(f"{place}: a question needs at least 2 choices, not {len(choices)}")
    if not is_integer(correct) or not 0 <= correct < len(choices):
        raise InputError(
            f"{place}: answer must be the index of a choice, 0 to {len(choices) - 1}, not "
            f"{shown(correct)}"
        )
    return row["prompt"], choices, correct


def _encode_choice(tokenizer: Any, prompt: str, choice: str, place: str) -> tuple[np.ndarray, int]:
    """Token ids of prompt and choice together, and where the choice begins."""
    stripped = prompt.rstrip()
    choice = prompt[len(stripped) :] + choice
    whole = np.asarray(tokenizer(stripped + choice, verbose=False)["input_ids"], dtype=np.int64)
    start = len(tokenizer(stripped, verbose=False)["input_ids"])
    if start == 0:
        raise InputError(
            f"{place}: the prompt is empty and the tokenizer adds no token before the choice"
        )
    if start >= len(whole):
        raise InputError(
            f"{place}: the choice {shown(choice)} adds no token of its own after the prompt"
        )
    return whole, start


def _read_documents(path: Path) -> list[str]:
    if path.suffix == ".txt":
        try:
            documents = [path.read_text(encoding="utf-8-sig")]
        except UnicodeDecodeError:
            raise InputError(f"{path}: not a text file in UTF-8") from None
    else:
        documents = []
        for number, row in read_jsonl(path):
            if not isinstance(row, dict) or not isinstance(row.get("text"), str):
                questions = isinstance(row, dict) and {"prompt", "choices"} <= set(row)
                hint = (
                    "; these are questions, for objectives such as margin and accuracy" * questions
                )
                raise InputError(f'{path}:{number}: expected a row like {{"text": "..."}}{hint}')
            documents.append(row["text"])
    if not any(document.strip() for document in documents):
        raise InputError(f"{path}: holds no text")
    return documents


def _read_ids(path: Path) -> np.ndarray:
    """Token ids int64[S, T] from a .npy file or a .safetensors file of one tensor."""
    if path.suffix == ".npy":
        ids = read_npy(path)
    else:
        from safetensors.numpy import load_file

        try:
            tensors = load_file(path)
        except Exception:
            raise InputError(f"{path}: not a readable .safetensors file") from None
        if len(tensors) != 1:
            raise InputError(f"{path}: expected one tensor of token ids, found {len(tensors)}")
        (ids,) = tensors.values()
    if ids.ndim != 2 or ids.dtype.kind not in "iu":
        raise InputError(
            f"{path}: token ids must be an integer array [S, T], not {ids.dtype} {list(ids.shape)}"
        )
    if ids.size == 0:
        raise InputError(f"{path}: holds no token ids")
    return ids.astype(np.int64)


def _check_path(path: object) -> Path:
    path = os.fspath(path) if isinstance(path, os.PathLike) else path
    return Path(check_kind("path", path, str, "that of a file"))


def _check_tokenizer(tokenizer: object) -> None:
    check_callable("tokenizer", tokenizer, "one of transformers, such as model.tokenizer")


def _check_count(name: str, value: Any, least: int) -> None:
    if value is not None:
        check_integer(name, value, least, MOST_COUNT)
