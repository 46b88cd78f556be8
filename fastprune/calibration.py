"""Calibration data: trees of tokens, the text and task loaders that make them, and a hash of their content."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path

import numpy as np

from .errors import InputError
from .records import read_jsonl, read_npy, shown


@dataclass(frozen=True)
class TokenBatch:
    """Rows of tokens, each a tree: a trunk, then branches that see the trunk and themselves but not each other.

    Plain text is a trunk without branches. The answers to one question share the question as their trunk, so it
    is run once. All arrays are int64; rows stand one after the other, whatever their lengths (R rows, C
    continuations, M targets, T tokens in all).

    ids, positions, branch [T]: token id, position in its own sequence, branch in its row (0 = trunk).
    row_starts [R + 1]: where each row begins in them.
    target_source, target_token, target_continuation [M]: a target is a token whose probability counts: the state
        at `target_source` predicts `target_token`, for continuation `target_continuation`.
    continuation_row [C]: the row of each continuation (a text row has one, a question one per choice).
    """

    ids: np.ndarray
    positions: np.ndarray
    branch: np.ndarray
    row_starts: np.ndarray
    target_source: np.ndarray
    target_token: np.ndarray
    target_continuation: np.ndarray
    continuation_row: np.ndarray

    @classmethod
    def from_ids(cls, ids) -> TokenBatch:
        """Plain text from token ids: an int array [S, T], or S sequences of ints whose lengths may differ.

        Every token but the first of its sequence is a target. Raises InputError when there are no sequences, or
        one has fewer than 2 tokens.

        >>> batch = TokenBatch.from_ids([[5, 6, 7], [5, 8]])
        >>> batch.num_rows, batch.num_tokens, batch.target_token.tolist()
        (2, 5, [6, 7, 8])
        """
        rows = [_as_ids(row, f"sequence {i}") for i, row in enumerate(_to_numpy(ids))]
        for i, row in enumerate(rows):
            if len(row) < 2:
                raise InputError(f"sequence {i} has {len(row)} tokens; at least 2 are needed to predict one")
        return cls.from_continuations([[(row, 1)] for row in rows])

    @classmethod
    def from_continuations(cls, rows: Sequence[Sequence[tuple[Sequence[int], int]]]) -> TokenBatch:
        """One tree per row from its sequences: (token ids, start), where the tokens from `start` on are targets.

        The trunk is the longest common prefix of a row's sequences; each sequence's remainder is a branch.
        Raises InputError when there are no rows, or a sequence has no token before or none after its start.

        >>> question = [(np.array([1, 2, 3, 7]), 3), (np.array([1, 2, 3, 8, 9]), 3)]
        >>> batch = TokenBatch.from_continuations([question])
        >>> batch.ids.tolist(), batch.branch.tolist()
        ([1, 2, 3, 7, 8, 9], [0, 0, 0, 1, 2, 2])
        """
        for r, sequences in enumerate(rows):
            for sequence, start in sequences:
                if not 1 <= start < len(sequence):
                    raise InputError(f"row {r}: a continuation needs a token before it and one of its own")
        return cls._from_trees([[(ids, start - 1, ids[start:]) for ids, start in sequences] for sequences in rows])

    @classmethod
    def from_predictions(cls, rows: Sequence[Sequence[tuple[Sequence[int], Sequence[int]]]]) -> TokenBatch:
        """One tree per row from its sequences: (token ids, targets), where the last ids predict the targets.

        What `from_continuations` makes of ids + targets[-1:], without running the last target, whose state predicts
        nothing: choices of one token each are one row without branches.
        """
        for r, sequences in enumerate(rows):
            for ids, targets in sequences:
                if not 1 <= len(targets) <= len(ids):
                    raise InputError(f"row {r}: {len(targets)} targets cannot be predicted by {len(ids)} tokens")
        return cls._from_trees([[(ids, len(ids) - len(t), t) for ids, t in sequences] for sequences in rows])

    @classmethod
    def _from_trees(cls, rows: Sequence[Sequence[tuple[Sequence[int], int, Sequence[int]]]]) -> TokenBatch:
        """One tree per row from its sequences: (token ids, first, targets), targets predicted at `first` and on."""
        if not rows:
            raise InputError("the calibration set is empty")
        ids, positions, branch, row_starts = [], [], [], [0]
        sources, tokens, continuations, continuation_row = [], [], [], []
        for r, sequences in enumerate(rows):
            trunk = common_prefix([s for s, *_ in sequences])
            base = row_starts[-1]
            row_ids, row_positions, row_branch = [sequences[0][0][:trunk]], [np.arange(trunk)], [np.zeros(trunk)]
            length = trunk
            for number, (sequence, first, targets) in enumerate(sequences, 1):
                tail = len(sequence) - trunk
                # where each token of this sequence lies in the row
                place = base + np.concatenate([np.arange(trunk), length + np.arange(tail)])
                sources.append(place[first : first + len(targets)])
                tokens.append(targets)
                continuations.append(np.full(len(targets), len(continuation_row)))
                continuation_row.append(r)
                row_ids.append(sequence[trunk:])
                row_positions.append(np.arange(trunk, len(sequence)))
                row_branch.append(np.full(tail, number))
                length += tail
            ids += row_ids
            positions += row_positions
            branch += row_branch
            row_starts.append(base + length)
        flat = [np.concatenate(part).astype(np.int64) for part in (ids, positions, branch)]
        targets = [np.concatenate(part).astype(np.int64) for part in (sources, tokens, continuations)]
        return cls(*flat, np.asarray(row_starts), *targets, np.asarray(continuation_row))

    @property
    def num_rows(self) -> int:
        return len(self.row_starts) - 1

    @property
    def num_tokens(self) -> int:
        return len(self.ids)

    @property
    def num_continuations(self) -> int:
        return len(self.continuation_row)

    @cached_property
    def row_lengths(self) -> np.ndarray:
        """Tokens of each row, int64[R]."""
        return np.diff(self.row_starts)

    @cached_property
    def target_counts(self) -> np.ndarray:
        """Targets of each continuation, int64[C]."""
        return np.bincount(self.target_continuation, minlength=self.num_continuations)

    @cached_property
    def row_is_tree(self) -> np.ndarray:
        """Whether each row has branches that must not see each other, bool[R]."""
        return np.maximum.reduceat(self.branch, self.row_starts[:-1]) > 0

    @cached_property
    def targets_by_row(self) -> list[np.ndarray]:
        """The targets of each row, in the order of their sources: R arrays of indices into the target arrays."""
        order = np.argsort(self.target_source, kind="stable")
        return np.split(order, np.searchsorted(self.target_source[order], self.row_starts[1:-1]))

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 of every array: equal for equal calibration data, whatever file it came from."""
        digest = hashlib.sha256()
        for item in fields(self):
            array = np.ascontiguousarray(getattr(self, item.name), dtype="<i8")
            digest.update(f"{item.name}{array.shape}".encode())
            digest.update(array.tobytes())
        return digest.hexdigest()

    def check_fits(self, vocab_size: int, max_positions: int | None) -> None:
        """Raise InputError for a token id outside the vocabulary or a sequence longer than the model's positions."""
        for name, ids in (("token", self.ids), ("target", self.target_token)):
            wrong = np.flatnonzero((ids < 0) | (ids >= vocab_size))
            if len(wrong):
                raise InputError(f"{name} id {ids[wrong[0]]} is outside the model's vocabulary (0 to {vocab_size - 1})")
        longest = int(self.positions.max()) + 1
        if max_positions is not None and longest > max_positions:
            raise InputError(f"a sequence of {longest} tokens is longer than the model's {max_positions} positions")


@dataclass(frozen=True)
class Tasks:
    """Multiple-choice questions as token trees: one row per question, one continuation per choice.

    question [C]: the question of each choice, ascending. answer [Q]: the continuation of each correct choice.
    choice_characters, choice_bytes [C]: length of each choice's text as given, leading spaces included, in
        characters and in UTF-8 bytes, for length-normalised accuracy.
    """

    batch: TokenBatch
    question: np.ndarray
    answer: np.ndarray
    choice_characters: np.ndarray = field(repr=False)
    choice_bytes: np.ndarray = field(repr=False)

    @property
    def num_questions(self) -> int:
        return len(self.answer)

    @cached_property
    def content_hash(self) -> str:
        digest = hashlib.sha256(self.batch.content_hash.encode())
        for array in (self.question, self.answer, self.choice_characters, self.choice_bytes):
            digest.update(np.ascontiguousarray(array, dtype="<i8").tobytes())
        return digest.hexdigest()


def load_text(
    path: str | os.PathLike,
    tokenizer=None,
    num_samples: int | None = None,
    seq_len: int | None = None,
    seed: int = 0,
) -> TokenBatch:
    """Calibration text as `num_samples` sequences of `seq_len` tokens (64 and 2048 by default).

    path: .txt, or .jsonl of rows {"text": ...}: documents are encoded (special tokens as the tokenizer adds them),
        joined in order, cut into windows of seq_len, and num_samples windows are drawn without replacement by
        `seed`, kept in file order.
    path: .npy or .safetensors (one tensor) of token ids [S, T]: used as they are; num_samples then draws rows and
        seq_len keeps the first tokens of each, by default all.
    Raises InputError for a missing or empty file, and when there are fewer windows or tokens than asked for.
    """
    path = Path(path)
    _check_count("num_samples", num_samples, 1)
    _check_count("seq_len", seq_len, 2)
    _check_count("seed", seed, 0)
    if not path.is_file():
        raise InputError(f"{path}: no such calibration file")
    if path.suffix in (".npy", ".safetensors"):
        ids = _read_ids(path)
        if seq_len is not None and seq_len > ids.shape[1]:
            raise InputError(f"{path}: its sequences have {ids.shape[1]} tokens, but seq_len is {seq_len}")
        windows, unit = ids[:, :seq_len], "sequences"
        num_samples = len(windows) if num_samples is None else num_samples
        fits = [f"num_samples={len(windows)}"]
    elif path.suffix in (".txt", ".jsonl"):
        if tokenizer is None:
            raise InputError(f"{path}: text needs a tokenizer, and the model has none; give token ids (.npy) instead")
        seq_len, num_samples = seq_len or 2048, num_samples or 64
        documents = _read_documents(path)
        encoded = tokenizer(documents, return_attention_mask=False, verbose=False)["input_ids"]
        stream = np.concatenate([np.asarray(ids, dtype=np.int64) for ids in encoded])
        windows = stream[: len(stream) // seq_len * seq_len].reshape(-1, seq_len)
        unit = f"windows of {seq_len} tokens"
        fits = [f"num_samples={len(windows)}"] * (len(windows) > 0)
        fits += [f"seq_len={len(stream) // num_samples}"] * (len(stream) >= 2 * num_samples)
        fits = fits or [f"a longer text (this one has {len(stream)} tokens)"]
    else:
        raise InputError(f"{path}: calibration text is read from .txt, .jsonl, .npy or .safetensors files")
    if len(windows) < num_samples:
        raise InputError(
            f"{path}: holds {len(windows)} {unit}, but {num_samples} samples were asked for; "
            f"what fits: {' or '.join(fits)}"
        )
    drawn = np.sort(np.random.default_rng(seed).choice(len(windows), num_samples, replace=False))
    return TokenBatch.from_ids(windows[drawn])


def load_tasks(path: str | os.PathLike, tokenizer, limit: int | None = None) -> Tasks:
    """Questions from a .jsonl file of rows {"prompt": str, "choices": [str, ...], "answer": index}.

    Prompt and choice are encoded together and split at the prompt's token count; trailing spaces of the prompt
    count to the choice (as lm-evaluation-harness does). `limit` keeps the first questions.
    Raises InputError naming file and line for a row without choices, an answer out of range, and the like.
    """
    path = Path(path)
    _check_count("limit", limit, 1)
    if not path.is_file():
        raise InputError(f"{path}: no such task file")
    if path.suffix != ".jsonl":
        raise InputError(f"{path}: tasks are read from .jsonl files")
    if tokenizer is None:
        raise InputError(f"{path}: tasks need a tokenizer, and the model has none")
    rows, question, answer, characters, in_bytes = [], [], [], [], []
    for number, row in read_jsonl(path):
        if limit is not None and len(rows) == limit:
            break
        prompt, choices, correct = _check_task(row, f"{path}:{number}")
        answer.append(len(question) + correct)
        rows.append([_encode_choice(tokenizer, prompt, choice, f"{path}:{number}") for choice in choices])
        question += [len(rows) - 1] * len(choices)
        characters += [len(choice) for choice in choices]
        in_bytes += [len(choice.encode()) for choice in choices]
    if not rows:
        raise InputError(f"{path}: holds no questions")
    arrays = map(np.asarray, (question, answer, characters, in_bytes))
    return Tasks(TokenBatch.from_continuations(rows), *arrays)


def _check_task(row, place: str) -> tuple[str, list[str], int]:
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise InputError(f'{place}: expected a row like {{"prompt": "...", "choices": ["...", "..."], "answer": 0}}')
    choices, correct = row.get("choices"), row.get("answer")
    if not isinstance(choices, list) or not choices or not all(isinstance(c, str) and c.strip() for c in choices):
        raise InputError(f"{place}: choices must be a list of strings that are not empty")
    if len(choices) < 2:
        raise InputError(f"{place}: a question needs at least 2 choices, not {len(choices)}")
    if isinstance(correct, bool) or not isinstance(correct, int) or not 0 <= correct < len(choices):
        raise InputError(
            f"{place}: answer must be the index of a choice, 0 to {len(choices) - 1}, not {shown(correct)}"
        )
    return row["prompt"], choices, correct


def _encode_choice(tokenizer, prompt: str, choice: str, place: str) -> tuple[np.ndarray, int]:
    """Token ids of prompt and choice together, and where the choice begins."""
    stripped = prompt.rstrip()
    choice = prompt[len(stripped) :] + choice
    whole = np.asarray(tokenizer(stripped + choice, verbose=False)["input_ids"], dtype=np.int64)
    start = len(tokenizer(stripped, verbose=False)["input_ids"])
    if start == 0:
        raise InputError(f"{place}: the prompt is empty and the tokenizer adds no token before the choice")
    if start >= len(whole):
        raise InputError(f"{place}: the choice {shown(choice)} adds no token of its own after the prompt")
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
                raise InputError(f'{path}:{number}: expected a row like {{"text": "..."}}')
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
        raise InputError(f"{path}: token ids must be an integer array [S, T], not {ids.dtype} {list(ids.shape)}")
    if ids.size == 0:
        raise InputError(f"{path}: holds no token ids")
    return ids.astype(np.int64)


def _as_ids(row, name: str) -> np.ndarray:
    array = np.asarray(row)
    if array.ndim != 1 or (array.dtype.kind not in "iu" and array.size):
        raise InputError(f"{name} must be integer token ids, not {array.dtype} {list(array.shape)}")
    return array.astype(np.int64)


def _to_numpy(ids) -> Iterable:
    if hasattr(ids, "detach"):
        ids = ids.detach().cpu().numpy()
    if isinstance(ids, np.ndarray) and ids.ndim != 2:
        raise InputError(f"token ids must have shape [S, T], not {list(ids.shape)}")
    if not isinstance(ids, Iterable):
        raise InputError(f"token ids must be an array [S, T] or a list of sequences, not {shown(ids)}")
    ids = list(ids)
    if ids and all(isinstance(row, (int, np.integer)) for row in ids):
        raise InputError("token ids must be an array [S, T] or a list of sequences; for one sequence, pass [ids]")
    return ids


def common_prefix(sequences: Sequence[np.ndarray]) -> int:
    """Length of the longest prefix that all sequences share."""
    shortest = min(map(len, sequences))
    stacked = np.stack([sequence[:shortest] for sequence in sequences])
    differs = (stacked != stacked[0]).any(axis=0)
    return int(differs.argmax()) if differs.any() else shortest


def _check_count(name: str, value, least: int) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least):
        raise InputError(f"{name} must be an integer of at least {least}, not {shown(value)}")
    if value is not None and value >= 2**63:
        raise InputError(f"{name} must be less than 2**63, not {shown(value)}")
